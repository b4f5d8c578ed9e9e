"""What an edited model is fine-tuned on afterwards: one class an objective.

`path: factworld` makes the rows from the world that the edited model knows, offline; any other path
is a file, a folder or a data set of the Hub. Rows that touch an edit or an intrinsic fact are left
out, and counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningDataModule

from editkit.data.batches import Batches
from editkit.data.decontaminate import Fact, Overlap
from editkit.data.files import files_of, read_records, version_of
from editkit.data.finetuning import Example, MadeName, made_examples
from editkit.data.rows import BadRowError, Record, Refused, report
from editkit.edits import Probe
from editkit.retention.source import EditedRun

MADE = "factworld"
Loss = Literal["target", "text", "preference"]
Measure = Literal["generation", "choice", "pair", "final_number", "perplexity"]


class Objective(LightningDataModule, ABC):
    """Rows to fine-tune on, in an order that is the same for every arm and on every device.

    Args:
        path: `factworld`, a file, a folder, or `owner/name` of the Hub.
        split: Split of a folder or a data set.
        test_path: Rows to test on; none sets rows of `path` apart.
        limit: Rows to train on at most; none takes all.
        test: Rows that are tested.
        batch_size: Rows of a step, over all devices.
        steps: Batches to train on; rows are dealt anew when all were seen.
        seed: Seed of what is drawn and of the order.
        decontaminate: Leave out rows that touch an edit or an intrinsic fact.
        replay: Share of each batch that is edits again, a remedy; 0 to 1.
    """

    loss: ClassVar[Loss] = "target"
    measure: ClassVar[Measure] = "generation"
    made: ClassVar[MadeName | None] = None
    room: ClassVar[int] = 256  # new tokens in which a final number is looked for
    wants: ClassVar[str]

    def __init__(
        self,
        path: str = MADE,
        split: str = "train",
        test_path: str | None = None,
        limit: int | None = None,
        test: int = 100,
        batch_size: int = 16,
        steps: int = 100,
        seed: int = 0,
        decontaminate: bool = True,
        replay: float = 0.0,
    ) -> None:
        super().__init__()
        told = {"batch_size": batch_size, "steps": steps, "test": test, "limit": limit}
        for name, value in told.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name} is {value}; it must be at least 1")
        if not 0 <= replay < 1:
            raise ValueError(
                f"data.replay is {replay}; it is a share of a batch, from 0 to below 1"
            )
        self.path, self.split, self.test_path = path, split, test_path
        self.limit, self.test, self.batch_size, self.steps = limit, test, batch_size, steps
        self.seed, self.decontaminate, self.replay = seed, decontaminate, replay
        self.batches_done = 0
        self.sources: dict[str, str] = {}
        self.account: dict[str, Any] = {}
        self.examples: list[Example] = []
        self.tests: list[Example] = []

    # what an objective implements

    @abstractmethod
    def parse(self, record: Record) -> Example:
        """Read one row of a file.

        Raises:
            BadRowError: If the row is not of this form.
        """

    def make(self, run: EditedRun) -> tuple[list[Example], list[Example]]:
        """Make rows from the world that the run's model knows."""
        if run.world is None or self.made is None:
            raise ValueError(
                f"data.path is {self.path!r}, but the run was not edited on fact-world; give "
                f"--data.path, rows with {self.wants}"
            )
        return made_examples(run.world, self.made, self.seed)

    # what the rest asks

    @property
    def name(self) -> str:
        """Short name of the objective."""
        return type(self).__name__.lower()

    def gather(self, run: EditedRun, facts: Sequence[Fact]) -> None:
        """Read, decontaminate and order the rows.

        Args:
            run: The edited run, for made rows and replay.
            facts: What rows must not touch.

        Raises:
            ValueError: If rows are bad, or none is left.
        """
        train, test = self.make(run) if self.path == MADE else self._from_files()
        overlap = Overlap(facts)
        if self.decontaminate:
            train = [row for row in train if overlap.keeps(row.text)]
            self.account = overlap.account()
        if not train:
            raise ValueError(
                f"none of the rows of {self.path!r} is left to train on"
                + (f": {self.account} touch the facts that are asked" if self.account else "")
            )
        self.examples, self.tests = train[: self.limit], test[: self.test]
        self.plan = self._order(run)

    def probes(self) -> list[Probe]:
        """Return the test rows as questions for the evaluator."""
        return [
            Probe(f"task{i}", None, "intrinsic", row.prompt, row.target,
                  rival=row.rejected or None, aliases=row.aliases, choices=row.choices)
            for i, row in enumerate(self.tests)
        ]  # fmt: skip

    def train_dataloader(self) -> Batches[Example]:
        """Return the planned batches, from the first that is not done."""
        size = self.batch_size
        spans = [(i, i + size) for i in range(0, len(self.plan), size)]
        return Batches(self.plan, spans, self.batches_done)

    def val_dataloader(self) -> Batches[Example]:
        """Return the test rows."""
        spans = [
            (i, min(i + self.batch_size, len(self.tests)))
            for i in range(0, len(self.tests), self.batch_size)
        ]
        return Batches(self.tests, spans)

    def state_dict(self) -> dict[str, int]:
        """Keep the position, since Lightning does not rewind a plain loader."""
        return {"batches_done": self.batches_done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on behind the batches that are done."""
        self.batches_done = state_dict["batches_done"]

    # private

    def _order(self, run: EditedRun) -> list[Example]:
        """Deal the rows into `steps` batches, each row once before any comes again."""
        rng = Random(f"order {self.seed}")
        replayed = round(self.replay * self.batch_size)
        if self.replay and not replayed:
            raise ValueError(
                f"data.replay is {self.replay}: of {self.batch_size} rows that is none; use "
                f"{1 / self.batch_size:.3g} or more"
            )
        fresh = _dealt(self.examples, rng)
        again = _dealt(self._replayed(run), rng) if replayed else iter(())
        plan = []
        for _ in range(self.steps):
            plan += [next(fresh) for _ in range(self.batch_size - replayed)]
            plan += [next(again) for _ in range(replayed)]
        return plan

    def _replayed(self, run: EditedRun) -> list[Example]:
        """Return the edits and the wordings that may be trained on, as rows of this objective.

        Raises:
            ValueError: If its rows are pairs of answers, which an edit is not, or no edit stands.
        """
        if not run.standing:
            raise ValueError(
                "data.replay repeats edits, and none of the run's stands; leave it out"
            )
        if self.loss == "preference":
            raise ValueError("data.replay is for rows with one answer; preferences have two")
        told = [(p, e.target) for e in run.standing.values() for p in (e.prompt, *e.rephrases)]
        is_text = self.loss == "text"
        return [Example("", f"{p} {t}") if is_text else Example(p, t) for p, t in told]

    def _from_files(self) -> tuple[list[Example], list[Example]]:
        """Read rows to train on and rows to test on; no row is in both."""
        train = self._read(self.path)
        Random(f"rows {self.seed}").shuffle(train)
        if self.test_path is not None:
            test = self._read(self.test_path)
            Random(f"tests {self.seed}").shuffle(test)
        else:
            cut = min(self.test, len(train) // 2)
            train, test = train[cut:], train[:cut]
        asked = {(row.prompt or row.target) for row in test}
        return [row for row in train if (row.prompt or row.target) not in asked], test

    def _read(self, path: str) -> list[Example]:
        found: list[Example] = []
        refused: list[Refused] = []
        count = 0
        for file in files_of(path, self.split):
            self.sources |= version_of(file)
            for line, record in read_records(file):
                count += 1
                try:
                    if isinstance(record, BadRowError):
                        raise record
                    found.append(self.parse(record))
                except BadRowError as bad:
                    refused.append(Refused(file, line, bad.reason, str(bad)))
        if refused:
            raise ValueError(f"{report(refused, count)}\n{self.name} needs {self.wants}")
        return found


def _dealt(rows: Sequence[Example], rng: Random) -> Iterator[Example]:
    """Yield rows without end, shuffled anew each time round."""
    if not rows:
        raise ValueError("there are no rows to deal")
    while True:
        yield from rng.sample(rows, len(rows))
