"""Losses that editing methods minimise. Legend: B rows, N target tokens, V vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def target_nll(logits_NV: Tensor, ids_N: Tensor, rows_N: Tensor, n_rows: int) -> Tensor:
    """Mean negative log likelihood of each row's target tokens, in nats, fp32 [B].

    The conditional likelihood -1/|y| log p(y | x) that FT-M, LoRA, WISE and MEMOIR minimise and
    ROME's eq. 4 starts from.

    Args:
        logits_NV: Logits that predict the target tokens of all rows, row by row.
        ids_N: Target token ids.
        rows_N: Row of each target token.
        n_rows: Number of rows B; each must own at least one target token.
    """
    nll_N = F.cross_entropy(logits_NV.float(), ids_N, reduction="none")
    total_B = nll_N.new_zeros(n_rows).index_add(0, rows_N, nll_N)
    count_B = nll_N.new_zeros(n_rows).index_add(0, rows_N, nll_N.new_ones(nll_N.shape))
    return total_B / count_B


def kl_from(start_BV: Tensor, logits_BV: Tensor) -> Tensor:
    """KL(p || p_start) of each row's distribution from where it started, in nats, fp32 [B].

    What holds the subject's essence in ROME's eq. 4.

    Args:
        start_BV: Log probabilities at the start.
        logits_BV: Logits now.
    """
    now_BV = logits_BV.float().log_softmax(-1)
    return (now_BV.exp() * (now_BV - start_BV)).sum(-1)


def dpo_loss(
    better_B: Tensor, worse_B: Tensor, ref_better_B: Tensor, ref_worse_B: Tensor, beta: float
) -> Tensor:
    """Loss of each pair of answers under direct preference optimisation, [B].

    -log sigmoid(beta [(log p(y_w) - log p_ref(y_w)) - (log p(y_l) - log p_ref(y_l))])
    (Rafailov et al. 2023, eq. 7).

    Args:
        better_B: Log-likelihood of the preferred answers.
        worse_B: Log-likelihood of the others.
        ref_better_B: The same under the reference, the model before training.
        ref_worse_B: The same under the reference.
        beta: Weight of staying near the reference.
    """
    return -F.logsigmoid(beta * ((better_B - ref_better_B) - (worse_B - ref_worse_B)))
