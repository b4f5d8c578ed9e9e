"""Runs of a grid: each one command with a folder of its own, skipped where it is done."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        name: For people.
        folder: Where it writes.
        args: Arguments of `editkit`.
        after: Folders of runs that must be done before.
    """

    name: str
    folder: Path
    args: tuple[str, ...]
    after: tuple[Path, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether its summary is there."""
        return (self.folder / "summary.json").exists()

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.folder.with_name(f"{self.folder.name}.log")


def slug(label: str) -> str:
    """Return a folder name for a label.

    >>> slug("MEMIT + queue")
    'memit---queue'
    """
    return "".join(c if c.isalnum() else "-" for c in label.lower())


def run_cells(
    cells: Sequence[Cell],
    jobs: int,
    tell: Callable[[str], None],
    run: Callable[[Cell], int] | None = None,
) -> list[Cell]:
    """Run the cells that are not done, each after those it needs; a failed one stops its followers.

    Args:
        cells: Runs.
        jobs: Runs at once.
        tell: Takes a line of news.
        run: Runs one cell and returns its exit code; None takes a process of its own for each.

    Returns:
        The cells that are not done at the end.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; it must be at least 1")
    waiting = [cell for cell in cells if not cell.is_done]
    done = len(cells) - len(waiting)
    tell(f"{done} of {len(cells)} runs are done already")
    running: dict[Future[str], Cell] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            ready = [c for c in waiting if all((f / "summary.json").exists() for f in c.after)]
            for cell in ready[: jobs - len(running)]:
                waiting.remove(cell)
                running[pool.submit(_timed, cell, run or run_one)] = cell
            if not running:
                break  # what is left waits for runs that failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                done += cell.is_done
                tell(f"{done:>4}/{len(cells)}  {future.result()}")
    return [cell for cell in cells if not cell.is_done]


def _timed(cell: Cell, run: Callable[[Cell], int]) -> str:
    started = time.perf_counter()
    code = run(cell)
    state = "done  " if code == 0 and cell.is_done else "FAILED"
    return f"{state}  {cell.name}  {time.perf_counter() - started:.0f} s  ({cell.log})"


def run_one(cell: Cell) -> int:
    """Run a cell in a process of its own, its output into its log; return the exit code."""
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "editkit", *cell.args]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with cell.log.open("w", encoding="utf-8") as file:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env={**os.environ, **threads},
        ).returncode  # fmt: skip
