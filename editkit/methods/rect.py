"""RECT: MEMIT that writes only the entries of its change that are largest for their weight.

Source: Gu et al. 2024 (arXiv 2401.04700), eq. 7; the MEMIT form of wpwpwpyo/LyapLock@c5e6186
(memit/memit_rect_main.py).

Equation, per layer: MEMIT's Δ for all layers, then keep the 40 % of each Δ's entries with the
largest |Δ / W|. Upper layers see the lower ones' whole changes, as released; what is written is cut
afterwards. (RECT's own code keeps 20 %.)

Deviations: statistics and solves as MEMIT's. With `queue` (reconstructed) the change solved for is
LyapLock's, with its memory of earlier keys; drift and achieved outputs are those of what is
written.

Undo is refused: which entries are kept depends on all edits of a batch and on the weight.

Costs: as MEMIT, and one order statistic over D F entries a layer; one more change in memory.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from editkit.functional.queue import QueueSettings
from editkit.functional.regression import Rules
from editkit.functional.solve import keep_largest
from editkit.functional.spectral import Penalty
from editkit.lm.sites import Site
from editkit.methods.locate import LocateThenEdit


class RECT(LocateThenEdit):
    """Writes the relatively largest entries of MEMIT's change.

    Args:
        ridge: Weight of the corpus against the new keys (paper: lambda).
        keep: Share of entries that are written.
        queue: LyapLock's queue on top, reconstructed; none leaves the ridge as it is.
    """

    reads_weights: ClassVar[bool] = True

    def __init__(
        self,
        ridge: float,
        keep: float = 0.4,
        queue: QueueSettings | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < keep <= 1:
            raise ValueError(f"keep is {keep}; it is a share in (0, 1]")
        self.ridge = ridge
        self.keep = keep
        self.queue = queue
        self.changes: dict[str, Tensor] = {}

    @property
    def rules(self) -> Rules:
        """Write part of the solution; remember keys with a queue only."""
        return Rules(remembers=self.queue is not None, masked=True, queue=self.queue)

    def penalty(self, site: Site, cov_FF: Tensor) -> Penalty:
        """Return lambda C0."""
        return Penalty(cov_FF, self.ridge)

    def solve(self, site: Site, keys_FE: Tensor, resid_DE: Tensor) -> Tensor:
        """Return MEMIT's change, and keep it for `settle`."""
        change_DF = self.changes[site.path] = super().solve(site, keys_FE, resid_DE)
        return change_DF

    def settle(self) -> None:
        """Put the largest entries of each change in the place of the whole."""
        for site in self.sites:
            layer, change_DF = self.deltas[site.path], self.changes.pop(site.path)
            weight_DF = layer.weight_oi.float() + layer.delta.detach()
            layer.discard()
            layer.stage(keep_largest(change_DF.to(weight_DF), weight_DF, self.keep))
