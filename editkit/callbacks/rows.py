"""Rows that a run adds to its folder as it goes, each with the number of edits seen by then."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from editkit.adapters.io import replacing


@rank_zero_only
def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:  # str.splitlines also splits at U+2028
        return [json.loads(line) for line in file]


def are_settled(row: Mapping[str, Any], edits_seen: int) -> bool:
    """Whether a row is of an earlier time."""
    return bool(row["edits_seen"] <= edits_seen)


def is_before_checkpoint(row: Mapping[str, Any], edits_seen: int) -> bool:
    """Whether a row of probes was written before the checkpoint of that many edits was.

    An edit's own probes are asked first, those of a milestone or of the end behind it.
    """
    is_own = row["edits_seen"] == edits_seen and row["moment"] == "immediate"
    return is_own or bool(row["edits_seen"] < edits_seen)


@rank_zero_only
def keep_rows(
    path: Path, edits_seen: int, is_kept: Callable[[Mapping[str, Any], int], bool] = are_settled
) -> None:
    """Drop the rows of later edits, or what else is not to be kept, and a torn last line."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="\n") as file:
        whole = [line for line in file if line.endswith("\n")]
    kept = [line for line in whole if is_kept(json.loads(line), edits_seen)]
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
