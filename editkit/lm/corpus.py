"""Corpora: plain texts that stand for what a model knows, and that edits should leave alone.

A corpus comes from a file, a folder of files, or a dataset of the Hub. More texts than wanted are
sampled by the seed. What was drawn from the Hub is kept in the cache folder, so the same corpus
comes back without a network, whatever happens to the dataset.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from editkit.adapters.io import write_lines
from editkit.lm.spec import LMSpec

log = logging.getLogger(__name__)

WIKIPEDIA = "wikimedia/wikipedia:20231101.en"
"""What the locate-then-edit papers measure on, in the edition that the Hub still serves."""
PACKAGED = "corpus.txt"
HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+(:[\w.-]+)?")
FILES = (".txt", ".jsonl")
FORMS = "a .txt (one text a line), a .jsonl (field `text`), a folder, or a dataset of the Hub"
SHUFFLED = 10_000  # texts of a stream that are held to choose among


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts with their identity.

    Args:
        texts: One document each, never blank.
        name: Where they come from, for people.
        sha256: Hash of the texts in their order.
    """

    texts: list[str]
    name: str
    sha256: str

    @classmethod
    def of(cls, texts: Iterable[str], name: str = "texts") -> Corpus:
        """Make a corpus of texts at hand; blank ones are left out.

        Raises:
            ValueError: If no text is left.
        """
        kept = [text for text in texts if text.strip()]
        if not kept:
            raise ValueError(f"corpus {name!r} has no text; give {FORMS}")
        digest = hashlib.sha256()
        for text in kept:
            digest.update(json.dumps(text).encode() + b"\n")
        return cls(kept, name, digest.hexdigest())


def cache_folder(cache: Path | None = None) -> Path:
    """Return the folder for what is slow to make: given, `$EDITKIT_CACHE`, or ~/.cache/editkit."""
    named = cache or os.environ.get("EDITKIT_CACHE") or "~/.cache/editkit"
    return Path(named).expanduser()


def read_corpus(
    source: str | Path | None,
    count: int,
    lm_spec: LMSpec,
    seed: int = 0,
    cache: Path | None = None,
) -> Corpus:
    """Read a corpus, or a sample of it.

    Args:
        source: A .txt (one text a line), a .jsonl (field `text`), a folder of these or of a local
            dataset, or `owner/name[:config]` of the Hub, whose split `train` is streamed. None is
            the `corpus.txt` in the base model's folder, else the English Wikipedia.
        count: Texts at most, sampled by the seed and kept in their order.
        lm_spec: Base model.
        seed: Seed of the sample.
        cache: Folder for what is drawn from the Hub; see `cache_folder`.

    Raises:
        ValueError: If there is no text to read; the message names the place and the fix.
    """
    if count < 1:
        raise ValueError(f"a corpus of {count} texts is empty; give at least 1")
    if source is None:
        packaged = Path(lm_spec.path) / PACKAGED
        source = packaged if packaged.is_file() else WIKIPEDIA
    name, path = str(source), Path(source).expanduser()
    if name and path.exists():
        return Corpus.of(_sample(_read(path), count, seed), name)
    if path.suffix in FILES or not HUB_ID.fullmatch(name):
        raise ValueError(f"corpus {name!r} does not exist; give {FORMS}")
    return _from_hub(name, count, seed, cache_folder(cache) / "corpora")


