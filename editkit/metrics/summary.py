"""From rows to `summary.json`: final scores, scores right after each edit, and scores by age."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from editkit.metrics.evaluate import ProbeRow
from editkit.metrics.intervals import Estimate, estimate
from editkit.metrics.protocol import ROW_KINDS, SCORERS, EvalProtocol

AGE_BUCKETS = 10

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
        "axes": {kind: named for kind, named in axes.items() if named},
        "immediate": score_table(immediate, seed),
        "by_age": by_age(final, facts.edits_seen, seed),
        "perplexity": {"before": facts.perplexity_before, "after": facts.perplexity_after},
        "seconds_per_edit": facts.seconds_per_edit,
        "peak_memory_bytes": facts.peak_memory_bytes,
        "uncounted": dict(Counter(row["kind"] for row in final if not row["counted"])),
        "protocol": asdict(protocol),
    }


def score_table(rows: Iterable[ProbeRow], seed: int = 0) -> Table:
    """Return an estimate by kind and scorer over the rows that count."""
    values: dict[tuple[str, str], list[float]] = {}
    edits: dict[tuple[str, str], list[int | None]] = {}
    for row in rows:
        if row["counted"]:
            for scorer, value in row["scores"].items():
                values.setdefault((row["kind"], scorer), []).append(value)
                edits.setdefault((row["kind"], scorer), []).append(row["edit_id"])
    table: Table = {}
    for kind in ROW_KINDS:
        for scorer in SCORERS:
            if found := values.get((kind, scorer)):
                cell = estimate(found, edits[kind, scorer], seed)
                table.setdefault(kind, {})[scorer] = cell
    return table


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
