"""A study in short: all methods together, each remedy against none on the very same questions.

A question that several methods were asked is one cluster: what varies together among them does so
in the intervals. Where edits are made alone, all questions to one edit's models are one. A remedy
counts where the same method, objective and stream ran without it, too, on the edits (or facts) that
were right before fine-tuning both times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from editkit.metrics.intervals import Estimate, estimate, estimate_contrast
from editkit.study.numbers import Part, Point
from editkit.study.plan import NONE

ALL = "all"
HEADS = (
    "remedy", "objective", "methods", "edits kept (ERR)", "facts kept (IRR)", "gap IRR - ERR",
    "edits kept more", "facts kept more", "gap changes by", "task, without",
)  # fmt: skip


@dataclass(frozen=True)
class Short:
    """What a remedy does, over all methods.

    Args:
        remedy: Label.
        objective: Label; `all` are those of the remedy.
        methods: Methods that ran.
        ERR: Edits kept.
        IRR: Intrinsic facts kept.
        gap: IRR - ERR.
        more_edits: ERR with the remedy minus without, paired; None of no remedy.
        more_facts: IRR likewise.
        gap_change: `more_facts` - `more_edits`.
        task: The task's score at the end and without the remedy, means over methods: what learns
            less keeps more for nothing. None over several objectives.
    """

    remedy: str
    objective: str
    methods: int
    ERR: Estimate
    IRR: Estimate
    gap: Estimate
    more_edits: Estimate | None = None
    more_facts: Estimate | None = None
    gap_change: Estimate | None = None
    task: tuple[float | None, float | None] | None = None


def shorten(points: Sequence[Point], is_alone: bool = False) -> list[Short]:
    """Return a row for each remedy and objective, and one for all objectives of a remedy.

    Args:
        points: What came of the study.
        is_alone: Whether each edit had a model of its own.
    """
    done = [p for p in points if p.done]
    found = []
    for remedy in dict.fromkeys(p.remedy for p in done):
        mine = [p for p in done if p.remedy == remedy]
        objectives = [*dict.fromkeys(p.objective for p in mine)]
        for name in [*objectives, *([ALL] if len(objectives) > 1 else [])]:
            part = [p for p in mine if name in (ALL, p.objective)]
            found.append(_short(remedy, name, part, done, is_alone))
    return found


def _short(
    remedy: str, objective: str, part: Sequence[Point], done: Sequence[Point], is_alone: bool
) -> Short:
    edits, facts = (_pooled(part, name, is_alone) for name in ("E", "K"))
    found = (
        remedy, objective, len({p.method for p in part}), estimate(*edits), estimate(*facts),
        estimate_contrast(facts, edits, "difference", is_joint=is_alone),
    )  # fmt: skip
    if remedy == NONE:
        return Short(*found, task=None if objective == ALL else (_task(part), None))
    plain = {(p.method, p.objective): p for p in done if p.remedy == NONE}
    pairs = [(p, plain[p.method, p.objective]) for p in part if (p.method, p.objective) in plain]
    more_edits, more_facts = (_paired(pairs, name, is_alone) for name in ("E", "K"))
    task = (
        None if objective == ALL else (_task([p for p, _ in pairs]), _task([q for _, q in pairs]))
    )
    return Short(
        *found, estimate(*more_edits), estimate(*more_facts),
        estimate_contrast(more_facts, more_edits, "difference", is_joint=is_alone), task,
    )  # fmt: skip


def _task(points: Sequence[Point]) -> float | None:
    values = [p.downstream["tuned"] for p in points if "tuned" in p.downstream]
    return sum(values) / len(values) if values else None


def _pooled(points: Sequence[Point], name: str, is_alone: bool) -> Part:
    """Return the questions of a set over several points, those of one kind together."""
    return _part([(key, v) for p in points for key, v in p.items[name].items()], is_alone)


def _paired(pairs: Sequence[tuple[Point, Point]], name: str, is_alone: bool) -> Part:
    """Return with minus without, of the questions that count in both."""
    rows = []
    for with_, without in pairs:
        one, other = with_.items[name], without.items[name]
        rows += [(key, one[key] - other[key]) for key in one if key in other]
    return _part(rows, is_alone)


def _part(rows: Sequence[tuple[tuple[int, str], float]], is_alone: bool) -> Part:
    """Return values and clusters; those of a model are its stream, of edits and facts alike."""
    clusters: dict[Any, int] = {}
    ids: list[int | None] = [
        key[0] if is_alone else clusters.setdefault(key, len(clusters)) for key, _ in rows
    ]
    return [value for _, value in rows], ids
