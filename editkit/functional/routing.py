"""Routing scores of side memories (WISE, arXiv 2405.14768; REPAIR, arXiv 2510.01879, eq. 2-3).

Legend: B rows, T tokens, D layer output, P memories ("pools"), C kept inputs, M main directions,
R random rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

LONG = 100  # tokens from which the released code takes the largest norm, not the mean
TINY = torch.finfo(torch.float32).tiny


def mean_norms(change_BTD: Tensor, counted_BT: Tensor) -> Tensor:
    """Mean over the counted tokens of how far a memory moves the layer's output, fp32 [B].

    Args:
        change_BTD: What the memory adds to the output at each token; [B, T, P, D] gives [B, P].
        counted_BT: Tokens that count, at least one a row.
    """
    norm_BT: Tensor = torch.linalg.vector_norm(change_BTD.float(), dim=-1)
    counted_BT = counted_BT.view(*counted_BT.shape, *(1,) * (norm_BT.ndim - 2))
    return (norm_BT * counted_BT).sum(1) / counted_BT.sum(1)


def largest_norms(change_BTD: Tensor, counted_BT: Tensor) -> Tensor:
    """Largest norm over the counted tokens [B], as WISE is released for texts above 100 tokens."""
    norm_BT: Tensor = torch.linalg.vector_norm(change_BTD.float(), dim=-1)
    counted_BT = counted_BT.view(*counted_BT.shape, *(1,) * (norm_BT.ndim - 2))
    return norm_BT.masked_fill(~counted_BT, 0).amax(1)


def sketch(delta_DC: Tensor, start_MD: Tensor, random_RD: Tensor, wider: float) -> Tensor:
    """Return rows [M + R, C] whose product with an input bounds the norm of a change's own.

    The first M are the change's coordinates in orthonormal directions in which it moves most, by
    one step of subspace iteration (Halko, Martinsson & Tropp 2011): |first x| <= |delta x|.
    The others mix at random what those leave out: their squared norm is wider^2 times that of the
    rest, in the mean, and of it a chi^2 of R degrees over R (Johnson & Lindenstrauss 1984), so
    |all x| < |delta x| only where chi^2 < R / wider^2.

    Args:
        delta_DC: The change, fp32.
        start_MD: Where the directions start from; M is at most D and C.
        random_RD: Standard normal numbers that neither the change nor inputs depend on.
        wider: Factor of the random rows.
    """
    inward_CM = torch.linalg.qr((start_MD @ delta_DC).T).Q
    outward_DM = torch.linalg.qr(delta_DC @ inward_CM).Q
    main_MC = outward_DM.T @ delta_DC
    rest_RC = random_RD @ delta_DC - (random_RD @ outward_DM) @ main_MC
    return torch.cat([main_MC, wider * len(random_RD) ** -0.5 * rest_RC])


def pick_relative(score_BP: Tensor, threshold_P: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the memory whose score is the largest multiple of its threshold.

    Returns:
        Its index, or -1 where that multiple is at most one, int64 [B]; and the multiple [B].
    """
    ratio_B, pool_B = (score_BP / threshold_P.clamp_min(TINY)).max(1)
    return pool_B.where(ratio_B > 1, -1), ratio_B


def pick_typical(score_BP: Tensor, threshold_P: Tensor, typical_P: Tensor) -> tuple[Tensor, Tensor]:
    """Choose, of the memories whose threshold is exceeded, the one that is most in its own.

    A memory whose edits score very differently has a low threshold, of which the prompts of other
    memories can be large multiples; they are not of its typical score.

    Args:
        score_BP: Routing scores.
        threshold_P: Threshold of each memory.
        typical_P: Mean score of each memory's own edits.

    Returns:
        Index or -1, int64 [B]; and the multiple of its threshold, or the largest of all, fp32 [B].
    """
    ratio_BP = score_BP / threshold_P.clamp_min(TINY)
    share_BP = (score_BP / typical_P.clamp_min(TINY)).masked_fill(ratio_BP <= 1, -1)
    best_B, pool_B = share_BP.max(1)
    is_found_B, ratio_B = best_B >= 0, ratio_BP.gather(1, pool_B[:, None])[:, 0]
    return pool_B.where(is_found_B, -1), ratio_B.where(is_found_B, ratio_BP.amax(1))


def pick_released(score_BP: Tensor, threshold_P: Tensor, open_P: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the memory with the largest score, as WISE's released code does.

    The memory that is being written comes first, and its score must be beaten by the others even
    where it does not reach its own threshold. Several of them count as one.

    Args:
        score_BP: Routing scores.
        threshold_P: Threshold of each memory.
        open_P: Which memory is being written.

    Returns:
        Its index or -1, int64 [B]; and the multiple of its threshold [B].
    """
    live_BP = score_BP.masked_fill(~open_P, 0)
    passes_BP = torch.where(open_P, score_BP >= threshold_P, score_BP > threshold_P)
    passes_BP &= open_P | (score_BP > live_BP.amax(1, keepdim=True))
    ranked_BP = score_BP.masked_fill(~passes_BP, -1)
    best_B, pool_B = ranked_BP.max(1)
    ratio_BP = score_BP / threshold_P.clamp_min(TINY)
    ratio_B = ratio_BP.gather(1, pool_B[:, None])[:, 0]
    is_found_B = best_B >= 0
    return pool_B.where(is_found_B, -1), ratio_B.where(is_found_B, ratio_BP.amax(1))
