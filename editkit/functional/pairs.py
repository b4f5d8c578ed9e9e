"""The regression of a site in kernel form: its pairs of key and wanted output, solved in N x N.

Relative to the base weight, the change Δ of all edits so far is one ridge regression: minimise
V |Δ K - T|^2 + kappa tr(Δ B Δ^T) over pairs of a key and the output wanted of it. Methods that
penalise increments and keep their past keys (MEMIT-seq, ENCORE, AlphaEdit) solve it too, with
kappa = 1 and T = Δ_before K + R: their steps are recursive least squares,
Δ_t A_t = Δ_t-1 A_t-1 + (Δ_t-1 K_t + R_t) K_t^T. LyapLock moves kappa, and after each batch puts the
outputs achieved in the place of those wanted. While kappa stands still, only the newest two batches
have targets that Δ does not fit already, and the update has their rank.

An edit is taken out by dropping its column and fitting the others again. Beyond F pairs
`functional.grams` is smaller and faster, and takes over.

Legend: F layer input, D layer output, E edits of a batch, N pairs so far, M columns of an update.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from editkit.functional.grams import Batch, Grams
from editkit.functional.queue import Queue
from editkit.functional.solve import kernel_update
from editkit.functional.spectral import Penalty


@dataclass(frozen=True)
class Pairs:
    """All pairs of a site, in order.

    Args:
        ids: Edit id of each column.
        sizes: Columns of each batch.
        queues: The queue that each batch was solved with.
        weights: The weight V that each batch was solved with.
        keys_FN: Keys, fp32 as the model gave them.
        wanted_DN: Outputs wanted, fp64, relative to the base weight.
        reached_DN: Outputs they are held at instead, once their batch is written.
        white_FN: Whitened keys, made where needed.
        gram_NN: Their Gram matrix.
    """

    ids: tuple[int, ...]
    sizes: tuple[int, ...]
    queues: tuple[Queue, ...]
    weights: tuple[float, ...]
    keys_FN: Tensor
    wanted_DN: Tensor
    reached_DN: Tensor | None = None
    white_FN: Tensor | None = None
    gram_NN: Tensor | None = None

    @classmethod
    def none(cls, shape_oi: tuple[int, int], device: torch.device | str) -> Pairs:
        """Return a site without a past."""
        outputs, inputs = shape_oi
        keys_FN = torch.zeros(inputs, 0, device=device)
        return cls((), (), (), (), keys_FN, keys_FN.new_zeros(outputs, 0, dtype=torch.float64))

    @property
    def count(self) -> int:
        """Number of pairs N."""
        return len(self.ids)

    @property
    def kappa(self) -> float | None:
        """The kappa that Δ was solved with."""
        return self.queues[-1].kappa if self.queues else None

    def step(self, batch: Batch, penalty: Penalty) -> tuple[Tensor, Pairs]:
        """Return the change [D, F] that a batch asks for, and the pairs with it.

        Raises:
            ValueError: If the solve is singular.
        """
        after = self.joined(batch, batch.wanted_DE).whitened(penalty)
        if batch.refit:
            targets_DN = torch.cat([self._held_DN, batch.wanted_DE], dim=1)
            return after._solve(targets_DN, penalty) - batch.delta_DF, after
        gap_DE = batch.resid_DE[:, :0]
        if self.reached_DN is not None:
            gap_DE = (self.reached_DN - self.wanted_DN)[:, self._newest :]
        return after._solve(torch.cat([gap_DE, batch.resid_DE], dim=1), penalty), after

    def joined(self, batch: Batch, wanted_DE: Tensor) -> Pairs:
        """Return the pairs with those of a batch behind them."""
        return replace(
            self,
            ids=self.ids + batch.ids,
            sizes=(*self.sizes, len(batch.ids)),
            queues=(*self.queues, batch.queue),
            weights=(*self.weights, batch.V),
            keys_FN=torch.cat([self.keys_FN, batch.keys_FE.to(self.keys_FN)], dim=1),
            wanted_DN=torch.cat([self.wanted_DN, wanted_DE.to(self.wanted_DN)], dim=1),
        )

    def settled(self, delta_DF: Tensor) -> Pairs:
        """Return the pairs with the newest outputs held where the written change has put them."""
        reached_DE = delta_DF @ self.keys_FN[:, self._newest :].to(delta_DF)
        before_DN = self._held_DN[:, : self._newest]
        return replace(self, reached_DN=torch.cat([before_DN, reached_DE], dim=1))

    def fit(self, penalty: Penalty) -> Tensor:
        """Return Δ [D, F] as the pairs determine it, with the newest batch's kappa and V."""
        if not self.ids:
            return self.wanted_DN @ self.keys_FN.to(self.wanted_DN).T
        held_DN = torch.cat(
            [self._held_DN[:, : self._newest], self.wanted_DN[:, self._newest :]], dim=1
        )
        return self.whitened(penalty)._solve(held_DN, penalty)

    def without(self, edit_id: int) -> Pairs:
        """Return the pairs without an edit's columns, and without its batch where that is empty."""
        kept = [n for n in range(self.count) if self.ids[n] != edit_id]
        gone = [self._batch_at(n) for n in range(self.count) if self.ids[n] == edit_id]
        sizes = [size - gone.count(i) for i, size in enumerate(self.sizes)]
        left = [i for i, size in enumerate(sizes) if size]
        return Pairs(
            ids=tuple(self.ids[n] for n in kept),
            sizes=tuple(sizes[i] for i in left),
            queues=tuple(self.queues[i] for i in left),
            weights=tuple(self.weights[i] for i in left),
            keys_FN=self.keys_FN[:, kept],
            wanted_DN=self.wanted_DN[:, kept],
            reached_DN=None if self.reached_DN is None else self.reached_DN[:, kept],
        )

    def is_together(self, edit_id: int) -> bool:
        """Whether all columns of an edit were written in one batch."""
        return len({self._batch_at(n) for n in range(self.count) if self.ids[n] == edit_id}) == 1

    def batch_of(self, edit_id: int) -> Pairs:
        """Return the pairs of one edit's batch alone."""
        number = self._batch_at(self.ids.index(edit_id))
        end = sum(self.sizes[: number + 1])
        part = slice(end - self.sizes[number], end)
        return Pairs(
            ids=self.ids[part],
            sizes=self.sizes[number : number + 1],
            queues=self.queues[number : number + 1],
            weights=self.weights[number : number + 1],
            keys_FN=self.keys_FN[:, part],
            wanted_DN=self.wanted_DN[:, part],
        )

    def summed(self) -> Grams:
        """Return the sums of the dense form over these pairs."""
        keys_FN = self.keys_FN.double()
        return Grams(
            count=self.count,
            keys_FF=keys_FN @ keys_FN.T,
            targets_DF=self._held_DN @ keys_FN.T,
            last_keys_FE=keys_FN[:, self._newest :],
            last_wanted_DE=self.wanted_DN[:, self._newest :],
            last_reached_DE=None if self.reached_DN is None else self.reached_DN[:, self._newest :],
            kappa=self.kappa,
        )

    def whitened(self, penalty: Penalty) -> Pairs:
        """Return the pairs with whitened keys; batch by batch, for the same bits after a resume."""
        white_FN, gram_NN = self.white_FN, self.gram_NN
        done = 0 if white_FN is None else white_FN.shape[1]
        for end, size in zip(accumulate(self.sizes), self.sizes, strict=True):
            if end <= done:
                continue
            white_FE = penalty.whiten(self.keys_FN[:, end - size : end].double())
            square_EE = white_FE.T @ white_FE
            if white_FN is None or gram_NN is None:
                white_FN, gram_NN = white_FE, square_EE
                continue
            cross_NE = white_FN.T @ white_FE
            lower = torch.cat([cross_NE.T, square_EE], dim=1)
            gram_NN = torch.cat([torch.cat([gram_NN, cross_NE], dim=1), lower])
            white_FN = torch.cat([white_FN, white_FE], dim=1)
        return replace(self, white_FN=white_FN, gram_NN=gram_NN)

    @property
    def _newest(self) -> int:
        """First column of the newest batch."""
        return self.count - (self.sizes[-1] if self.sizes else 0)

    @property
    def _held_DN(self) -> Tensor:
        return self.wanted_DN if self.reached_DN is None else self.reached_DN

    def _batch_at(self, column: int) -> int:
        return next(i for i, end in enumerate(accumulate(self.sizes)) if column < end)

    def _solve(self, resid_DM: Tensor, penalty: Penalty) -> Tensor:
        """Solve for the last M columns, by the newest batch's kappa and V."""
        assert self.white_FN is not None
        assert self.gram_NN is not None
        noise = self.queues[-1].kappa / self.weights[-1]
        return kernel_update(self.white_FN, self.gram_NN, resid_DM, noise, penalty)
