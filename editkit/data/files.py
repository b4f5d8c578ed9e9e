"""Find the files that a path stands for, here or on the Hub, and read the records in them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from editkit.data.jsonfile import Place, first_line, read_json
from editkit.data.rows import BadRowError

PARQUET = b"PAR1"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
HUB_FILE = re.compile(r"hf://datasets/(?P<repo>[^/]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<file>.+)")
FILE_NAME = re.compile(r".*\.(json|jsonl|ndjson|parquet|txt|csv|tsv|gz)")


def files_of(path: str, split: str) -> list[str]:
    """Find the files that a path stands for.

    Args:
        path: A file; a folder of files; `owner/name` or `owner/name@revision` of a Hub data set;
            or one file there, `hf://datasets/owner/name@revision/file.json`, which is fetched.
        split: Split to take of a folder or a Hub data set.

    Returns:
        Paths, or of a Hub data set addresses, in the order of `datasets`; a path that is nothing of
        this is returned as it is, to be reported as missing.

    Raises:
        ValueError: If a folder, a data set or a file there cannot be read, or has no such split.
    """
    is_folder = Path(path).is_dir()
    is_id = HUB_ID.fullmatch(path) is not None and not FILE_NAME.fullmatch(path)
    one = HUB_FILE.fullmatch(path)
    try:
        if one:
            from huggingface_hub import hf_hub_download

            repo, file, revision = one["repo"], one["file"], one["revision"]
            return [hf_hub_download(repo, file, repo_type="dataset", revision=revision)]
        if not is_folder and (Path(path).exists() or not is_id):
            return [path]
        from datasets import load_dataset_builder

        name, _, revision = (path, "", "") if is_folder else path.partition("@")
        found = load_dataset_builder(name, revision=revision or None).config.data_files
    except (OSError, ValueError) as error:
        is_there = "" if is_folder or one else " (and there is no such file or folder here)"
        raise ValueError(f"data set {path!r} cannot be read: {error}{is_there}") from error
    if not found or split not in found:
        splits = sorted(map(str, found or {}))
        raise ValueError(f"data set {path!r} has no split {split!r}, only {splits}")
    return [str(file) for file in found[split]]


def version_of(file: str) -> dict[str, str]:
    """Return the name of a file with its SHA-256; of one on the Hub, with its revision."""
    if is_remote(file):
        name, _, rest = file.partition("@")
        revision, _, inner = rest.partition("/")
        return {f"{name}/{inner}" if rest else name: revision}
    path, digest = Path(file), hashlib.sha256()
    if not path.is_file():
        return {}
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return {path.name: digest.hexdigest()}


def is_remote(file: str) -> bool:
    """Whether a file has to be fetched."""
    return "://" in file


def read_records(file: str | Path) -> Iterator[Place]:
    """Read records from JSON lines, a JSON array of objects, one JSON object, or Parquet.

    Told apart by how they begin: the file's name does not matter. JSON lines are read one at a
    time; an array is held in memory as text.

    Yields:
        The line a record starts at (of Parquet: its number), and the record or what is wrong.
    """
    if not is_remote(str(file)) and not Path(file).is_file():
        yield 0, BadRowError("missing file", "there is no such file")
        return
    with _open(file) as opened:
        first = first_line(opened)
    if first.startswith(PARQUET):
        from datasets import load_dataset

        rows = load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        yield from enumerate(rows, start=1)
    else:
        with _open(file) as opened:
            yield from read_json(opened, first)


def _open(file: str | Path) -> BinaryIO:
    if not is_remote(str(file)):
        return Path(file).open("rb")
    import fsspec

    return cast(BinaryIO, fsspec.open(str(file), "rb").open())


def passages(path: Path) -> list[str]:
    """Read the lines of a text file that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"text {path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text {path}: not UTF-8 at byte {error.start}; save it as UTF-8"
        ) from error
    passages = [line.strip() for line in lines if line.strip()]
    if not passages:
        raise ValueError(f"text {path}: the file is empty; leave `text` out to do without")
    return passages
