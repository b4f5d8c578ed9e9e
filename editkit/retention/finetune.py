"""FineTuneEdited: an ordinary LightningModule that trains an edited model on something else.

Optimisation is Lightning's own, so any strategy, precision, accumulation or clipping of the
Trainer applies. Every device gets the whole batch and takes its rows of it; losses are divided by
the tokens of the whole batch, so that the number of devices changes nothing but rounding.

The edited run is read and never written: the weights trained here are a copy in memory, or an
adapter, and belong to the retention run.

Legend: B rows, N target tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from editkit.api import load_edited
from editkit.data.finetuning import Example
from editkit.functional.losses import dpo_loss
from editkit.functional.scores import token_nll
from editkit.lm.editable import EditableLM
from editkit.lm.tokens import TokenPolicy, Tokens
from editkit.methods.base import EditModule
from editkit.retention.objectives import Loss
from editkit.retention.schedule import Schedule
from editkit.retention.trainable import Adapter, Freeze, Kind, Scope, choose_trainable, unwrapped

Arm = Literal["edited", "control", "identity"]
ARMS: tuple[Arm, ...] = ("edited", "control", "identity")
NO_FREEZE, ADAPTER, LINEAR = Freeze(), Adapter(), Schedule()


class FineTuneEdited(L.LightningModule):
    """Fine-tunes an edited model, or the same model without its edits.

    Args:
        run: Folder of the edited run.
        loss: What the objective minimises.
        arm: `edited`; `control`: the model as it was before any edit; `identity`: `edited` with a
            learning rate of 0.
        kind: Train all weights, or a LoRA or DoRA adapter by PEFT.
        scope: Train the backbone alone, or the values of the edits with it.
        lr: Learning rate of AdamW.
        weight_decay: Its weight decay.
        schedule: How the learning rate goes.
        freeze: What of the backbone stays as it is, a remedy.
        adapter: Sizes of an adapter.
        max_tokens: Tokens of a row; what is longer is cut.
        append_eos: Train the end of the text behind each answer.
        beta: Weight of the KL to the start in DPO.
        seed: Seed of an adapter's start.
        trust: Allow a method class from outside editkit.
    """

    def __init__(
        self,
        run: Path,
        loss: Loss,
        arm: Arm = "edited",
        kind: Kind = "full",
        scope: Scope = "backbone",
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        schedule: Schedule = LINEAR,
        freeze: Freeze = NO_FREEZE,
        adapter: Adapter = ADAPTER,
        max_tokens: int = 512,
        append_eos: bool = True,
        beta: float = 0.1,
        seed: int = 0,
        trust: bool = False,
    ) -> None:
        super().__init__()
        if lr < 0 or max_tokens < 2:
            raise ValueError(
                f"model.lr is {lr}, model.max_tokens is {max_tokens}; use 0 or more, and 2 or more"
            )
        self.strict_loading = False  # checkpoints carry what is trained, not the base model
        self.run, self.loss, self.arm = Path(run), loss, arm
        self.kind, self.scope, self.freeze_spec, self.adapter = kind, scope, freeze, adapter
        self.lr, self.weight_decay, self.schedule = lr, weight_decay, schedule
        self.max_tokens, self.append_eos, self.beta = max_tokens, append_eos, beta
        self.seed, self.trust = seed, trust
        self.method: EditModule | None = None
        self.start: dict[str, Tensor] = {}
        self.reference: dict[tuple[str, str, str], tuple[float, float]] = {}

    @property
    def lm(self) -> EditableLM:
        """The model that is trained."""
        assert self.method is not None, "configure_model has loaded it"
        lm: EditableLM = self.method.lm
        return lm

    def configure_model(self) -> None:
        """Load the edited run once; in the control arm its edits are switched off."""
        if self.method is not None:
            return
        self.method = load_edited(self.run, trust=self.trust).method
        self.enable_edits(self.arm != "control")
        scope = "backbone" if self.arm == "control" else self.scope
        self.trained = choose_trainable(
            self.lm, self.kind, scope, self.freeze_spec, self.adapter, self.seed
        )
        self.start = {n: p.detach().to("cpu", copy=True) for n, p in self.trained.items()}

    def enable_edits(self, enabled: bool) -> None:
        """Switch the edits on or off."""
        for layer in self.lm.layers.values():
            layer.enabled = enabled

    def train(self, mode: bool = True) -> FineTuneEdited:
        """Put the backbone in training mode (its dropout), but never the edits."""
        super().train(mode)
        if self.method is not None:
            self.lm.model.train(mode)
            for layer in self.lm.layers.values():
                for name, child in layer.named_children():
                    if name != "base_layer":
                        child.eval()
                        layer.base_layer.train(mode)
        return self

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule, by step."""
        rate = 0.0 if self.arm == "identity" else self.lr
        optimizer = torch.optim.AdamW(
            self.trained.values(), lr=rate, weight_decay=self.weight_decay
        )
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        factor = partial(self.schedule.factor, steps=steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def transfer_batch_to_device(self, batch: Any, *args: Any) -> Any:
        """Leave text alone."""
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of this device's rows, as a share of the whole batch's."""
        rows = list(batch)
        loss = self._loss(rows, self.trainer.global_rank, self.trainer.world_size)
        self.trainer.datamodule.batches_done = batch_idx + 1  # kept in checkpoints
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(rows), sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss of the test rows, on every device alike."""
        rows = list(batch)
        self.log("val_loss", self._loss(rows, 0, 1), batch_size=len(rows), sync_dist=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, what preferences are measured from, and the references."""
        state = {name: p.detach() for name, p in self.trained.items()}
        checkpoint["state_dict"] = {f"method.lm.model.{name}": p for name, p in state.items()}
        checkpoint["retention"] = {
            "reference": self.reference,
            "references": self.method.references.state_dict() if self.method else {},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back, also where other layers hold edits (a control arm that runs share)."""
        kept = {unwrapped(name): value for name, value in checkpoint["state_dict"].items()}
        names = (f"method.lm.model.{name}" for name in self.trained)
        checkpoint["state_dict"] = {name: kept[unwrapped(name)] for name in names}
        state = checkpoint["retention"]
        self.reference = state["reference"]
        if self.method is not None:
            self.method.references.load_state_dict(state["references"])

    @torch.no_grad()
    def note_start(self, rows: list[Example], size: int) -> None:
        """Measure what preferences are compared with: the likelihoods before training."""
        if self.loss != "preference":
            return
        for i in range(0, len(rows), size):
            part = rows[i : i + size]
            pairs = zip(
                *(self._log_p(part, name).tolist() for name in ("target", "rejected")), strict=True
            )
            self.reference |= {_key(row): pair for row, pair in zip(part, pairs, strict=True)}

    # private

    def _loss(self, rows: list[Example], rank: int, world: int) -> Tensor:
        """Return the loss of rows rank, rank + world, ..., scaled so that ranks average to it."""
        if len(rows) < world:
            raise ValueError(
                f"a batch of {len(rows)} rows cannot be shared by {world} devices; raise "
                "--data.batch_size"
            )
        own = rows[rank::world]
        if self.loss == "preference":
            losses_B = self._preference(own)
            return losses_B.sum() * world / len(rows)
        whole = self._tokens(rows)
        count = int(whole.target_BT.sum())
        tokens = whole.rows(torch.arange(rank, len(rows), world)) if world > 1 else whole
        return self._nll(tokens)[0].sum() * world / count

    def _nll(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the negative log-likelihood of every target token and its row, [N] each."""
        tokens = tokens.to(self.lm.device)
        logits_NV = self.lm.target_logits(tokens)
        return token_nll(logits_NV, tokens.target_ids_N), tokens.target_rows_N

    def _tokens(self, rows: list[Example], field: str = "target") -> Tokens:
        """Encode rows, on the CPU; running text is prompt and target at once."""
        texts = [getattr(row, field) for row in rows]
        if self.loss == "text":
            ids = TokenPolicy(self.lm.tokenizer).ids(texts)
            tokens = self.lm.policy.pad(
                [i[: self.max_tokens] for i in ids], [[]] * len(ids), [-1] * len(ids)
            )
            target_BT = tokens.mask_BT.clone()
            target_BT[:, 0] = False
            return replace(tokens, target_BT=target_BT)
        has_end = self.append_eos and self.lm.policy.eos_id is not None
        heads, tails = self.lm.policy.pieces([row.prompt for row in rows], texts, has_end)
        heads = [head[-(self.max_tokens - 1) :] for head in heads]
        tails = [t[: self.max_tokens - len(h)] for h, t in zip(heads, tails, strict=True)]
        return self.lm.policy.pad(heads, tails, [-1] * len(heads))

    def _log_p(self, rows: list[Example], field: str) -> Tensor:
        """Return log p(answer | prompt) of each row, [B]."""
        nll_N, row_N = self._nll(self._tokens(rows, field))
        return nll_N.new_zeros(len(rows)).index_add(0, row_N, -nll_N)

    def _preference(self, rows: list[Example]) -> Tensor:
        """Return DPO's loss of each row, [B]."""
        better_B, worse_B = self._log_p(rows, "target"), self._log_p(rows, "rejected")
        start = better_B.new_tensor([self.reference[_key(row)] for row in rows])
        return dpo_loss(better_B, worse_B, start[:, 0], start[:, 1], self.beta)


def _key(row: Example) -> tuple[str, str, str]:
    return row.prompt, row.target, row.rejected
