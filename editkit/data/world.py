"""The fact-world: an invented world of facts, wholly determined by a seed and its sizes.

A world has persons, countries, cities and companies, and 16 relations among them and some small
closed sets. Each fact is trained in four of its relation's eight wordings and the other four are
held out for that fact. Some chains of two facts, and the reverse of every one-to-one fact, are
trained as sentences of their own, so that the unedited model can answer portability probes.
No torch here: a world is text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from random import Random
from typing import Literal

from editkit.data.names import CLOSED_SETS, FEMALE, FILLER, MALE, Namer
from editkit.data.relations import CHAINS, RELATIONS, Relation

Group = Literal["edit", "dev", "near_edit", "near_dev", "background"]
# Parts of a cycle of twenty entities: who is edited, who is only asked about, who is only read.
GROUPS: tuple[tuple[Group, int], ...] = (
    ("edit", 13),
    ("dev", 2),
    ("near_edit", 2),
    ("near_dev", 1),
    ("background", 2),
)


@dataclass(frozen=True)
class WorldSize:
    """How large a world is.

    Args:
        persons: Number of persons, each with six facts.
        countries: Number of countries, each with five facts.
        cities: Number of cities, each with two facts.
        companies: Number of companies, each with three facts.
        languages: Number of languages to choose from.
        currencies: Number of currencies to choose from.
        universities: Number of universities to choose from.
        surnames: Number of surnames; fewer than persons, so that both names must be bound.
        two_hop_share: Share of the subjects to edit whose two-hop chains are trained.
    """

    persons: int = 1000
    countries: int = 60
    cities: int = 300
    companies: int = 200
    languages: int = 24
    currencies: int = 24
    universities: int = 30
    surnames: int = 330
    two_hop_share: float = 0.5


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact; `trained` and `held_out` index its relation's templates."""

    id: int
    relation: str
    subject: str
    object: str
    trained: tuple[int, ...]
    held_out: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Derived:
    """A sentence that follows from facts: a chain of two (`path` of two) or a reversed fact."""

    subject: str
    path: tuple[str, ...]
    object: str
    prompts: tuple[str, ...]


