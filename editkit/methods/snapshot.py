"""A method's state at one commit, kept in memory, and put back bit for bit."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from editkit.adapters.io import load_tensors
from editkit.methods.base import EditModule


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What an edit can change, on the CPU; the base model is not in it, edits never write it.

    Args:
        tensors: Edit state of all layers, by `<site path>.<name>`.
        is_written: Which layers take part.
        edits_seen: Edits applied.
        entries: Lines of the ledger.
        generator: State of the method's generator.
        stream: The method's stream state.
    """

    tensors: dict[str, Tensor]
    is_written: dict[str, bool]
    edits_seen: int
    entries: int
    generator: Tensor
    stream: dict[str, Any]


def take_snapshot(method: EditModule) -> Snapshot:
    """Copy a method's state as it stands between two edits."""
    layers = method.lm.layers
    return Snapshot(
        tensors={
            f"{path}.{name}": tensor.to("cpu", copy=True)
            for path, layer in layers.items()
            for name, tensor in layer.edit_state().items()
        },
        is_written={path: layer.is_written for path, layer in layers.items()},
        edits_seen=method.edits_seen,
        entries=len(method.ledger),
        generator=method.generator.get_state(),
        stream=copy.deepcopy(move_data_to_device(method.stream_state(), torch.device("cpu"))),
    )


def restore_snapshot(method: EditModule, snapshot: Snapshot) -> None:
    """Put a method back to a commit, as resuming from a checkpoint does.

    The ledger's later lines go too. `prepare` runs again, since a method may rest on it to take its
    stream state back.
    """
    layers = method.lm.layers
    load_tensors(snapshot.tensors, layers)
    for path, layer in layers.items():
        layer.is_written = snapshot.is_written[path]
    method.edits_seen = snapshot.edits_seen
    method.ledger = method.ledger[: snapshot.entries]
    method.load_stream_state(copy.deepcopy(snapshot.stream))
    method.start()
    method.generator.set_state(snapshot.generator)  # prepare may have drawn from it
