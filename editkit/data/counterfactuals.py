"""One counterfactual edit of a fact-world fact, and the questions asked about it."""

from __future__ import annotations

from functools import cached_property
from random import Random

from editkit.data.relations import CHAINS
from editkit.data.world import Fact, Group, World
from editkit.edits import Edit, Probe

NEIGHBOURS: dict[str, Group] = {"edit": "near_edit", "dev": "near_dev"}


def kept_relations(world: World) -> dict[str, list[str]]:
    """Return for each subject its relations that no edit of any split changes."""
    rng = Random(f"kept {world.seed}")
    kept: dict[str, list[str]] = {}
    for subject, group in world.group.items():
        relations = list(world.facts_of(subject))
        part = rng.sample(relations, max(1, len(relations) // 3))
        kept[subject] = part if group in NEIGHBOURS else relations
    return kept


class Counterfactuals:
    """Draws new objects and words edits and probes.

    Args:
        world: World of the facts.
        kept: Relations of each subject that are never edited.
        split: Split whose neighbours are asked.
        rng: Source of randomness of the stream.
    """

    def __init__(self, world: World, kept: dict[str, list[str]], split: str, rng: Random) -> None:
        self.world, self.kept, self.rng = world, kept, rng
        self.neighbours: dict[str, list[Fact]] = {}
        self._free: dict[str, list[str]] = {}
        self._firm: dict[str, list[str]] = {}
        for fact in world.facts:
            if world.group[fact.subject] == NEIGHBOURS[split]:
                self.neighbours.setdefault(fact.relation, []).append(fact)

    def edit(self, number: int, fact: Fact, negatives: tuple[str, ...]) -> Edit:
        """Word an edit in a trained statement; the other trained wordings are its rephrases."""
        statements = len(self.world.relations[fact.relation].statements)
        stated = [template for template in fact.trained if template < statements]
        chosen = self.rng.choice(stated)
        others = [template for template in fact.trained if template != chosen]
        return Edit(
            id=number,
            prompt=self.world.prompt(fact, chosen),
            target=self._new_object(fact),
            subject=fact.subject,
            negatives=negatives,
            rephrases=tuple(self.world.prompt(fact, template) for template in others),
            relation=fact.relation,
        )

    def _new_object(self, fact: Fact) -> str:
        """Draw another object of the right kind.

        Of one-to-one relations each object is given out once and never one already taken, so that
        the reversed question keeps one answer. Where a chain goes on from the object, one whose
        next fact is never edited is preferred, so that the two-hop question has a firm answer.
        """
        if self.world.relations[fact.relation].reverse:
            return self._free_objects(fact.relation).pop()
        pool = [name for name in self._firm_objects(fact.relation) if name != fact.object]
        return self.rng.choice(pool)

    def _free_objects(self, relation: str) -> list[str]:
        if relation not in self._free:
            taken = {fact.object for fact in self.world.facts if fact.relation == relation}
            firm = set(self._firm_objects(relation))
            free = [name for name in self.world.objects(relation) if name not in taken]
            self.rng.shuffle(free)
            self._free[relation] = sorted(
                free, key=lambda name: name in firm
            )  # popped from the end
        return self._free[relation]

    def _firm_objects(self, relation: str) -> list[str]:
        """Return the objects that have some next fact which is never edited; all if none has."""
        if relation not in self._firm:
            seconds = {second for first, second in CHAINS if first == relation}
            names = self.world.objects(relation)
            firm = [name for name in names if seconds & set(self.kept.get(name, ()))]
            self._firm[relation] = firm or names
        return self._firm[relation]

    def own_probes(self, edit: Edit, fact: Fact, rephrases: int) -> list[Probe]:
        """Ask the edit's own prompt, and wordings held out for its fact."""
        held = self.rng.sample(fact.held_out, min(rephrases, len(fact.held_out)))
        own = Probe(f"{edit.id}.rel", edit.id, "reliability", edit.prompt, edit.target)
        return [own] + [
            Probe(
                f"{edit.id}.gen{n}",
                edit.id,
                "generalization",
                self.world.prompt(fact, template),
                edit.target,
                axis="question" if self._is_question(fact, template) else "statement",
            )
            for n, template in enumerate(held)
        ]

    def _is_question(self, fact: Fact, template: int) -> bool:
        return template >= len(self.world.relations[fact.relation].statements)

    def other_subjects(self, number: int, fact: Fact, count: int) -> list[Probe]:
        """Ask the same relation of subjects that are never edited."""
        pool = self.neighbours.get(fact.relation, [])
        return self._locality(number, "other_subject", self.rng.sample(pool, min(count, len(pool))))

    def same_subject(self, number: int, fact: Fact, count: int) -> list[Probe]:
        """Ask relations of the edit's subject that are never edited."""
        facts = self.world.facts_of(fact.subject)
        kept = [facts[relation] for relation in self.kept[fact.subject]]
        return self._locality(number, "same_subject", self.rng.sample(kept, min(count, len(kept))))

    def _locality(self, number: int, axis: str, facts: list[Fact]) -> list[Probe]:
        return [
            Probe(
                f"{number}.{axis}{n}",
                number,
                "locality",
                self.world.prompt(fact, self.rng.choice(fact.trained)),
                fact.object,
                axis,
            )
            for n, fact in enumerate(facts)
        ]

    @cached_property
    def _trained_chains(self) -> set[tuple[str, tuple[str, ...]]]:
        return {(hop.subject, hop.path) for hop in self.world.two_hop}

    def portability(self, edit: Edit, fact: Fact) -> list[Probe]:
        """Ask what follows from the new object: chains the base model can answer, and reversals."""
        probes = []
        for chain in CHAINS:
            if (fact.subject, chain) in self._trained_chains:
                probes += self._two_hop(edit, fact, chain[1])
        if prompts := self.world.reverse_prompts(fact.relation, edit.target):
            n = self.rng.randrange(len(prompts))
            known = self.world.reverse_prompts(fact.relation, fact.object)[n], fact.subject
            name = f"{edit.id}.reversed"
            probes.append(
                Probe(name, edit.id, "portability", prompts[n], fact.subject, "reversed", (known,))
            )
        return probes

    def _two_hop(self, edit: Edit, fact: Fact, second: str) -> list[Probe]:
        """Ask the second relation of the new object, if it is never edited and has a new answer."""
        bridge = self.world.facts_of(edit.target).get(second)
        old = self.world.answer(fact.object, second)
        if bridge is None or old is None or bridge.object == old:
            return []
        if second not in self.kept[edit.target]:
            return []
        prompts = self.world.two_hop_prompts(fact.subject, fact.relation, second)
        prompt = self.rng.choice(prompts)
        stated = self.world.prompt(bridge, self.rng.choice(bridge.trained))
        return [
            Probe(
                f"{edit.id}.{second}",
                edit.id,
                "portability",
                prompt,
                bridge.object,
                "two_hop",
                conditions=((prompt, old), (stated, bridge.object)),
            )
        ]
