"""Merging of weight changes that were trained apart from one another.

Sources: TIES (Yadav et al. 2023, arXiv 2306.01708), its disjoint mean as WISE uses it (Wang et al.
2024, arXiv 2405.14768, section 3.3), and REPAIR's weights and rule (arXiv 2510.01879, section 2.5
and Alg. 4).

Legend: S weight changes ("shards"), D layer output, F layer input. Everything is reckoned in at
least fp32 and returned so.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def loss_weights(losses_S: Tensor, alpha: float) -> Tensor:
    """Weigh shards by how well they learned, exp(-alpha L_i) / sum_j exp(-alpha L_j) (section 2.5).

    Args:
        losses_S: Mean training loss of each shard, in nats.
        alpha: 0 weighs all alike; the larger, the more the best shard decides.
    """
    return torch.softmax(-alpha * _precise(losses_S), dim=0)


def ties_merge(
    deltas_SDF: Tensor,
    weights_S: Tensor | None = None,
    density: float = 0.53,
    conflict: Literal["elect", "winner"] = "elect",
) -> Tensor:
    """Trim, settle signs, and take the weighted mean of what agrees [D, F] (TIES, section 3).

    Zeros abstain from the mean, so that a change that stands alone keeps its size: changes under
    disjoint masks merge to their sum. Only the weights' proportions matter.

    Args:
        deltas_SDF: Weight changes.
        weights_S: Positive weights; none weighs all alike.
        density: Share of each change, its largest magnitudes, that is kept.
        conflict: Where signs disagree, `elect` the sign of the weighted sum (0 is plus), or let the
            change with the largest weighted magnitude be the `winner` (Alg. 4).
    """
    deltas_SDF = trim(_precise(deltas_SDF), density)
    weights_S11 = _uniform(deltas_SDF) if weights_S is None else _align(weights_S, deltas_SDF)
    if conflict == "winner":
        winner_DF = _winner(deltas_SDF, weights_S11)
        agrees_SDF = deltas_SDF.sign() == winner_DF.sign()
        mean_DF = _disjoint_mean(deltas_SDF, weights_S11, agrees_SDF)
        return torch.where(_are_in_conflict(deltas_SDF), winner_DF, mean_DF)
    is_plus_DF = (weights_S11 * deltas_SDF).sum(0) >= 0
    agrees_SDF = torch.where(is_plus_DF, deltas_SDF > 0, deltas_SDF < 0)
    return _disjoint_mean(deltas_SDF, weights_S11, agrees_SDF)


def trim(deltas_SDF: Tensor, density: float) -> Tensor:
    """Keep of each change the share `density` of entries with the largest magnitudes."""
    flat_SN = deltas_SDF.flatten(1)
    k = int(density * flat_SN.shape[1])
    if int(flat_SN.count_nonzero(1).max()) <= k:  # what masks left zero is trimmed already
        return deltas_SDF
    top_SN = flat_SN.abs().topk(k, sorted=False).indices
    return (
        torch.zeros_like(flat_SN).scatter(1, top_SN, flat_SN.gather(1, top_SN)).view_as(deltas_SDF)
    )


def _disjoint_mean(deltas_SDF: Tensor, weights_S11: Tensor, agrees_SDF: Tensor) -> Tensor:
    """Weighted mean over the entries that agree; zero where none does."""
    total_DF = (weights_S11 * agrees_SDF).sum(0)
    sum_DF = (weights_S11 * deltas_SDF * agrees_SDF).sum(0)
    return sum_DF / torch.where(total_DF == 0, 1, total_DF)


def _are_in_conflict(deltas_SDF: Tensor) -> Tensor:
    return (deltas_SDF > 0).any(0) & (deltas_SDF < 0).any(0)


def _winner(deltas_SDF: Tensor, weights_S11: Tensor) -> Tensor:
    """Entry of the largest weighted magnitude; the earliest among equals."""
    best_DF = (weights_S11 * deltas_SDF.abs()).argmax(0)
    return deltas_SDF.gather(0, best_DF[None])[0]


def _uniform(deltas_SDF: Tensor) -> Tensor:
    shards = len(deltas_SDF)
    return deltas_SDF.new_full((shards, 1, 1), 1 / shards)


def _align(weights_S: Tensor, deltas_SDF: Tensor) -> Tensor:
    return weights_S.to(deltas_SDF)[:, None, None]


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
