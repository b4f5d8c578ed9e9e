"""How the learning rate of fine-tuning goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes.

    Args:
        shape: `linear` falls to 0 at the last step, `constant` stays.
        warmup: Share of the steps in which it rises from 0; from 0 to below 1.
    """

    shape: Literal["linear", "constant"] = "linear"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        """Check user input."""
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"schedule.warmup is {self.warmup}; it is a share of the steps, from 0 to below 1"
            )

    def factor(self, step: int, steps: int) -> float:
        """Return the share of the learning rate at a step of so many.

        >>> [Schedule(warmup=0.5).factor(step, 4) for step in range(4)]
        [0.3333333333333333, 0.6666666666666666, 1.0, 0.5]
        """
        warm = self.warmup * steps
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.shape == "constant":
            return 1.0
        return max(0.0, (steps - step) / max(1.0, steps - warm))
