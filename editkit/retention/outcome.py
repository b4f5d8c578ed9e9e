"""From answers to `retention.jsonl` and the numbers of a retention run.

A line of `retention.jsonl` is one item under one scorer at one checkpoint of one arm:

    run, arm, ckpt_step     arm: edited, control (never edited), identity (lr 0), or what was
                            done afterwards (`editkit.retention.afterwards`)
    set, item_id, prompt_kind, relation, matched    see `editkit.retention.items`
    scorer, score_M0, score_Med, score_Mft          Med is null in the control arm
    logp_M0, logp_Med, logp_Mft                     log probability per token of the expected answer
    text_Mft                                        what the fine-tuned model says
    fate    stable, erased_true (back to the old answer), erased_other, erased_empty, emergent,
            impossible (wrong before and after); null in the control arm
    route   of methods with a memory: the edit that answers, and how well it fits

Every number of `summary.json` can be made again from these lines (`rates`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from editkit.functional.retention import (
    edit_retention,
    emergence,
    fact_retention,
    fate_of,
    flips,
    log_odds_gap,
    nearest,
    relative_decrease,
)
from editkit.functional.scores import answers_match
from editkit.metrics.intervals import Estimate, estimate, estimate_contrast
from editkit.report.compare import mcnemar
from editkit.retention.asking import Row
from editkit.retention.items import Item

HEADLINE = ("generation", "sequence_accuracy")
FAITHFUL = ("first_token", "substring")
KEPT_SCORERS = (*HEADLINE, *FAITHFUL, "pair")

Line = dict[str, Any]
Rows = dict[str, Row]


def lines(
    run: str, arm: str, step: int, items: Sequence[Item],
    base: Rows, edited: Rows | None, tuned: Rows, matched: frozenset[str],
) -> Iterable[Line]:  # fmt: skip
    """Yield the lines of one arm at one checkpoint."""
    split = any(item.old is not None for item in items)  # else the data does not say what was true
    for item in items:
        if item.id not in tuned or item.id not in base:
            continue
        rows = base[item.id], None if edited is None else edited.get(item.id), tuned[item.id]
        known = {
            "run": run, "arm": arm, "ckpt_step": step, "set": item.set, "item_id": item.id,
            "edit_id": item.probe.edit_id, "prompt_kind": item.prompt_kind,
            "relation": item.relation, "subset": subset_of(item, base[item.id]) if split else "",
            "matched": item.id in matched,
        }  # fmt: skip
        logs = dict(zip(("logp_M0", "logp_Med", "logp_Mft"), map(_log_p, rows), strict=True))
        for scorer in KEPT_SCORERS:
            scores = [None if row is None else row["scores"].get(scorer) for row in rows]
            if scores[2] is None:
                continue
            fate = None
            if scores[1] is not None:
                answer = tuned[item.id]["answer"] or ""
                fate = fate_of(scores[1] == 1, scores[2] == 1, answer, item.old)
            yield {
                **known, "scorer": scorer,
                **dict(zip(("score_M0", "score_Med", "score_Mft"), scores, strict=True)),
                **logs, "text_Mft": tuned[item.id]["answer"], "fate": fate,
                **({"route": tuned[item.id]["route"]} if "route" in tuned[item.id] else {}),
            }  # fmt: skip


def subset_of(item: Item, base: Row) -> str:
    """Tell edits that overwrite what the base model knew from those that insert something new."""
    if item.set != "E":
        return ""
    is_known = item.old is not None and answers_match(base["answer"] or "", item.old)
    return "overwritten" if is_known else "inserted"


def match_facts(items: Sequence[Item], base: Rows, edited: Rows, per: int) -> frozenset[str]:
    """Choose intrinsic facts like the edits: of the same relation, and as sure of their answer.

    Compared are the log probability that the edited model gives a new answer and the one that the
    base model gives an intrinsic one; both right.
    """
    edits = [
        (item.relation, _log_p(edited[item.id]) or 0.0)
        for item in items
        if item.prompt_kind == "rewrite" and _is_right(edited, item)
    ]
    pool = [i for i in items if i.set == "K" and _is_right(base, i) and _is_right(edited, i)]
    known = [(item.relation, _log_p(base[item.id]) or 0.0) for item in pool]
    found = nearest(edits, known, per)
    return frozenset(pool[i].id for mine in found for i in mine)


def rates(
    told: Sequence[Line], edits_by: str = "generation", facts_by: str = "generation"
) -> dict[str, Any]:
    """Return the rates of one arm at one checkpoint; edits and facts may be scored differently.

    Args:
        told: Its lines.
        edits_by: Scorer of the edits.
        facts_by: Scorer of everything else.
    """
    rows = [r for r in told if r["scorer"] == (edits_by if r["set"] == "E" else facts_by)]
    own = [r for r in rows if r["prompt_kind"] == "rewrite"]
    facts = [r for r in rows if r["set"] == "K"]
    matched = [r for r in facts if r["matched"]]
    kept, known = _values(own, edit_retention), _values(facts, fact_retention)
    like = _values(matched, fact_retention)
    found: dict[str, Any] = {
        "ERR": estimate(*kept),
        "ERR_rephrase": _rate([r for r in rows if r["prompt_kind"] == "rephrase"], edit_retention),
        "IRR": estimate(*known),
        "IRR_matched": estimate(*like),
        "gap": estimate_contrast(known, kept, "difference"),
        "gap_matched": estimate_contrast(like, kept, "difference"),
        "ratio": estimate_contrast(kept, known, "ratio"),
        "log_odds_gap": log_odds_gap(_counts(kept), _counts(known)),
        "EFR": _rate(own, lambda base, edited, tuned: flips(edited, tuned)),
        "emergence": _rate(own, lambda base, edited, tuned: emergence(edited, tuned)),
        "relative_decrease": _decrease(own),
        "neighbours": _rate([r for r in rows if r["set"] == "N"], _of_edited),
        "portability": _rate([r for r in rows if r["set"] == "P"], _of_edited),
        "unknown": _rate([r for r in rows if r["set"] == "U"], lambda b, e, t: [*map(float, t)]),
        "fates": dict(Counter(r["fate"] for r in own)),
        "soft": {"edits": _soft(own), "facts": _soft(facts), "margin": _margin(told, own)},
    }  # fmt: skip
    for subset in ("overwritten", "inserted"):
        part = [r for r in own if r["subset"] == subset]
        if part and len(part) < len(own):
            found[f"ERR_{subset}"] = _rate(part, edit_retention)
    return found


def control_rates(told: Sequence[Line], scorer: str = "generation") -> dict[str, Any]:
    """Return what the never-edited model keeps: IRR(M0 to M0ft), all facts and the matched ones."""
    facts = [r for r in told if r["scorer"] == scorer and r["set"] == "K"]

    def kept(part: Sequence[Line]) -> Estimate:
        values = [float(r["score_Mft"]) if r["score_M0"] == 1 else float("nan") for r in part]
        return estimate(values, [None] * len(values))

    unknown = [r for r in told if r["scorer"] == scorer and r["set"] == "U"]
    return {
        "IRR": kept(facts),
        "IRR_matched": kept([r for r in facts if r["matched"]]),
        "unknown": estimate([r["score_Mft"] for r in unknown], [None] * len(unknown)),
    }


def against_control(
    edited: Sequence[Line], control: Sequence[Line], scorer: str = "generation"
) -> dict[str, Any]:
    """Compare fine-tuning with and without edits: difference-in-differences, and McNemar on facts.

    `diff_in_diff` = IRR(M0 to M0ft) - ERR: what edits lose beyond what fine-tuning costs facts.
    """
    own = [r for r in edited if r["scorer"] == scorer and r["prompt_kind"] == "rewrite"]
    facts = [r for r in control if r["scorer"] == scorer and r["set"] == "K"]
    values = [float(r["score_Mft"]) if r["score_M0"] == 1 else float("nan") for r in facts]
    theirs = {r["item_id"]: r["score_Mft"] for r in facts if r["score_M0"] == 1}
    mine = {
        r["item_id"]: r["score_Mft"] for r in edited if r["scorer"] == scorer and r["set"] == "K"
    }
    pairs = [(theirs[i], mine[i]) for i in theirs.keys() & mine.keys()]
    only = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return {
        "diff_in_diff": estimate_contrast(
            (values, [None] * len(values)), _values(own, edit_retention), "difference"
        ),
        "facts_kept_by_control_alone": only[0],
        "facts_kept_by_edited_alone": only[1],
        "mcnemar_p": mcnemar(*only),
    }


# private

Pick = Callable[[Sequence[bool], Sequence[bool], Sequence[bool]], list[float]]


def _values(rows: Sequence[Line], pick: Pick) -> tuple[list[float], list[int | None]]:
    hits = [[r[name] == 1 for r in rows] for name in ("score_M0", "score_Med", "score_Mft")]
    return pick(*hits), [r["edit_id"] for r in rows]


def _rate(rows: Sequence[Line], pick: Pick) -> Estimate:
    return estimate(*_values(rows, pick))


def _of_edited(base: Sequence[bool], edited: Sequence[bool], tuned: Sequence[bool]) -> list[float]:
    """Share of what the edited model had right that the fine-tuned one has."""
    return [1.0 - flip for flip in flips(edited, tuned)]


def _counts(part: tuple[list[float], list[int | None]]) -> tuple[int, int]:
    kept = [value for value in part[0] if value == value]
    return int(sum(kept)), len(kept)


def _decrease(rows: Sequence[Line]) -> float | None:
    if not rows or not any(r["score_Med"] for r in rows):
        return None
    means = [sum(r[name] for r in rows) / len(rows) for name in ("score_Med", "score_Mft")]
    return relative_decrease(*means)


def _soft(rows: Sequence[Line]) -> Estimate:
    """Mean change of log probability per token, of answers that the edited model had right."""
    kept = [r for r in rows if r["score_Med"] == 1]
    return estimate([r["logp_Mft"] - r["logp_Med"] for r in kept], [r["edit_id"] for r in kept])


def _margin(told: Sequence[Line], own: Sequence[Line]) -> dict[str, Estimate]:
    """Mean of log p(new) - log p(old) per token, before and after fine-tuning."""
    old = {r["edit_id"]: r for r in told if r["prompt_kind"] == "old"}
    rows = [r for r in own if r["edit_id"] in old and r["score_Med"] == 1]
    ids = [r["edit_id"] for r in rows]
    return {
        when: estimate([r[name] - old[r["edit_id"]][name] for r in rows], ids)
        for when, name in (("before", "logp_Med"), ("after", "logp_Mft"))
    }


def _log_p(row: Row | None) -> float | None:
    """Return the log probability per token of the expected answer."""
    nll = None if row is None else row["scores"].get("nll")
    return None if nll is None else -float(nll)


def _is_right(rows: Rows, item: Item) -> bool:
    row = rows.get(item.id)
    return row is not None and row["scores"].get(HEADLINE[0]) == 1
