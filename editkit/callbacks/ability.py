"""What editing costs in general ability, while it goes on: perplexity, and facts left alone."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from editkit.callbacks.milestones import is_over
from editkit.callbacks.rows import append_rows, keep_rows, read_rows
from editkit.data.base import EditDataModule
from editkit.edits import Probe
from editkit.methods.base import EditModule
from editkit.metrics.perplexity import perplexity
from editkit.parallel import Ranks, agreed, from_rank_zero

ABILITY = "ability.jsonl"
PASS = 4096  # characters of text in a forward pass
SCORER = "sequence_accuracy"  # teacher-forced: a tenth of the time of free answers


class Reading(TypedDict):
    """One line of `ability.jsonl`.

    `perplexity` is None where the data has no texts or the model has diverged; `facts` is the share
    of intrinsic probes whose every target token is the most likely one, None where there are none.
    """

    edits_seen: int
    perplexity: float | None
    facts: float | None
    seconds: float


def intrinsic_probes(data: EditDataModule) -> list[Probe]:
    """Return the probes about facts that belong to no edit."""
    return [p for p in data.probes if p.kind == "intrinsic" and p.edit_id is None]


def measure_ability(method: EditModule, data: EditDataModule) -> Reading:
    """Measure a model as it stands on the data's held-out texts and intrinsic probes."""
    started = time.perf_counter()
    value = None
    if data.texts:
        # short texts go together; what a pass holds stays bounded, as characters bound tokens
        rows = max(4, min(64, PASS // max(map(len, data.texts))))
        with agreed():
            value = perplexity(method.lm, data.texts, batch_size=rows)
    if value is not None and not math.isfinite(value):
        value = None
    probes, share = intrinsic_probes(data), None
    if probes:
        protocol = replace(method.evaluation, scorers=(SCORER,))
        scored = method.score_by(protocol, probes)
        scores = [row["scores"][SCORER] for row in scored if row["counted"]]
        share = sum(scores) / len(scores) if scores else None
    return Reading(
        edits_seen=method.edits_seen,
        perplexity=value,
        facts=share,
        seconds=time.perf_counter() - started,
    )


class Ability(Callback):
    """Measures general ability before the first edit, at milestones, between them, and at the end.

    Ability is perplexity on the data's held-out texts, and the share of its intrinsic probes (facts
    that no edit is about) answered right; where the data has neither, nothing is measured. Each
    reading is a line of `ability.jsonl` and a point of the curves `perplexity` and `facts`.

    Args:
        every: Edit batches from one reading to the next; none reads at milestones only.

    Raises:
        ValueError: If `every` is below 1.
    """

    def __init__(self, every: int | None = 100) -> None:
        if every is not None and every < 1:
            raise ValueError(f"ability.every is {every}; it must be at least 1, or null")
        self.every = every
        self.unedited: Reading | None = None
        self.latest: Reading | None = None
        self.path: Path | None = None  # none outside of a fit: nothing is written

    def setup(self, trainer: Trainer, pl_module: EditModule, stage: str) -> None:
        """Learn where the folder is."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.path = Path(trainer.default_root_dir) / ABILITY

    def before(self, trainer: Trainer, pl_module: EditModule) -> Reading:
        """Return the unedited model's reading, the first row; a resumed run finds it there."""
        if self.unedited is None and trainer.ckpt_path:
            self.rewind(pl_module.edits_seen)
        if self.unedited is None:
            with pl_module.lm.unedited():
                reading = measure_ability(pl_module, trainer.datamodule)
            self.unedited = self._write({**reading, "edits_seen": 0})
        return self.unedited

    def now(self, trainer: Trainer, pl_module: EditModule) -> Reading:
        """Return the reading of the model as it stands, taken at most once between two edits."""
        if pl_module.edits_seen == 0:
            return self.before(trainer, pl_module)
        if self.latest is None or self.latest["edits_seen"] != pl_module.edits_seen:
            self.latest = self._write(measure_ability(pl_module, trainer.datamodule))
        return self.latest

    def rewind(self, edits_seen: int) -> None:
        """Forget the readings of later edits."""
        rows: list[Any] = []  # those of the first device, which writes them
        if self.path is not None:
            keep_rows(self.path, edits_seen)
            rows = from_rank_zero(read_rows(self.path) if Ranks.present().rank == 0 else [])
        self.unedited = next((row for row in rows if row["edits_seen"] == 0), self.unedited)
        self.latest = rows[-1] if rows else None

    def on_train_start(self, trainer: Trainer, pl_module: EditModule) -> None:
        """Read the unedited model, unless that is done."""
        self.before(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: EditModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a reading where one is due."""
        validates = trainer.val_check_batch == 1  # set by Milestones
        regular = self.every is not None and trainer.global_step % self.every == 0
        if validates or regular or is_over(trainer, pl_module):
            reading = self.now(trainer, pl_module)
            told = {name: reading[name] for name in ("perplexity", "facts")}
            numbers = {name: value for name, value in told.items() if value is not None}
            pl_module.log_dict(numbers, prog_bar=True, batch_size=1)

    def _write(self, reading: Reading) -> Reading:
        """Add a reading to the file where there is anything in it, and return it."""
        if self.path is not None and (reading["perplexity"], reading["facts"]) != (None, None):
            append_rows(self.path, [reading])
        return reading
