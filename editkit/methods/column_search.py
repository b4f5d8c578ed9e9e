"""The inner loop of MEMOIR: clipped SGD on the columns of a batch of edits, each by itself.

Legend: E edits, B rows (the same number for each edit), T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from editkit.adapters.columns import Columns
from editkit.descend import descend
from editkit.lm.rows import SiteRows

RELEASED_DECAY, RELEASED_CHANGE = 1e-5, 1e-4


def descend_columns(
    rows: SiteRows,
    columns: Columns,
    steps: int,
    lr: float,
    clip: float,
    stop_below: float,
    compat: bool = False,
) -> tuple[Tensor, int]:
    """Move the columns until every edit is done.

    Args:
        rows: What the edits train on.
        columns: Columns of the edits; they move in place.
        steps: Most steps of the batch.
        lr: Learning rate.
        clip: Largest norm of each edit's gradient.
        stop_below: Loss in nats per token at which an edit is done.
        compat: Decay, weigh and stop as the released code does.

    Returns:
        The last losses, nats [E], and the steps taken.
    """
    edits, size_B = len(columns.leaves), rows.tokens.target_BT.sum(1)
    inputs = columns.inputs(rows.inputs_BTF)
    weight_B = size_B / (size_B + 1) if compat else torch.ones_like(size_B)
    seen: list[Tensor] = []

    def loss_fn(step: int) -> Tensor:
        loss_B = rows.losses(columns.products(inputs)) * weight_B
        loss_E = loss_B.view(edits, -1).mean(1)
        done_E = _are_done(seen, loss_E.detach(), stop_below, compat)
        seen.append(loss_E.detach())
        return loss_E[~done_E].sum()

    descent = descend(
        columns.leaves,
        loss_fn,
        steps,
        lr,
        stop_below=0.0,  # the sum over the edits that are not done
        weight_decay=RELEASED_DECAY if compat else 0.0,
        project=columns.merge,
        optimizer=torch.optim.SGD,
        clip=clip,
    )
    return seen[-1], descent.steps


def _are_done(seen: list[Tensor], loss_E: Tensor, stop_below: float, compat: bool) -> Tensor:
    """Return which edits take no further step, bool [E], given the losses of the steps before."""
    if not compat:
        return loss_E <= stop_below
    if len(seen) < 2:
        return torch.zeros_like(loss_E, dtype=torch.bool)
    has_settled_E = (seen[-1] - seen[-2]).abs() <= RELEASED_CHANGE
    return has_settled_E & (seen[-1] <= stop_below)
