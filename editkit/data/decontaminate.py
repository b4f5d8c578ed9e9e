"""Leave out of fine-tuning texts what states, or could state, a fact that is asked afterwards.

A text goes where it names the subject of a fact, or names an object of it together with the
relation's cue. Texts are compared as words: case, punctuation, accents' encoding and a possessive
's do not matter. The cue is what is left of the fact's prompt without its subject; all its pieces
must be there.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

_POSSESSIVE = re.compile(r"['\u2019]s\b")
_NOT_WORD = re.compile(r"[^\w]+")
Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact that fine-tuning must not touch.

    Args:
        prompt: Text up to the object.
        subjects: Names of its subject; none where they are not known.
        objects: Answers, old and new.
    """

    prompt: str
    subjects: tuple[str, ...]
    objects: tuple[str, ...]


def words_of(text: str) -> Words:
    """Reduce a text to what is compared.

    >>> words_of("Alice Brano's job: that of a Baker.")
    ('alice', 'brano', 'job', 'that', 'of', 'a', 'baker')
    """
    plain = _POSSESSIVE.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    return tuple(_NOT_WORD.sub(" ", plain).split())


def cue_of(fact: Fact) -> tuple[Words, ...]:
    """Return the pieces of a fact's prompt around its subject.

    >>> cue_of(Fact("People in Alba speak", ("Alba",), ("French",)))
    (('people', 'in'), ('speak',))
    """
    text = fact.prompt
    for subject in sorted(fact.subjects, key=len, reverse=True):
        text = text.replace(subject, "\0")
    return tuple(piece for part in text.split("\0") if (piece := words_of(part)))


@dataclass
class Overlap:
    """Finds texts that touch facts.

    Args:
        facts: What must not be touched.

    Attributes:
        removed: Why texts were left out: `subject` or `object and cue`, and how many.
    """

    facts: Sequence[Fact]
    removed: Counter[str] = field(default_factory=Counter)
    read: int = 0

    def __post_init__(self) -> None:
        """Index names by their words, so that a text is read once."""
        self._subjects = {w for f in self.facts for s in f.subjects if (w := words_of(s))}
        self._cues: dict[Words, set[tuple[Words, ...]]] = {}
        for fact in self.facts:
            if cue := cue_of(fact):
                for name in fact.objects:
                    self._cues.setdefault(words_of(name), set()).add(cue)
        self._cues.pop((), None)
        self._lengths = sorted({len(name) for name in (*self._subjects, *self._cues)})

    def reason(self, text: str) -> str | None:
        """Say why a text must go; None where it may stay."""
        words = words_of(text)
        found = set(self._names(words))
        if found & self._subjects:
            return "subject"
        row = f" {' '.join(words)} "
        for name in found & self._cues.keys():
            for cue in self._cues[name]:
                if all(f" {' '.join(piece)} " in row for piece in cue):
                    return "object and cue"
        return None

    def keeps(self, text: str) -> bool:
        """Whether a text may stay; counts what is read and what must go."""
        self.read += 1
        why = self.reason(text)
        if why is not None:
            self.removed[why] += 1
        return why is None

    def _names(self, words: Words) -> Iterator[Words]:
        for size in self._lengths:
            for i in range(len(words) - size + 1):
                yield words[i : i + size]

    def account(self) -> dict[str, float | int]:
        """Return what was read and left out, for the manifest."""
        gone = sum(self.removed.values())
        share = gone / self.read if self.read else 0.0
        return {"read": self.read, "removed": gone, "removed_share": share, **self.removed}


def mentioned(texts: Iterable[str], facts: Sequence[Fact]) -> list[str]:
    """Return the texts that name a subject of these facts: what adversarial overlap trains on."""
    overlap = Overlap(facts)
    return [text for text in texts if overlap.reason(text) == "subject"]
