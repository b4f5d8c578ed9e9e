"""Weights & Biases as one YAML line, offline where no key is known."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger


def has_wandb_key() -> bool:
    """Whether a W&B key is configured, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Wandb(WandbLogger):
    """Lightning's WandbLogger that goes offline by itself where there is no key.

    Args:
        project: W&B project.
        save_dir: Folder of the local files.
        offline: Write local files only; none decides by whether a key is configured.
        name: Name of the run in W&B.
        options: Further arguments of Lightning's WandbLogger.
    """

    def __init__(
        self,
        project: str = "editkit",
        save_dir: Path = Path("runs"),
        offline: bool | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        offline = not has_wandb_key() if offline is None else offline
        super().__init__(name=name, save_dir=save_dir, project=project, offline=offline, **options)
