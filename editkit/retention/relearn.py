"""Latent retention: is a lost edit learned again sooner than one that was never made?

Forgetting may be loss of access alone. Each edit that fine-tuning took gets a partner: the same
answer, taught of a fact of the same relation that no edit has touched. Both train in the same
batches, in as many steps of AdamW on what fine-tuning trained; then the weights are put back.

A line of `relearned.jsonl` is one pair: for the lost edit and its partner the negative
log-likelihood per token before every step and behind the last, and the step at which the answer is
the likeliest first (`learned_at`; one more than the steps where it never is).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from editkit.functional.losses import target_nll
from editkit.functional.scores import row_scores
from editkit.metrics.intervals import estimate
from editkit.retention.answers import Rows
from editkit.retention.items import Item
from editkit.retention.outcome import subset_of

if TYPE_CHECKING:
    from editkit.retention.finetune import FineTuneEdited

Pair = tuple[Item, Item]


def lost_pairs(items: Sequence[Item], base: Rows, edited: Rows, tuned: Rows) -> list[Pair]:
    """Return the edits that are lost, each with the fact that takes its answer.

    Edits that overwrite what the base model knew get a fact that it knows, those that insert one
    that it never read of, while there are any.
    """
    free = {
        "K": [i for i in items if i.set == "K" and _is_right(base, i)],
        "U": [i for i in items if i.set == "U" and i.id in base],
    }
    found = []
    for item in items:
        if item.prompt_kind != "rewrite" or item.id not in tuned:
            continue
        if (
            item.id not in base
            or _is_right(base, item)
            or not _is_right(edited, item)
            or _is_right(tuned, item)
        ):
            continue
        is_known = subset_of(item, base[item.id]) == "overwritten"
        for name in ("K", "U") if is_known else ("U", "K"):
            fits = [i for i in free[name] if _fits(i, item)]
            if fits:
                free[name].remove(fits[0])
                found.append((item, fits[0]))
                break
    return found


def relearn(
    module: FineTuneEdited, pairs: Sequence[Pair], steps: int, lr: float, size: int
) -> list[dict[str, Any]]:
    """Teach lost edits and their partners; the model is as before behind it.

    Args:
        module: The fine-tuned model.
        pairs: What `lost_pairs` found.
        steps: Steps.
        lr: Learning rate of AdamW.
        size: Rows of a pass.
    """
    rows = [pair for lost, other in pairs for pair in (_row(lost, lost), _row(other, lost))]
    parameters = [*module.trained.values()]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    optimizer.zero_grad()  # those of fine-tuning's last batch are still there
    told = []
    for step in range(steps + 1):
        told.append(_pass(module, rows, size, is_last=step == steps))
        if step < steps:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    for layer in module.lm.layers.values():
        layer.changed()
    return [
        {
            "item_id": lost.id, "edit_id": lost.probe.edit_id, "partner_id": other.id,
            "relation": lost.relation, "lost": _course(told, 2 * n),
            "partner": _course(told, 2 * n + 1),
        }
        for n, (lost, other) in enumerate(pairs)
    ]  # fmt: skip


def latent_rates(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what pairs say: steps and start of both, and what is saved, paired by edit."""
    ids = [row["edit_id"] for row in told]

    def pooled(values: Sequence[float]) -> Any:
        return estimate(values, ids)

    steps = [[float(row[who]["learned_at"]) for row in told] for who in ("lost", "partner")]
    start = [[row[who]["nll"][0] for row in told] for who in ("lost", "partner")]
    return {
        "pairs": len(told),
        "steps": len(told[0]["lost"]["nll"]) - 1,
        "steps_lost": pooled(steps[0]),
        "steps_partner": pooled(steps[1]),
        "steps_saved": pooled([b - a for a, b in zip(*steps, strict=True)]),
        "nll_gap": pooled([b - a for a, b in zip(*start, strict=True)]),
    }


# private


@torch.enable_grad()
def _pass(
    module: FineTuneEdited, rows: Sequence[tuple[str, str]], size: int, is_last: bool
) -> list[dict[str, float]]:
    """Score all rows, and unless it is the last pass gather their gradients."""
    found: list[dict[str, float]] = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        tokens = module.lm.encode([prompt for prompt, _ in part], [target for _, target in part])
        logits_NV = module.lm.target_logits(tokens)
        where = tokens.target_ids_N, tokens.target_rows_N
        if not is_last:
            (target_nll(logits_NV, *where, len(part)).sum() / len(rows)).backward()
        found += row_scores(logits_NV.detach(), *where, len(part))
    return found


def _course(told: Sequence[Sequence[dict[str, float]]], row: int) -> dict[str, Any]:
    right = [step for step, rows in enumerate(told) if rows[row]["sequence_accuracy"] == 1]
    return {
        "nll": [rows[row]["nll"] for rows in told],
        "learned_at": right[0] if right else len(told),
    }


def _row(asked: Item, lost: Item) -> tuple[str, str]:
    return asked.probe.prompt, lost.probe.target or ""


def _fits(other: Item, lost: Item) -> bool:
    return other.relation == lost.relation and other.probe.target != lost.probe.target


def _is_right(rows: Rows, item: Item) -> bool:
    return item.id in rows and rows[item.id]["scores"].get("generation") == 1
