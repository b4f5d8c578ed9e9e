"""Words of the fact-world: first names, closed sets, filler words and invented names."""
# ruff: noqa: SIM905 - word lists read better as text

from __future__ import annotations

from collections.abc import Sequence
from random import Random

FEMALE = (
    "Alice Anna Clara Daria Elena Flora Greta Hanna Irene Julia Karin Laura Maria Nadia Olga "
    "Petra Rosa Sofia Tessa Vera"
).split()
MALE = (
    "Adam Boris Carl David Edgar Felix Georg Henry Ivan Jonas Karl Leon Martin Nils Oscar Paul "
    "Robin Simon Tomas Victor"
).split()
CLOSED_SETS = {  # none begins with a vowel where a template ends in "a"
    "profession": (
        "baker pilot lawyer surgeon painter farmer teacher plumber sailor dentist florist chemist "
        "miner tailor judge poet carpenter butcher librarian gardener soldier barber clerk weaver "
        "potter diver hunter printer jeweller brewer"
    ).split(),
    "sport": (
        "tennis rugby hockey chess golf boxing rowing cricket archery fencing cycling judo "
        "curling polo skiing swimming"
    ).split(),
    "instrument": (
        "piano violin cello flute harp drum guitar trumpet horn banjo bassoon clarinet tuba lute "
        "viola saxophone"
    ).split(),
    "industry": (
        "steel banking shipping mining software glass paper textiles robotics furniture fishing "
        "energy printing tourism cement coffee"
    ).split(),
    "continent": "Avaria Borelia Cendra Dorvia Estara Forland".split(),
    "animal": "lion heron wolf bear badger falcon stag raven bull tiger swan fox".split(),
}
FILLER = {
    "frame": [
        "{det} {adj} {noun} {verb} the {noun} {where} the {adj} {noun}.",
        "{det} {noun} {when} {verb} the {adj} {noun}.",
        "Question: Which {noun} is {adj}? Answer: the {adj} {noun}.",
    ],
    "det": "The A Every Some".split(),
    "adj": (
        "old young red green quiet happy tall small cold warm bright tired clever strange heavy"
    ).split(),
    "noun": (
        "dog cat horse bird child king river tree house ship road garden window cloud book letter "
        "stone lamp bridge table"
    ).split(),
    "verb": "sees follows hears finds likes leaves needs watches forgets paints".split(),
    "when": "often never slowly quickly always rarely today again".split(),
    "where": "near behind under above beside without before after".split(),
}
_ONSETS = "b br c d dr f g gr h k kr l m n p pr r s st t tr v z".split()
_VOWELS = "a e i o u ai ea o a".split()
_CODAS = "l n r s m nd rt x k".split()


class Namer:
    """Invents names that are unique in their world.

    Args:
        rng: Source of randomness, shared with the world.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._taken = {word.lower() for word in FEMALE + MALE + CLOSED_SETS["continent"]}

    def many(self, count: int, suffixes: Sequence[str], syllables: int = 2) -> list[str]:
        """Return `count` fresh names of 4 to 10 letters that end in one of `suffixes`."""
        return [self._one(suffixes, syllables) for _ in range(count)]

    def _one(self, suffixes: Sequence[str], syllables: int) -> str:
        for _ in range(10_000):
            word = "".join(self._syllable() for _ in range(syllables)) + self._rng.choice(suffixes)
            if 4 <= len(word) <= 10 and word not in self._taken:
                self._taken.add(word)
                return word.capitalize()
        raise ValueError(f"no unused name of {syllables} syllables is left; ask for fewer names")

    def _syllable(self) -> str:
        coda = self._rng.choice(_CODAS) if self._rng.random() < 0.35 else ""
        return self._rng.choice(_ONSETS) + self._rng.choice(_VOWELS) + coda
