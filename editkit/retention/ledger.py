"""The ledger of an edited run, and the stream that it stands for where no config tells of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from editkit.callbacks.folder import EDITS
from editkit.data.base import EditDataModule
from editkit.edits import Edit, Probe
from editkit.report.files import Row, read_lines


class LedgerStream(EditDataModule):
    """The edits of a ledger, each asked its own prompt.

    Args:
        ledger: Lines of `edits.jsonl` whose edits stand; the stream keeps their ids.
    """

    def __init__(self, ledger: list[Row]) -> None:
        super().__init__()
        self.ledger = ledger

    def setup(self, stage: str | None = None) -> None:
        """Order the stream, then call every edit what the ledger calls it.

        Raises:
            ValueError: If two edits are called the same.
        """
        super().setup(stage)
        ids = [entry["edit_id"] for entry in self.ledger]
        if twice := [i for i in ids if ids.count(i) > 1]:
            raise ValueError(
                f"{EDITS} has edit {twice[0]} twice; retention tells edits apart by their ids: "
                "make each with an id of its own"
            )
        standing = {p.edit_id for p in self.probes if p.is_due(len(ids))}
        own = [(ids[e.id], e) for e in self.edits]
        self.edits = [replace(edit, id=name) for name, edit in own]
        self.probes = [
            Probe(f"{name}.rel", name, "reliability", edit.prompt, edit.target)
            for name, edit in own
            if edit.id in standing
        ]

    def load(self) -> tuple[list[Edit], list[Probe]]:
        """Turn the lines into edits."""
        edits = [
            Edit(i, entry["prompt"], entry["target"], entry.get("subject"))
            for i, entry in enumerate(self.ledger)
        ]
        probes = [Probe(f"{e.id}.rel", e.id, "reliability", e.prompt, e.target) for e in edits]
        return edits, probes


def read_ledger(folder: Path, artefact: dict[str, Any]) -> list[Row]:
    """Read the ledger of a run.

    Args:
        folder: The run's folder.
        artefact: Its `adapter_config.json`.

    Raises:
        ValueError: If it is missing or damaged.
    """
    path = folder / EDITS
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no {EDITS}; give the folder of an edited run")
    rows, _ = read_lines(path, ("edit_id", "prompt", "target", "undone"))
    if wrong := [row["edit_id"] for row in rows if not isinstance(row["edit_id"], int)]:
        raise ValueError(f"{str(path)!r} is damaged: an edit_id is {wrong[0]!r:.40}")
    count = sum(not row.get("rolled_back") for row in rows)
    if count < artefact.get("edits_seen", 0):
        raise ValueError(
            f"{str(path)!r} names {count} of the {artefact['edits_seen']} edits that were made; "
            "it was cut short, copy it again"
        )
    return rows
