"""One arm of a retention run: fine-tune, ask the questions on the way and at the end, resume.

`arms/<arm>/` holds `base.jsonl` and `edited.jsonl` (before training), `step-NNNNNN.jsonl` (on the
way and at the end), `done.json` when it is finished, and until then what a resume needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from editkit.adapters.io import write_lines
from editkit.edits import Edit
from editkit.methods.base import EditModule
from editkit.methods.memory import MemoryEdit
from editkit.metrics.protocol import EvalProtocol
from editkit.metrics.summary import write_json
from editkit.retention.afterwards import ARM_OF, afterwards
from editkit.retention.answers import BASE, DONE, EDITED, RELEARNED, Rows, answers
from editkit.retention.asking import ask_downstream, ask_items
from editkit.retention.drift import Before, drift, look
from editkit.retention.finetune import Arm, FineTuneEdited
from editkit.retention.items import Item
from editkit.retention.objectives import Objective
from editkit.retention.relearn import lost_pairs, relearn
from editkit.retention.shared import Known
from editkit.retention.source import EditedRun

LOOK = "before.safetensors"
ARM_ORDER: tuple[Arm, ...] = ("edited", "control", "identity")
IDENTITY_STEPS = 5  # at a learning rate of 0 more steps would change as little


@dataclass(frozen=True)
class Questions:
    """What is asked in every arm, and how.

    Args:
        items: The frozen questions.
        evaluation: How answers are scored.
        at: Steps after which to ask, besides the end.
        faithful: Also score as Wen & Zhang do.
        texts: Held-out texts on which drift is measured.
        edits: Edits whose keys are followed.
        known: Answers that other runs have found.
        after: What is done at the end (`ARM_OF`).
        relearn: Steps in which lost edits are learned again; 0 leaves it out.
    """

    items: Sequence[Item]
    evaluation: EvalProtocol
    at: tuple[int, ...]
    faithful: bool
    texts: Sequence[str]
    edits: Sequence[Edit]
    known: Known
    after: Sequence[str] = ()
    relearn: int = 0


class Watch(Callback):
    """Asks the questions before, during and after the fine-tuning of one arm.

    Args:
        folder: Folder of the arm.
        questions: What to ask.
        objective: What is trained on.
        run: The edited run.
    """

    def __init__(
        self, folder: Path, questions: Questions, objective: Objective, run: EditedRun
    ) -> None:
        self.folder, self.questions, self.objective = folder, questions, objective
        self.run = run
        self.numbers: dict[str, Any] = {}
        self.asked_at, self.is_over = -1, False

    def on_fit_start(self, trainer: Trainer, pl_module: FineTuneEdited) -> None:
        """Ask before the first step; a resumed run reads what was found."""
        method, questions = pl_module.method, self.questions
        assert method is not None
        method.evaluation = questions.evaluation
        if "rekeyed" in questions.after and not isinstance(method, MemoryEdit):
            raise ValueError(
                f"{type(method).__name__} has no keys to find again; --retain.rekey is for methods "
                "with a memory, such as MEMOIR"
            )
        if trainer.ckpt_path:
            self.before = Before.load(self.folder / LOOK)
            return
        with Still(pl_module):
            rows = dict.fromkeys([*self.objective.plan, *self.objective.tests])
            pl_module.note_start([*rows], questions.evaluation.batch_size)
            with method.lm.unedited():
                self._note("downstream_base", method)
                base = questions.known.rows(method, False, partial(self._ask, method))
            self._write(BASE, base)
            if pl_module.arm != "control":
                self._note("downstream_before", method)
                edited = questions.known.rows(method, True, partial(self._ask, method))
                self._write(EDITED, edited)
            self.before = look(method.lm, questions.texts, questions.edits)
        if trainer.is_global_zero:
            self.before.save(self.folder / LOOK)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: FineTuneEdited, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask at the steps that were named."""
        step = trainer.global_step
        if step in self.questions.at and step != self.asked_at:
            self._ask_now(pl_module, step)

    def on_train_end(self, trainer: Trainer, pl_module: FineTuneEdited) -> None:
        """Ask at the end, measure the drift, and finish the arm."""
        step = trainer.global_step
        if step != self.asked_at:
            self._ask_now(pl_module, step)
        assert pl_module.method is not None
        lm = pl_module.lm
        with Still(pl_module):
            now = look(lm, self.questions.texts, self.questions.edits)
            self.numbers["drift"] = drift(lm, self.before, now, pl_module.start)
            if self.questions.relearn and pl_module.arm == "edited":
                trainer.strategy.barrier()  # all read what the first device has written
                self._write(RELEARNED, self._relearned(pl_module, step))
            for name in self.questions.after:
                if ARM_OF[name] == pl_module.arm:
                    with afterwards(name, pl_module.method, self.run) as method:
                        self._note(f"downstream_{name}", method)
                        self._write(f"{name}.jsonl", self._ask(method))
        loss = trainer.callback_metrics.get("loss")
        self.numbers |= {
            "step": step,
            "loss": None if loss is None or not math.isfinite(float(loss)) else float(loss),
            "trained_parameters": sum(p.numel() for p in pl_module.trained.values()),
            "trained_tensors": len(pl_module.trained),
        }
        self._finish()
        self.is_over = True

    def on_fit_end(self, trainer: Trainer, pl_module: FineTuneEdited) -> None:
        """End what was resumed behind its last step, too, where Lightning trains no more."""
        if not self.is_over:
            self.on_train_end(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: FineTuneEdited, exception: BaseException
    ) -> None:
        """Keep what was done where the run is told to end; Lightning does so between two steps."""
        if isinstance(exception, SIGTERMException) and trainer.checkpoint_callback is not None:
            trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")

    def state_dict(self) -> dict[str, Any]:
        """Keep the numbers found before the first step."""
        return {"numbers": self.numbers, "asked_at": self.asked_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.numbers, self.asked_at = state_dict["numbers"], state_dict["asked_at"]

    # private

    def _ask(self, method: EditModule) -> Rows:
        return ask_items(method, self.questions.items, self.questions.faithful)

    def _relearned(self, module: FineTuneEdited, step: int) -> list[dict[str, Any]]:
        names = (BASE, EDITED, f"step-{step:06d}.jsonl")
        pairs = lost_pairs(self.questions.items, *(answers(self.folder / name) for name in names))
        size = self.objective.batch_size
        return relearn(module, pairs, self.questions.relearn, module.lr, size) if pairs else []

    def _ask_now(self, module: FineTuneEdited, step: int) -> None:
        assert module.method is not None
        with Still(module):
            self.asked_at = step
            self._note(f"downstream_{step}", module.method)
            self._write(f"step-{step:06d}.jsonl", self._ask(module.method))

    def _note(self, name: str, method: EditModule) -> None:
        score = ask_downstream(method, self.objective, self.questions.evaluation)
        self.numbers[name] = score

    @rank_zero_only
    def _write(self, name: str, rows: Rows | list[dict[str, Any]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_lines(self.folder / name, rows.values() if isinstance(rows, dict) else rows)

    @rank_zero_only
    def _finish(self) -> None:
        write_json(self.folder / DONE, self.numbers)
        for leftover in (self.folder / LOOK, *self.folder.glob("checkpoints/*.ckpt")):
            leftover.unlink(missing_ok=True)
        if (self.folder / "checkpoints").is_dir():
            (self.folder / "checkpoints").rmdir()


class Still:
    """Evaluation mode and no gradients inside the context."""

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        self.grad = torch.no_grad()

    def __enter__(self) -> None:
        self.was_training = self.module.training
        self.module.eval()
        self.grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.grad.__exit__(*error)
        self.module.train(self.was_training)


def checkpoint_of(folder: Path) -> Path | None:
    """Return the checkpoint to go on from; a torn one is passed over."""
    path = folder / "checkpoints" / "last.ckpt"
    if not path.is_file() or not (folder / LOOK).is_file():
        return None
    if not is_zipfile(path):  # cut short: torch writes zip files, whose end comes last
        rank_zero_info(f"{path} is torn; the arm begins again")
        return None
    return path


def keeper(folder: Path, every: int) -> ModelCheckpoint:
    """Return a callback that keeps one checkpoint to resume from."""
    return ModelCheckpoint(
        folder / "checkpoints",
        filename="last",
        every_n_train_steps=every,
        enable_version_counter=False,
    )
