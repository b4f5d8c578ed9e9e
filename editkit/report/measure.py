"""From rows to what is averaged: one score a question, several wordings of one counted once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from editkit.report.files import Row
from editkit.report.words import HITS


@dataclass(frozen=True)
class Score:
    """One counted score.

    Args:
        name: What makes two scores, in one run or in two, those of the same question.
        edit: Edit that the question belongs to; None where it belongs to none.
        value: The score; of several wordings of a question, any of which may be right, the best.
    """

    name: Hashable
    edit: int | None
    value: float


def question(row: Row) -> tuple[str, str, str, str | None]:
    """Return what makes two rows the same question, in one run or in two."""
    return row["probe_id"], row["kind"], row["prompt"], row["target"]


def name_of(row: Row, scorer: str) -> Hashable:
    """Return the name of the score that a row has a part in."""
    is_grouped = row.get("group") and scorer in HITS
    return (row["edit_id"], row["kind"], row["group"]) if is_grouped else question(row)


def scores_of(rows: Iterable[Row], kind: str, scorer: str) -> list[Score]:
    """Return the scores of one kind that count; rows of one group are one question (MQuAKE)."""
    found: dict[Hashable, Score] = {}
    for row in rows:
        if row["kind"] == kind and row["counted"] and scorer in row["scores"]:
            name = name_of(row, scorer)
            before = found[name].value if name in found else -float("inf")
            value = max(before, row["scores"][scorer])
            found[name] = Score(name, row["edit_id"], value)
    return [*found.values()]


def right_ones(rows: Sequence[Row], scorer: str) -> set[Hashable]:
    """Return the names of the scores of at least 1."""
    found = (score for kind in measures(rows) for score in scores_of(rows, kind, scorer))
    return {score.name for score in found if score.value >= 1.0}


def measure(rows: Iterable[Row], kind: str, scorer: str) -> Any:
    """Return the mean and its interval, as `editkit.metrics.intervals.estimate` does."""
    from editkit.metrics.intervals import estimate

    found = scores_of(rows, kind, scorer)
    return estimate([score.value for score in found], [score.edit for score in found])


def measures(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return the scorers of each kind that rows have."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["counted"]:
            found.setdefault(row["kind"], {}).update(dict.fromkeys(row["scores"]))
    return {kind: [*scorers] for kind, scorers in found.items()}
