"""Progress in the terminal: edits per second and the running scores."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class EditProgress(RichProgressBar):
    """Lightning's rich bar with editkit's numbers and without the version."""

    def __init__(self) -> None:
        super().__init__(leave=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Show the logged numbers, not the logger's version."""
        items = super().get_metrics(trainer, pl_module)
        return {key: value for key, value in items.items() if key != "v_num"}
