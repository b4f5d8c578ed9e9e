"""Edits and probes of the fact-world, rebuilt from the seed of a trained model; no download.

Subjects are dealt into groups once per world (`editkit.data.world.GROUPS`): those edited in the
`edit` split, those edited in the `dev` split (for choosing layers, thresholds and learning rates),
neighbours of either split that are only asked about, and a background that is only read (negatives,
held-out texts, corpora). A third of the relations of every subject, at least one, is *kept*: never
edited. So no locality probe and no bridge of a two-hop probe is ever made false by another edit,
however the stream is sliced. Wordings are shared by the splits; facts and subjects are not.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any, Literal

from editkit.data.base import EditDataModule
from editkit.data.counterfactuals import NEIGHBOURS, Counterfactuals, kept_relations
from editkit.data.downstream import Task, TaskName, downstream_task
from editkit.data.world import Fact, World, WorldSize
from editkit.edits import Edit, Probe

# Seeds of filler, apart from those of training, so that texts of one use are not those of another.
NEGATIVES, TEXTS, CORPUS = 1001, 1002, 1003


def load_world(folder: Path | None = None) -> World:
    """Rebuild the world that a trained model knows.

    Args:
        folder: The model's folder, holding `world.json`; None is the packaged model.

    Raises:
        ValueError: This version of editkit makes another world from the stored seed and sizes.
    """
    path = (folder or Path(str(files("editkit") / "assets" / "factworld"))) / "world.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; train a model with `python experiments/factworld/train.py`"
        )
    stored = json.loads(path.read_text())
    world = World(stored["seed"], WorldSize(**stored["size"]))
    if world.fingerprint() != stored["fingerprint"]:
        raise ValueError(
            f"the model in {path.parent} was trained on a world of seed {stored['seed']} with"
            f" fingerprint {stored['fingerprint'][:12]}, but that seed and these sizes now make"
            f" {world.fingerprint()[:12]}; use the editkit version of that model or train it again"
            " with `python experiments/factworld/train.py`"
        )
    return world


class FactWorld(EditDataModule):
    """Counterfactual edits of the facts that a fact-world model knows.

    One edit a fact at most; `seed` draws their order, wordings and new objects, so that another
    seed is another stream. Probes of an edit: its own prompt; wordings held out for its fact
    (generalization); the same relation of other subjects and kept relations of the same subject
    (locality); what follows from the new object (portability, axes `two_hop` and `reversed`), where
    the world has such a chain.

    Args:
        relations: Relations to edit; None is all sixteen.
        split: `edit` for results, `dev` for choosing settings; their subjects are disjoint.
        rephrases_per_edit: Generalization probes an edit, at most 4.
        neighbours_per_edit: Locality probes an edit on other subjects.
        inserted: Share of the edits that tell something new, about subjects that the model never
            read of, and overwrite nothing; they have no probes of their subject or of what follows.
        same_subject_per_edit: Locality probes an edit on kept relations of its subject, where it
            has so many.
        negatives_per_edit: Unrelated texts a method may see with each edit.
        intrinsic: Probes about facts that belong to no edit and to no text a method may see: what
            the model should still know, for `--ability` and `--canary`.
        world: Folder of a trained fact-world model; None is the packaged one.
        order: As in `EditDataModule`; the source itself is already shuffled by `seed`.
        seed: Seed of the order, the wordings and the new objects.
        **kwargs: Further arguments of `EditDataModule`.
    """

    def __init__(
        self,
        relations: list[str] | None = None,
        split: Literal["edit", "dev"] = "edit",
        rephrases_per_edit: int = 2,
        neighbours_per_edit: int = 2,
        same_subject_per_edit: int = 1,
        negatives_per_edit: int = 2,
        intrinsic: int = 0,
        inserted: float = 0.0,
        world: Path | None = None,
        order: Literal["file", "shuffled"] = "file",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(order=order, seed=seed, **kwargs)
        if split not in NEIGHBOURS:
            raise ValueError(f"split is {split!r}; use 'edit' or 'dev'")
        if not 0 <= inserted <= 1:
            raise ValueError(f"inserted is {inserted}; it is a share of the edits, from 0 to 1")
        self.relations, self.split, self.folder = relations, split, world
        self.inserted = inserted
        self.rephrases_per_edit = rephrases_per_edit
        self.neighbours_per_edit = neighbours_per_edit
        self.same_subject_per_edit = same_subject_per_edit
        self.negatives_per_edit = negatives_per_edit
        self.intrinsic = intrinsic
        self._world: World | None = None

    @property
    def world(self) -> World:
        """The world, rebuilt at first use."""
        if self._world is None:
            self._world = load_world(self.folder)
        return self._world

    def load(self) -> tuple[list[Edit], list[Probe]]:
        """Draw the stream: one edit per editable fact, and its probes."""
        rng = Random(f"{self.split} {self.seed}")
        kept = kept_relations(self.world)
        facts = self._editable(kept)
        rng.shuffle(facts)
        self._insert(facts)
        source = Counterfactuals(self.world, kept, self.split, rng)
        per_edit = self.negatives_per_edit
        negatives = self._negatives(rng, len(facts) * per_edit)
        edits: list[Edit] = []
        probes: list[Probe] = []
        for i, fact in enumerate(facts):
            texts = tuple(negatives[i * per_edit : (i + 1) * per_edit])
            edits.append(source.edit(i, fact, texts))
            probes += source.own_probes(edits[i], fact, self.rephrases_per_edit)
            probes += source.other_subjects(i, fact, self.neighbours_per_edit)
            if fact.subject in kept:  # else it is new, and nothing is known of it
                probes += source.same_subject(i, fact, self.same_subject_per_edit)
                probes += source.portability(edits[i], fact)
        self.texts = self._held_out_texts()
        return edits, probes + self._intrinsic({edit.target for edit in edits})

    def filler(self, count: int, seed: int = 0) -> list[str]:
        """Make `count` sentences that state no fact."""
        return self.world.filler(count, seed=CORPUS + seed)

    def corpus(self, count: int, seed: int = 0) -> list[str]:
        """Draw `count` texts as in training, for moments: background facts and a tenth filler.

        No text is about a subject that is edited or asked about in either split.
        """
        rng = Random(f"corpus {seed}")
        stated = rng.choices(self._background("trained"), k=count - count // 10)
        texts = stated + self.filler(count // 10, seed)
        rng.shuffle(texts)
        return texts

    def downstream(self, name: TaskName, seed: int = 0) -> Task:
        """Make a small task to fine-tune on, of (prompt, target) pairs; see `downstream_task`."""
        return downstream_task(self.world, name, seed)

    def _editable(self, kept: dict[str, list[str]]) -> list[Fact]:
        known = self.world.relations
        for name in self.relations or []:
            if name not in known:
                raise ValueError(f"no relation {name!r} in the fact-world; it has {sorted(known)}")
        return [
            fact
            for fact in self.world.facts
            if self.world.group[fact.subject] == self.split
            and fact.relation not in kept[fact.subject]
            and (self.relations is None or fact.relation in self.relations)
        ]

    def _insert(self, facts: list[Fact]) -> None:
        """Put facts about new subjects in the place of some of these."""
        rng = Random(f"inserted {self.split} {self.seed}")
        named = self.relations or [*self.world.relations]
        new = [fact for fact in self.world.strangers if fact.relation in named]
        count = round(self.inserted * len(facts))
        if count > len(new):
            raise ValueError(f"inserted asks for {count} new facts; there are {len(new)}")
        places = rng.sample(range(len(facts)), count)
        for place, fact in zip(places, rng.sample(new, count), strict=True):
            facts[place] = fact

    def _intrinsic(self, new_objects: set[str]) -> list[Probe]:
        """Ask facts of the other split's neighbours, whom nothing else in this split is about."""
        world, other = self.world, NEIGHBOURS["dev" if self.split == "edit" else "edit"]
        named = new_objects | {
            fact.object for fact in world.facts if world.group[fact.subject] == self.split
        }
        facts = [
            fact
            for fact in world.facts
            if world.group[fact.subject] == other and fact.subject not in named
        ]
        if not 0 <= self.intrinsic <= len(facts):
            raise ValueError(f"intrinsic is {self.intrinsic}; this world has 0 to {len(facts)}")
        rng = Random(f"intrinsic {self.split} {self.seed}")
        return [
            Probe(
                f"intrinsic{n}",
                None,
                "intrinsic",
                world.prompt(fact, rng.choice(fact.trained)),
                fact.object,
                axis=fact.relation,
            )
            for n, fact in enumerate(rng.sample(facts, self.intrinsic))
        ]

    def _background(self, wordings: Literal["trained", "held_out"]) -> list[str]:
        world = self.world
        return [
            f"{world.prompt(fact, template)} {fact.object}."
            for fact in world.facts
            if world.group[fact.subject] == "background"
            for template in (fact.trained if wordings == "trained" else fact.held_out)
        ]

    def _negatives(self, rng: Random, count: int) -> list[str]:
        texts = rng.choices(self._background("trained"), k=count - count // 2)
        texts += self.world.filler(count // 2, seed=NEGATIVES + self.seed)
        rng.shuffle(texts)
        return texts

    def _held_out_texts(self, count: int = 100) -> list[str]:
        rng = Random("held-out texts")
        filler = self.world.filler(count, seed=TEXTS)
        return filler + rng.sample(self._background("held_out"), count)
