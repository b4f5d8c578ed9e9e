"""The ledger's line of an edit, entered as soon as the edit is written."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from torch import Tensor

from editkit.edits import Edit


def entries_of(
    edits: list[Edit], step: int, before_B: Tensor, change_norm: float, seconds: float
) -> list[dict[str, Any]]:
    """Return the lines of a batch; `loss_after` stays open until it is measured."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return [
        {
            "edit_id": edit.id, "prompt": edit.prompt, "target": edit.target,
            "subject": edit.subject, "step": step, "batch": len(edits), "time": now,
            "seconds": seconds / len(edits), "loss_before": before, "loss_after": None,
            "change_norm": change_norm, "undone": False,
        }
        for edit, before in zip(edits, before_B.tolist(), strict=True)
    ]  # fmt: skip
