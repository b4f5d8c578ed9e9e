"""The one inner optimisation loop: the only place that calls `backward()` while editing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Descent:
    """What an inner loop did.

    Args:
        losses: Loss at every call, in order.
        steps: Optimiser steps taken.
        stopped_early: Whether the loss fell to the threshold before the calls ran out.
    """

    losses: list[float]
    steps: int
    stopped_early: bool


def descend(
    leaves: Sequence[Tensor],
    loss_fn: Callable[[int], Tensor],
    steps: int,
    lr: float,
    stop_below: float = float("-inf"),
    epoch: int = 1,
    weight_decay: float = 0.0,
    project: Callable[[], None] | None = None,
) -> Descent:
    """Minimise `loss_fn` over scratch leaves with Adam.

    Args:
        leaves: Tensors to move, each with `requires_grad`; their values change in place.
        loss_fn: Scalar loss at a step, given the step's number.
        steps: Most calls of `loss_fn`.
        lr: Adam's learning rate.
        stop_below: No step is taken on a loss at or below this, and an epoch whose mean loss is
            there ends the loop.
        epoch: Calls that make up an epoch.
        weight_decay: Decoupled weight decay (AdamW).
        project: Called after every step, to clamp or project the leaves.

    Raises:
        ValueError: If the loss is not finite; the leaves are then worth nothing.
    """
    optimizer = torch.optim.AdamW(list(leaves), lr=lr, weight_decay=weight_decay)
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
            grads = torch.autograd.grad(loss, list(leaves))
            for leaf, grad in zip(leaves, grads, strict=True):
                leaf.grad = grad
            optimizer.step()
            taken += 1
            if project is not None:
                project()
        if len(losses) % epoch == 0 and sum(losses[-epoch:]) / epoch <= stop_below:
            return Descent(losses, taken, stopped_early=True)
    return Descent(losses, taken, stopped_early=False)
