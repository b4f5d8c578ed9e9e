"""Edits that repeat, contradict or nearly repeat an earlier one, found by their words alone.

Two prompts are near when they share most of their words, both when every word counts the same and
when rare words count more. The first keeps questions about the same thing apart ("born in" and
"born in the year"), the second keeps the same question about two things apart: names are rare.
"""

from __future__ import annotations

import math
import unicodedata
from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from editkit.edits import Edit

ConflictKind = Literal["duplicate", "contradiction", "near"]
MARKS = ".,;:!?\"'()[]\u201c\u201d\u2018\u2019\u2026"  # stripped off words; inside: C++, 3.5
FEW = 100  # prompts that are compared one by one sooner than counted all together
SAYS = {"duplicate": "repeats", "contradiction": "contradicts", "near": "nearly repeats"}


@dataclass(frozen=True, slots=True)
class Conflict:
    """An edit and the earlier one it is at odds with.

    Args:
        kind: `duplicate`, same question and answer; `contradiction`, same question and another
            answer; `near`, nearly the same question, whatever the answers.
        edit: The later edit.
        earlier: The latest earlier one of that kind, which is in force.
        similarity: Of the prompts' words, at most 1; 1 where a wording is the same.
    """

    kind: ConflictKind
    edit: Edit
    earlier: Edit
    similarity: float

    def __str__(self) -> str:
        edit, other = self.edit, self.earlier
        text = (
            f"edit {edit.id} {SAYS[self.kind]} edit {other.id}: {edit.prompt!r} -> {edit.target!r}"
        )
        return f"{text}, before {other.prompt!r} -> {other.target!r}"

    def row(self) -> dict[str, Any]:
        """Return a line of `conflicts.jsonl`."""
        return {
            "kind": self.kind,
            "edit_id": self.edit.id,
            "prompt": self.edit.prompt,
            "target": self.edit.target,
            "earlier_id": self.earlier.id,
            "earlier_prompt": self.earlier.prompt,
            "earlier_target": self.earlier.target,
            "similarity": round(self.similarity, 4),
        }


class ConflictIndex:
    """Edits made so far, to be asked whether a new one is at odds with them.

    Exact: an inverted index over words, of which a new prompt looks up its rarest only. Where a
    prompt shares none of these with another, their similarity is below the threshold.

    Args:
        similarity: Least similarity at which two prompts are near, above 0, at most 1.

    Raises:
        ValueError: If `similarity` is not in that range.
    """

    def __init__(self, similarity: float = 0.8) -> None:
        if not 0 < similarity <= 1:
            raise ValueError(f"similarity is {similarity}; it must be above 0 and at most 1")
        self.similarity = similarity
        self._by_wording: dict[str, Edit] = {}
        self._place: dict[str, int] = {}  # of each different prompt in the two lists
        self._words: list[frozenset[str]] = []
        self._latest: list[tuple[int, Edit]] = []  # (number of edits by then, edit)
        self._sizes = array("q")  # words of each
        self._holding: dict[str, array[int]] = {}  # word to the prompts that hold it
        self._count = 0

    def add(self, edit: Edit) -> None:
        """Take an edit in."""
        for wording in _wordings(edit):
            self._by_wording[wording] = edit
        self._count += 1
        text = bare(edit.prompt)
        place = self._place.setdefault(text, len(self._words))
        if place < len(self._words):
            self._latest[place] = (self._count, edit)
            return
        self._words.append(frozenset(text.split()))
        self._sizes.append(len(self._words[place]))
        self._latest.append((self._count, edit))
        for word in self._words[place]:
            self._holding.setdefault(word, array("q")).append(place)

    def find(self, edit: Edit) -> Conflict | None:
        """Return what the edit is at odds with: first of all an edit of the same wording."""
        for wording in _wordings(edit):
            if (other := self._by_wording.get(wording)) is not None:
                same = bare(other.target) == bare(edit.target)
                return Conflict("duplicate" if same else "contradiction", edit, other, 1.0)
        words = frozenset(bare(edit.prompt).split())
        best = max(
            (
                (similarity, *self._latest[place])
                for place in self._candidates(words)
                if (similarity := self._compare(words, self._words[place])) >= self.similarity
                and not _other_subject(edit, self._latest[place][1])
            ),
            key=lambda found: found[:2],
            default=None,
        )
        return None if best is None else Conflict("near", edit, best[2], best[0])

    def _weight(self, word: str) -> float:
        """Return how much a word counts: more the fewer prompts hold it."""
        return math.log1p((len(self._words) + 1) / (len(self._holding.get(word, ())) + 1))

    def _weigh(self, words: frozenset[str]) -> float:
        """Return what words weigh together, the same in whatever order a set has them."""
        return math.fsum(map(self._weight, words))

    def _candidates(self, words: frozenset[str]) -> Collection[int]:
        """Return every prompt that can be near: it holds one of the rarest words.

        What is near lacks at most `1 - similarity` of the words' weight, so it cannot lack all of
        a part that weighs more.
        """
        heaviest = sorted(((self._weight(word), word) for word in words), reverse=True)
        left = (1 - self.similarity) * self._weigh(words)
        lists: list[array[int]] = []
        for weight, word in heaviest:
            lists.append(self._holding.get(word, array("q")))
            left -= weight
            if left < -1e-9:
                break
        if sum(map(len, lists)) <= FEW:
            return {place for places in lists for place in places}
        return self._sharing_most(words)

    def _sharing_most(self, words: frozenset[str]) -> list[int]:
        """Return every prompt that is near where all words count the same, by counting."""
        shared = np.zeros(len(self._words), np.int64)
        for word in words & self._holding.keys():
            shared[np.frombuffer(self._holding[word], np.int64)] += 1
        overlap = shared / (np.frombuffer(self._sizes, np.int64) + len(words) - shared)
        return [int(place) for place in np.flatnonzero(overlap > self.similarity - 1e-9)]

    def _compare(self, one: frozenset[str], other: frozenset[str]) -> float:
        """Return the lower of the words' overlap, plain and weighted (Jaccard's)."""
        shared, all_words = one & other, one | other
        plain = len(shared) / len(all_words)
        if plain < self.similarity:
            return plain
        return min(plain, self._weigh(shared) / self._weigh(all_words))


def find_conflicts(edits: Iterable[Edit], similarity: float = 0.8) -> list[Conflict]:
    """Return what each edit of a stream is at odds with among those before it.

    Args:
        edits: The stream, in order.
        similarity: As of `ConflictIndex`.
    """
    index, found = ConflictIndex(similarity), []
    for edit in edits:
        if (conflict := index.find(edit)) is not None:
            found.append(conflict)
        index.add(edit)
    return found


def bare(text: str) -> str:
    """Return a text without regard to case, spacing, and marks at the ends of words.

    >>> bare("  What is  Alba's capital? "), bare("...")
    ('what is alba capital', '...')
    """
    words = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'").split()
    stripped = (word.strip(MARKS).removesuffix("'s") for word in words)
    return " ".join(filter(None, stripped)) or " ".join(words)


def _wordings(edit: Edit) -> list[str]:
    """Return an edit's own question first, then its other wordings, bare."""
    return [bare(text) for text in (edit.prompt, *edit.rephrases)]


def _other_subject(one: Edit, other: Edit) -> bool:
    """Whether two edits are known to be about different things."""
    if one.subject is None or other.subject is None:
        return False
    return bare(one.subject) != bare(other.subject)
