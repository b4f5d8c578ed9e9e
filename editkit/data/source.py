"""What a source of edits must keep to, whoever wrote it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from editkit.edits import Edit, Probe


def leaks(edits: Sequence[Edit], probes: Sequence[Probe]) -> Iterator[tuple[Edit, str, Probe]]:
    """Find texts that a method may see while editing and that are asked as probes too.

    Compared without regard to case and spacing, as a probe's prompt and as prompt with answer.

    Yields:
        The edit, its offending text, and the probe.
    """
    asked: dict[str, Probe] = {}
    if any(edit.rephrases or edit.negatives for edit in edits):
        for probe in probes:
            asked.setdefault(plain(probe.prompt), probe)
            asked.setdefault(plain(f"{probe.prompt} {probe.target or ''}"), probe)
    for edit in edits:
        for text in (*edit.rephrases, *edit.negatives):
            if (hit := asked.get(plain(text))) is not None:
                yield edit, text, hit


def plain(text: str) -> str:
    """Text without regard to case and spacing."""
    return " ".join(text.casefold().split())


def check_source(edits: Sequence[Edit], probes: Sequence[Probe]) -> None:
    """Raise where a subclass' `load` breaks the contract that numbering and probes rest on."""
    if not edits:
        raise ValueError("the source holds no edits")
    for i, edit in enumerate(edits):
        if edit.id != i:
            raise ValueError(f"load() numbered edit {i} as {edit.id}; ids are source positions")
    seen: set[str] = set()
    for probe in probes:
        if probe.id in seen:
            raise ValueError(f"probe id {probe.id!r} is used twice; ids name probes in the tables")
        if probe.edit_id is not None and not 0 <= probe.edit_id < len(edits):
            raise ValueError(
                f"probe {probe.id!r} belongs to edit {probe.edit_id}, but there are {len(edits)}"
            )
        seen.add(probe.id)


def sha256_of(edits: Sequence[Edit]) -> str:
    """Fingerprint of what these edits write, in this order."""
    digest = hashlib.sha256()
    for edit in edits:
        digest.update(repr((edit.prompt, edit.target, edit.subject)).encode())
        digest.update(repr((edit.negatives, edit.rephrases)).encode())
    return digest.hexdigest()
