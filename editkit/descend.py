"""The inner optimisation loops: the only place that calls `backward()` while editing.

`descend` moves what all edits of a batch share. `descend_rows` moves one vector per row, each as
if it were alone: rows of values, which locate-then-edit methods search for.

Legend: B rows, D width of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from editkit.parallel import mean_over_ranks


@dataclass(frozen=True, slots=True)
class Descent:
    """What an inner loop did.

    Args:
        losses: Loss at every call, in order.
        steps: Optimiser steps taken.
    """

    losses: list[float]
    steps: int


def descend(
    leaves: Sequence[Tensor],
    loss_fn: Callable[[int], Tensor],
    steps: int,
    lr: float,
    stop_below: float = float("-inf"),
    epoch: int = 1,
    weight_decay: float = 0.0,
    project: Callable[[], None] | None = None,
    optimizer: type[torch.optim.AdamW | torch.optim.SGD] = torch.optim.AdamW,
    clip: float = math.inf,
) -> Descent:
    """Minimise `loss_fn` over scratch leaves, with Adam where nothing else is asked for.

    Args:
        leaves: Tensors to move, each with `requires_grad`; their values change in place.
        loss_fn: Scalar loss at a step, given the step's number.
        steps: Most calls of `loss_fn`.
        lr: Learning rate.
        stop_below: No step is taken on a loss at or below this, and an epoch whose mean loss is
            there ends the loop.
        epoch: Calls that make up an epoch.
        weight_decay: Decoupled weight decay.
        project: Called after every step, to clamp or project the leaves.
        optimizer: `AdamW`, or `SGD` without momentum.
        clip: Largest norm of each leaf's gradient; a larger one is scaled down to it.

    Raises:
        ValueError: If the loss is not finite; the leaves are then worth nothing.
    """
    stepper = optimizer(list(leaves), lr=lr, weight_decay=weight_decay)
    losses: list[float] = []
    taken = 0
    for step in range(steps):
        with torch.enable_grad():
            loss = loss_fn(step)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"the loss became {losses[-1]} at step {step} of an edit (lr {lr}); lower the "
                "learning rate or use a wider precision"
            )
        if losses[-1] > stop_below:
            grads = mean_over_ranks(torch.autograd.grad(loss, list(leaves)))
            for leaf, grad in zip(leaves, grads, strict=True):
                leaf.grad = grad if clip == math.inf else _clipped(grad, clip)
            stepper.step()
            taken += 1
            if project is not None:
                project()
        if len(losses) % epoch == 0 and sum(losses[-epoch:]) / epoch <= stop_below:
            break
    return Descent(losses, taken)


def _clipped(grad: Tensor, norm: float) -> Tensor:
    """Scale a gradient down to a norm, as `torch.nn.utils.clip_grad_norm_` does."""
    clipped: Tensor = grad * (norm / (grad.norm() + 1e-6)).clamp_max(1.0)
    return clipped


class RowLoss(Protocol):
    """Losses of rows that do not depend on one another."""

    def __call__(self, leaf_BD: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return each row's loss [B], and whether it is done before any step on it (bool [B])."""

    def project(self, leaf_BD: Tensor, /) -> None:
        """Clamp or project the rows in place; called without gradients after every step."""

    def keep(self, rows: list[int], /) -> None:
        """Go on with these of the present rows, in this order."""


@dataclass(frozen=True, slots=True)
class RowsDescent:
    """What a loop over rows did.

    Args:
        found_BD: The rows where they ended.
        calls_B: Losses computed of each row, int64; one more than the steps it took.
        stopped_B: Whether it was done before the calls ran out, or with the last of them.
    """

    found_BD: Tensor
    calls_B: Tensor
    stopped_B: Tensor


def descend_rows(
    start_BD: Tensor,
    loss: RowLoss,
    steps: int,
    lr: float,
    name: Callable[[int], str] = "row {}".format,
) -> RowsDescent:
    """Minimise the loss of every row with Adam, all rows together; a row that is done leaves.

    Adam works number by number and all rows started together, so a row takes the steps that it
    would take alone.

    Args:
        start_BD: Where the rows start.
        loss: Losses of the rows still under way.
        steps: Most calls of `loss`; the last one is not followed by a step.
        lr: Adam's learning rate.
        name: What to call a row in an error.

    Raises:
        ValueError: If a row's loss is not finite.
    """
    found_BD = start_BD.clone()
    calls_B = torch.zeros(len(start_BD), dtype=torch.long)
    stopped_B = torch.zeros(len(start_BD), dtype=torch.bool)
    rows = list(range(len(start_BD)))
    leaf = start_BD.clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=lr)
    for step in range(steps):
        is_last = step == steps - 1
        with torch.set_grad_enabled(not is_last):
            loss_B, done_B = loss(leaf)
        value_B = loss_B.detach()
        finite, done = torch.stack([value_B.isfinite(), done_B]).tolist()
        if not all(finite):
            bad = finite.index(False)
            raise ValueError(
                f"the loss of {name(rows[bad])} became {float(value_B[bad])} at step {step} "
                f"(lr {lr}); lower the learning rate or use a wider precision"
            )
        calls_B[rows] = step + 1
        stopped_B[rows] = torch.tensor(done)
        going = [i for i, is_done in enumerate(done) if not is_done]
        if len(going) < len(rows) or is_last:
            found_BD[rows] = leaf.detach()  # those that go on are written again
        if not going or is_last:
            break
        (leaf.grad,) = torch.autograd.grad(loss_B[going].sum(), leaf)
        adam.step()
        with torch.no_grad():
            loss.project(leaf)
        if len(going) < len(rows):
            rows = [rows[i] for i in going]
            leaf = _keep(adam, leaf, going)
            loss.keep(going)
    return RowsDescent(found_BD, calls_B, stopped_B)


def _keep(adam: torch.optim.Adam, leaf: Tensor, rows: list[int]) -> Tensor:
    """Let an optimiser go on with some rows of its one leaf, moments included."""
    kept = leaf.detach()[rows].requires_grad_()
    state = adam.state.pop(leaf)
    adam.state[kept] = {k: v[rows] if v.shape == leaf.shape else v for k, v in state.items()}
    adam.param_groups[0]["params"] = [kept]
    return kept
