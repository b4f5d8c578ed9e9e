"""The stream of edits and its probes: order, slices, increments, and where a resumed run goes on.

Everything here is text. Batches hold `Edit` or `Probe` records; a method and the evaluator make
tensors of them, each in its own way.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import replace
from itertools import accumulate, groupby
from typing import Any, Literal

from lightning.pytorch import LightningDataModule

from editkit.data.batches import Batches
from editkit.data.source import Facts, check_source, leaks, sha256_of, until_overwritten
from editkit.edits import Edit, Probe


class EditDataModule(LightningDataModule, ABC):
    """A stream of edits, the probes asked about them, and the position reached in it.

    A subclass implements `load`. After `setup`, `edits` is the stream: put in order, then sliced,
    then numbered 0..N-1, so that `Edit.id` is the position in the stream. A probe whose answer a
    later edit of the stream makes wrong is asked only until then (`Probe.until`).

    Args:
        edits_per_step: Edits that a method writes at once (one step of the Trainer).
        start: First edit of the ordered source to use.
        limit: Number of edits to use from there; None uses all.
        order: Keep the order of the file, or shuffle it by `seed`.
        seed: Seed of the shuffled order.
        increments: Sizes of successive increments, such as [100, 300, 600]; the stream then ends
            with the last of them. No batch holds edits of two increments.
        probes_per_batch: Probes given to the evaluator at once; it puts them into batches of like
            length, at most `evaluation.batch_size` each.

    Attributes:
        edits: The stream.
        probes: Probes of the edits in the stream, and those that belong to no edit.
        texts: Held-out texts for perplexity, unrelated to the edits; may be empty. Set by `load`.
        boundaries: Number of edits in the stream at the end of each increment, ascending.
        edits_applied: Edits of this stream already written; the training loop keeps it up to date.
        sources: Files that `load` read by name, each with its SHA-256 or revision.
        needs: Source positions of the edits that a probe needs beside its own, by probe id. Set by
            `load`, as are the next two; all may stay empty.
        rests_on: Facts that a probe's answer rests on beside its edit, by probe id.
        steps: Time step of each edit in the source; in file order, each is an increment.
        ask_overwritten: Ask probes to the end all the same.
    """

    edits: list[Edit]
    probes: list[Probe]
    boundaries: list[int]

    def __init__(
        self,
        edits_per_step: int = 1,
        start: int = 0,
        limit: int | None = None,
        order: Literal["file", "shuffled"] = "file",
        seed: int = 0,
        increments: list[int] | None = None,
        probes_per_batch: int = 256,
    ) -> None:
        super().__init__()
        for name, value in (
            ("edits_per_step", edits_per_step),
            ("probes_per_batch", probes_per_batch),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if start < 0:
            raise ValueError(f"start is {start}; it counts edits from the front, so use 0 or more")
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}; use a number of edits, or null for all of them")
        if order not in ("file", "shuffled"):
            raise ValueError(f"order is {order!r}; use 'file' or 'shuffled'")
        if increments is not None and (not increments or min(increments) < 1):
            raise ValueError(f"increments are {increments}; give sizes of at least 1 edit each")
        self.edits_per_step = edits_per_step
        self.start, self.limit, self.order, self.seed = start, limit, order, seed
        self.increments, self.probes_per_batch = increments, probes_per_batch
        self.texts: list[str] = []
        self.edits_applied = 0
        self.sources: dict[str, str] = {}
        self.needs: dict[str, tuple[int, ...]] = {}
        self.rests_on: dict[str, Facts] = {}
        self.steps: list[str] = []
        self.ask_overwritten = False
        self._restored: dict[str, Any] | None = None

    @abstractmethod
    def load(self) -> tuple[list[Edit], list[Probe]]:
        """Read the whole source in file order; `Edit.id` is the position in the source."""

    def setup(self, stage: str | None = None) -> None:
        """Read, order, slice and number the stream, once; needs no model."""
        if stage == "fit":  # begins at the first edit; a checkpoint is restored after this
            self.edits_applied, self._restored = 0, None
        if hasattr(self, "edits"):
            return
        edits, probes = self.load()
        check_source(edits, probes)
        chosen = [edits[i] for i in self._positions(len(edits))]
        position = {edit.id: i for i, edit in enumerate(chosen)}
        self.boundaries = self._boundaries(chosen)
        chosen = [e if e.id == i else replace(e, id=i) for i, e in enumerate(chosen)]
        kept = self._placed(probes, position)
        for edit, text, probe in leaks(chosen, kept):
            raise ValueError(
                f"text given to edit {edit.id} ({edit.prompt!r}) for editing is also asked as probe"
                f" {probe.id}: {text!r}; remove it from the edit's rephrases and negatives, or from"
                " the probes"
            )
        if not self.ask_overwritten:
            kept = until_overwritten(chosen, kept, self.rests_on)
        self.edits, self.probes = chosen, kept

    def _placed(self, probes: list[Probe], position: dict[int, int]) -> list[Probe]:
        """Probes whose edits are all in the stream, each behind the last of them."""
        kept = []
        for probe in probes:
            if probe.edit_id is None:
                kept.append(probe)
                continue
            needed = {probe.edit_id, *self.needs.get(probe.id, ())}
            if needed <= position.keys():
                last = max(position[i] for i in needed)
                kept.append(probe if last == probe.edit_id else replace(probe, edit_id=last))
        return kept

    def _boundaries(self, chosen: list[Edit]) -> list[int]:
        """Number of edits at the end of each increment; `chosen` still has source positions."""
        if self.increments:
            return list(accumulate(self.increments))
        if self.order == "file" and self.steps:
            runs = groupby(chosen, key=lambda edit: self.steps[edit.id])
            return list(accumulate(len(list(run)) for _, run in runs))
        return [len(chosen)]

    def _positions(self, count: int) -> list[int]:
        """Positions in the source of the edits of the stream, in stream order."""
        positions = list(range(count))
        if self.order == "shuffled":
            draw = random.Random(self.seed)  # of it only `random()` is the same in every Python
            keys = [draw.random() for _ in positions]
            positions.sort(key=keys.__getitem__)
        if self.start >= count:
            raise ValueError(f"start is {self.start}, but the source holds {count} edits")
        stop = count if self.limit is None else min(count, self.start + self.limit)
        if self.increments is None:
            return positions[self.start : stop]
        total = sum(self.increments)
        if total > stop - self.start:
            raise ValueError(
                f"increments {self.increments} need {total} edits, but start={self.start} and"
                f" limit={self.limit} leave {stop - self.start} of the source's {count}; make the"
                " increments smaller or raise limit"
            )
        return positions[self.start : self.start + total]

    def probes_of(self, edit_ids: Collection[int]) -> list[Probe]:
        """Probes that belong to these edits, in order."""
        wanted = set(edit_ids)
        return [probe for probe in self.probes if probe.edit_id in wanted]

    def train_dataloader(self) -> Batches[Edit]:
        """Batches of the stream in order; after a restored checkpoint, those not yet applied."""
        first = 0 if self._restored is None else self._resume(self._restored)
        self._restored = None
        return Batches(self.edits, self._spans(), first)

    def val_dataloader(self) -> Batches[Probe]:
        """All probes; the evaluator leaves out those of edits not yet applied.

        Raises:
            ValueError: If a checkpoint was restored whose edits are not this stream's.
        """
        if self._restored is not None:
            self._check_stream(self._restored)
        size, count = self.probes_per_batch, len(self.probes)
        spans = [(start, min(start + size, count)) for start in range(0, count, size)]
        return Batches(self.probes, spans)

    test_dataloader = predict_dataloader = val_dataloader

    def _spans(self) -> list[tuple[int, int]]:
        """(start, stop) of each batch of edits."""
        begins = [0, *self.boundaries[:-1]]
        return [
            (start, min(start + self.edits_per_step, end))
            for begin, end in zip(begins, self.boundaries, strict=True)
            for start in range(begin, end, self.edits_per_step)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Edits already applied, in how many batches, and a hash of their text."""
        applied = self.edits_applied
        return {
            "edits_applied": applied,
            "batches": sum(stop <= applied for _, stop in self._spans()),
            "sha256": sha256_of(self.edits[:applied]),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the position; `train_dataloader` checks that it is one of this stream."""
        self._restored = state_dict
        self.edits_applied = state_dict["edits_applied"]

    def _resume(self, state: dict[str, Any]) -> int:
        """Batches of this stream that a checkpoint has already applied."""
        self._check_stream(state)
        applied = state["edits_applied"]
        ends = [0] + [stop for _, stop in self._spans()]
        if applied not in ends or ends.index(applied) != state["batches"]:
            raise ValueError(
                f"the checkpoint has applied {applied} edits in {state['batches']} batches, which"
                f" edits_per_step={self.edits_per_step} and increments={self.increments} do not;"
                " resume with the edits_per_step and increments of that run"
            )
        return int(state["batches"])

    def _check_stream(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint whose edits are not the first ones of this stream."""
        applied = state["edits_applied"]
        if applied > len(self.edits):
            raise ValueError(
                f"the checkpoint has applied {applied} edits, but this stream holds"
                f" {len(self.edits)}; resume with the start, limit and increments of that run"
            )
        if state["sha256"] != sha256_of(self.edits[:applied]):
            raise ValueError(
                f"the first {applied} edits of this stream are not those of the checkpoint; resume"
                " with the file, start, order and seed of that run, or begin a new run without"
                " ckpt_path"
            )
