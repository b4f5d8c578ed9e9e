"""What Lightning calls: one Trainer step is one committed edit batch.

Nothing here knows a method; `EditModule` fills in what applying and scoring mean.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, final

import lightning as L
import torch

from editkit.edits import Edit, Probe
from editkit.lm.editable import EditableLM
from editkit.lm.load import weight_hash
from editkit.lm.spec import LMSpec
from editkit.methods.arguments import without
from editkit.methods.position import set_position
from editkit.metrics.edit_score import EditScores
from editkit.metrics.evaluate import ProbeRow
from editkit.metrics.protocol import EvalProtocol
from editkit.metrics.references import References
from editkit.parallel import agreed, ranks_of

GO_ON = (
    "the {} edits before it are made and, in a run folder, kept: mend that row or take it out, "
    "leave those before it, and go on with --ckpt_path last; a smaller lr needs a new run"
)


class StreamModule(L.LightningModule):
    """Steps, clocks and checkpoints of a stream of edits.

    Args:
        lm: Model to edit.
        evaluation: How probes are scored.
        seed: Seed of whatever the method samples.
    """

    passing: ClassVar[tuple[str, ...]] = ()  # options without a say in results, free on resuming

    def __init__(self, lm: LMSpec, evaluation: EvalProtocol, seed: int = 0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints carry edits, not the base model
        self.spec = lm
        self.evaluation = evaluation
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.is_prepared = False
        self.edits_seen = 0
        self.is_refused = False  # a batch of which nothing was written, behind others
        self.ledger: list[dict[str, Any]] = []
        self.references = References()
        # every device has all rows: nothing to sync
        self.scores = EditScores(evaluation.scorers, sync_on_compute=False)
        self.lm: EditableLM | None = None  # type: ignore[assignment]

    def train(self, mode: bool = True) -> StreamModule:
        """Leave the edited model in evaluation mode, also layers that are kept as attributes."""
        super().train(mode)
        if self.lm is not None:
            self.lm.train(False)
        return self

    @abstractmethod
    def start(self) -> None:
        """Load, attach and prepare."""

    @abstractmethod
    def check(self, edits: list[Edit]) -> None:
        """Refuse edits that this method cannot write."""

    @abstractmethod
    def apply_edits(self, edits: list[Edit]) -> dict[str, float]:
        """Write one batch of edits and enter it in the ledger."""

    @abstractmethod
    def score(self, probes: list[Probe]) -> list[ProbeRow]:
        """Score the probes whose edits are applied."""

    @abstractmethod
    def init_args(self) -> dict[str, Any]:
        """Return the constructor arguments that rebuild this method."""

    @abstractmethod
    def finish(self) -> None:
        """Close the stream."""

    @abstractmethod
    def stream_state(self) -> dict[str, Any]:
        """Return what resuming needs beside the edit layers."""

    @abstractmethod
    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take `stream_state` back."""

    def standing(self) -> list[dict[str, Any]]:
        """Return the ledger's entries of edits that stand: not undone, not rolled back."""
        return [e for e in self.ledger if not (e["undone"] or e.get("rolled_back"))]

    def configure_optimizers(self) -> None:
        """Have none: Lightning's mock optimiser is the clock, `descend` optimises."""

    def transfer_batch_to_device(self, batch: Any, *args: Any) -> Any:
        """Leave text alone; Lightning would rebuild the frozen records field by field."""
        return batch

    def on_fit_start(self) -> None:
        """Prepare on the device the Trainer chose.

        Raises:
            ValueError: If the Trainer would apply the stream more than once.
        """
        if self.trainer.max_epochs != 1:
            raise ValueError(
                f"trainer.max_epochs is {self.trainer.max_epochs}; a stream of edits is applied "
                "once, so set trainer.max_epochs: 1"
            )
        self.start()

    @final
    def training_step(self, batch: Iterable[Edit], batch_idx: int) -> None:
        """Write one batch of edits, then tick Lightning's clock once."""
        edits = list(batch)
        data = getattr(self.trainer, "datamodule", None)
        try:
            numbers = self.apply_edits(edits)
        except ValueError as error:
            self.is_refused = 0 < self.edits_seen == getattr(data, "edits_applied", -1)
            if self.is_refused:
                error.args = (f"{error}\n{GO_ON.format(self.edits_seen)}",)
            raise
        optimizer: Any = self.optimizers()
        optimizer.step()
        if self._is_last_step():
            self.finish()
        if data is not None:
            data.edits_applied = edits[-1].id + 1
        rates = {"edits": float(self.edits_seen), "edits/s": len(edits) / numbers["seconds"]}
        self.log_dict({f"edit/{k}": v for k, v in numbers.items()}, batch_size=len(edits))
        self.log_dict(rates, prog_bar=True, batch_size=len(edits))

    def on_train_batch_end(self, *args: Any) -> None:
        """Close a stream that a callback stops, not one broken off or taken back to a commit."""
        is_kept = not (self.ledger and self.ledger[-1].get("rolled_back"))
        is_stopped = self.trainer.should_stop and not self.trainer.received_sigterm
        if is_stopped and is_kept and not self._is_last_step():
            self.finish()

    def _is_last_step(self) -> bool:
        """Whether the batch under way is the last one of the stream or of `max_steps`."""
        return self.trainer.is_last_batch or 0 < self.trainer.max_steps <= self.global_step

    @final
    def validation_step(self, batch: Iterable[Probe], batch_idx: int) -> dict[str, Any]:
        """Score probes; callbacks collect the rows."""
        rows = self.score(list(batch))
        self.scores.update(rows)
        return {"rows": rows}

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the mean of every kind and scorer."""
        for kind, cells in self.scores.compute().items():
            self.log_dict({f"{kind}/{scorer}": cell["value"] for scorer, cell in cells.items()})
        self.scores.reset()

    on_test_epoch_end = on_validation_epoch_end

    @final
    def predict_step(self, batch: Iterable[Probe], batch_idx: int) -> list[dict[str, Any]]:
        """Answer the probes' prompts freely, with the edited model."""
        probes, ranks = list(batch), ranks_of(self.lm.model)
        own = probes[ranks.own(len(probes))]
        with agreed():
            prompts, protocol = [p.prompt for p in own], self.evaluation
            answers = self.lm.generate(prompts, protocol.max_new_tokens, protocol.stop)
            rows = [
                {"id": p.id, "prompt": p.prompt, "answer": answer}
                for p, answer in zip(own, answers, strict=True)
            ]
            return ranks.gather_list(rows, len(probes))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the edits and the stream's state; leave the base model out."""
        checkpoint["state_dict"] = {
            f"lm.model.{path}.{name}": tensor
            for path, layer in self.lm.layers.items()
            for name, tensor in layer.edit_state().items()
        }
        checkpoint["editkit"] = {
            "method": [f"{type(self).__module__}.{type(self).__qualname__}", self.init_args()],
            "base": {"id": self.spec.id, "hash": weight_hash(self.spec)},
            "edits_seen": self.edits_seen,
            "ledger": self.ledger,
            "generator": self.generator.get_state(),
            "references": self.references.state_dict(),
            "stream": self.stream_state(),
        }
        data = getattr(self.trainer, "datamodule", None)
        place = checkpoint.get(type(data).__qualname__, {})
        if "batches" in place:
            is_last = place["edits_applied"] >= len(data.edits)
            if place["batches"] or not is_last:  # also a stream that was taken back whole
                set_position(checkpoint, place["batches"], is_last)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the stream's state back.

        Raises:
            ValueError: If the checkpoint is not editkit's, was made on another base model or by
                another method.
        """
        state = checkpoint.get("editkit")
        if state is None:
            raise ValueError("the checkpoint was not written by editkit; give one of this run")
        check_base(state["base"], self.spec)
        own = [f"{type(self).__module__}.{type(self).__qualname__}", self.init_args()]
        name, arguments = state["method"]
        passing = self.passing
        if name != own[0] or without(arguments, passing) != without(own[1], passing):
            raise ValueError(
                f"the checkpoint was made by {name} with {arguments}, this run "
                f"has {own[0]} with {own[1]}; resume with the settings it was begun with"
            )
        self.edits_seen = state["edits_seen"]
        self.ledger = state["ledger"]
        self.generator.set_state(state["generator"])
        self.references.load_state_dict(state["references"])
        self.load_stream_state(state["stream"])


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
