"""A short stream with text to read, and a Trainer as the command line makes one."""

from __future__ import annotations

import lightning as L
import pytest

from editkit.callbacks.milestones import Milestones
from editkit.data.base import EditDataModule
from editkit.edits import Edit, Probe

SUBJECTS = ["Alba", "Bera", "Cora", "Dora", "Elda", "Rome", "Paris", "Oslo", "Bern"]
TARGETS = ["Oslo", "Lima", "Bern", "Rome", "Paris", "town", "city", "St. Louis", "Lima"]


class Stream(EditDataModule):
    """Nine edits, a probe each, and text to read."""

    def load(self):
        edits = [
            Edit(
                i,
                f"the capital of {s} is",
                t,
                s,
                ("he works for Rome", "a big town"),
                (f"{s} is where he lives in",),
            )
            for i, (s, t) in enumerate(zip(SUBJECTS, TARGETS, strict=True))
        ]
        self.texts = ["she was born in a small city", "where lives a Question : ? Answer"]
        return edits, [Probe(f"{e.id}", e.id, "reliability", e.prompt, e.target) for e in edits]


@pytest.fixture
def stream():
    """Return a new stream; arguments are those of `EditDataModule`."""
    return Stream


@pytest.fixture
def train():
    """Fit a method on a stream in a folder; return the Trainer."""

    def run(method, folder, *callbacks, stream=None, ckpt_path=None, **kwargs):
        checkpoint = L.pytorch.callbacks.ModelCheckpoint(
            folder / "checkpoints",
            filename="{step}",
            every_n_train_steps=1,
            save_last=True,
            save_top_k=-1,
            enable_version_counter=False,
        )
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            callbacks=[Milestones(), *callbacks, checkpoint],
            **kwargs,
        )
        trainer.fit(method, stream or Stream(), ckpt_path=ckpt_path and str(ckpt_path))
        return trainer

    return run
