"""What a source of edits must keep to, whoever wrote it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from editkit.edits import Edit, Probe

Facts = tuple[tuple[str, str], ...]
"""(prompt, answer) pairs."""


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


def until_overwritten(
    edits: Sequence[Edit], probes: Sequence[Probe], rests_on: Mapping[str, Facts]
) -> list[Probe]:
    """Give each probe the edit from which on its answer is wrong, or for locality out of place.

    An edit answers its prompt and its rephrasings, those for training and those that are asked. A
    later edit that answers one of them otherwise is an update: what the earlier edit was asked is
    then no longer true. A locality question that an edit answers is meant to change. Wordings are
    compared without regard to case and spacing. Where the other edit comes first and stands, the
    probe is never asked (`until` is then not above `edit_id`).

    Args:
        edits: The stream, numbered 0..N-1.
        probes: Its probes.
        rests_on: Facts that a probe rests on beside its own edit's and its own, by probe id.

    Returns:
        The probes in order, with `until` set where there is such an edit.
    """
    wordings = _wordings(edits, probes)
    answered = _Answered(edits, wordings)
    updates = [
        min(
            (i for word in words for i in answered.others(word, edit.target) if i > edit.id),
            default=None,
        )
        for edit, words in zip(edits, wordings, strict=True)
    ]
    found = []
    for probe in probes:
        own = -1 if probe.edit_id is None else probe.edit_id
        if probe.kind == "locality":
            at = answered.by(probe.prompt)
        else:
            at = [i for i in answered.others(probe.prompt, probe.target) if i > own]
            if own >= 0 and (update := updates[own]) is not None:
                at.append(update)
            for prompt, answer in rests_on.get(probe.id, ()):
                standing = [i for i in answered.by(prompt) if i <= own][-1:]
                at += [i for i in answered.others(prompt, answer) if i > own or i in standing]
        found.append(replace(probe, until=min(at)) if at else probe)
    return found


class _Answered:
    """Which edits answer a wording, in the order of the stream."""

    def __init__(self, edits: Sequence[Edit], wordings: Sequence[Sequence[str]]) -> None:
        self._edits: dict[str, list[Edit]] = {}
        for edit, words in zip(edits, wordings, strict=True):
            for word in words:
                self._edits.setdefault(word, []).append(edit)

    def by(self, wording: str) -> list[int]:
        """All of them."""
        return [edit.id for edit in self._edits.get(plain(wording), [])]

    def others(self, wording: str, answer: str | None) -> list[int]:
        """Those that answer otherwise."""
        there = self._edits.get(plain(wording), [])
        return [edit.id for edit in there if plain(edit.target) != plain(answer or "")]


def _wordings(edits: Sequence[Edit], probes: Sequence[Probe]) -> list[list[str]]:
    """All wordings that each edit answers, plain, each once."""
    found = [dict.fromkeys(map(plain, (edit.prompt, *edit.rephrases))) for edit in edits]
    for probe in probes:
        own = probe.edit_id
        if probe.kind == "generalization" and own is not None and probe.target == edits[own].target:
            found[own][plain(probe.prompt)] = None
    return [[*words] for words in found]


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


def sha256_of_probes(probes: Sequence[Probe]) -> str:
    """Fingerprint of what is asked, in this order."""
    digest = hashlib.sha256()
    for probe in probes:
        digest.update(repr(probe).encode())
    return digest.hexdigest()
