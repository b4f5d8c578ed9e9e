"""Rows that cannot be used, and how all those of a file are reported together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 20
"""Bad rows that a report spells out; the rest it only counts."""

Record = dict[str, object]


class BadRowError(ValueError):
    """One row that cannot be used.

    Args:
        reason: Short name under which such rows are counted.
        detail: The offending value and where it stands in the row.
        at: Offset of the offending byte in the file, where that is what is wrong.
    """

    def __init__(self, reason: str, detail: str, at: int = 0) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.at = reason, detail, at


@dataclass(frozen=True, slots=True)
class Refused:
    """A bad row and its place.

    Args:
        file: File it stands in.
        line: Line its record starts at, from 1 (of Parquet: the record's number); 0 where the file
            as a whole is meant.
        reason: Short name under which such rows are counted.
        detail: The offending value and what to do about it.
    """

    file: str
    line: int
    reason: str
    detail: str

    def __str__(self) -> str:
        return (
            f"{self.file}:{self.line}: {self.detail}"
            if self.line
            else f"{self.file}: {self.detail}"
        )


class BadRowsError(ValueError):
    """All bad rows of a file, found before any edit is made.

    Args:
        refused: The bad rows in file order.
        count: Rows read, good and bad.
    """

    def __init__(self, refused: Sequence[Refused], count: int) -> None:
        hint = "\nmend these rows, or set on_bad_row to 'skip' to edit without them"
        if not any(row.line for row in refused):
            hint = ""  # no row, the whole file
        super().__init__(report(refused, count) + hint)
        self.refused, self.count = list(refused), count


def report(refused: Sequence[Refused], count: int) -> str:
    """Describe bad rows: how many of each kind, then the first `SHOWN` of them."""
    reasons = Counter(row.reason for row in refused).most_common()
    counts = ", ".join(f"{number} {reason}" for reason, number in reasons)
    lines = [f"{len(refused)} of {count} rows cannot be used ({counts})"]
    lines += [f"  {row}" for row in refused[:SHOWN]]
    if len(refused) > SHOWN:
        lines.append(f"  and {len(refused) - SHOWN} more")
    return "\n".join(lines)
