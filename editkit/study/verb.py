"""`editkit study`: run a grid, or go on with it, and write its table and page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from editkit.study.cells import run_cells
from editkit.study.numbers import collect
from editkit.study.page import write_study
from editkit.study.reading import read_study


def run_study(path: Path, out: Path | None, jobs: int, only: str, dry_run: bool) -> None:
    """Run what is not done of a study, then write its table and page; see `editkit.verbs.study`.

    Raises:
        ValueError: If the study is not well-formed, or runs of it have failed.
    """
    plan = read_study(path)
    root = Path(out) if out is not None else Path("runs/studies") / plan.name
    console = Console()
    cells = plan.cells(root)
    if only:
        wanted = [c for c in cells if c.after and only in c.name]
        needed = {folder for cell in wanted for folder in cell.after}
        cells = [c for c in cells if c.folder in needed or c in wanted]
        if not cells:
            raise ValueError(f"no run of {str(path)!r} has {only!r} in its name")
    if dry_run:
        for cell in cells:
            state = "done" if cell.is_done else "to do"
            console.print(f"{state:>5}  {cell.name}", highlight=False, soft_wrap=True)
        console.print(f"{len(cells)} runs in {root}", highlight=False)
        return

    def tell(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    left = run_cells(cells, jobs, tell)
    table, page = write_study(plan, collect(plan, root), root)
    tell(f"saved {table} and {page}")
    if left:
        raise ValueError(
            f"{len(left)} of {len(cells)} runs are not done, such as {left[0].name!r}; see "
            f"{left[0].log} and run the study again"
        )
