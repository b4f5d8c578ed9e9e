"""EditModule: the contract between a method and everything around it.

A method implements `attach` (wrap its sites) and `edit` (write a batch of edits), and where it
needs them `prepare`, `finish`, `undo` and its stream state. Clocks, scores, the ledger, saving
and resuming are final here.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from editkit.edits import Edit, Probe
from editkit.functional.losses import target_nll
from editkit.lm.editable import EditableLM
from editkit.lm.load import plain_linears
from editkit.lm.shard import shard
from editkit.lm.spec import LMSpec
from editkit.methods.arguments import kept_arguments
from editkit.methods.ledger import entries_of
from editkit.methods.steps import StreamModule
from editkit.methods.wordings import check_counts, expanded
from editkit.metrics.evaluate import ProbeRow, score_probes
from editkit.metrics.protocol import EvalProtocol
from editkit.parallel import agreed, from_all_ranks, ranks_of


class UndoError(ValueError):
    """An edit cannot be undone exactly; the text says why."""


class EditModule(StreamModule, ABC):
    """Base class of all editing methods.

    Args:
        lm: Model to edit.
        evaluation: How probes are scored.
        seed: Seed of whatever the method samples.
        paraphrases: Rephrases of each edit to write with it, as if each were an edit of its own.
        repeats: How often to write each edit once more, as further rows: a control of equal cost
            for paraphrases. Methods that average over rows (FT, LoRA) or have learnt the edit by
            then (GRACE, ROME) gain nothing by it.
    """

    why_no_undo = "its edits share weights, so one cannot be taken out without the others"

    def __init__(
        self, lm: LMSpec, evaluation: EvalProtocol, seed: int = 0, paraphrases: int = 0,
        repeats: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(lm, evaluation, seed)
        self.paraphrases, self.repeats = check_counts(paraphrases, repeats)

    # what a method implements

    @abstractmethod
    def attach(self) -> None:
        """Wrap the sites of `self.lm`."""

    def prepare(self) -> None:
        """Measure what the method needs on the unedited model, before the stream and on resume."""

    @abstractmethod
    def edit(self, edits: list[Edit]) -> dict[str, float]:
        """Write a batch of edits into the edit layers; return numbers to log.

        With paraphrases or repeats, several of a batch have one id.
        """

    def check(self, edits: list[Edit]) -> None:
        """Refuse a stream that this method cannot write, before its first edit."""
        expanded(edits, self.paraphrases, self.repeats)

    def finish(self) -> None:
        """Close the stream, after its last edit."""

    def undo(self, edit_id: int) -> None:
        """Take one edit out exactly.

        Raises:
            UndoError: If this method cannot; the text says why.
        """
        raise UndoError(f"{type(self).__name__} cannot undo edit {edit_id}: {self.why_no_undo}")

    def stream_state(self) -> dict[str, Any]:
        """Return what resuming needs beside the edit layers: plain values and tensors."""
        return {}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take `stream_state` back."""

    def kept_state(self) -> dict[str, Any]:
        """Return what a saved run keeps of `stream_state`, as JSON has it."""
        return {}

    def check_weights(self) -> None:
        """Refuse weights under edit that are stored packed: a method that computes with them asks.

        Raises:
            ValueError: If one is; the text names it.
        """
        for layer in self.lm.layers.values():
            _ = layer.weight_oi  # which raises

    # life outside and inside a Trainer

    @final
    def configure_model(self) -> None:
        """Load the base model once, in the Trainer's precision, and wrap its sites."""
        if self.lm is None:
            self.init_args()  # what could not be saved at the end is an error now
            precision = str(self._trainer.precision) if self._trainer is not None else ""
            dtypes = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
            with agreed(), plain_linears():
                self.lm = EditableLM.load(self.spec, dtypes.get(precision, torch.float32))
                shard(self.lm, self._device_mesh)
                with torch.device("cpu"):  # a Trainer's default would not suit seeded draws
                    self.attach()
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            with agreed():  # before anything is asked or measured
                data = getattr(self._trainer, "datamodule", None)
                self.check(getattr(data, "edits", []))

    @final
    def start(self) -> None:
        """Load, attach and prepare: what the Trainer does before the first edit."""
        self.configure_model()
        with agreed(), torch.no_grad(), self.lm.unedited():
            self.prepare()
        self.is_prepared = True

    @final
    def apply_edits(self, edits: list[Edit]) -> dict[str, float]:
        """Write one batch of edits and enter it in the ledger; no Trainer needed.

        Returns:
            The method's numbers, and `loss_before`, `loss_after` (nats per target token, mean
            over the batch), `change_norm` (Frobenius, of the whole batch) and `seconds`.

        Raises:
            ValueError: If an edit cannot be encoded or diverges; nothing is written then.
        """
        if not self.is_prepared:  # outside a Trainer
            self.start()
        started = time.perf_counter()
        written = expanded(edits, self.paraphrases, self.repeats)
        for layer in (layers := [*self.lm.layers.values()]):
            layer.moved = 0.0
        with self._discard_on_error(), agreed():
            before_B = self.edit_losses(edits)
            numbers = self.edit(written)
        norm = sum(layer.moved**2 for layer in layers) ** 0.5
        seconds = time.perf_counter() - started
        entries = entries_of(edits, self._step(), before_B, norm, seconds)
        self.ledger += entries  # at once: whatever happens now, these edits are written
        self.edits_seen += len(edits)
        with agreed():
            after_B = self.edit_losses(edits)
        seconds = time.perf_counter() - started
        for entry, after in zip(entries, after_B.tolist(), strict=True):
            entry |= {"seconds": seconds / len(edits), "loss_after": after}
        means = {"loss_before": float(before_B.mean()), "loss_after": float(after_B.mean())}
        return numbers | means | {"change_norm": norm, "seconds": seconds}

    @final
    def undo_edit(self, edit_id: int) -> None:
        """Take one edit out exactly and mark it in the ledger.

        Raises:
            UndoError: If there is no such edit, it is undone already, or the method cannot.
        """
        made = [e for e in self.ledger if not e.get("rolled_back")]
        entry = next((e for e in made if e["edit_id"] == edit_id), None)
        if entry is None or entry["undone"]:
            state = "was undone already" if entry else f"is not among the {len(made)} made"
            raise UndoError(f"edit {edit_id} {state}; see edits.jsonl")
        with self._discard_on_error():
            self.undo(edit_id)
        entry["undone"] = True

    @torch.no_grad()
    def edit_losses(self, edits: list[Edit]) -> Tensor:
        """Return each edit's mean target NLL under the model as it is, nats [B]."""
        size, losses, ranks = self.evaluation.batch_size, [], ranks_of(self.lm.model)
        own = edits[ranks.own(len(edits))]
        for start in range(0, len(own), size):
            part = own[start : start + size]
            tokens = self.lm.encode([e.prompt for e in part], [e.target for e in part])
            logits_NV = self.lm.target_logits(tokens)
            where = tokens.target_ids_N, tokens.target_rows_N
            losses.append(target_nll(logits_NV, *where, len(part)))
        return ranks.gather(torch.cat(losses), len(edits))

    def score(self, probes: list[Probe]) -> list[ProbeRow]:
        """Score the probes whose edits are applied and stand; one row per probe and kind."""
        return self.score_by(self.evaluation, [p for p in probes if p.is_due(self.edits_seen)])

    def score_unedited(self, probes: list[Probe]) -> list[ProbeRow]:
        """Score probes on the unedited model, and keep the answers that later scores need."""
        with self.lm.unedited():
            return self.score_by(self.evaluation, probes)

    @final
    def score_by(self, protocol: EvalProtocol, probes: list[Probe]) -> list[ProbeRow]:
        """Score probes by a protocol, on the model as it stands; devices share them out."""
        ranks = ranks_of(self.lm.model)
        own = probes[ranks.own(len(probes))]
        with agreed():
            rows = score_probes(self.lm, own, self.references, protocol)
            if ranks.size > 1:
                for known in from_all_ranks(self.references.about(own)):
                    self.references.take(known, protocol)
            return ranks.gather_list(rows, len(probes))

    def init_args(self) -> dict[str, Any]:
        """Return the constructor arguments that rebuild this method, as JSON has them.

        Raises:
            ValueError: If an argument is not kept under its own name, or has no place in JSON.
        """
        return kept_arguments(self, EditModule)

    def found_args(self) -> dict[str, Any]:
        """Return arguments that were left open and that `prepare` has filled."""
        return {}

    # private

    def _step(self) -> int:
        """Number of the edit batch under way, from 0."""
        if self._trainer is not None:
            return int(self.global_step)
        return int(self.ledger[-1]["step"]) + 1 if self.ledger else 0

    @contextmanager
    def _discard_on_error(self) -> Iterator[None]:
        """Leave no half-written scratch behind when an edit fails."""
        try:
            yield
        except BaseException:
            for layer in self.lm.layers.values():
                layer.discard()
            raise
