"""Make Lightning validate after 1, 10, 100, 1000 … edits, and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer

from editkit.methods.base import EditModule


def is_over(trainer: Trainer, pl_module: EditModule) -> bool:
    """Whether the last edit of this run is made: of the stream, of `max_steps`, or by a stop."""
    at_end = pl_module.edits_seen >= len(trainer.datamodule.edits)
    return at_end or trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step


class Milestones(Callback):
    """Asks all probes of the applied edits at milestones, at increments' ends, and at the end.

    Args:
        at: Numbers of applied edits.
    """

    def __init__(self, at: Sequence[int] = (1, 10, 100, 1_000, 10_000, 100_000)) -> None:
        self.at = sorted(set(at))
        self.next: list[int] = []

    def asked_at(self, trainer: Trainer) -> list[int]:
        """Return all numbers of edits at which all is asked, but the last."""
        boundaries = getattr(getattr(trainer, "datamodule", None), "boundaries", [])
        return sorted({*self.at, *boundaries})

    def on_train_start(self, trainer: Trainer, pl_module: EditModule) -> None:
        """Find the milestones that are still ahead, on resume too."""
        self.next = [m for m in self.asked_at(trainer) if m > pl_module.edits_seen]
        trainer.val_check_batch = float("inf")  # the last batch validates all the same

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: EditModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let Lightning validate behind this batch if it reached a milestone."""
        reached = bool(self.next) and pl_module.edits_seen >= self.next[0]
        self.next = [m for m in self.next if m > pl_module.edits_seen]
        out_of_steps = 0 < trainer.max_steps <= trainer.global_step
        trainer.val_check_batch = 1 if reached or out_of_steps else float("inf")
