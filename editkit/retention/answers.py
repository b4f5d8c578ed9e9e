"""What an arm leaves in its folder: the answers of every questioning, and its numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.callbacks.rows import read_rows
from editkit.methods.memory import routing_rates
from editkit.retention.asking import Row
from editkit.retention.finetune import Arm

DONE, BASE, EDITED, REAPPLIED = "done.json", "base.jsonl", "edited.jsonl", "reapplied.jsonl"

Rows = dict[str, Row]


@dataclass(frozen=True)
class ArmResult:
    """What an arm has left in its folder.

    Args:
        arm: Its name.
        numbers: `done.json`.
        base: Rows of the base model.
        edited: Rows of the edited model; None in the control arm.
        steps: Rows of the fine-tuned model by step.
        reapplied: Rows of the fine-tuned base model with the edits put on; None where not asked.
    """

    arm: Arm
    numbers: dict[str, Any]
    base: Rows
    edited: Rows | None
    steps: dict[int, Rows]
    reapplied: Rows | None

    @classmethod
    def read(cls, arm: Arm, folder: Path) -> ArmResult:
        """Read a finished arm."""
        edited, reapplied = folder / EDITED, folder / REAPPLIED
        return cls(
            arm,
            json.loads((folder / DONE).read_text(encoding="utf-8")),
            _rows(folder / BASE),
            _rows(edited) if edited.exists() else None,
            {int(p.stem[5:]): _rows(p) for p in sorted(folder.glob("step-*.jsonl"))},
            _rows(reapplied) if reapplied.exists() else None,
        )

    @property
    def last(self) -> int:
        """Step of the end."""
        return max(self.steps)


def gate_rates(rows: Rows | None) -> dict[str, float] | None:
    """Return where a method with a memory routed the questions; None of other methods."""
    told = [row for row in (rows or {}).values() if "route" in row]
    return routing_rates(told) if told else None


def _rows(path: Path) -> Rows:
    return {row["probe_id"]: row for row in read_rows(path)}
