"""PRUNE: MEMIT whose whole change is compressed once the stream is over.

Idea: long streams fail by a few singular values of the change that outgrow the weight's own.

Source: Ma et al. 2025 (arXiv 2405.16821), eq. 9; the MEMIT form of wpwpwpyo/LyapLock@c5e6186
(memit/memit_prune_main.py).

Equation, per layer, at the end: Δ = U diag(s) V^T; each s above the largest singular value m of W0
becomes log(s) - log(m) + m.

Deviations:
    - W0 + f(Δ) is written. The released code adds f(Δ) to the edited weights, W0 + Δ + f(Δ), which
      is not its equation and edits twice; there is no switch to do so.
    - Statistics and solves as MEMIT's. With `queue` (reconstructed) the change is LyapLock's, with
      its memory of earlier keys; the queue sees the drift before compression.
    - The change before compression is kept in checkpoints, so a stream may be resumed after its
      end and is then compressed again as a whole. Without a Trainer, `lm.method.finish()` ends a
      stream; a next edit goes on from the whole change.

Undo as MEMIT's (with a queue as LyapLock's), on the change before compression.

Costs: as MEMIT; one SVD of D x F a layer at the end, and a second copy of the change from then on.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from editkit.edits import Edit
from editkit.functional.queue import QueueSettings
from editkit.functional.regression import Rules
from editkit.functional.spectral import Penalty, compressed
from editkit.lm.sites import Site
from editkit.methods.locate import LocateThenEdit


class PRUNE(LocateThenEdit):
    """Writes as MEMIT does, and compresses large singular values of the change at the end.

    Args:
        ridge: Weight of the corpus against the new keys (paper: lambda).
        queue: LyapLock's queue on top, reconstructed; none leaves the ridge as it is.
    """

    needs_past: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = True

    def __init__(self, ridge: float, queue: QueueSettings | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ridge = ridge
        self.queue = queue
        self.whole: dict[str, Tensor] = {}  # changes before compression, once that is done

    @property
    def rules(self) -> Rules:
        """Remember keys with a queue only."""
        return Rules(remembers=self.queue is not None, queue=self.queue)

    def penalty(self, site: Site, cov_FF: Tensor) -> Penalty:
        """Return lambda C0."""
        return Penalty(cov_FF, self.ridge)

    def on_train_batch_start(self, *args: Any) -> None:
        """Go on from the whole change where a stream is resumed after its end."""
        if self.whole:
            self._unfold()
            for layer in self.deltas.values():
                layer.commit()
            self.whole = {}

    def edit(self, edits: list[Edit]) -> dict[str, float]:
        """Edit as MEMIT does, from the whole change where the stream goes on after its end."""
        self._unfold()
        numbers = super().edit(edits)
        self.whole = {}
        return numbers

    @torch.no_grad()
    def finish(self) -> None:
        """Compress the changes of all sites."""
        if self.whole:
            return
        for site in self.sites:
            layer = self.deltas[site.path]
            whole_DF = self.whole[site.path] = layer.delta.detach().clone()
            largest = float(torch.linalg.matrix_norm(layer.weight_oi.float(), ord=2))
            layer.open()["delta"].copy_(compressed(whole_DF, largest))
            layer.commit()

    def undo(self, edit_id: int) -> None:
        """Take one edit out of the whole change, then compress it again if it was."""
        was_finished = bool(self.whole)
        self._unfold()
        super().undo(edit_id)
        self.whole = {}
        if was_finished:
            self.finish()

    @torch.no_grad()
    def _unfold(self) -> None:
        """Put the whole changes into the layers' scratch."""
        for path, whole_DF in self.whole.items():
            self.deltas[path].open()["delta"].copy_(whole_DF)

    def stream_state(self) -> dict[str, Any]:
        """Return the family's state and the changes before compression."""
        return {**super().stream_state(), "whole": self.whole}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take the state back."""
        super().load_stream_state(state)
        self.whole = dict(state["whole"])
