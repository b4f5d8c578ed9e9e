"""The tables of a report as CSV and as markdown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.report.files import write_text
from editkit.report.tables import Table

if TYPE_CHECKING:
    from pandas import DataFrame


def write_tables(folder: Path, tables: dict[str, Table]) -> None:
    """Write each table as `<name>.csv` and `<name>.md`.

    Args:
        folder: Folder to write into; made where it is missing.
        tables: Tables by name.
    """
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", table.frame.to_csv(index=False))
        text = f"# {table.title}\n\n{table.note}\n\n{markdown(table.frame)}"
        write_text(folder / f"{name}.md", text)


def markdown(frame: DataFrame) -> str:
    """Return a frame as a markdown table; numbers in four figures."""
    lines = [[*map(str, frame.columns)], ["---"] * len(frame.columns)]
    lines += [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    """Return a value as the text of a cell."""
    if value is None or value != value:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())
