"""LyapLock: hold the drift of a long stream within a budget, by a queue that weighs it.

Idea: besides the new facts, keep what earlier batches achieved and pull the weights back to the
base model; the weight of that pull, kappa, grows while the drift is above its budget.

Source: Wang et al. 2025 (arXiv 2505.15702), eqs. 6-12; released code wpwpwpyo/LyapLock@c5e6186
(lyaplock/lyaplock_main.py).

Equations, per layer, with Δ the change since the base model and C0 = E[k k^T]:
    minimise V |Δ K - (Δ_t-1 K + R)|^2 + V sum_s |Δ K_s - Δ_s K_s|^2 + kappa lambda tr(Δ C0 Δ^T)
    PL = tr(Δ C0 Δ^T),  D = alpha PL_1,  kappa <- max(kappa + PL / D - 1, 1)
in `functional.pairs` (kernel form, N <= F), `functional.grams` (dense form) and `functional.queue`.

Deviations:
    - kappa = a Z in place of Z, a and the floor: the same numbers (tested).
    - PL from Δ itself in fp64; the released trace form subtracts large fp32-rounded numbers.
    - C0 alone is measured, in fp64, before the stream: E[v k^T] = W0 C0 and E[v v^T] = W0 C0 W0^T.
    - Δ is kept in fp32 beside the base weights and rounded once per batch.
    - `history: desired` holds what was wanted instead of what was achieved, `D` gives the budget
      itself, `d_base_edits` takes PL_1 later, `kappa_max` caps kappa; all off as released.

Undo drops an edit's pair and fits the pairs that remain again, exactly, with the kappa of the last
batch among them; a last batch taken out as a whole takes its step of the queue with it, and leaves
the state before it. Later values were searched for with the edit in place, so this is not the model
that never saw it. Refused beyond F edits and for a loaded run.

Costs: per layer F^2 fp64 twice (C0 and its inverse factor), and for N <= F edits N (12 F + 16 D) +
8 N^2 bytes, beyond F sums of 8 (2 F^2 + D F); both twice while a batch is written. A batch costs
N^3 / 3 + O(F^2 E), and O(D F^2) where kappa has moved; dense F^3 / 3, or 6 F^2 E while kappa stands
still and batches are small.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from editkit.functional.queue import QueueSettings
from editkit.functional.regression import Rules
from editkit.functional.spectral import Penalty
from editkit.lm.sites import Site
from editkit.methods.locate import LocateThenEdit


class LyapLock(LocateThenEdit):
    """Writes batches within a budget of drift from the base model.

    Args:
        ridge: Weight of the corpus against the keys at kappa = 1 (paper: lambda).
        V: Weight of the edits; only its ratio to the ridge counts.
        alpha: Budget in units of the first batch's preservation loss: D = alpha * PL_1.
        D: Budget itself, the mean square change of a layer's outputs; alpha and d_base_edits are
            then ignored. None takes it from alpha.
        d_base_edits: Number of edits after which PL_1 is taken, so that single edits get the
            budget of batches; none takes it after the first batch.
        kappa_max: Highest kappa; none leaves it unbounded, as the bound on the drift needs.
        history: Hold earlier edits at the outputs they achieved, or at those desired.
    """

    def __init__(
        self,
        ridge: float = 1000.0,
        V: float = 1.0,
        alpha: float = 60.0,
        D: float | None = None,
        d_base_edits: int | None = None,
        kappa_max: float | None = None,
        history: Literal["achieved", "desired"] = "achieved",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ridge = ridge
        self.V = V
        self.alpha = alpha
        self.D = D
        self.d_base_edits = d_base_edits
        self.kappa_max = kappa_max
        self.history = history
        self.settings = QueueSettings(alpha, D, d_base_edits, kappa_max, V, history)

    @property
    def rules(self) -> Rules:
        """Remember all keys, and hold the whole change back."""
        return Rules(remembers=True, queue=self.settings)

    def penalty(self, site: Site, cov_FF: Tensor) -> Penalty:
        """Return lambda C0."""
        return Penalty(cov_FF, self.ridge)
