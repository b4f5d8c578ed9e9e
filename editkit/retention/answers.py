"""What an arm leaves in its folder: the answers of every questioning, and its numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.callbacks.rows import read_rows
from editkit.methods.memory import routing_rates
from editkit.retention.afterwards import ARM_OF
from editkit.retention.asking import Row
from editkit.retention.finetune import Arm

DONE, BASE, EDITED = "done.json", "base.jsonl", "edited.jsonl"
RELEARNED = "relearned.jsonl"

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
        after: Rows of what was done at the end, by the names of `ARM_OF`.
        relearned: Lost edits learned again, and their partners; None where not asked.
    """

    arm: Arm
    numbers: dict[str, Any]
    base: Rows
    edited: Rows | None
    steps: dict[int, Rows]
    after: dict[str, Rows]
    relearned: list[dict[str, Any]] | None

    @classmethod
    def read(cls, arm: Arm, folder: Path) -> ArmResult:
        """Read a finished arm."""
        relearned = folder / RELEARNED
        edited, after = folder / EDITED, {n: folder / f"{n}.jsonl" for n in ARM_OF}
        return cls(
            arm,
            json.loads((folder / DONE).read_text(encoding="utf-8")),
            answers(folder / BASE),
            answers(edited) if edited.exists() else None,
            {int(p.stem[5:]): answers(p) for p in sorted(folder.glob("step-*.jsonl"))},
            {name: answers(path) for name, path in after.items() if path.exists()},
            read_rows(relearned) if relearned.exists() else None,
        )

    @property
    def last(self) -> int:
        """Step of the end."""
        return max(self.steps)


def gate_rates(rows: Rows | None) -> dict[str, float] | None:
    """Return where a method with a memory routed the questions; None of other methods."""
    told = [row for row in (rows or {}).values() if "route" in row]
    return routing_rates(told) if told else None


def answers(path: Path) -> Rows:
    """Read the answers of one questioning, by item id."""
    return {row["probe_id"]: row for row in read_rows(path)}