class World:
    """All names, facts and sentences of one world.

    Args:
        seed: Another seed is another world.
        size: Numbers of entities.
    """

    def __init__(self, seed: int = 0, size: WorldSize | None = None) -> None:
        self.seed = seed
        self.size = size or WorldSize()
        self.relations: dict[str, Relation] = {relation.name: relation for relation in RELATIONS}
        rng = Random(f"world {seed}")
        self.entities = self._name_entities(rng)
        self.facts = self._draw_facts(rng)
        self.group = self._draw_groups(rng)
        asked = [subject for subject, group in self.group.items() if group in ("edit", "dev")]
        self.two_hop = [
            hop
            for subject in asked
            if rng.random() < self.size.two_hop_share
            for hop in self._hops(subject)
        ]
        self.reversed = [
            Derived(fact.object, (fact.relation,), fact.subject, prompts)
            for fact in self.facts
            if (prompts := self.reverse_prompts(fact.relation, fact.object))
        ]

    def _name_entities(self, rng: Random) -> dict[str, list[str]]:
        namer, size = Namer(rng), self.size
        surnames = namer.many(size.surnames, ["", "", "n", "r", "s", "ov", "ez"])
        full = [f"{first} {last}" for first in FEMALE + MALE for last in surnames]
        if size.persons > len(full):
            raise ValueError(f"{size.persons} persons need more than {size.surnames} surnames")
        rng.shuffle(full)
        currencies = namer.many(size.currencies, ["in", "ar", "ek"], syllables=1)
        universities = namer.many(size.universities, ["ham", "wick", "bridge"], syllables=1)
        kinds = ("College", "University", "Institute")
        return {
            "person": full[: size.persons],
            "country": namer.many(size.countries, ["ia", "land", "stan", "ria"]),
            "city": namer.many(size.cities, ["ville", "burg", "ton", "ford", "a", "o"]),
            "company": namer.many(size.companies, ["corp", "tech", "ex", "co", "soft"]),
            "language": namer.many(size.languages, ["ish", "ese", "ic"], syllables=1),
            "currency": [currency.lower() for currency in currencies],
            "university": [f"{name} {rng.choice(kinds)}" for name in universities],
            **{kind: list(words) for kind, words in CLOSED_SETS.items()},
        }

    def _draw_facts(self, rng: Random) -> list[Fact]:
        countries, cities = self.entities["country"], self.entities["city"]
        if self.size.cities < self.size.countries:
            raise ValueError(f"{self.size.cities} cities for {self.size.countries} capitals")
        home = {city: countries[i % len(countries)] for i, city in enumerate(cities)}
        fixed = {"located_in": home, "capital": dict(zip(countries, cities, strict=False))}
        facts: list[Fact] = []
        for name, relation in self.relations.items():
            subjects, objects = self.entities[relation.subject], self.entities[relation.object]
            if name in fixed:
                answers = [fixed[name][subject] for subject in subjects]
            elif relation.reverse:  # one to one, so that the reversed question has one answer
                answers = rng.sample(objects, len(subjects))
            else:
                answers = [rng.choice(objects) for _ in subjects]
            for subject, answer in zip(subjects, answers, strict=True):
                order = rng.sample(range(len(relation.templates)), len(relation.templates))
                half = len(order) // 2
                trained, held = tuple(sorted(order[:half])), tuple(sorted(order[half:]))
                facts.append(Fact(len(facts), name, subject, answer, trained, held))
        return facts

    def _draw_groups(self, rng: Random) -> dict[str, Group]:
        cycle: list[Group] = [group for group, parts in GROUPS for _ in range(parts)]
        group: dict[str, Group] = {}
        for kind in ("person", "country", "city", "company"):
            rng.shuffle(cycle)
            group |= {name: cycle[i % len(cycle)] for i, name in enumerate(self.entities[kind])}
        return group

    def _hops(self, subject: str) -> Iterator[Derived]:
        for first, second in CHAINS:
            bridge = self.answer(subject, first)
            end = self.answer(bridge, second) if bridge else None
            if end and end != subject:
                yield Derived(
                    subject, (first, second), end, self.two_hop_prompts(subject, first, second)
                )

    @cached_property
    def _facts_of(self) -> dict[str, dict[str, Fact]]:
        table: dict[str, dict[str, Fact]] = {}
        for fact in self.facts:
            table.setdefault(fact.subject, {})[fact.relation] = fact
        return table

    @cached_property
    def strangers(self) -> list[Fact]:
        """Facts of the next world, about subjects that no text of this one names."""
        other = World(self.seed + 1, self.size)
        return [fact for fact in other.facts if fact.subject not in self.group]

    def facts_of(self, subject: str) -> dict[str, Fact]:
        """Return the facts about `subject` by relation; empty for members of the closed sets."""
        return self._facts_of.get(subject, {})

    def answer(self, subject: str, relation: str) -> str | None:
        """Return the object of a fact, or None where the subject has no such fact."""
        fact = self.facts_of(subject).get(relation)
        return fact.object if fact else None

    def objects(self, relation: str) -> list[str]:
        """Return every entity of the kind that answers `relation`."""
        return self.entities[self.relations[relation].object]

    def prompt(self, fact: Fact, template: int) -> str:
        """Word a fact up to its object."""
        return self.relations[fact.relation].templates[template].format(s=fact.subject)

    def two_hop_prompts(self, subject: str, first: str, second: str) -> tuple[str, ...]:
        """Word a chain in two ways, as in "The industry of the employer of Alice Brano is"."""
        bridge = self.relations[first].phrase.format(s=subject)
        asked = self.relations[second]
        return asked.statements[1].format(s=bridge), asked.questions[0].format(s=bridge)

    def reverse_prompts(self, relation: str, target: str) -> tuple[str, ...]:
        """Word the reverse of a one-to-one fact; empty for other relations."""
        return tuple(text.format(o=target) for text in self.relations[relation].reverse)

    def filler(self, count: int, seed: int = 0) -> list[str]:
        """Make `count` sentences that state no fact of the world."""
        rng = Random(f"filler {seed}")
        return [_filler(rng) for _ in range(count)]

    def fingerprint(self) -> str:
        """Hash every name, fact, wording and derived sentence of the world."""
        rows = [[f.id, f.relation, f.subject, f.object, f.trained] for f in self.facts]
        derived = [[d.object, *d.prompts] for d in self.two_hop + self.reversed]
        words = [relation.templates for relation in RELATIONS]
        text = json.dumps([rows, derived, words, self.group, self.filler(100)])
        return hashlib.sha256(text.encode()).hexdigest()

    def card(self) -> dict[str, object]:
        """Return what `world.json` stores beside a trained model."""
        return {"seed": self.seed, "size": asdict(self.size), "fingerprint": self.fingerprint()}


def _filler(rng: Random) -> str:
    form = rng.random()
    if form > 0.85:
        start = rng.randint(0, 60)
        return " ".join(str(number) for number in range(start, start + rng.randint(4, 9))) + "."
    frame = FILLER["frame"][0 if form < 0.4 else 1 if form < 0.7 else 2]
    while "{" in frame:  # one slot at a time, so that no word is bound to repeat
        slot = frame[frame.index("{") + 1 : frame.index("}")]
        frame = frame.replace("{" + slot + "}", rng.choice(FILLER[slot]), 1)
    return frame
