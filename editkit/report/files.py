"""The files of a run folder, read with errors that name the path and the line.

Nothing here, nor elsewhere in the report of a finished run, needs torch: it opens in seconds.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_json(path: Path, required: Collection[str] = ()) -> Row:
    """Read one JSON object.

    Args:
        path: File to read; {} where it is missing.
        required: Keys it must have.

    Raises:
        ValueError: If the file is damaged or misses a key.
    """
    if not path.exists():
        return {}
    try:
        return _record(path.read_text(encoding="utf-8"), required)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); copy or make the run again") from (
            error
        )


def read_lines(
    path: Path, required: Collection[str] = (), unfinished: bool = False
) -> tuple[list[Row], bool]:
    """Read one JSON object a line.

    Args:
        path: File to read; nothing where it is missing.
        required: Keys that each object must have.
        unfinished: Leave out a last line that was cut while it was written.

    Returns:
        The objects, and whether a last line was left out.

    Raises:
        ValueError: If a line is damaged or misses a key.
    """
    rows: list[Row] = []
    if not path.exists():
        return rows, False
    count, raw = 0, b""
    try:
        with path.open("rb") as file:
            for count, raw in enumerate(file, start=1):  # noqa: B007
                if raw.strip():
                    rows.append(_record(raw.decode("utf-8"), required))
    except ValueError as error:
        if unfinished and not raw.endswith(b"\n"):
            return rows, True
        raise ValueError(
            f"line {count} of {str(path)!r} is damaged ({error}); copy or make the run again"
        ) from error
    return rows, False


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read Lightning's CSV curves, those of the parts before a resume first; blanks left out.

    Raises:
        ValueError: If a cell is not a number.
    """
    parts = sorted(folder.glob("metrics.part*.csv"), key=lambda p: (len(p.name), p.name))
    return [row for path in (*parts, *folder.glob("metrics.csv")) for row in _curves(path)]


def _curves(path: Path) -> list[dict[str, float]]:
    """Read one CSV file of numbers."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            return [{k: float(v) for k, v in line.items() if k and v} for line in lines]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error})") from error


def read_config(path: Path) -> Row:
    """Read a run's `config.yaml`; {} where it is missing.

    Raises:
        ValueError: If it is no YAML mapping.
    """
    import yaml

    if not path.exists():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        sentence = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} is damaged ({sentence})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} is damaged (no mapping)")
    return found


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _record(text: str, required: Collection[str]) -> Row:
    """Parse one object and check its keys."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not an object")
    if missing := sorted(set(required) - set(found)):
        raise ValueError(f"no {missing[0]!r} in it")
    return found
