"""What a stream is at odds with itself about, told before anything is written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from editkit.adapters.io import write_lines
from editkit.data.conflicts import Conflict, find_conflicts
from editkit.methods.base import EditModule

CONFLICTS = "conflicts.jsonl"
SHOWN = 5  # lines of the table


class Conflicts(Callback):
    """Finds edits that repeat, contradict or nearly repeat an earlier one of the stream.

    Each is a line of `conflicts.jsonl` that names the earlier edit (`earlier_id`, as in the
    ledger); their numbers are in `summary.json`, and the first few are shown before the first edit.
    A later edit that contradicts an earlier one may well be an update, so by default all are made.

    Args:
        on_conflict: `report` tells of them and goes on; `raise` refuses the stream before the model
            is loaded.
        similarity: Share of the words, rare ones counting more, at which two prompts are near.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, on_conflict: Literal["report", "raise"] = "report", similarity: float = 0.8
    ) -> None:
        if on_conflict not in ("report", "raise"):
            raise ValueError(f"conflicts.on_conflict is {on_conflict!r}; use report or raise")
        if not 0 < similarity <= 1:
            raise ValueError(f"conflicts.similarity is {similarity}; it must be above 0, at most 1")
        self.on_conflict = on_conflict
        self.similarity = similarity
        self.found: list[Conflict] = []

    def setup(self, trainer: Trainer, pl_module: EditModule, stage: str) -> None:
        """Check the whole stream, before the model is loaded.

        Raises:
            ValueError: If there are conflicts and `on_conflict` is `raise`.
        """
        if stage != "fit":
            return
        self.found = find_conflicts(trainer.datamodule.edits, self.similarity)
        if self.found and self.on_conflict == "raise":
            first = "; ".join(map(str, self.found[:SHOWN]))
            more = f" and {len(self.found) - SHOWN} more" if len(self.found) > SHOWN else ""
            raise ValueError(
                f"the stream is at odds with itself in {self._counted()}: {first}{more}. Mend the "
                "rows, or set conflicts.on_conflict to report"
            )

    def on_train_start(self, trainer: Trainer, pl_module: EditModule) -> None:
        """Write and show what was found."""
        if self.found:
            self._tell(Path(trainer.default_root_dir))

    def for_summary(self) -> dict[str, Any]:
        """Return the number of conflicts by kind, for `summary.json`."""
        return {"conflicts": dict(Counter(c.kind for c in self.found))} if self.found else {}

    def _counted(self) -> str:
        """Return such as `2 duplicates, 1 contradiction`."""
        names = {"near": "near repeat"}
        counts = Counter(names.get(c.kind, c.kind) for c in self.found)
        return ", ".join(f"{n} {name}{'s' * (n > 1)}" for name, n in counts.items())

    @rank_zero_only
    def _tell(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_lines(folder / CONFLICTS, [conflict.row() for conflict in self.found])
        more = f"; the first {SHOWN}, all in {CONFLICTS}" if len(self.found) > SHOWN else ""
        table = Table(
            title=f"the stream is at odds with itself: {self._counted()}{more}",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for name in ("edit", "", "of edit", "prompt", "target", "target before"):
            table.add_column(name, justify="right" if "edit" in name else "left")
        for found in self.found[:SHOWN]:
            cells = (found.edit.prompt, found.edit.target, found.earlier.target)
            numbers = str(found.edit.id), found.kind, str(found.earlier.id)
            table.add_row(*numbers, *map(Text, cells))
        console = Console()
        if not console.is_terminal:
            console.width = 100
        console.print(table)
