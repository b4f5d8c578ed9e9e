"""From rows to `summary.json`: final scores, scores right after each edit, and scores by age.

A line of `probes.jsonl` is a row of `editkit.metrics.evaluate` with its moment:

    moment      immediate (right after its own edit), milestone (on the way) or final
    edits_seen  edits applied when it was scored
    probe_id, edit_id, kind, axis, group, prompt, target, rival     as the probe has them; a probe
                of kind locality with a gold target leaves two rows, locality and locality_gold
    relation    relation of the edited fact; empty where the data has none
    scores      scorer: value, of the scorers that the probe has data for; {} where not counted
    answer      what the model said, cut; null where nothing was decoded
    reference   what the unedited model said; null on rows that are not compared with it
    counted     whether the probe's conditions hold for the unedited model
    route       which edit answered and how well its key fits; only of routed methods

`summary.json` holds, every estimate being {value, low, high, n, edits}:

    method, base, edits_seen, seconds_per_edit, peak_memory_bytes, perplexity {before, after}
    scores      kind: scorer: estimate over the final rows that count
    score       harmonic mean of `pair` on reliability, generalization and locality_gold, which
                is CounterFact's score of efficacy, generalization and specificity; null without
    axes        kind: axis: scorer: estimate
    immediate   kind: scorer: estimate over the rows scored right after their own edit
    by_age      [{age: [from, to], edits, scores}], newest first
    routing     rate: estimate over the final rows, where a memory picks who answers
                (`editkit.metrics.routing`); empty elsewhere
    loop        name: number, what a method that checks and mends itself counted; else missing
    uncounted   kind: rows left out
    protocol    how rows were scored, and what a run is stamped with

Rows of one group are one question in several wordings: under a scorer of 1 or 0 they count once,
as the best of them (MQuAKE's multi-hop hit rate).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from editkit.metrics.evaluate import ProbeRow
from editkit.metrics.intervals import Estimate, estimate, estimate_harmonic
from editkit.metrics.protocol import HIT_SCORERS, ROW_KINDS, SCORERS, EvalProtocol
from editkit.metrics.routing import routing_table

AGE_BUCKETS = 10
COUNTERFACT_KINDS = ("reliability", "generalization", "locality_gold")

Table = dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class RunFacts:
    """What a summary states beside scores.

    Args:
        method: Name of the method.
        base: Id of the base model.
        edits_seen: Edits applied.
        perplexity_before: On held-out text, of the unedited model; None where not measured.
        perplexity_after: On the same text at the end.
        seconds_per_edit: Wall-clock mean of applying one edit.
        peak_memory_bytes: Largest memory held while editing.
    """

    method: str
    base: str
    edits_seen: int
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    seconds_per_edit: float | None = None
    peak_memory_bytes: int | None = None


def summarise(
    final: Sequence[ProbeRow],
    immediate: Sequence[ProbeRow],
    facts: RunFacts,
    protocol: EvalProtocol,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the content of `summary.json`.

    Args:
        final: Rows of the model after the whole stream.
        immediate: Rows that were scored right after their own edit; may be empty.
        facts: What else the run says of itself.
        protocol: How the rows were scored.
        seed: Seed of the intervals.
    """
    axes = {
        kind: {
            axis: scores
            for axis in sorted({row["axis"] for row in final if row["kind"] == kind} - {""})
            if (scores := score_table(_of_axis(final, kind, axis), seed).get(kind))
        }
        for kind in ROW_KINDS
    }
    return {
        "method": facts.method,
        "base": facts.base,
        "edits_seen": facts.edits_seen,
        "scores": score_table(final, seed),
        "score": counterfact_score(final, seed),
        "axes": {kind: named for kind, named in axes.items() if named},
        "immediate": score_table(immediate, seed),
        "by_age": by_age(final, facts.edits_seen, seed),
        "perplexity": {"before": facts.perplexity_before, "after": facts.perplexity_after},
        "seconds_per_edit": facts.seconds_per_edit,
        "peak_memory_bytes": facts.peak_memory_bytes,
        "routing": routing_table(final, seed),
        "uncounted": dict(Counter(row["kind"] for row in final if not row["counted"])),
        "protocol": protocol.describe(),
    }


def score_table(rows: Iterable[ProbeRow], seed: int = 0) -> Table:
    """Return an estimate by kind and scorer over the rows that count, a group counting once."""
    values = score_values(rows)
    table: Table = {}
    for kind in ROW_KINDS:
        for scorer in SCORERS:
            if found := values.get((kind, scorer)):
                table.setdefault(kind, {})[scorer] = estimate(*found, seed)
    return table


def score_values(
    rows: Iterable[ProbeRow],
) -> dict[tuple[str, str], tuple[list[float], list[int | None]]]:
    """Return the scores that count and their edits, by kind and scorer."""
    values: dict[tuple[str, str], tuple[list[float], list[int | None]]] = {}
    places: dict[tuple[object, ...], int] = {}
    for row in rows:
        for scorer, value in row["scores"].items() if row["counted"] else ():
            found, edits = values.setdefault((row["kind"], scorer), ([], []))
            if row.get("group") and scorer in HIT_SCORERS:
                name = (row["kind"], scorer, row["edit_id"], row["group"])
                place = places.setdefault(name, len(found))
                if place < len(found):
                    found[place] = max(found[place], value)
                    continue
            found.append(value)
            edits.append(row["edit_id"])
    return values


def counterfact_score(rows: Iterable[ProbeRow], seed: int = 0) -> Estimate | None:
    """Return the harmonic mean of efficacy, generalization and specificity; None without rivals."""
    values = score_values(rows)
    parts = [values.get((kind, "pair")) for kind in COUNTERFACT_KINDS]
    whole = [part for part in parts if part is not None]
    return estimate_harmonic(whole, seed) if len(whole) == len(parts) else None


def by_age(
    rows: Sequence[ProbeRow], edits_seen: int, seed: int = 0, buckets: int = AGE_BUCKETS
) -> list[dict[str, Any]]:
    """Return scores by how many edits came after, newest first, in buckets of like many edits.

    Age 0 is the edit applied last. Rows without an edit have no age.

    Args:
        rows: Final rows.
        edits_seen: Edits applied when the rows were scored.
        seed: Seed of the intervals.
        buckets: Number of buckets at most.

    Raises:
        ValueError: If a row is of an edit that was not applied.
    """
    aged = [(edits_seen - 1 - row["edit_id"], row) for row in rows if row["edit_id"] is not None]
    ages = sorted({age for age, _ in aged})
    if ages and ages[0] < 0:
        newest = edits_seen - 1 - ages[0]
        raise ValueError(f"a row is of edit {newest}, but only {edits_seen} edits were applied")
    curve = []
    for part in np.array_split(ages, min(buckets, len(ages)) or 1):
        if len(part):
            low, high = int(part[0]), int(part[-1])
            scores = score_table((row for age, row in aged if low <= age <= high), seed)
            curve.append({"age": [low, high], "edits": len(part), "scores": scores})
    return curve


def write_json(path: str | Path, obj: Any) -> None:
    """Write an object as JSON under a temporary name, then rename: never half a file.

    Raises:
        ValueError: If the object holds nan or inf, which JSON has no word for.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _of_axis(rows: Iterable[ProbeRow], kind: str, axis: str) -> list[ProbeRow]:
    """Return the rows of one kind and axis."""
    return [row for row in rows if row["kind"] == kind and row["axis"] == axis]
