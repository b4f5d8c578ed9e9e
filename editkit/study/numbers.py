"""What came of a study: every run's rates, pooled over seeds, paired between remedies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from editkit.functional.retention import edit_retention, fact_retention
from editkit.metrics.intervals import Estimate, estimate, estimate_contrast
from editkit.report.compare import mcnemar
from editkit.report.files import read_lines
from editkit.study.plan import NONE, Stream, Study

Part = tuple[list[float], list[int | None]]
APART = 1_000_000  # edits of two seeds are two edits
LINE_KEYS = ("arm", "ckpt_step", "set", "item_id", "scorer", "score_M0", "score_Med", "score_Mft")


@dataclass
class Point:
    """One method, objective and remedy over all seeds.

    Args:
        method: Label.
        objective: Label.
        remedy: Label.
        done: Streams that are done.
        missing: Streams that are not.
        ERR: Edits kept.
        IRR: Intrinsic facts kept.
        IRR_matched: Those matched to the edits.
        gap: IRR - ERR.
        control: Facts kept by the never-edited model.
        diff_in_diff: `control` - `ERR`.
        downstream: Mean of each moment's score, by moment.
        measure: What that score is.
        kl: Mean KL to the edited model; None of what was done afterwards.
        keys: Mean relative shift of the keys, likewise.
        trained: Mean number of trained parameters.
        only_here: Of the edits that held before fine-tuning with and without the remedy, those kept
            with it alone; None for `none`.
        only_there: The reverse.
        mcnemar_p: Exact p of these two.
        fates: What became of the edits, counted.
        items: Of the edits (`E`) and intrinsic facts (`K`) that count, whether each is kept.
    """

    method: str
    objective: str
    remedy: str
    done: list[Stream] = field(default_factory=list)
    missing: list[Stream] = field(default_factory=list)
    ERR: Estimate | None = None
    IRR: Estimate | None = None
    IRR_matched: Estimate | None = None
    gap: Estimate | None = None
    control: Estimate | None = None
    diff_in_diff: Estimate | None = None
    downstream: dict[str, float] = field(default_factory=dict)
    measure: str = ""
    kl: float | None = None
    keys: float | None = None
    trained: float | None = None
    only_here: int | None = None
    only_there: int | None = None
    mcnemar_p: float | None = None
    fates: dict[str, int] = field(default_factory=dict)
    items: dict[str, dict[tuple[int, str], float]] = field(
        default_factory=lambda: {"E": {}, "K": {}}, repr=False
    )


def collect(study: Study, root: Path) -> list[Point]:
    """Read every finished run of a study."""
    found: dict[tuple[str, str, str], Point] = {}
    parts: dict[tuple[str, str, str], list[tuple[int, Path]]] = {}
    place = {stream: n for n, stream in enumerate(study.streams)}
    for method, objective, remedy, stream in study.points():
        key = method, objective, remedy
        point = found.setdefault(key, Point(*key))
        folder = study.tuned_folder(root, method, objective, remedy, stream)
        if (folder / "summary.json").exists():
            point.done.append(stream)
            parts.setdefault(key, []).append((place[stream], folder))
        else:
            point.missing.append(stream)
    for key, folders in parts.items():
        _fill(found[key], folders, study)
    for (method, objective, remedy), point in found.items():
        plain = found.get((method, objective, NONE))
        if remedy != NONE and plain is not None:
            _pair(point, plain)
    return [*found.values()]


def _fill(point: Point, folders: Sequence[tuple[int, Path]], study: Study) -> None:
    """Pool the lines of all streams, an edit of a stream being a cluster."""
    scorer, arm, is_alone = study.scorer, study.arm(point.remedy), bool(study.alone)
    kept, known, like, control = [], [], [], []
    summaries = []
    for n, folder in folders:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        summaries.append(summary)
        rows, _ = read_lines(folder / "retention.jsonl", LINE_KEYS)
        end = [r for r in rows if r["scorer"] == scorer and r["ckpt_step"] == summary["step"]]
        own = [r for r in end if r["arm"] == arm]
        made = [r for r in own if r["prompt_kind"] == "rewrite"]
        kept.append(_part(made, n, edit_retention, is_alone))
        facts = [r for r in own if r["set"] == "K"]
        known.append(_part(facts, n, fact_retention, is_alone))
        matched = [r for r in facts if r["matched"]]
        like.append(_part(matched, n, fact_retention, is_alone))
        for name, asked, part in (("E", made, kept[-1]), ("K", facts, known[-1])):
            pairs = zip(asked, part[0], strict=True)
            point.items[name] |= {(n, r["item_id"]): v for r, v in pairs if v == v}
        theirs = [r for r in end if r["arm"] == "control" and r["set"] == "K"]
        values = [r["score_Mft"] if r["score_M0"] == 1 else float("nan") for r in theirs]
        control.append((values, _clusters(theirs, n, is_alone)))
        for r in made:
            point.fates[r["fate"]] = point.fates.get(r["fate"], 0) + 1
    edits, facts_all, alike, never = map(_joined, (kept, known, like, control))
    point.ERR, point.IRR = estimate(*edits), estimate(*facts_all)
    point.IRR_matched, point.control = estimate(*alike), estimate(*never)
    point.gap = estimate_contrast(facts_all, edits, "difference", is_joint=is_alone)
    point.diff_in_diff = estimate_contrast(never, edits, "difference", is_joint=is_alone)
    point.measure = summaries[0]["measure"]
    for moment in ("base", "edited", "tuned", "control"):
        name = arm if moment == "tuned" and arm != "edited" else moment
        values = [s["downstream"].get(name) for s in summaries]
        if None not in values:
            point.downstream[moment] = sum(values) / len(values)
    if arm == "edited":  # the one whose drift is measured
        point.kl = _mean([s["drift"]["kl"] for s in summaries])
        point.keys = _mean([_mean([*s["drift"]["keys"].values()]) for s in summaries])
    point.trained = _mean([s["manifest"]["trained_parameters"] for s in summaries])


def _pair(point: Point, plain: Point) -> None:
    """Compare edits kept with a remedy and without it, edit by edit (McNemar).

    Those that held before fine-tuning both times count: a remedy that edits otherwise may make
    others.
    """
    mine, theirs = point.items["E"], plain.items["E"]
    both = mine.keys() & theirs.keys()
    if not both:
        return
    point.only_here = sum(mine[i] > theirs[i] for i in both)
    point.only_there = sum(mine[i] < theirs[i] for i in both)
    point.mcnemar_p = mcnemar(point.only_there, point.only_here)


def _part(rows: Sequence[dict[str, Any]], stream: int, pick: Any, is_alone: bool = False) -> Part:
    hits = [[r[name] == 1 for r in rows] for name in ("score_M0", "score_Med", "score_Mft")]
    return pick(*hits), _clusters(rows, stream, is_alone)


def _clusters(rows: Sequence[dict[str, Any]], stream: int, is_alone: bool) -> list[int | None]:
    """Return what hangs together: questions of an edit, and all of a model with one edit."""
    first = stream * APART
    if is_alone:
        return [first] * len(rows)
    return [None if r["edit_id"] is None else first + r["edit_id"] for r in rows]


def _joined(parts: Sequence[Part]) -> Part:
    return [v for values, _ in parts for v in values], [i for _, ids in parts for i in ids]


def _mean(values: Sequence[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None
