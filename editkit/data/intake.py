"""What came of a source: rows in, rows used, rows refused and why, probes by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from editkit.data.rows import Refused


@dataclass
class Intake:
    """An account of one source; `rich` prints it as a table.

    Args:
        module: Data module that read it.
        sources: Files by name, each with its SHA-256, or the revision of one on the Hub.
        version: Name of the published version that these files are; empty where none is known.
        rows: Records read.
        used: Records that became edits.
        refused: Records left out.
        notes: Other counts worth knowing, by what they count.
        edits: Edits in the stream, after its slices.
        probes: Probes of these edits, by kind and axis.
    """

    module: str
    sources: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    rows: int = 0
    used: int = 0
    refused: Sequence[Refused] = ()
    notes: Counter[str] = field(default_factory=Counter)
    edits: int = 0
    probes: Mapping[tuple[str, str], int] = field(default_factory=dict)

    @property
    def reasons(self) -> dict[str, int]:
        """Rows refused by reason, the most frequent first."""
        return dict(Counter(row.reason for row in self.refused).most_common())

    def __str__(self) -> str:
        """All of it in one line."""
        return "; ".join(f"{name} {value}" for name, value in self._lines() if value)

    def __rich__(self) -> Table:
        """Return a small table."""
        table = Table(title=f"{self.module}: what was read", show_header=False, min_width=40)
        for name, value in self._lines():
            table.add_row(name, value)
        return table

    def _lines(self) -> list[tuple[str, str]]:
        reasons = ", ".join(f"{number} {reason}" for reason, number in self.reasons.items())
        lines = [(name, f"sha256 {digest[:16]}") for name, digest in self.sources.items()]
        return [
            *lines,
            ("version", self.version or "none that is known here"),
            ("rows in", str(self.rows)),
            ("rows used", str(self.used)),
            ("rows refused", f"{len(self.refused)}" + (f" ({reasons})" if reasons else "")),
            *((name, str(number)) for name, number in self.notes.items() if number),
            ("edits in the stream", str(self.edits)),
            *(
                (f"probes: {kind}{' ' + axis if axis else ''}", str(number))
                for (kind, axis), number in self.probes.items()
            ),
        ]
