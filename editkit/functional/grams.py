"""The regression of a site in dense form: sums over its past, solved in F x F.

See `functional.pairs` for the problem. Legend: F layer input, D layer output, E edits of a batch, M
columns of a low-rank update.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editkit.functional.queue import START, Queue
from editkit.functional.solve import dense_update, factor, woodbury
from editkit.functional.spectral import Penalty

LOW_RANK_STEPS = 64  # Woodbury steps on one inverse before it is computed afresh
LOW_RANK_SHARE = 18  # a Woodbury step costs 6 F^2 E, a factorisation F^3 / 3


@dataclass(frozen=True)
class Batch:
    """A batch of edits at one site.

    Args:
        ids: Edit ids.
        keys_FE: Keys, fp64.
        resid_DE: Wanted changes of their outputs, fp64.
        delta_DF: Change of the weight so far, fp64.
        V: Weight of the edits.
        queue: The site's queue; `START` where there is none.
        refit: Solve for Δ as a whole, as a moved kappa needs, not for its newest part.
    """

    ids: tuple[int, ...]
    keys_FE: Tensor
    resid_DE: Tensor
    delta_DF: Tensor
    V: float = 1.0
    queue: Queue = START
    refit: bool = False

    @property
    def wanted_DE(self) -> Tensor:
        """Outputs wanted of the keys, relative to the base weight."""
        return self.delta_DF @ self.keys_FE + self.resid_DE


@dataclass(frozen=True)
class Grams:
    """Sums over all pairs of a site; their size does not depend on the number of pairs.

    Args:
        count: Pairs summed up.
        keys_FF: Sum of k k^T, fp64 (paper: S).
        targets_DF: Sum of t k^T over the outputs that are held, relative to the base (paper: H).
        last_keys_FE: Keys of the newest batch.
        last_wanted_DE: Outputs wanted of them.
        last_reached_DE: Outputs they are held at instead, once the batch is written.
        kappa: The kappa that Δ was solved with.
        inverse_FF: Inverse of the Gram matrix with its penalty, kept while batches are small.
        age: Low-rank steps since that inverse was computed.
    """

    count: int
    keys_FF: Tensor
    targets_DF: Tensor
    last_keys_FE: Tensor
    last_wanted_DE: Tensor
    last_reached_DE: Tensor | None = None
    kappa: float | None = None
    inverse_FF: Tensor | None = None
    age: int = 0

    @classmethod
    def none(cls, shape_oi: tuple[int, int], device: torch.device | str) -> Grams:
        """Return a site without a past."""
        zeros_DF = torch.zeros(shape_oi, dtype=torch.float64, device=device)
        square_FF = zeros_DF.new_zeros(shape_oi[1], shape_oi[1])
        return cls(0, square_FF, zeros_DF, square_FF[:, :0], zeros_DF[:, :0])

    def step(self, batch: Batch, penalty: Penalty) -> tuple[Tensor, Grams]:
        """Return the change [D, F] that a batch asks for, and the sums with it.

        In a refit the moments of the penalty weigh Δ as a whole, but its plain norm (`shrink`)
        only what this batch adds.

        Raises:
            ValueError: If the solve is singular.
        """
        keys_FE, wanted_DE, kappa = batch.keys_FE, batch.wanted_DE, batch.queue.kappa
        after = Grams(
            count=self.count + len(batch.ids),
            keys_FF=self.keys_FF + keys_FE @ keys_FE.T,
            targets_DF=self.targets_DF + wanted_DE @ keys_FE.T,
            last_keys_FE=keys_FE,
            last_wanted_DE=wanted_DE,
            kappa=kappa,
        )
        if batch.refit:
            left_DF = after.targets_DF + penalty.shrink / batch.V * batch.delta_DF
            gram_FF = penalty.added_to(after.keys_FF, kappa, 1 / batch.V)
            return dense_update(left_DF, gram_FF) - batch.delta_DF, after
        keys_FM, resid_DM = keys_FE, batch.resid_DE
        if self.last_reached_DE is not None:
            keys_FM = torch.cat([self.last_keys_FE, keys_FE], dim=1)
            gap_DE = self.last_reached_DE - self.last_wanted_DE
            resid_DM = torch.cat([gap_DE, resid_DM], dim=1)
        after = self._inverted(after, batch, penalty)
        if after.inverse_FF is not None:
            return resid_DM @ (keys_FM.T @ after.inverse_FF), after
        gram_FF = penalty.added_to(after.keys_FF, kappa, 1 / batch.V)
        root_FF = factor(gram_FF, "keys and moments")
        return resid_DM @ torch.cholesky_solve(keys_FM, root_FF).T, after

    def _inverted(self, after: Grams, batch: Batch, penalty: Penalty) -> Grams:
        """Return `after` with its inverse, where keeping one costs less than factorising."""
        keys_FE, kappa = batch.keys_FE, batch.queue.kappa
        if LOW_RANK_SHARE * keys_FE.shape[1] >= keys_FE.shape[0]:
            return after
        if self.inverse_FF is not None and self.kappa == kappa and self.age < LOW_RANK_STEPS:
            inverse_FF = woodbury(self.inverse_FF, keys_FE)
            return replace(after, inverse_FF=inverse_FF, age=self.age + 1)
        gram_FF = penalty.added_to(after.keys_FF, kappa, 1 / batch.V)
        inverse_FF = torch.cholesky_inverse(factor(gram_FF, "keys and moments"))
        return replace(after, inverse_FF=inverse_FF)

    def settled(self, delta_DF: Tensor) -> Grams:
        """Return the sums with the newest outputs held where the written change has put them."""
        reached_DE = delta_DF @ self.last_keys_FE
        moved_DE = reached_DE - self.last_wanted_DE
        return replace(
            self,
            targets_DF=self.targets_DF + moved_DE @ self.last_keys_FE.T,
            last_reached_DE=reached_DE,
        )
