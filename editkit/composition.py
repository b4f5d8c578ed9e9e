"""Put the edits of several runs on one base model together, where they can be added up."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editkit.adapters.delta import DeltaLayer
from editkit.api import EditedLM, load_edited
from editkit.data.conflicts import ConflictIndex
from editkit.edits import Edit
from editkit.export import merged_deltas
from editkit.lm.load import weight_hash
from editkit.lm.spec import LMSpec
from editkit.methods.artefact import build_method, check_base
from editkit.metrics.protocol import EvalProtocol


def compose(
    *folders: str | Path,
    device: str = "cpu",
    dtype: str | None = None,
    lm: LMSpec | None = None,
    trust: bool = False,
) -> EditedLM:
    """Add up the changes of edited models of one base.

    Edits are numbered anew, run after run; one that is at odds with an earlier one is warned of.
    Methods that decide by the input what to answer hold no change that could be added.

    Example:
        both = editkit.compose("runs/a", "runs/b")
        both.save("runs/both")

    Args:
        folders: Run folders, two or more.
        device: Such as `cpu` or `cuda`.
        dtype: Dtype of the base weights; None takes that on which the edits were made.
        lm: Where the base lies now, if elsewhere than recorded.
        trust: Allow method classes from outside `editkit.methods`.

    Raises:
        ValueError: If there are fewer than two, they are of different bases, or one of them
            cannot be added.
    """
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} run folders given; two or more are composed")
    sums: dict[str, Tensor] = {}
    ledger: list[dict[str, Any]] = []
    spec: LMSpec | None = None
    for folder in folders:
        part = load_edited(folder, "cpu", dtype, lm, trust)
        if spec is not None:
            _check_same(folders[0], spec, folder, part.method.spec)
        spec = spec or part.method.spec
        for path, delta_DF in merged_deltas(part.lm).items():
            sums[path] = sums[path] + delta_DF if path in sums else delta_DF.clone()
        start = len(ledger)
        ledger += [{**row, "edit_id": start + i} for i, row in enumerate(part.ledger)]
    assert spec is not None
    made = build_method(
        "editkit.methods.composed.Composed", lm=spec, evaluation=EvalProtocol(), sites=[*sums]
    )
    made.configure_model()
    for path, layer in made.lm.layers.items():
        assert isinstance(layer, DeltaLayer)
        layer.add(sums[path])
    made.edits_seen, made.ledger = len(ledger), ledger
    _warn_of_conflicts(ledger)
    return EditedLM(made.to(torch.device(device)))


def _warn_of_conflicts(ledger: list[dict[str, Any]]) -> None:
    index = ConflictIndex()
    for row in ledger:
        if not (row["undone"] or row.get("rolled_back")):
            edit = Edit(*(row[name] for name in ("edit_id", "prompt", "target", "subject")))
            if (conflict := index.find(edit)) is not None:
                warnings.warn(str(conflict), stacklevel=3)
            index.add(edit)


def _check_same(first: str | Path, spec: LMSpec, folder: str | Path, other: LMSpec) -> None:
    """Refuse to add up changes of different bases."""
    try:
        check_base({"id": other.id, "hash": weight_hash(other)}, spec)
    except ValueError as error:
        raise ValueError(
            f"{str(first)!r} and {str(folder)!r} are of different bases: {error}"
        ) from error
