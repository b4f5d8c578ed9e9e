"""The life of a run folder: claimed before work, tidied away where nothing came of it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import is_zipfile

from lightning.pytorch.utilities import rank_zero_only

PROBES, EDITS, SUMMARY = "probes.jsonl", "edits.jsonl", "summary.json"
PREDICTIONS, UNEDITED, REPORT = "predictions.jsonl", "unedited.jsonl", "report.html"


LEFTOVERS = (
    "ability.jsonl", "conflicts.jsonl", "lm_eval.json",
    SUMMARY, PROBES, EDITS, PREDICTIONS, UNEDITED, REPORT, "wandb_run.txt", "config.yaml",
    "metrics*.csv", "adapter_config.json", "adapter_model.safetensors", "checkpoints/*.ckpt",
    "retention/*/summary.json", "retention/*/retention.jsonl", "retention/*/probes.jsonl",
    "retention/*/config.yaml", "retention/*/arms",
)  # fmt: skip


@rank_zero_only
def claim(folder: Path, overwrite: bool) -> None:
    """Make sure that a new run writes over nothing, or clear what an earlier run left.

    Raises:
        ValueError: If the folder holds a run and `overwrite` is off.
    """
    finished = (folder / SUMMARY).exists()
    begun = (folder / PROBES).exists() or any(folder.glob("checkpoints/*.ckpt"))
    if (finished or begun) and not overwrite:
        state = "a finished" if finished else "an unfinished"
        other = "" if finished else "go on with it by --ckpt_path last, "
        raise ValueError(
            f"{str(folder)!r} holds {state} run; {other}choose another --trainer.default_root_dir "
            "or pass --run.overwrite true"
        )
    for path in [path for pattern in LEFTOVERS for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in (*folder.glob("retention/*"), folder / "retention"):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


@contextmanager
def tidy(folder: Path) -> Iterator[None]:
    """Remove a run folder that this run made and that holds nothing to go on from."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if rank_zero_only.rank != 0:  # the first device tidies
            raise
        for path in folder.glob("checkpoints/*.ckpt"):
            if path.is_file() and not is_zipfile(path):
                path.unlink()  # cut short: torch writes zip files, whose end comes last
        done = (folder / SUMMARY).exists() or any(folder.glob("checkpoints/*.ckpt"))
        if made and not done and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            sys.stderr.write(f"editkit: removed {folder}, it held nothing to go on from\n")
        for path in made[1:]:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


def last_checkpoint(folders: Iterable[Path]) -> Path | None:
    """Return the newest whole checkpoint; a run that was killed may leave one cut short."""
    found = [path for folder in folders for path in folder.glob("*.ckpt") if is_zipfile(path)]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def check_checkpoint(path: Path) -> None:
    """Refuse what cannot be gone on with.

    Raises:
        ValueError: If there is no checkpoint, or it was cut short.
    """
    if not path.exists():
        raise ValueError(f"checkpoint {str(path)!r} does not exist; give a file, or last")
    if not (path.is_file() and is_zipfile(path)):
        raise ValueError(
            f"{str(path)!r} is no whole checkpoint; give another one, or last for the newest whole"
        )


@rank_zero_only
def sweep(folder: Path) -> None:
    """Remove what a run that was killed was about to write under a temporary name."""
    for path in folder.glob("*.tmp"):
        path.unlink()


def keep_metrics(folder: Path) -> None:
    """Put the curves of the part before a resume aside: Lightning's CSV logger begins anew."""
    path = folder / "metrics.csv"
    if path.exists():
        part = len(list(folder.glob("metrics*.csv")))
        path.rename(folder / f"metrics.part{part}.csv")
