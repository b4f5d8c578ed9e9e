"""How a small Llama is made to know a world and to recall its facts at the subject's last token.

Legend: B rows, T tokens, V vocabulary, S subjects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rows import Rows
from sentences import BOS_ID, INSIDE, NONE, PAD_ID
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class FactWorldLM(L.LightningModule):
    """A plain Llama; site masks and the attribute head exist in training only.

    Args:
        width: Hidden size.
        layers: Number of decoder blocks.
        heads: Number of attention heads.
        inner: Width of the feed-forward layers.
        lr: Peak learning rate: flat to 40 % of the steps, then linear to zero.
        weight_decay: AdamW's decay of matrices; embeddings and norms have none. Strong decay keeps
            hidden norms near 50, where the constants of the editing papers mean something.
        warmup: Steps of linear warm-up.
        other_weight: Loss weight of tokens outside the object, whose weight is 1.
        attribute_weight: Weight of the auxiliary loss at the subject's last token.
        recall_layer: Layers below it build the subject; from it on the subject may be read.
        site_share: Share of the batches with site masks.
        site_until: Share of the steps after which no masks are used.
    """

    def __init__(
        self,
        width: int = 192,
        layers: int = 6,
        heads: int = 6,
        inner: int = 768,
        lr: float = 3e-3,
        weight_decay: float = 0.5,
        warmup: int = 50,
        other_weight: float = 0.2,
        attribute_weight: float = 0.3,
        recall_layer: int = 3,
        site_share: float = 0.75,
        site_until: float = 0.75,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lm: LlamaForCausalLM | None = None

    def configure_model(self) -> None:
        """Build the model once the data module knows the vocabulary."""
        if self.lm is not None:
            return
        data: Any = self.trainer.datamodule
        config = self.hparams
        self.lm = build_llama(
            len(data.tokenizer), config.width, config.layers, config.heads, config.inner
        )
        self.attribute_head = nn.Linear(config.width, config.width, bias=False)
        nn.init.eye_(self.attribute_head.weight)
        self.register_buffer("attributes_SV", data.attributes(), persistent=False)
        self.draws = torch.Generator().manual_seed(data.hparams.seed)

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
        """Return the object-weighted loss plus the attribute loss."""
        progress = self.global_step / self.trainer.estimated_stepping_batches
        draw = torch.rand((), generator=self.draws).item()
        is_masked = progress < self.hparams.site_until and draw < self.hparams.site_share
        layer = self.hparams.recall_layer
        with site_masks(self.lm, batch, layer) if is_masked else nullcontext():
            out = self.lm(batch.ids_BT, output_hidden_states=True)
        loss, object_loss = weighted_loss(out.logits, batch, self.hparams.other_weight)
        attribute_loss = self._attribute_loss(out.hidden_states[layer], batch.subject_BT)
        self.log_dict({"object": object_loss, "attribute": attribute_loss}, prog_bar=True)
        return loss + self.hparams.attribute_weight * attribute_loss

    def _attribute_loss(self, hidden_BTD: Tensor, subject_BT: Tensor) -> Tensor:
        """KL from the subject's objects to what its last token predicts after `recall_layer`."""
        last = subject_BT >= 0
        hidden_SD = F.rms_norm(hidden_BTD[last].float(), hidden_BTD.shape[-1:], eps=1e-6)
        logits_SV = self.attribute_head(hidden_SD) @ self.lm.get_input_embeddings().weight.T
        target_SV = self.attributes_SV[subject_BT[last]]
        return F.kl_div(logits_SV.float().log_softmax(-1), target_SV, reduction="batchmean")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with decay on matrices only; flat, then linear to zero."""
        matrices = [p for n, p in self.lm.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.lm.named_parameters() if p.ndim != 2 or "embed" in n]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.hparams.weight_decay},
                {"params": [*others, *self.attribute_head.parameters()], "weight_decay": 0.0},
            ],
            lr=self.hparams.lr,
            betas=(0.9, 0.95),
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(step, steps, self.hparams.warmup)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def build_llama(
    vocabulary: int, width: int, layers: int, heads: int, inner: int
) -> LlamaForCausalLM:
    """Build an untrained Llama with tied embeddings; loads in transformers 4 and 5 alike."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
        pad_token_id=PAD_ID,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak rate: warm-up, flat to 40 %, linear to 1 %."""
    progress = step / steps
    falling = 1.0 if progress < 0.4 else max((1 - progress) / 0.6, 0.01)
    return min(1.0, (step + 1) / warmup) * falling


def weighted_loss(logits_BTV: Tensor, batch: Rows, other_weight: float) -> tuple[Tensor, Tensor]:
    """Return the next-token loss with objects weighted 1, and the loss on objects alone."""
    targets, is_object = batch.ids_BT[:, 1:], batch.object_BT[:, 1:].float()
    entropy = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none"
    ).view_as(is_object)
    weight = (targets != PAD_ID) * (other_weight + (1 - other_weight) * is_object)
    object_loss = (entropy * is_object).sum() / is_object.sum().clamp_min(1)
    return (entropy * weight).sum() / weight.sum(), object_loss.detach()


@contextmanager
def site_masks(lm: LlamaForCausalLM, batch: Rows, recall_layer: int) -> Iterator[None]:
    """Hide subjects from attention, so that recall must happen at their last token.

    Below `recall_layer` no token outside a mention sees it; from there on, only its last token
    is seen. Without this a small model copies the name to the end of the prompt in layer 0 and
    recalls there, out of reach of methods that edit at the subject.
    """
    early_BTT, late_BTT = visible_sites(batch.ids_BT, batch.subject_BT)
    with ExitStack() as stack:
        for i, block in enumerate(lm.model.layers):
            mask_BTT = early_BTT if i < recall_layer else late_BTT
            handle = block.self_attn.register_forward_pre_hook(
                _mask_hook(mask_BTT[:, None]), with_kwargs=True
            )
            stack.callback(handle.remove)
        yield


def _mask_hook(mask: Tensor) -> Callable[..., tuple[Any, Any]]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {**kwargs, "attention_mask": mask}

    return hook


def visible_sites(ids_BT: Tensor, subject_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return who sees whom (True = visible) below and from the recall layer on."""
    sentence_BT = (ids_BT == BOS_ID).cumsum(1)
    mention_BT = subject_BT != NONE
    same_BTT = (sentence_BT[:, :, None] == sentence_BT[:, None]) & (
        mention_BT[:, :, None] & mention_BT[:, None]
    )
    causal_TT = torch.ones_like(same_BTT[0]).tril()
    early_BTT = causal_TT & (~mention_BT[:, None] | same_BTT)
    late_BTT = causal_TT & ((subject_BT != INSIDE)[:, None] | same_BTT)
    return early_BTT, late_BTT
