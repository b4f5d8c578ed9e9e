"""Where prompts were routed: rates from the rows of any method whose memory picks who answers.

A routed row says in `route` which edit answered its prompt (`edit_id`, None for the unedited
model) and how well the best stored key fits (`match`). Rows without it count nowhere.

    self_match          edited prompts that their own edit answers
    self_wrong          edited prompts that another edit answers
    self_rejected       edited prompts that the unedited model answers
    right_route         other wordings of them that their own edit answers
    wrong_route         other wordings of them that another edit answers
    rejected            other wordings of them that the unedited model answers
    false_activations   prompts to be left alone that some edit answers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from editkit.metrics.intervals import Estimate, estimate


def routed(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[int | None]]]:
    """Return what counts for each rate, 1 or 0, and the edits; kinds not asked are left out."""
    found: dict[str, tuple[list[float], list[int | None]]] = {}
    for row in rows:
        if "route" not in row:
            continue
        answerer, own = row["route"]["edit_id"], row["edit_id"]
        hits = {
            "reliability": {
                "self_match": answerer == own,
                "self_wrong": answerer not in (None, own),
                "self_rejected": answerer is None,
            },
            "generalization": {
                "right_route": answerer == own,
                "wrong_route": answerer not in (None, own),
                "rejected": answerer is None,
            },
            "locality": {"false_activations": answerer is not None},
        }
        for name, hit in hits.get(row["kind"], {}).items():
            values, edits = found.setdefault(name, ([], []))
            values.append(float(hit))
            edits.append(own)
    return found


def routing_rates(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the rates alone."""
    return {name: sum(values) / len(values) for name, (values, _) in routed(rows).items()}


def routing_table(rows: Iterable[Mapping[str, Any]], seed: int = 0) -> dict[str, Estimate]:
    """Return the rates with their intervals; empty where nothing is routed."""
    return {name: estimate(*found, seed) for name, found in routed(rows).items()}
