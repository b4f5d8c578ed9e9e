"""MEMIT-seq: MEMIT that holds the outputs of all earlier keys, too.

Source: MEMIT (Meng et al. 2023) with the sequential term of AlphaEdit's repository; released code
wpwpwpyo/LyapLock@c5e6186 (memit/memit_seq_main.py).

Equation, per layer: Δ = R K^T (lambda C0 + S + K K^T)^-1, S the sum of k k^T over earlier batches.

Deviations:
    - The released code computes the batch's keys once more after the last layer to add them to S;
      they have not changed, so the ones at hand are added.
    - As MEMIT's: statistics in fp64 and before the stream, Cholesky, a logged diagonal where
      moments are singular. With N <= F keys so far the system is N x N, beyond it F x F.

Undo drops an edit's key and value and fits the pairs that remain again, exactly: the steps are
recursive least squares on the values wanted at the time. Later values were searched for with the
edit in place, so this is not the model that never saw it, except for the newest edits. Refused
beyond F edits and for a loaded run.

Costs: as MEMIT, plus per layer N (12 F + 8 D) + 8 N^2 bytes for N <= F edits, beyond F sums of
8 (2 F^2 + D F); both twice while a batch is written. A batch costs O(F^2 E + N^2 E), from
N = F on no more as the stream grows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from editkit.functional.regression import Rules
from editkit.functional.spectral import Penalty
from editkit.lm.sites import Site
from editkit.methods.locate import LocateThenEdit


class MEMITSeq(LocateThenEdit):
    """Writes batches by ridge regression against a corpus and all earlier keys.

    Args:
        ridge: Weight of the corpus against the keys (paper: lambda).
    """

    def __init__(self, ridge: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ridge = ridge

    @property
    def rules(self) -> Rules:
        """Remember all keys."""
        return Rules(remembers=True)

    def penalty(self, site: Site, cov_FF: Tensor) -> Penalty:
        """Return lambda C0."""
        return Penalty(cov_FF, self.ridge)
