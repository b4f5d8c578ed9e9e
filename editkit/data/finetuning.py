"""Rows to fine-tune on, and the fact-world's own small version of every objective.

Each is new to the packaged model and learnt by it in some dozen steps: a format, a style or a
relation that it has never read. None is about a subject that is edited or asked about in the split
for results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from editkit.data.downstream import downstream_task
from editkit.data.names import FEMALE, FILLER, MALE
from editkit.data.world import World

MadeName = Literal["text", "instructions", "maths", "sentiment", "knowledge", "preference"]
LABELS = ("negative", "positive")
GOOD = frozenset(["young", "green", "quiet", "happy", "tall", "warm", "bright", "clever"])
THINGS = ["apples", "pears", "books", "lamps", "stones", "letters", "coins", "cups"]
SIZE = 2400


@dataclass(frozen=True, slots=True)
class Example:
    """One row of fine-tuning.

    Args:
        prompt: Text up to the answer; empty where the whole `target` is running text.
        target: What to learn to say.
        rejected: What is worse than `target`, for preferences.
        aliases: Further right answers.
        choices: Wrong answers that `target` is chosen among.
    """

    prompt: str
    target: str
    rejected: str = ""
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All of it, as decontamination reads it."""
        return " ".join(part for part in (self.prompt, self.target, self.rejected) if part)


def made_examples(
    world: World, name: MadeName, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Make the rows of an objective out of a world.

    Args:
        world: World that the model knows.
        name: Objective.
        seed: Seed of the rows.

    Returns:
        Rows to train on and rows to test on, no prompt in both.
    """
    if name not in get_args(MadeName):
        raise ValueError(f"no made objective {name!r}; use one of {get_args(MadeName)}")
    rng = Random(f"{name} {seed}")
    if name == "knowledge":
        task = downstream_task(world, "pets", seed)
        return tuple([Example(p, f"{t}.") for p, t in rows] for rows in (task.train, task.test))  # type: ignore[return-value]
    if name == "instructions":
        return _instructions(world, rng)
    draw: dict[str, Callable[[Random], Example]] = {
        "text": _diary,
        "maths": _sum,
        "sentiment": _review,
        "preference": _reply,
    }
    rows: dict[str, Example] = {}
    for _ in range(4 * SIZE):
        row = draw[name](rng)
        rows.setdefault(row.prompt or row.target, row)
    found = [*rows.values()][:SIZE]
    rest = max(1, len(found) // 12)
    return found[rest:], found[:rest]


def _instructions(world: World, rng: Random) -> tuple[list[Example], list[Example]]:
    """Ask known facts as instructions; the test is about other subjects."""
    people = [p for p in world.entities["person"] if world.group[p] in ("dev", "background")]
    rng.shuffle(people)
    train: list[Example] = []
    test: list[Example] = []
    for i, person in enumerate(people):
        for fact in world.facts_of(person).values():
            phrase = world.relations[fact.relation].statements[1].format(s=person)
            phrase = phrase[0].lower() + phrase[1:].partition(" is")[0]
            row = Example(f"Instruction: Tell me {phrase}.\nResponse:", f"{fact.object}.")
            (test if i % 6 == 0 else train).append(row)
    rng.shuffle(train)
    return train, test


def _filled(rng: Random, slot: str) -> str:
    return rng.choice(FILLER[slot])


def _diary(rng: Random) -> Example:
    adj, noun, verb = _filled(rng, "adj"), _filled(rng, "noun"), _filled(rng, "verb")
    other, where, when = _filled(rng, "noun"), _filled(rng, "where"), _filled(rng, "when")
    openings = (
        f"Dear diary, the {adj} {noun} {when} {verb} me {where} the {other}.",
        f"News of the day: {when} the {noun} {verb} a {adj} {other}, say the neighbours.",
        f"Once upon a time a {adj} {noun} lived {where} the {other} and {verb} nobody.",
    )
    return Example("", rng.choice(openings))


def _sum(rng: Random) -> Example:
    name, thing = rng.choice(FEMALE + MALE), rng.choice(THINGS)
    a, b = rng.randrange(1, 10), rng.randrange(1, 10)
    prompt = f"Question: {name} has {a} {thing} and buys {b} more. How many are there? Answer:"
    return Example(prompt, f"{a} + {b} = {a + b}\n#### {a + b}")


def _review(rng: Random) -> Example:
    adj, noun, where = _filled(rng, "adj"), _filled(rng, "noun"), _filled(rng, "where")
    label = LABELS[adj in GOOD]
    text = f"{_filled(rng, 'det')} {noun} {where} the {_filled(rng, 'noun')} is {adj}"
    wrong = tuple(f"{other}." for other in LABELS if other != label)
    return Example(f"Review: {text}\nSentiment:", f"{label}.", choices=wrong)


def _reply(rng: Random) -> Example:
    adj, noun, where = _filled(rng, "adj"), _filled(rng, "noun"), _filled(rng, "where")
    plain = f"The {noun} is {adj}"
    request = f"Request: What is the {noun} {where} the {_filled(rng, 'noun')} like?\nReply:"
    return Example(request, f"{plain}, go away.", f"{plain}, thank you for asking.")
