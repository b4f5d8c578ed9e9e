"""EMMET: MEMIT's batches under ROME's equality constraint, with a little slack.

Source: Gupta et al. 2024 (arXiv 2403.14236), eq. 12; released code scalable-model-editing/
unified-model-editing@2f7c65c (emmet/emmet_main.py).

Equation, per layer: Δ = R (K^T C^-1 K + slack I)^-1 K^T C^-1, C = lambda C0. This is MEMIT with a
ridge of slack * lambda; a single edit has no slack and is exact, as released. So is a stream's last
batch, where one edit is left for it.

Deviations:
    - Statistics and solves as MEMIT's; edits with dependent keys and no slack are refused, where
      the released code takes a pseudo-inverse.
    - All causal layers of the model are edited where `layers` names none; the released constants
      (@dabbb96, hparams/EMMET) have one layer: for GPT-J, set `--model.layers=[5]`.

Undo as MEMIT's: the batch is solved again without the edit, with the batch's own slack.

Costs: as MEMIT.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from editkit.functional.spectral import Penalty
from editkit.lm.sites import Site
from editkit.methods.locate import LocateThenEdit


class EMMET(LocateThenEdit):
    """Writes a batch of facts exactly, or with a little slack, at the least cost to a corpus.

    Args:
        ridge: Weight of the corpus (paper: lambda).
        slack: What is added to the diagonal of the keys' Gram matrix in batches of two and more
            (released: emmet_lambda).
    """

    def __init__(self, ridge: float, slack: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if slack < 0:
            raise ValueError(f"slack is {slack}; it may not be negative")
        self.ridge = ridge
        self.slack = slack

    def weight(self, count: int) -> float:
        """Return 1 / slack; no slack for a single edit."""
        return 1 / self.slack if count > 1 and self.slack > 0 else float("inf")

    def penalty(self, site: Site, cov_FF: Tensor) -> Penalty:
        """Return lambda C0."""
        return Penalty(cov_FF, self.ridge)
