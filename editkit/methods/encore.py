"""ENCORE: MEMIT-seq that also keeps its changes small, and stops its searches in time.

Source: Gupta et al. 2025 (arXiv 2502.01636), released code scalable-model-editing/
knowledge-editing-regularization@df30617 (encore/encore_main.py).

Equation, per layer: Δ = R K^T (lambda C0 + lambda_n I + S + K K^T)^-1, S the sum of k k^T over
earlier batches. Values: `search.rank_stop` ends a search once the target has been the likeliest
answer behind all prefixes that many times (most-probable early stopping; the released `prob_cutoff`
with its sign turned).

Deviations:
    - Statistics and solves as MEMIT-seq's.
    - With `queue` (reconstructed) the corpus' part of the penalty is on the whole change and its
      weight moves, while lambda_n still weighs increments; this is solved in F x F.

Undo as MEMIT-seq's: an exact re-fit to the pairs that remain. Refused with a queue.

Costs: as MEMIT-seq.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from editkit.functional.queue import QueueSettings
from editkit.functional.regression import Rules
from editkit.functional.spectral import Penalty
from editkit.lm.sites import Site
from editkit.methods.locate import LocateThenEdit
from editkit.methods.value_search import ValueSearch

AS_PUBLISHED = ValueSearch(rank_stop=2)


class ENCORE(LocateThenEdit):
    """Writes batches by ridge regression against a corpus, all earlier keys and the norm.

    Args:
        ridge: Weight of the corpus against the keys (paper: lambda).
        norm_weight: Weight of the change's squared norm (paper: lambda_n).
        queue: LyapLock's queue on top, reconstructed; none leaves the ridge as it is.
        search: How the value of an edit is searched for.
        corpus_texts: Texts of the corpus to measure on.
    """

    def __init__(
        self,
        ridge: float,
        norm_weight: float,
        queue: QueueSettings | None = None,
        search: ValueSearch = AS_PUBLISHED,
        corpus_texts: int = 10_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(search=search, corpus_texts=corpus_texts, **kwargs)
        self.ridge = ridge
        self.norm_weight = norm_weight
        self.queue = queue

    @property
    def rules(self) -> Rules:
        """Remember all keys."""
        return Rules(remembers=True, queue=self.queue, shrinks=self.norm_weight > 0)

    def penalty(self, site: Site, cov_FF: Tensor) -> Penalty:
        """Return lambda C0 + lambda_n I."""
        return Penalty(cov_FF, self.ridge, self.norm_weight)
