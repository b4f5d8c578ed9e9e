"""AlphaEdit: write only into directions of the keys that a corpus does not use.

Source: Fang et al. 2025 (arXiv 2410.02355), eqs. 5-14; released code
jianghoucheng/AlphaEdit@f5248d3 (AlphaEdit/AlphaEdit_main.py, experiments/evaluate.py).

Equation, per layer: Δ^T = (P (K K^T + S) + L2 I)^-1 P K R^T, with P the projector on the
eigenvectors of C0 = E[k k^T] below `nullspace_threshold` and S the sum of k k^T over earlier
batches. On projected keys P K this is ridge regression with the penalty L2 I, which is how it is
solved here.

Deviations:
    - fp64 and Cholesky; the released code solves a non-symmetric F x F system in fp32.
    - A threshold below all eigenvalues is an error; the released code then edits nothing.
    - With `queue` (reconstructed) kappa lambda tr(Δ C0 Δ^T) is added on the whole change, where it
      weighs what leaks through the projection, and L2 still weighs increments; solved in F x F.

Undo as MEMIT-seq's: an exact re-fit to the pairs that remain. Refused with a queue.

Costs: per layer one eigendecomposition of F x F in fp64 at the start, and P. Then as MEMIT-seq.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from editkit.functional.queue import QueueSettings
from editkit.functional.regression import Rules
from editkit.functional.spectral import Penalty, null_projector
from editkit.lm.sites import Site
from editkit.methods.locate import LocateThenEdit


class AlphaEdit(LocateThenEdit):
    """Writes batches into the null space of a corpus' keys.

    Args:
        nullspace_threshold: Directions with a second moment below this, per token, may be changed.
        l2: Weight of the change's squared norm (paper: the identity in eq. 14).
        ridge: Weight of the corpus, used with a queue only.
        queue: LyapLock's queue on top, reconstructed.
    """

    def __init__(
        self,
        nullspace_threshold: float = 2e-2,
        l2: float = 10.0,
        ridge: float = 15000.0,
        queue: QueueSettings | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not l2 > 0:
            raise ValueError(f"l2 is {l2}; it must be above 0")
        self.nullspace_threshold = nullspace_threshold
        self.l2 = l2
        self.ridge = ridge
        self.queue = queue
        self.projectors: dict[str, Tensor] = {}

    @property
    def rules(self) -> Rules:
        """Remember all keys."""
        return Rules(remembers=True, queue=self.queue, shrinks=True)

    def penalty(self, site: Site, cov_FF: Tensor) -> Penalty:
        """Return L2 I; with a queue also lambda P C0 P. Finds the projector on the way."""
        projector_FF = null_projector(cov_FF, self.nullspace_threshold)
        self.projectors[site.path] = projector_FF
        if self.queue is None:
            return Penalty(None, 0.0, self.l2)
        return Penalty(projector_FF @ cov_FF @ projector_FF, self.ridge, self.l2)

    def solve(self, site: Site, keys_FE: Tensor, resid_DE: Tensor) -> Tensor:
        """Solve for projected keys."""
        return super().solve(site, self.projectors[site.path] @ keys_FE, resid_DE)