def _sample(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """Sample `count` texts of a stream, each as likely as any, holding no more than these."""
    rng = Random(seed)
    kept: list[tuple[int, str]] = []
    for i, text in enumerate(texts):
        if i < count:
            kept.append((i, text))
        elif (place := rng.randrange(i + 1)) < count:
            kept[place] = (i, text)
    return [text for _, text in sorted(kept)]


def _read(path: Path) -> Iterator[str]:
    """Yield the texts of a local file or folder."""
    if path.is_file():
        files = [path]
    else:
        found = (f for f in path.rglob("*") if f.suffix in FILES and f.is_file())
        files = sorted(f for f in found if "/." not in f"/{f.relative_to(path).as_posix()}")
    for file in files:
        if file.suffix not in FILES:
            raise ValueError(f"corpus {str(file)!r} is no {' or '.join(FILES)}; give {FORMS}")
        for number, line in enumerate(_lines(file), start=1):
            text = _field(line, f"{file}:{number}") if file.suffix == ".jsonl" else line
            if text.strip():
                yield text
    if not files:
        yield from _stream(str(path))


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a text file, those that are not blank, without their ends."""
    at = 0
    try:
        with file.open("rb") as opened:  # as bytes: only "\n" ends a line, not U+2028 in a text
            for line in opened:
                if b"\0" in line:
                    raise ValueError(f"corpus {str(file)!r} holds binary data; give {FORMS}")
                yield line.decode("utf-8-sig" if at == 0 else "utf-8").strip("\r\n")
                at += len(line)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"corpus {str(file)!r} is not UTF-8 at byte {at + error.start}; save it as UTF-8"
        ) from error
    except OSError as error:
        raise ValueError(f"corpus {str(file)!r} cannot be read: {error}") from error


def _field(line: str, place: str) -> str:
    """Return the field `text` of one JSON line; nothing of a blank one."""
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: {error.msg} at column {error.colno}; write JSON") from error
    return _text(row, place)


def _text(row: Any, place: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f'{place}: expected {{"text": ...}}, found {row!r:.60}')
    text = row.get("text")
    if not isinstance(text, str):
        found = sorted(row) if "text" not in row else f"{text!r:.60}"
        raise ValueError(f"{place}: needs a field 'text' that holds a text, found {found}")
    return text.encode(errors="replace").decode()  # half an emoji is no text to a tokenizer


def _stream(source: str, config: str | None = None, seed: int | None = None) -> Iterator[str]:
    """Yield the texts of a dataset as `datasets` streams them, shuffled where there is a seed."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    place = f"dataset {source!r}" + (f", configuration {config!r}" if config else "")
    fix = (
        "check its name, or without a network give `corpus` as a .txt (one text a line) or a "
        ".jsonl (field `text`)"
    )
    try:
        rows = load_dataset(source, config, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(f"corpus: {place} cannot be opened ({_first(error)}); {fix}") from error
    rows = iter(rows if seed is None else rows.shuffle(seed=seed, buffer_size=SHUFFLED))
    while True:
        try:
            row = next(rows, None)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise ValueError(f"corpus: {place} broke off ({_first(error)}); {fix}") from error
        if row is None:
            return
        if (text := _text(row, place)).strip():
            yield text


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _from_hub(name: str, count: int, seed: int, folder: Path) -> Corpus:
    """Return the texts drawn from a dataset of the Hub, now or before.

    A stream is shuffled shard by shard, through a buffer: a sample takes the texts of as many
    shards as it needs, in a drawn order, and is not even over the whole dataset.
    """
    from rich.console import Console
    from rich.progress import track

    drawn = {"source": name, "count": count, "seed": seed}
    digest = hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]
    kept = folder / f"{re.sub('[/:]', '--', name)}-{digest}.jsonl"
    if (corpus := _kept(kept, drawn)) is not None:
        return corpus
    dataset, _, config = name.partition(":")
    stream = _stream(dataset, config or None, seed)
    console = Console(stderr=True)
    shown = track(
        islice(stream, count), f"reading {name}", total=count, console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    corpus = Corpus.of(shown, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        header = {**drawn, "sha256": corpus.sha256}
        write_lines(kept, [header, *({"text": text} for text in corpus.texts)])
    except OSError as error:
        log.warning("the texts of %s are drawn but not kept: %s", name, error)
    return corpus


def _kept(file: Path, drawn: dict[str, Any]) -> Corpus | None:
    """Return what was drawn before; nothing where it is not there or not whole."""
    if not file.is_file():
        return None
    try:
        header, *rows = [json.loads(line) for line in _lines(file)]
        corpus = Corpus.of([row["text"] for row in rows], drawn["source"])
        if header == {**drawn, "sha256": corpus.sha256}:
            return corpus
    except (ValueError, KeyError, TypeError):
        pass
    log.warning("%s is damaged; its texts are drawn again", file)
    return None
