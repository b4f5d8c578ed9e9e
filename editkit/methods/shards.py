"""Settings of WISE and REPAIR; the masks of shards, and their merging.

Legend: D layer output, F layer input, C kept inputs of a shard, S shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from editkit.adapters.pools import Pools
from editkit.functional.clusters import greedy_clusters
from editkit.functional.merge import ties_merge


@dataclass(frozen=True)
class Shards:
    """How edits are shared out to shards and shards are merged.

    Args:
        density: Share of the weight that a shard may write (rho).
        mask: Draw entries one by one (`elementwise`, as published) or whole `columns`, inputs of
            the layer: as many numbers, stored and multiplied at a fraction of the cost.
        save: Edits after which a shard is closed.
        merge: Edits after which the closed shards are merged.
        retrieve: Keep every merged memory (WISE-Retrieve); false keeps a single one (WISE-Merge).
        keep: Share of each shard that TIES keeps, its largest entries.
    """

    density: float = 0.2
    mask: Literal["elementwise", "columns"] = "elementwise"
    save: int = 500
    merge: int = 1000
    retrieve: bool = True
    keep: float = 0.53

    def __post_init__(self) -> None:
        """Check user input."""
        if not (0 < self.density <= 1 and 0 < self.keep <= 1):
            raise ValueError(
                f"shards.density is {self.density}, keep is {self.keep}; both are shares above 0, "
                "at most 1"
            )
        if self.mask not in ("elementwise", "columns"):
            raise ValueError(f"shards.mask is {self.mask!r}; use 'elementwise' or 'columns'")
        if self.save < 1 or self.merge < self.save or self.merge % self.save:
            raise ValueError(
                f"shards.save is {self.save}, merge is {self.merge}; merge is a multiple of save, "
                "which is at least 1"
            )

    def width(self, inputs: int) -> int:
        """Return the number of inputs that a shard keeps."""
        return inputs if self.mask == "elementwise" else max(1, round(self.density * inputs))


@dataclass(frozen=True)
class Fitting:
    """How a shard is descended on.

    Args:
        steps: Most steps per batch of edits.
        lr: Learning rate.
        stop_below: Loss in nats per token, margins included, at which an edit is done.
        optimizer: `sgd`, as published, or `adam`.
        clamp: Largest change of an entry of the weight.
        weight_decay: Decay at each step of what is written.
        irrelevant: Unrelated texts that each edit is held against.
    """

    steps: int = 70
    lr: float = 1.0
    stop_below: float = 0.02
    optimizer: Literal["sgd", "adam"] = "sgd"
    clamp: float = 1.0
    weight_decay: float = 0.0
    irrelevant: int = 1

    def __post_init__(self) -> None:
        """Check user input."""
        if self.steps < 1 or self.irrelevant < 1:
            raise ValueError(
                f"fitting.steps is {self.steps}, irrelevant is {self.irrelevant}; both are at "
                "least 1"
            )
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"fitting.optimizer is {self.optimizer!r}; use 'sgd' or 'adam'")


@dataclass(frozen=True)
class Margins:
    """How the scores of edits are held apart from those of unrelated texts.

    Args:
        outside: Score that unrelated texts should stay below (WISE: alpha, REPAIR: gamma_1).
        inside: Score that an edit's rows should reach (beta, gamma_2).
        apart: Distance between the two (gamma).
        weight: Weight of the margins beside the edit's own loss (REPAIR: lambda_a).
        relative: Measure scores in units of the mean norm of the layer's output over unrelated
            prompts, which differs from model to model; false takes them as they are.
    """

    outside: float = 2.0
    inside: float = 20.0
    apart: float = 10.0
    weight: float = 1.0
    relative: bool = False


@dataclass(frozen=True)
class Distillation:
    """How the edits of a shard are drawn to activate it alike (REPAIR, eq. 6-7).

    Args:
        weight: Weight of the whole term (lambda_KD); 0 leaves it out.
        cosine: Weight of the cosines to the first edit (lambda).
        variance: Weight of the variance (vartheta).
    """

    weight: float = 0.0
    cosine: float = 0.2
    variance: float = 0.2


@dataclass(frozen=True)
class Regroup:
    """How a window is dealt into batches.

    Args:
        by_likeness: Batch like edits; false takes them as they came.
        consistency: 1 - cos to the seed from which an edit leaves its batch (eps_cons).
        deferrals: Later windows that an edit may wait for.
    """

    by_likeness: bool = True
    consistency: float = 0.5
    deferrals: int = 2

    def deal(self, features_EH: Tensor, size: int) -> list[list[int]]:
        """Return indices of the edits of each batch, its seed first."""
        if self.by_likeness:
            return greedy_clusters(features_EH, size)
        return [part.tolist() for part in torch.arange(len(features_EH)).split(size)]


@dataclass(frozen=True)
class Loop:
    """When pools are pruned and rebuilt.

    Args:
        enabled: Check and rebuild; false leaves pools as their windows made them.
        correct: Share of right target tokens that an edit must exceed (Err_Thresh, tau_correct).
        prune: Share of failing edits above which a pool is rebuilt (tau_prune).
        errors: Failing edits above which the worst pool is rebuilt (tau_E).
        retries: Times that a pool is tried.
        budget: Trainings of an edit, on average, beyond which nothing is rebuilt.
    """

    enabled: bool = True
    correct: float = 0.85
    prune: float = 0.3
    errors: int = 30
    retries: int = 3
    budget: float = 10.0


@dataclass(frozen=True)
class Merge:
    """How the shards of a window are merged.

    Args:
        alpha: Weight of a shard's loss; 0 weighs all alike, as WISE does.
        conflict: `elect` signs by weighted sum, or let the largest weighted entry be the `winner`.
    """

    alpha: float = 1.0
    conflict: Literal["elect", "winner"] = "elect"


@dataclass(frozen=True)
class Mask:
    """Where a shard may be written.

    Args:
        columns_C: Inputs that it keeps.
        gate_DC: Entries that may change; None lets all of them.
    """

    columns_C: Tensor
    gate_DC: Tensor | None

    @classmethod
    def draw(
        cls, shape_oi: tuple[int, int], shards: Shards, seed: int, device: torch.device
    ) -> Mask:
        """Draw a mask, the same on every device: entries one by one, or whole inputs."""
        generator = torch.Generator().manual_seed(seed)
        out, inputs = shape_oi
        if shards.mask == "elementwise":
            draw_DF = torch.rand(out, inputs, generator=generator, dtype=torch.float32)
            return cls(torch.arange(inputs, device=device), (draw_DF < shards.density).to(device))
        order_F = torch.randperm(inputs, generator=generator)
        return cls(order_F[: shards.width(inputs)].sort().values.to(device), None)


def merged(
    pools: Pools,
    changes: list[tuple[Tensor, Tensor]],
    weights_S: Tensor | None,
    keep: float,
    conflict: Literal["elect", "winner"] = "elect",
) -> tuple[Tensor, Tensor]:
    """Merge changes by TIES, each with the inputs that it keeps; return one in the same form.

    Inputs that no change has written are left out, so the share that TIES keeps of a change is
    counted in all of the matrix.
    """
    deltas_SDF = torch.cat([pools.spread(d_DC[None], c_C[None]) for d_DC, c_C in changes])
    if pools.is_whole:
        return ties_merge(deltas_SDF, weights_S, keep, conflict), changes[0][1]
    columns_C = deltas_SDF.any(1).any(0).nonzero()[:, 0]
    share = min(1.0, keep * deltas_SDF.shape[2] / max(1, len(columns_C)))
    return ties_merge(deltas_SDF[..., columns_C], weights_S, share, conflict), columns_C
