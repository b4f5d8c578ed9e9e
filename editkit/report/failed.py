"""Probes that fail at the end, with what the model said before and after editing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from editkit.report.files import Row
from editkit.report.load import Run
from editkit.report.measure import name_of, question, right_ones
from editkit.report.words import HAS_NO_RIGHT_ANSWER

LOCALITY = "locality"


def failed_rows(runs: Sequence[Run], scorer: str) -> Iterable[Row]:
    """Yield the last rows that a score of at most 1 says are not fully right.

    A wording of a question that another wording answers right is not among them.

    Args:
        runs: Runs of one report.
        scorer: Score by which a probe fails; none fails by one that has no right answer.
    """
    if scorer in HAS_NO_RIGHT_ANSWER:
        return
    has_relation = any(row.get("relation") for run in runs for row in run.last)
    right = [right_ones(run.last, scorer) for run in runs]
    for i, run in enumerate(runs):
        asked_early = {name_of(row, scorer) for row in run.immediate if scorer in row["scores"]}
        right_early = right_ones(run.immediate, scorer)
        before = {question(row): row["answer"] for row in run.unedited}
        for row in run.last:
            name = name_of(row, scorer)
            if not row["counted"] or scorer not in row["scores"] or name in right[i]:
                continue
            yield {
                "run": run.name,
                "edit": row["edit_id"],
                "kind": row["kind"],
                "axis": row.get("axis", ""),
                **({"relation": row.get("relation", "")} if has_relation else {}),
                "prompt": row["prompt"],
                "expected": row["reference"] if row["kind"] == LOCALITY else row["target"],
                "before": before.get(question(row), row["reference"]),
                "after": row["answer"],
                "fate": _fate(row, name in right_early) if name in asked_early else "",
                "right_elsewhere": any(name in found for j, found in enumerate(right) if j != i),
            }


def _fate(row: Row, was_right: bool) -> str:
    """Say what became of a probe that fails in the end; see `words.FATES`."""
    if row["kind"].startswith(LOCALITY):
        return "changed later" if was_right else "changed at once"
    return "forgotten" if was_right else "never right"
