"""Runs of a grid: each one command with a folder of its own, skipped where it is done."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path
from threading import Thread

import torch

PRELOADED = ("editkit.trainer_cli", "editkit.retention.cli", "editkit.api", "peft")
PLACES = ("--run=", "--out=", "--retain.shared=", "--trainer.default_root_dir=")


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
        """Whether its summary is there.

        Raises:
            ValueError: If it was run with other options.
        """
        if not (self.folder / "summary.json").exists():
            return False
        if self.kept.exists() and self.kept.read_text(encoding="utf-8") != self.told:
            raise ValueError(
                f"{str(self.folder)!r} was run with other options (see {self.kept.name} beside "
                "it); choose another --out or remove it"
            )
        return True

    @property
    def told(self) -> str:
        """The content of the file of its options, without where things lie."""
        return json.dumps([a for a in self.args if not a.startswith(PLACES)], indent=1) + "\n"

    @property
    def kept(self) -> Path:
        """Where its options are kept, from its start; runs of old have none and count as done."""
        return self.folder.with_name(f"{self.folder.name}.args.json")

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
    cell.kept.parent.mkdir(parents=True, exist_ok=True)
    cell.kept.write_text(cell.told, encoding="utf-8")
    code = run(cell)
    state = "done  " if code == 0 and cell.is_done else "FAILED"
    return f"{state}  {cell.name}  {time.perf_counter() - started:.0f} s  ({cell.log})"


def run_one(cell: Cell) -> int:
    """Run a cell in a process of its own, its output into its log; return the exit code."""
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    process = _starter().Process(target=_work, args=(cell,))
    process.start()
    process.join()
    return int(process.exitcode or 0)


@cache
def _starter() -> BaseContext:
    """Return what starts processes: forks of one that has the imports behind it.

    Where there is a GPU each starts afresh, for CUDA does not outlive a fork.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    is_forked = "forkserver" in get_all_start_methods() and not torch.cuda.is_available()
    context = get_context("forkserver" if is_forked else "spawn")
    context.set_forkserver_preload([*PRELOADED])
    return context


def _work(cell: Cell) -> None:
    """Be the command of a cell; end with the study, even where that is killed."""
    with cell.log.open("w", encoding="utf-8") as log, open(os.devnull, encoding="utf-8") as empty:
        for here, there in ((empty, 0), (log, 1), (log, 2)):
            os.dup2(here.fileno(), there)
    Thread(target=_follow, daemon=True).start()
    main_module = import_module("editkit.__main__")  # Lightning starts further devices by it
    sys.modules["__main__"], sys.argv = main_module, [str(main_module.__file__), *cell.args]
    sys.exit(import_module("editkit.cli").main([*cell.args]))


def _follow() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
