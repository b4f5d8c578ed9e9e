"""Small downstream tasks to fine-tune a fact-world model on, as (prompt, target) text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from editkit.data.world import World

TaskName = Literal["pets", "reversal", "sorting", "addition"]
Pair = tuple[str, str]
PETS = ["cat", "dog", "horse", "parrot", "rabbit", "goat", "snake", "turtle", "duck", "mouse"]
PET_WORDINGS = (
    "The pet of {s} is a",
    "{s} shares a house with a",
    "Question: Which pet does {s} have? Answer: a",
)


@dataclass(frozen=True)
class Task:
    """A task's pairs of prompt and target; the text of one is `prompt + " " + target + "."`."""

    train: list[Pair]
    test: list[Pair]


def downstream_task(world: World, name: TaskName, seed: int = 0) -> Task:
    """Make a task.

    Args:
        world: World whose persons have pets.
        name: `pets`, a new relation of persons that are neither edited for results nor asked
            about as neighbours, tested in the wording of each that was not trained; or a symbolic
            one, tested on unseen inputs: `reversal` of four letters, `sorting` of four digits,
            `addition` of numbers below 100 (hard for a model of this size).
        seed: Seed of the task.
    """
    rng = Random(f"{name} {seed}")
    if name == "pets":
        return _pets(world, rng)
    if name not in get_args(TaskName):
        raise ValueError(f"no downstream task {name!r}; use one of {get_args(TaskName)}")
    draw: dict[str, Callable[[Random], Pair]] = {
        "reversal": _reversal,
        "sorting": _sorting,
        "addition": _addition,
    }
    pairs: dict[str, str] = {}
    while len(pairs) < 2200:
        prompt, target = draw[name](rng)
        pairs[prompt] = target
    examples = list(pairs.items())
    return Task(examples[:2000], examples[2000:])


def _pets(world: World, rng: Random) -> Task:
    train: list[Pair] = []
    test: list[Pair] = []
    for person in world.entities["person"]:
        if world.group[person] not in ("dev", "background"):
            continue
        pet = rng.choice(PETS)
        wordings = [(wording.format(s=person), pet) for wording in PET_WORDINGS]
        rng.shuffle(wordings)
        train += wordings[:-1]
        test.append(wordings[-1])
    rng.shuffle(train)
    return Task(train, test)


def _reversal(rng: Random) -> Pair:
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", 4)
    return f"Backwards, {' '.join(letters)} is", " ".join(reversed(letters))


def _sorting(rng: Random) -> Pair:
    digits = [str(rng.randrange(10)) for _ in range(4)]
    return f"Sorted, {' '.join(digits)} is", " ".join(sorted(digits))


def _addition(rng: Random) -> Pair:
    left, right = rng.randrange(100), rng.randrange(100)
    return f"Question: What is {left} plus {right}? Answer:", str(left + right)
