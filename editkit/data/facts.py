"""Facts to look for in a model, where nothing is edited: from a file, or of the fact-world."""

from __future__ import annotations

from pathlib import Path
from random import Random

from editkit.data.factworld import load_world
from editkit.data.files import read_records
from editkit.data.rows import BadRowError, Record
from editkit.data.world import World
from editkit.edits import Edit


def facts_to_trace(
    folder: Path, prompts: Path | None, fact: tuple[str, str, str], limit: int, seed: int
) -> list[Edit]:
    """Return the facts of a file, the one fact given, or those of the world that a model knows.

    Args:
        folder: The model's folder, with a `world.json` where it knows a world.
        prompts: File of facts.
        fact: Prompt, subject and target of one fact; empty where not given.
        limit: Facts at most.
        seed: Seed of the facts that are drawn where there are more.

    Raises:
        ValueError: If there are no facts, or two sources of them.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; give at least 1")
    prompt, subject, target = fact
    if prompts is not None and any(fact):
        raise ValueError("give either a file of --prompts or one --prompt with its --subject")
    if prompts is not None:
        facts = read_facts(Path(prompts))
        return facts if len(facts) <= limit else Random(seed).sample(facts, limit)
    if any(fact):
        if not subject or subject not in prompt:
            raise ValueError(f"--subject {subject!r} is not a part of --prompt {prompt!r}")
        return [Edit(0, prompt, target, subject)]
    if not (folder / "world.json").is_file():
        raise ValueError("no facts to trace; give a file of --prompts, or --prompt and --subject")
    return known_facts(load_world(folder), limit, seed)


def read_facts(path: Path) -> list[Edit]:
    """Read facts, one object each: `prompt`, `subject` and, where it has one, `target`.

    Any further field is passed over, so that files of edits serve too; ROME's `known_1000.json`
    calls the target `attribute`.

    Args:
        path: JSON lines, a JSON array, or Parquet.

    Raises:
        ValueError: If the file or a row is bad; the message names the line.
    """
    facts: list[Edit] = []
    for line, record in read_records(path):
        place = f"{path}:{line}" if line else str(path)
        if isinstance(record, BadRowError):
            raise ValueError(f"{place}: {record}") from record
        prompt, subject = (_text(record, name, place) for name in ("prompt", "subject"))
        if subject not in prompt:
            raise ValueError(f"{place}: subject {subject!r} is not in prompt {prompt!r}")
        name = "attribute" if "attribute" in record else "target"
        target = _text(record, name, place) if record.get(name) is not None else ""
        facts.append(Edit(len(facts), prompt, target, subject))
    return facts


def known_facts(world: World, count: int, seed: int = 0) -> list[Edit]:
    """Draw facts of the subjects for choosing settings, in wordings that the model was trained on.

    Args:
        world: World of a trained model.
        count: Facts at most.
        seed: Seed of the facts and wordings.
    """
    rng = Random(f"known {seed}")
    facts = [fact for fact in world.facts if world.group[fact.subject] == "dev"]
    drawn = rng.sample(facts, min(count, len(facts)))
    return [
        Edit(i, world.prompt(fact, rng.choice(fact.trained)), fact.object, fact.subject)
        for i, fact in enumerate(drawn)
    ]


def _text(record: Record, name: str, place: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: needs a field {name!r} that holds a text, found {value!r:.60}")
    return value.strip() if name != "prompt" else value
