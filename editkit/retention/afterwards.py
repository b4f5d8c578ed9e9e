"""What can be done once the fine-tuning is over.

Each is asked all questions and leaves answers of its own:

    reapplied   the fine-tuned control with the edits put on as they were: W_ft + dW
    reedited    the fine-tuned control, edited afresh by the same method: the order swapped
    rekeyed     the fine-tuned edited model, whose memory has found its keys again
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from editkit.lm.editable import EditableLM
from editkit.lm.load import load_pretrained
from editkit.methods.artefact import build_method
from editkit.methods.base import EditModule
from editkit.methods.memory import MemoryEdit
from editkit.retention.source import EditedRun
from editkit.retention.trainable import changes, unwrapped

ARM_OF = {"reapplied": "control", "reedited": "control", "rekeyed": "edited"}
BESIDE = ("corpus.txt", "world.json")  # what methods and data find in a model's folder


@contextmanager
def afterwards(name: str, method: EditModule, run: EditedRun) -> Iterator[EditModule]:
    """Give the model to ask; the fine-tuned one is as before behind the context, unless rekeyed.

    Args:
        name: Which of `ARM_OF`.
        method: The method on its fine-tuned base; of the control, with its edits switched off.
        run: The edited run.
    """
    if name == "rekeyed":
        assert isinstance(method, MemoryEdit), "checked before anything is asked"
        method.rekey([*run.standing.values()])
        yield method
    elif name == "reapplied":
        layers = [*method.lm.layers.values()]
        for layer in layers:
            layer.enabled = True
        yield method
        for layer in layers:
            layer.enabled = False
    else:
        with TemporaryDirectory(prefix="editkit-") as place:
            yield edited_afresh(method, run, Path(place) / "base")


def edited_afresh(method: EditModule, run: EditedRun, folder: Path) -> EditModule:
    """Save a fine-tuned base and write the run's edits into it, in the batches of the run.

    Args:
        method: The method on its fine-tuned base, its edits switched off.
        run: The edited run.
        folder: Where to save the base.
    """
    save_base(method.lm, folder)
    spec = replace(
        method.lm.spec, id=str(folder), revision=None, causal_layers=method.lm.causal_layers,
        memory_layer=method.lm.memory_layer, dtype=str(method.lm.model.dtype)[len("torch.") :],
    )  # fmt: skip
    fresh = build_method(
        run.artefact["class_path"], run.trust, lm=spec,
        evaluation=method.evaluation, **run.artefact["init_args"],
    )  # fmt: skip
    fresh.configure_model()
    fresh.to(method.lm.device)
    made = [entry for entry in run.made if entry["edit_id"] in run.standing]
    with torch.enable_grad():
        for _, entries in groupby(made, key=lambda entry: entry["step"]):
            fresh.apply_edits([run.standing[entry["edit_id"]] for entry in entries])
        fresh.finish()
    fresh.edits_seen = method.edits_seen
    fresh.references.load_state_dict(method.references.state_dict())  # the base's before all this
    return fresh


@torch.no_grad()
def save_base(lm: EditableLM, folder: Path) -> None:
    """Write a fine-tuned base as a plain Hugging Face folder, without its edits."""
    model, tokenizer = load_pretrained(lm.spec, lm.model.dtype)
    now: dict[str, Any] = {unwrapped(name): p for name, p in lm.model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.copy_(now[name])
    for name, delta in changes(lm, {}).items():  # of an adapter on top
        weight = model.get_parameter(unwrapped(name))
        weight.copy_((weight.float() + delta).to(weight.dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in BESIDE:
        if (beside := Path(lm.spec.path) / name).is_file():
            shutil.copy(beside, folder / name)
