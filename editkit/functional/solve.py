"""Closed-form weight changes of the locate-then-edit family, in kernel and in dense form.

All of them are one ridge regression. Over changes X of a weight, minimise

    |X K - R|^2 + noise * tr(X B X^T)

with keys K, wanted changes of their outputs R and a penalty B (`editkit.functional.spectral`). With
B = L L^T and whitened keys L^-1 K this is X = R (K^T B^-1 K + noise I)^-1 K^T B^-1, an N x N solve
(kernel form), or X = R K^T (K K^T + noise B)^-1, an F x F solve (dense form). MEMIT (Meng et al.
2023, eq. 14) has noise 1 and B = ridge * C0, EMMET (Gupta et al. 2024) noise 0.1, ROME (Meng et al.
2022, eq. 2) is the limit noise -> 0 for one key. What a stream adds is in `functional.pairs` and
`functional.grams`.

Legend: F layer input, D layer output, N keys, M the last of them, E edits of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from editkit.functional.spectral import Penalty


def factor(gram_NN: Tensor, what: str) -> Tensor:
    """Return the lower Cholesky factor of a positive definite matrix.

    Args:
        gram_NN: Symmetric matrix.
        what: What it is made of, for the error.

    Raises:
        ValueError: If it is not positive definite or not finite.
    """
    root_NN: Tensor
    root_NN, info = torch.linalg.cholesky_ex(gram_NN)
    pivots_N = root_NN.diagonal().square()
    rounding = 8 * torch.finfo(gram_NN.dtype).eps * pivots_N.max()
    if int(info) != 0 or not bool((pivots_N > rounding).all()):  # nan compares false
        raise ValueError(
            f"cannot solve for {what}: their {gram_NN.shape[0]} x {gram_NN.shape[0]} Gram matrix "
            "is singular; a larger ridge, more corpus text or fewer edits about one subject help"
        )
    return root_NN


def kernel_update(
    white_FN: Tensor, gram_NN: Tensor, resid_DM: Tensor, noise: float, penalty: Penalty
) -> Tensor:
    """Return the change that moves the outputs of the last M of N keys by `resid_DM` [D, F].

    The other N - M keys are asked to stay. Costs N^3 / 3 + O(N F M); runs in the dtype of the
    whitened keys, and fp32 is enough for them once they were whitened in fp64.

    Args:
        white_FN: Whitened keys, `penalty.whiten(keys)`.
        gram_NN: Their Gram matrix.
        resid_DM: Wanted changes of the last M outputs.
        noise: Weight of the penalty against one key.
        penalty: What whitened the keys.

    Raises:
        ValueError: If the solve is singular: without noise, where keys depend on each other.
    """
    count, moved = gram_NN.shape[0], resid_DM.shape[1]
    eye_NN = torch.eye(count, dtype=gram_NN.dtype, device=gram_NN.device)
    root_NN = factor(gram_NN + noise * eye_NN, f"{count} keys")
    if moved <= resid_DM.shape[0]:
        gain_NM = torch.cholesky_solve(eye_NN[:, count - moved :], root_NN)
        return resid_DM @ penalty.lift(gain_NM.T @ white_FN.T)
    resid_DN = torch.nn.functional.pad(resid_DM, (count - moved, 0))
    return penalty.lift(torch.cholesky_solve(resid_DN.T, root_NN).T @ white_FN.T)


def dense_update(left_DF: Tensor, gram_FF: Tensor) -> Tensor:
    """Return `left_DF` times the inverse of `gram_FF`, by Cholesky in fp64 [D, F].

    Raises:
        ValueError: If the Gram matrix is not positive definite.
    """
    return torch.cholesky_solve(left_DF.T, factor(gram_FF, "keys and moments")).T


def woodbury(inverse_FF: Tensor, keys_FE: Tensor) -> Tensor:
    """Return (A + K K^T)^-1 from A^-1: 4 F^2 E operations instead of F^3.

    Raises:
        ValueError: If the result is not finite.
    """
    gain_FE = inverse_FF @ keys_FE
    eye_EE = torch.eye(keys_FE.shape[1], dtype=keys_FE.dtype, device=keys_FE.device)
    root_EE = factor(eye_EE + keys_FE.T @ gain_FE, f"{keys_FE.shape[1]} keys")
    half_EF = torch.linalg.solve_triangular(root_EE, gain_FE.T, upper=False)
    updated_FF: Tensor = inverse_FF - half_EF.T @ half_EF
    return updated_FF


def rome_residual(key_F1: Tensor, probe_F1: Tensor, resid_D1: Tensor, penalty: Penalty) -> Tensor:
    """Return the residual that moves `probe_F1`, not `key_F1`, by `resid_D1` [D, 1].

    ROME's direction u = C^-1 k comes from the key averaged over contexts, but the released code
    scales the change so that the bare prompt's key gets its value: (v - W k') / (u^T k').

    Raises:
        ValueError: If the two keys are orthogonal under C^-1.
    """
    white_F1, probe_F1 = penalty.whiten(key_F1), penalty.whiten(probe_F1)
    overlap = float((white_F1 * probe_F1).sum())
    if overlap == 0:
        raise ValueError("the subject's key in context has nothing in common with its bare key")
    return resid_D1 * float(white_F1.square().sum()) / overlap


def keep_largest(change_DF: Tensor, weight_DF: Tensor, keep: float) -> Tensor:
    """Zero all but the share `keep` of entries that are largest relative to the weight [D, F].

    RECT (Gu et al. 2024, eq. 7) ranks |change / weight|; the released MEMIT form adds 1e-8 to the
    weight, takes the order statistic int((1 - keep) * size) and keeps what is at least that.

    Raises:
        ValueError: If `keep` is not in (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; it is a share in (0, 1]")
    score_DF = (change_DF / (weight_DF + 1e-8)).abs()
    rank = max(1, int(round(1 - keep, 12) * score_DF.numel()))
    return torch.where(score_DF >= score_DF.flatten().kthvalue(rank).values, change_DF, 0.0)


def turned_away(gram_FF: Tensor) -> Tensor:
    """Return (1 + C)^-1, which turns gradients [D, F] away from inputs to be left alone.

    C is the weighted sum of x x^T over those inputs, whose outputs are to stay: the projection of
    orthogonal weights modification (Zeng et al. 2019, arXiv 1810.01256) and the gain of recursive
    least squares. Of a gradient along one input of weight w the share 1 / (1 + w) is left, and all
    of it across the inputs.
    """
    one_FF = torch.eye(len(gram_FF)).to(gram_FF)
    return torch.cholesky_inverse(torch.linalg.cholesky(one_FF + gram_FF))
