"""Second moments as penalties: whitening, null spaces, preservation loss, singular values.

Moments are non-centred means over tokens, C0 = E[k k^T], of the unedited model's keys. All of it
runs in fp64. Legend: F layer input, D layer output, E keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

WORST_CONDITION = 1e12  # beyond it an fp64 solve has fewer than four digits


@dataclass(frozen=True)
class Penalty:
    """What holds a weight change X back: tr(X B X^T) with B = ridge * cov + shrink * I.

    Args:
        cov_FF: Second moments C0, fp64; None where the penalty is `shrink` alone.
        ridge: Weight of the moments (paper: lambda).
        shrink: Weight of the plain norm (ENCORE: lambda_n, AlphaEdit: L2).

    Raises:
        ValueError: If a weight is negative or nothing holds the change back.
    """

    cov_FF: Tensor | None
    ridge: float
    shrink: float = 0.0

    def __post_init__(self) -> None:
        total = self.shrink + (self.ridge if self.cov_FF is not None else 0.0)
        if self.ridge < 0 or self.shrink < 0 or total == 0:
            raise ValueError(
                f"the ridge is {self.ridge} and the norm's weight {self.shrink}; neither may be "
                "negative and one must be above 0"
            )

    @cached_property
    def map_FF(self) -> Tensor:
        """Inverse of the Cholesky factor of B; computed once, an F x F triangle."""
        root_FF = torch.linalg.cholesky(self.added_to(torch.zeros_like(self._cov), 1.0, 1.0))
        eye_FF = torch.eye(root_FF.shape[0], dtype=root_FF.dtype, device=root_FF.device)
        inverse_FF: Tensor = torch.linalg.solve_triangular(root_FF, eye_FF, upper=False)
        return inverse_FF

    def whiten(self, keys_FE: Tensor) -> Tensor:
        """Return keys in coordinates where B is the identity: L^-1 K with B = L L^T."""
        if self.cov_FF is None:
            return keys_FE / math.sqrt(self.shrink)
        return self.map_FF.to(keys_FE.dtype) @ keys_FE

    def lift(self, rows_EF: Tensor) -> Tensor:
        """Return rows of a change given in whitened coordinates as rows of a weight: X L^-1."""
        if self.cov_FF is None:
            return rows_EF / math.sqrt(self.shrink)
        return rows_EF @ self.map_FF.to(rows_EF.dtype)

    def added_to(self, gram_FF: Tensor, kappa: float, noise: float) -> Tensor:
        """Return gram + noise * (kappa * ridge * cov + shrink * I) [F, F]."""
        total_FF = gram_FF.clone()
        if self.cov_FF is not None:
            total_FF.add_(self.cov_FF, alpha=noise * kappa * self.ridge)
        total_FF.diagonal().add_(noise * self.shrink)
        return total_FF

    @property
    def _cov(self) -> Tensor:
        if self.cov_FF is None:
            raise ValueError("a penalty without moments has no Cholesky factor of its own")
        return self.cov_FF


def stabilised(cov_FF: Tensor) -> tuple[Tensor, float]:
    """Return moments that can be inverted in fp64, and what was added to their diagonal.

    Moments of fewer tokens than inputs are singular. The smallest power of ten times the mean
    eigenvalue that brings the condition below 1e12 is added; nothing where they are fine.

    Args:
        cov_FF: Second moments, any precision.

    Raises:
        ValueError: If they are not finite or all zero.
    """
    cov_FF = cov_FF.double()
    scale = float(cov_FF.diagonal().mean())
    if not 0 < scale < float("inf"):
        raise ValueError(f"the mean second moment of a key is {scale}; the statistics are damaged")
    for jitter in (0.0, *(10.0**power * scale for power in range(-12, 1))):
        tried_FF = cov_FF.clone()
        tried_FF.diagonal().add_(jitter)
        root_FF, info = torch.linalg.cholesky_ex(tried_FF)
        pivots_F = root_FF.diagonal().square()
        if int(info) == 0 and float(pivots_F.max() / pivots_F.min()) < WORST_CONDITION:
            return tried_FF, jitter
    raise ValueError("the second moments are not positive; measure the statistics again")


def null_projector(cov_FF: Tensor, threshold: float) -> Tensor:
    """Return the projector on the eigenvectors of the moments below a threshold [F, F].

    AlphaEdit (Fang et al. 2025, eq. 5 and its code's absolute threshold on the mean per token).

    Raises:
        ValueError: If no eigenvalue is below it.
    """
    values_F, vectors_FF = torch.linalg.eigh(cov_FF.double())
    basis_FN = vectors_FF[:, values_F < threshold]
    if basis_FN.shape[1] == 0:
        raise ValueError(
            f"no direction of the keys has a second moment below nullspace_threshold {threshold}; "
            f"here they go from {float(values_F[0]):.3g} to {float(values_F[-1]):.3g}, choose a "
            "threshold between"
        )
    projector_FF: Tensor = basis_FN @ basis_FN.T
    return projector_FF


def preservation_loss(delta_DF: Tensor, cov_FF: Tensor) -> float:
    """Return E|(W - W0) k0|^2 = tr(Δ C0 Δ^T), from Δ itself (LyapLock's PL).

    The released trace form subtracts large numbers of fp32 moments and may turn out negative.
    """
    delta_DF = delta_DF.double()
    return max(0.0, float((delta_DF @ cov_FF * delta_DF).sum()))


def compressed(delta_DF: Tensor, largest: float) -> Tensor:
    """Return a change whose singular values above `largest` grow only with their logarithm.

    PRUNE (Ma et al. 2025, eq. 9): sigma becomes log(sigma) - log(largest) + largest.

    Args:
        delta_DF: Change of a weight by all edits.
        largest: Largest singular value of the base weight.
    """
    left_DN, sigma_N, right_NF = torch.linalg.svd(delta_DF.double(), full_matrices=False)
    squeezed_N = sigma_N.clamp_min(largest).log() - torch.log(sigma_N.new_tensor(largest)) + largest
    pressed_DF: Tensor = left_DN * torch.where(sigma_N > largest, squeezed_N, sigma_N) @ right_NF
    return pressed_DF


def low_rank(matrix_DF: Tensor, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Split a matrix into factors [D, R] and [R, F] of the rank R it has (Eckart and Young, 1936).

    Args:
        matrix_DF: The matrix.
        tolerance: Singular values at or below this part of the largest are rounding; none of a
            matrix of zeros is left but one.
    """
    left_DR, values_R, right_RF = torch.linalg.svd(matrix_DF.double(), full_matrices=False)
    rank = max(1, int((values_R > tolerance * values_R[0]).sum()))
    root_R = values_R[:rank].sqrt()
    factors = left_DR[:, :rank] * root_R, root_R[:, None] * right_RF[:rank]
    return factors[0].to(matrix_DF.dtype), factors[1].to(matrix_DF.dtype)
