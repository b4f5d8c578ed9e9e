"""Batches of like samples (REPAIR, arXiv 2510.01879, section 2.4, eq. 5 and Alg. 3).

Legend: B samples, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def greedy_clusters(features_BD: Tensor, size: int) -> list[list[int]]:
    """Deal samples into batches: the most central one left, then those nearest to it by cosine.

    One Gram matrix; sums of cosines to what is left are kept running. Equals go to the earliest.

    Args:
        features_BD: Features of the samples.
        size: Most samples of a batch.

    Returns:
        Indices of each batch, its seed first.
    """
    unit_BD = F.normalize(features_BD.double(), dim=1)
    cosine_BB = unit_BD @ unit_BD.T
    sum_B = cosine_BB.sum(1)
    left_B = torch.ones(len(unit_BD), dtype=torch.bool, device=unit_BD.device)
    found = []
    for start in range(0, len(unit_BD), size):
        taken = min(size, len(unit_BD) - start)
        seed = int(sum_B.masked_fill(~left_B, -torch.inf).argmax())
        near_B = cosine_BB[seed].masked_fill(~left_B, -torch.inf)
        near_B[seed] = torch.inf
        batch_b = near_B.sort(descending=True, stable=True).indices[:taken]
        left_B[batch_b] = False
        sum_B -= cosine_BB[:, batch_b].sum(1)
        found.append(batch_b.tolist())
    return found
