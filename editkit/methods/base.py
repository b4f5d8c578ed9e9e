"""EditModule: the contract between a method and everything around it.

A method implements `attach` (wrap its sites) and `edit` (write a batch of edits), and where it
needs them `prepare`, `finish`, `undo` and its stream state. Clocks, scores, the ledger, saving
and resuming are final here.
"""

from __future__ import annotations

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, final

import lightning as L
import torch
from torch import Tensor

from editkit.edits import Edit, Probe
from editkit.functional.losses import target_nll
from editkit.lm.editable import EditableLM
from editkit.lm.load import weight_hash
from editkit.lm.spec import LMSpec
from editkit.metrics.evaluate import EvalProtocol, References, score_probes

NOT_SAVED = ("self", "lm", "evaluation", "kwargs")


class UndoRefused(ValueError):
    """An edit cannot be undone exactly; the text says why."""


class EditModule(L.LightningModule, ABC):
    """Base class of all editing methods.

    Args:
        lm: Model to edit.
        evaluation: How probes are scored.
        seed: Seed of whatever the method samples.
    """

    why_no_undo = "its edits share weights, so one cannot be taken out without the others"

    def __init__(self, lm: LMSpec, evaluation: EvalProtocol, seed: int = 0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints carry edits, not the base model
        self.spec = lm
        self.evaluation = evaluation
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.edits_seen = 0
        self.ledger: list[dict[str, Any]] = []
        self.references = References()
        self.lm: EditableLM | None = None  # type: ignore[assignment]

    # what a method implements

    @abstractmethod
    def attach(self) -> None:
        """Wrap the sites of `self.lm`."""

    def prepare(self) -> None:
        """Measure what the method needs on the unedited model, before the stream and on resume."""

    @abstractmethod
    def edit(self, edits: list[Edit]) -> dict[str, float]:
        """Write a batch of edits into the edit layers; return numbers to log."""

    def finish(self) -> None:
        """Close the stream, after its last edit."""

    def undo(self, edit_id: int) -> None:
        """Take one edit out exactly.

        Raises:
            UndoRefused: If this method cannot; the text says why.
        """
        raise UndoRefused(f"{type(self).__name__} cannot undo edit {edit_id}: {self.why_no_undo}")

    def stream_state(self) -> dict[str, Any]:
        """Return what resuming needs beside the edit layers: plain values and tensors."""
        return {}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take `stream_state` back."""

    # life outside and inside a Trainer

    @final
    def configure_model(self) -> None:
        """Load the base model once, in the Trainer's precision, and wrap its sites."""
        if self.lm is None:
            precision = str(self._trainer.precision) if self._trainer is not None else ""
            dtypes = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
            self.lm = EditableLM.load(self.spec, dtypes.get(precision, torch.float32))
            self.attach()

    @final
    def start(self) -> None:
        """Load, attach and prepare: what the Trainer does before the first edit."""
        self.configure_model()
        self._prepare()

    @final
    def apply_edits(self, edits: list[Edit]) -> dict[str, float]:
        """Write one batch of edits and enter it in the ledger; no Trainer needed.

        Returns:
            The method's numbers, and `loss_before`, `loss_after` (nats per target token, mean
            over the batch), `change_norm` (Frobenius, of the whole batch) and `seconds`.

        Raises:
            ValueError: If an edit cannot be encoded or diverges; nothing is written then.
        """
        started = time.perf_counter()
        before_B = self.edit_losses(edits)
        layers = self.lm.layers.values()
        for layer in layers:
            layer.moved = 0.0
        with self._discard_on_error():
            numbers = self.edit(edits)
        after_B = self.edit_losses(edits)
        norm = sum(layer.moved**2 for layer in layers) ** 0.5
        seconds = time.perf_counter() - started
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        for edit, before, after in zip(edits, before_B.tolist(), after_B.tolist(), strict=True):
            self.ledger.append({
                "edit_id": edit.id, "prompt": edit.prompt, "target": edit.target,
                "subject": edit.subject, "step": self._step(), "batch": len(edits), "time": now,
                "seconds": seconds / len(edits), "loss_before": before, "loss_after": after,
                "change_norm": norm, "undone": False,
            })  # fmt: skip
        self.edits_seen += len(edits)
        return {
            **numbers,
            "loss_before": float(before_B.mean()),
            "loss_after": float(after_B.mean()),
            "change_norm": norm,
            "seconds": seconds,
        }

    @final
    def undo_edit(self, edit_id: int) -> None:
        """Take one edit out exactly and mark it in the ledger.

        Raises:
            UndoRefused: If there is no such edit, it is undone already, or the method cannot.
        """
        entry = next((e for e in self.ledger if e["edit_id"] == edit_id), None)
        if entry is None or entry["undone"]:
            state = "was undone already" if entry else f"is not among the {len(self.ledger)} made"
            raise UndoRefused(f"edit {edit_id} {state}; see edits.jsonl")
        self.undo(edit_id)
        entry["undone"] = True

    @torch.no_grad()
    def edit_losses(self, edits: list[Edit]) -> Tensor:
        """Return each edit's mean target NLL under the model as it is, nats [B]."""
        tokens = self.lm.encode([e.prompt for e in edits], [e.target for e in edits])
        logits_NV = self.lm.target_logits(tokens)
        return target_nll(logits_NV, tokens.target_ids_N, tokens.target_rows_N, len(edits))

    def score(self, probes: list[Probe]) -> list[dict[str, Any]]:
        """Score the probes whose edits are applied; one row per probe and kind."""
        asked = [p for p in probes if p.edit_id is None or p.edit_id < self.edits_seen]
        return score_probes(self.lm, asked, self.references, self.evaluation) if asked else []

    def init_args(self) -> dict[str, Any]:
        """Return the constructor arguments that rebuild this method, read from its attributes."""
        names: dict[str, None] = {}
        for cls in type(self).__mro__:
            if issubclass(cls, EditModule) and "__init__" in vars(cls):
                names |= dict.fromkeys(inspect.signature(cls.__init__).parameters)
        return {name: getattr(self, name) for name in names if name not in NOT_SAVED}

    # Lightning's hooks, final: one Trainer step is one committed edit batch

    def configure_optimizers(self) -> None:
        """Have none: Lightning's mock optimiser is the clock, `descend` optimises."""

    def transfer_batch_to_device(self, batch: Any, *args: Any) -> Any:
        """Leave text alone; Lightning would rebuild the frozen records field by field."""
        return batch

    def on_fit_start(self) -> None:
        """Prepare on the device the Trainer chose."""
        self._prepare()

    @final
    def training_step(self, batch: list[Edit], batch_idx: int) -> None:
        """Write one batch of edits, then tick Lightning's clock once."""
        numbers = self.apply_edits(batch)
        optimizer: Any = self.optimizers()
        optimizer.step()
        if self.trainer.is_last_batch:
            self.finish()
        if hasattr(self.trainer, "datamodule") and self.trainer.datamodule is not None:
            self.trainer.datamodule.edits_applied = self.edits_seen
        rates = {"edits": float(self.edits_seen), "edits/s": len(batch) / numbers["seconds"]}
        self.log_dict({f"edit/{k}": v for k, v in numbers.items()}, batch_size=len(batch))
        self.log_dict(rates, prog_bar=True, batch_size=len(batch))

    @final
    def validation_step(self, batch: list[Probe], batch_idx: int) -> dict[str, Any]:
        """Score probes; callbacks collect the rows."""
        return {"rows": self.score(batch)}

    @final
    def test_step(self, batch: list[Probe], batch_idx: int) -> dict[str, Any]:
        """Score probes; callbacks collect the rows."""
        return {"rows": self.score(batch)}

    @final
    def predict_step(self, batch: list[Probe], batch_idx: int) -> list[dict[str, Any]]:
        """Answer the probes' prompts freely, with the edited model."""
        prompts = [p.prompt for p in batch]
        answers = self.lm.generate(prompts, self.evaluation.max_new_tokens, self.evaluation.stop)
        return [
            {"id": p.id, "prompt": p.prompt, "answer": answer}
            for p, answer in zip(batch, answers, strict=True)
        ]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the edits and the stream's state; leave the base model out."""
        checkpoint["state_dict"] = {
            f"lm.model.{path}.{name}": tensor
            for path, layer in self.lm.layers.items()
            for name, tensor in layer.edit_state().items()
        }
        checkpoint["editkit"] = {
            "base": {"id": self.spec.id, "hash": weight_hash(self.spec)},
            "edits_seen": self.edits_seen,
            "ledger": self.ledger,
            "generator": self.generator.get_state(),
            "references": self.references.state_dict(),
            "stream": self.stream_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the stream's state back.

        Raises:
            ValueError: If the checkpoint was made on another base model; names both.
        """
        state = checkpoint["editkit"]
        check_base(state["base"], self.spec)
        self.edits_seen = state["edits_seen"]
        self.ledger = state["ledger"]
        self.generator.set_state(state["generator"])
        self.references.load_state_dict(state["references"])
        self.load_stream_state(state["stream"])

    # private

    def _prepare(self) -> None:
        with torch.no_grad(), self.lm.unedited():
            self.prepare()

    def _step(self) -> int:
        """Number of the edit batch under way, from 0."""
        return int(self.global_step) if self._trainer is not None else len(self.ledger)

    @contextmanager
    def _discard_on_error(self) -> Iterator[None]:
        """Leave no half-written scratch behind when an edit fails."""
        try:
            yield
        except BaseException:
            for layer in self.lm.layers.values():
                layer.discard()
            raise


def check_base(saved: dict[str, str], spec: LMSpec) -> None:
    """Refuse edits that were made on another base model.

    Raises:
        ValueError: If the weight hashes differ; names both.
    """
    found = weight_hash(spec)
    if found != saved["hash"]:
        raise ValueError(
            f"these edits were made on {saved['id']!r} (weights {saved['hash'][:12]}), but the "
            f"base here is {spec.id!r} (weights {found[:12]}); load them on the model they edit"
        )
