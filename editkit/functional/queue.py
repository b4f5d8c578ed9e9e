"""LyapLock's virtual queue (2025, eq. 7): how much a stream has to hold its drift back.

The queue Z grows while the preservation loss PL is above its budget D and shrinks below it; the
penalty is weighted by kappa = a Z. With a = 1 / sqrt(D) and a floor of sqrt(D), the released
choice, kappa alone tells everything: kappa <- max(kappa + PL / D - 1, 1). Summed up,
mean(PL) <= D (1 + (kappa_T+1 - kappa_1) / T) at every T, over the batches from the one on that sets
D, whatever the losses are, as long as no `kappa_max` cuts in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass
class QueueSettings:
    """How a queue weighs drift against edits.

    Args:
        alpha: Budget in units of the first batch's preservation loss: D = alpha * PL_1.
        D: Budget of the preservation loss itself; alpha and d_base_edits are then ignored. None
            takes it from alpha.
        d_base_edits: Number of edits after which PL_1 is taken, so that a stream of single edits
            gets the budget of one in batches; none takes it after the first batch.
        kappa_max: Highest kappa; none leaves it unbounded, as the bound on the mean needs.
        V: Weight of the edits against what they may harm.
        history: Hold earlier edits at the outputs they achieved, or at those desired.
    """

    alpha: float = 60.0
    D: float | None = None
    d_base_edits: int | None = None
    kappa_max: float | None = None
    V: float = 1.0
    history: Literal["achieved", "desired"] = "achieved"

    def __post_init__(self) -> None:
        for name in ("alpha", "D", "d_base_edits", "V"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} of the queue is {value}; it must be above 0")
        if self.kappa_max is not None and not self.kappa_max >= 1:
            raise ValueError(f"kappa_max is {self.kappa_max}; kappa is never below 1")
        if self.history not in ("achieved", "desired"):
            raise ValueError(f"history is {self.history!r}; it is 'achieved' or 'desired'")


@dataclass(frozen=True)
class Queue:
    """Where a site's queue stands.

    Args:
        kappa: Weight of the penalty in the next batch.
        D: Budget, once it is known.
        edits: Edits seen.
    """

    kappa: float = 1.0
    D: float | None = None
    edits: int = 0

    def after(self, loss: float, edits: int, settings: QueueSettings) -> Queue:
        """Return the queue after a batch.

        Args:
            loss: Preservation loss PL of the weights as the batch left them.
            edits: Edits in the batch.
            settings: Budget and bounds.
        """
        seen = replace(self, edits=self.edits + edits)
        budget = self.D if settings.D is None else settings.D
        if budget is None and loss > 0 and seen.edits >= (settings.d_base_edits or 1):
            budget = settings.alpha * loss
        if budget is None:
            return seen
        kappa = kappa_step(self.kappa, loss, budget)
        return replace(seen, kappa=min(kappa, settings.kappa_max or kappa), D=budget)


START = Queue()


def kappa_step(kappa: float, loss: float, budget: float) -> float:
    """Return max(kappa + PL / D - 1, 1)."""
    return max(kappa + loss / budget - 1.0, 1.0)
