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


def mean_active(hinge_EN: Tensor) -> Tensor:
    """Mean of each row's positive entries, 0 where there are none [E]; WISE averages hinges so."""
    return hinge_EN.sum(1) / (hinge_EN > 0).sum(1).clamp_min(1)


def activation_margins(
    inside_ER: Tensor, outside_EN: Tensor, outside: float, inside: float, apart: float
) -> Tensor:
    """Hinges that part the scores of edits from those of unrelated texts [E] (WISE, eq. 6).

    mean+[out - alpha] + mean+[beta - in] + mean+[gamma + out - in], each over its positive entries.

    Args:
        inside_ER: Routing scores of each edit's rows.
        outside_EN: Routing scores of the unrelated texts that each edit is held against.
        outside: Score that unrelated texts should stay below (alpha; REPAIR: gamma_1).
        inside: Score that an edit's rows should reach (beta; gamma_2).
        apart: Distance between the two (gamma).
    """
    gap_EX = (apart + outside_EN[:, None] - inside_ER[:, :, None]).flatten(1)
    return (
        mean_active((outside_EN - outside).relu())
        + mean_active((inside - inside_ER).relu())
        + mean_active(gap_EX.relu())
    )


def cosine_to(seed_D: Tensor, found_BD: Tensor) -> Tensor:
    """1 - cos of each row to a seed, from 0 to 2 [B]; REPAIR's consistency (section 2.4)."""
    return 1 - F.cosine_similarity(found_BD, seed_D.expand_as(found_BD), dim=-1, eps=1e-12)


def inner_distillation(found_BD: Tensor, cosine: float, variance: float) -> Tensor:
    """Draw a batch towards its first row (REPAIR, eq. 7), a scalar.

    cosine / (b-1) sum_i (1 - <o_i, o_0>) + variance / b sum_i |o_i - mean(o)|^2 with o of unit
    norm. The first row and the mean are teachers: no gradient reaches them.

    Args:
        found_BD: Features of a batch, the seed first; 0 where there is nothing beside it.
        cosine: Weight of the cosines (lambda).
        variance: Weight of the variance (vartheta).
    """
    if len(found_BD) < 2:
        return found_BD.sum() * 0
    unit_BD = F.normalize(found_BD, dim=-1)
    pulled = cosine_to(unit_BD[0].detach(), unit_BD[1:]).mean()
    spread = (unit_BD - unit_BD.mean(0).detach()).square().sum(-1).mean()
    return cosine * pulled + variance * spread
