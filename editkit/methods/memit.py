"""MEMIT: many facts at once, spread over several layers, by ridge regression.

Idea: the keys of a corpus are told to stay where they are, with weight lambda; within that, each
layer moves the outputs of the new keys by its share of what is missing.

Source: Meng et al. 2023 (arXiv 2210.07229), eq. 14; released code kmeng01/memit, and its copy in
wpwpwpyo/LyapLock@c5e6186 (memit/memit_main.py).

Equation, per layer: Δ = R K^T (lambda C0 + K K^T)^-1, C0 = E[k k^T] (`functional.solve`).

Deviations:
    - C0 is fp64 and measured before the stream on the unedited model; the released code rounds it
      to fp32 and, with a cold cache, measures later layers when lower ones are edited already.
    - Solved as an E x E system with a Cholesky factor of lambda C0, F x F only where E > F.
    - Singular moments get a small diagonal, which is logged; the released code adds none.
    - With `queue` (reconstructed: LyapLock's paper claims it, its code does not have it) the
      penalty is kappa lambda tr(Δ C0 Δ^T) on the whole change, not on the increment. MEMIT has no
      memory of its keys, so this pulls every earlier batch back to the base model and only the
      newest is kept; to keep the others too, take `LyapLock`, at MEMIT's ridge if need be.

Undo takes an edit's column out of its batch and solves that batch again, exactly; later batches
stay as they were solved. Refused beyond F edits, with a queue, and for edits of a loaded run.

Costs: per layer one F x F Cholesky factor in fp64 at the start; a batch is then 4 F^2 E operations.
Memory: C0 and its inverse factor (F^2 fp64 each), the change (D F fp32), and for undo the pairs of
up to F edits on the CPU (4 F + 8 D bytes each, twice while a batch is written).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from editkit.functional.queue import QueueSettings
from editkit.functional.regression import Rules
from editkit.functional.spectral import Penalty
from editkit.lm.sites import Site
from editkit.methods.locate import LocateThenEdit


class MEMIT(LocateThenEdit):
    """Writes a batch of facts by ridge regression against a corpus.

    Args:
        ridge: Weight of the corpus against the new keys (paper: lambda).
        queue: LyapLock's queue on top, reconstructed; none leaves the ridge as it is. Its `history`
            has nothing to act on here.
    """

    def __init__(self, ridge: float, queue: QueueSettings | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if queue is not None and queue.history != "achieved":
            raise ValueError(
                f"queue.history is {queue.history!r}, and MEMIT holds no earlier edits at any "
                "outputs; leave history out, or take LyapLock, which remembers them"
            )
        self.ridge = ridge
        self.queue = queue

    @property
    def rules(self) -> Rules:
        """No memory of earlier batches."""
        return Rules(queue=self.queue)

    def penalty(self, site: Site, cov_FF: Tensor) -> Penalty:
        """Return lambda C0."""
        return Penalty(cov_FF, self.ridge)
