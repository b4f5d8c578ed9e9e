"""The folder of a retention run: claimed before work, tidied away where nothing came of it.

Only what such a run writes is ever removed.
"""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentError
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from editkit.adapters.io import CONFIG as ARTEFACT
from editkit.callbacks.folder import EDITS

ITEMS, CONFIG, SUMMARY, ROWS = "probes.jsonl", "config.yaml", "summary.json", "retention.jsonl"
OWN = (SUMMARY, ROWS, ITEMS, "arms", CONFIG)
FREE = "retain.checkpoint_every"  # may change between the parts of a run


def claim(folder: Path, parser: ArgumentParser, config: Namespace) -> list[Path]:
    """Take a folder, or go on with what is there.

    Args:
        folder: The folder.
        parser: What reads the options of an earlier part.
        config: Options of the run.

    Returns:
        The folders that were made: this one, and those above it.

    Raises:
        ValueError: If the folder holds an edited run, another run or something else.
    """
    _check(folder, config.overwrite)
    path, begun = folder / CONFIG, config.clone()
    begun.overwrite = False
    if config.overwrite:
        clear(folder)
    now = _comparable(parser, begun)
    if path.exists() and _told(parser, path.read_text(encoding="utf-8")) != now:
        raise ValueError(
            f"{str(folder)!r} was begun with other options (see its {CONFIG}); go on with "
            "those, choose another --out, or pass --overwrite true"
        )
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(parser.dump(begun), encoding="utf-8")
    return made


def clear(folder: Path) -> None:
    """Remove what a retention run writes."""
    for name in OWN:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def tidy(folder: Path, made: list[Path]) -> None:
    """Remove what holds nothing to go on from, and the folders that were made for it.

    Args:
        folder: The folder.
        made: What `claim` returned.
    """
    if [*folder.glob("arms/*/done.json"), *folder.glob("arms/*/checkpoints/*")]:
        return
    clear(folder)
    for path in made:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    sys.stderr.write(f"editkit: removed {folder}, it held nothing to go on from\n")


def _check(folder: Path, overwrite: bool) -> None:
    """Refuse a folder whose content is not a retention run's."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; choose another --out")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names & {ARTEFACT, EDITS}:
        raise ValueError(f"{str(folder)!r} holds an edited run; choose another --out")
    if names and not _is_own(folder / CONFIG):
        raise ValueError(
            f"{str(folder)!r} holds {min(names)!r}, which is of no retention run; choose another "
            "--out"
        )
    if SUMMARY in names and not overwrite:
        raise ValueError(
            f"{str(folder)!r} holds a finished run; choose another --out, or pass --overwrite true"
        )


def _is_own(path: Path) -> bool:
    """Whether a config is that of a retention run."""
    if not path.is_file():
        return False
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "retain:" in lines


def _told(parser: ArgumentParser, text: str) -> str | None:
    """Return the options of an earlier part, new ones at their defaults; None of a damaged file."""
    try:
        return _comparable(parser, parser.parse_string(text))
    except (ArgumentError, ValueError, TypeError, KeyError):
        return None


def _comparable(parser: ArgumentParser, config: Namespace) -> str:
    """Return options without what changes no number."""
    config = config.clone()
    config[FREE] = 1
    text: str = parser.dump(config)
    return text
