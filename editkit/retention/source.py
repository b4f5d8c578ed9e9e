"""An edited run as text: what was edited, what it replaced, and facts that were left alone.

The stream is rebuilt from the run's `config.yaml`; a folder that was saved from Python has none,
and its ledger then stands for the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

from jsonargparse import ArgumentParser, Namespace
from safetensors import safe_open

from editkit.adapters.io import TENSORS, read_config
from editkit.callbacks.folder import EDITS, SUMMARY
from editkit.data.base import EditDataModule
from editkit.data.facts import read_facts
from editkit.data.factworld import FactWorld
from editkit.data.source import plain, sha256_of
from editkit.data.world import World
from editkit.edits import Edit, Probe
from editkit.report.files import read_config as read_yaml
from editkit.report.files import read_json
from editkit.retention.ledger import LedgerStream, read_ledger


@dataclass
class EditedRun:
    """A run folder of `editkit fit`, or one that `EditedLM.save` wrote.

    Args:
        folder: The folder.
        trust: Allow a data or method class from outside editkit: a class path is code to run.

    Raises:
        ValueError: If the folder holds no finished run, or its stream cannot be made again.
    """

    folder: Path
    trust: bool = False

    def __post_init__(self) -> None:
        """Read what the run left behind."""
        self.folder = Path(self.folder)
        needed = "class_path", "init_args", "lm", "base", "edits_seen"
        self.artefact = read_config(self.folder, needed)
        self.ledger = read_ledger(self.folder, self.artefact)
        self.made = [e for e in self.ledger if not (e["undone"] or e.get("rolled_back"))]
        if not self.made:
            raise ValueError(
                f"{str(self.folder)!r} holds no edit that stands; there is nothing to retain"
            )
        self.data = self._stream()
        if not self.standing:
            raise ValueError(
                f"none of the edits of {str(self.folder / EDITS)!r} is in the stream that its "
                "config.yaml names; save the edits into a folder of their own"
            )

    def _stream(self) -> EditDataModule:
        path = self.folder / "config.yaml"
        if not path.is_file():
            stream: EditDataModule = LedgerStream(self.made)
            stream.setup()
            return stream
        stream = self._configured(path)
        stream.setup()
        told = read_json(self.folder / SUMMARY).get("protocol")
        sha = told.get("data_sha256") if isinstance(told, dict) else None
        if sha is not None and sha != sha256_of(stream.edits):
            raise ValueError(
                f"the stream that {str(path)!r} names is no longer the one that was edited; its "
                "file has changed: put the edited one back"
            )
        return stream

    def _configured(self, path: Path) -> EditDataModule:
        told = read_yaml(path).get("data")
        if not isinstance(told, dict):
            raise ValueError(f"{str(path)!r} is damaged ('data' is {told!r:.40}, no mapping)")
        name = str(told.get("class_path"))
        if not self.trust and not name.startswith("editkit."):
            raise ValueError(
                f"the run's data class {name!r} is from outside editkit; loading it runs that "
                "code: pass --trust true if you trust it"
            )
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(EditDataModule, "data")
        config = parser.parse_object({"data": told})
        stream: EditDataModule = instantiate(parser, config).data
        return stream

    @property
    def sites(self) -> list[str]:
        """Paths of the layers that hold the edits; of older runs, names of their tensors."""
        told = self.artefact.get("sites")
        if told is None:
            with safe_open(self.folder / TENSORS, "pt") as tensors:
                told = tensors.keys()
        return sorted(told)

    @cached_property
    def standing(self) -> dict[int, Edit]:
        """Edits that were made and not taken back, by id."""
        made = {entry["edit_id"] for entry in self.made}
        return {edit.id: edit for edit in self.data.edits if edit.id in made}

    @cached_property
    def old_answers(self) -> dict[int, str]:
        """What the data says was true before each edit, where it says so."""
        return _old_answers(self.data, self.data.edits, self.data.probes)

    @property
    def world(self) -> World | None:
        """The invented world that the edited model knows, where it knows one."""
        return self.data.world if isinstance(self.data, FactWorld) else None

    def untouched(self, path: Path | None, count: int, seed: int) -> list[Edit]:
        """Draw facts that no edit touches; their `target` is true.

        Args:
            path: File of facts; none takes those of the run's own source that were not edited.
            count: Facts at most.
            seed: Seed of the draw.

        Raises:
            ValueError: If there is no such fact.
        """
        facts = self._from_source() if path is None else read_facts(path)
        edited = self.data.edits
        subjects = {plain(e.subject) for e in edited if e.subject}
        prompts = {plain(e.prompt) for e in edited}
        asked = {plain(p.prompt) for p in self.data.probes if p.kind != "locality"}
        free = [
            fact
            for fact in facts
            if plain(fact.subject or "") not in subjects
            and plain(fact.prompt) not in prompts | asked
        ]
        if not free:
            raise ValueError(
                "no facts to compare the edits with: the run's source names no true answers beside "
                "its edits; give --probes.facts FILE, JSON lines with prompt, subject and target"
            )
        named = {e.relation for e in self.standing.values() if e.relation}
        alike = [f for f in free if not named or f.relation in named] or free
        drawn = Random(f"untouched {seed}").sample(alike, min(count, len(alike)))
        return sorted(drawn, key=lambda fact: fact.id)

    def _from_source(self) -> list[Edit]:
        """Return the facts of the run's source with what is true of them."""
        if isinstance(self.data, FactWorld):
            return _facts_of_world(self.data)
        edits, probes = self.data.load()
        old = _old_answers(self.data, edits, probes)
        return [
            Edit(e.id, e.prompt, old[e.id], e.subject, relation=e.relation)
            for e in edits
            if e.id in old
        ]

    def unknown(self, count: int, seed: int) -> list[Edit]:
        """Draw statements about subjects that the base model never read of; none on real data."""
        if self.world is None:
            return []
        rng = Random(f"unknown {seed}")
        told = {edit.subject for edit in self.data.edits}
        facts = [fact for fact in self.world.strangers if fact.subject not in told]
        return [
            Edit(i, self.world.prompt(fact, rng.choice(fact.trained)), fact.object, fact.subject,
                 relation=fact.relation)
            for i, fact in enumerate(rng.sample(facts, min(count, len(facts))))
        ]  # fmt: skip


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    """Build what a config names, by whichever name this version of jsonargparse has for it."""
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes
    built: Namespace = build(config)
    return built


def _old_answers(data: EditDataModule, edits: list[Edit], probes: list[Probe]) -> dict[int, str]:
    """Return the answers that edits replace: the world's, else the rivals of their own prompts."""
    if isinstance(data, FactWorld):
        known = ((e.id, data.world.answer(e.subject or "", e.relation)) for e in edits)
        return {i: answer for i, answer in known if answer is not None}
    return {
        probe.edit_id: probe.rival
        for probe in probes
        if probe.kind == "reliability" and probe.edit_id is not None and probe.rival is not None
    }


def _facts_of_world(data: FactWorld) -> list[Edit]:
    """Return facts of the split's subjects and of those that are only asked about."""
    world, rng = data.world, Random(f"facts {data.world.seed}")
    groups = {data.split, "near_edit", "near_dev"}
    statements = {name: len(relation.statements) for name, relation in world.relations.items()}
    facts = []
    for fact in world.facts:
        stated = [t for t in fact.trained if t < statements[fact.relation]]
        prompt = world.prompt(fact, rng.choice(stated))
        if world.group[fact.subject] in groups:
            facts.append(Edit(fact.id, prompt, fact.object, fact.subject, relation=fact.relation))
    return facts
