"""EditableLM: the one caller of the Hugging Face model.

Legend: B rows, T tokens, N target tokens of all rows, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from editkit.adapters.base import EditLayer, Scope, attach, disabled, edit_layers
from editkit.adapters.routed import tell_prompts
from editkit.lm.blocks import bypass, record_output_type, select_head_rows, tap
from editkit.lm.load import load_pretrained, resolve_dtype
from editkit.lm.reading import decode_ids
from editkit.lm.sites import (
    Site,
    find_blocks,
    find_sites,
    propose_causal_layers,
    propose_memory_layer,
)
from editkit.lm.spec import LMSpec
from editkit.lm.tokens import Padding, TokenPolicy, Tokens

if TYPE_CHECKING:
    from editkit.lm.row_states import Shortcuts


class EditableLM(nn.Module):
    """A frozen causal LM whose linear layers can carry edits.

    Args:
        model: A transformers causal LM.
        tokenizer: Its tokenizer.
        spec: What was loaded.

    Attributes:
        causal_layers: Blocks that recall facts: known of the model, or proposed by depth.
        memory_layer: Block for a memory, likewise.

    Raises:
        ValueError: If the model has no editable site, or the spec names a layer it does not have.
    """

    def __init__(self, model: Any, tokenizer: Any, spec: LMSpec) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.spec = spec
        self.policy = TokenPolicy(tokenizer, spec.chat_template)
        self.scope = Scope()
        tell_prompts(model, self.scope)
        self.sites: list[Site] = find_sites(model)
        self.blocks: list[nn.Module] = list(find_blocks(model)[1])
        self.ends: dict[
            tuple[str, ...], Tensor
        ] = {}  # decoding: tokens with a stop, per stop tuple
        self._block_gives_tuple: bool | None = None
        self.shortcuts: Shortcuts | None = None  # what passes can leave out, once it was tried
        known, depth = spec.with_known(), len(self.blocks)
        for layer in [*(known.causal_layers or []), known.memory_layer]:
            if layer is not None:
                self.site(layer)
        causal, memory = known.causal_layers, known.memory_layer
        self.causal_layers = propose_causal_layers(depth) if causal is None else causal
        self.memory_layer = propose_memory_layer(depth) if memory is None else memory

    @classmethod
    def load(cls, spec: LMSpec, dtype: torch.dtype = torch.float32) -> EditableLM:
        """Load a spec's model; `spec.dtype` wins over `dtype`.

        Raises:
            ValueError: If the model cannot be found or read; the text names the fix.
        """
        model, tokenizer = load_pretrained(spec, resolve_dtype(spec.dtype, dtype))
        return cls(model, tokenizer, spec)

    def train(self, mode: bool = True) -> EditableLM:
        """Stay in evaluation mode: an edited model has no dropout to train with."""
        super().train(False)
        return self

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where ids go."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.device

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text: the generation config's, else the tokenizer's."""
        config = getattr(self.model, "generation_config", None)
        ids = getattr(config, "eos_token_id", None)
        ids = [ids] if isinstance(ids, int) else list(ids or [])
        return frozenset(ids or ([] if self.policy.eos_id is None else [self.policy.eos_id]))

    def site(self, layer: int, role: str = "mlp.down") -> Site:
        """Return the one site of a role in a block.

        Raises:
            ValueError: If the block does not exist or has not exactly one site of that role.
        """
        if not 0 <= layer < len(self.blocks):
            raise ValueError(f"layer {layer} is not in 0..{len(self.blocks) - 1} of {self.spec.id}")
        found = [s for s in self.sites if s.layer == layer and s.role == role]
        if len(found) != 1:
            has = sorted({s.role for s in self.sites if s.layer == layer})
            raise ValueError(f"block {layer} has {len(found)} sites of role {role!r}; it has {has}")
        return found[0]

    def attach(self, path: str, make: Callable[[nn.Module], EditLayer]) -> EditLayer:
        """Wrap the site at `path`; see `editkit.adapters.base.attach`."""
        layer = attach(self.model, path, make)
        layer.scope = self.scope
        layer.eval()
        return layer

    @property
    def layers(self) -> dict[str, EditLayer]:
        """Edit layers by site path."""
        return edit_layers(self.model)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Be the base model inside the context, bit for bit."""
        with disabled(list(self.layers.values())):
            yield

    def encode(
        self,
        prompts: list[str],
        targets: list[str] | None = None,
        subjects: list[str] | None = None,
        padding: Padding = "right",
        append_eos: bool = False,
    ) -> Tokens:
        """Encode rows onto the model's device; see `editkit.lm.tokens.TokenPolicy.encode`."""
        tokens = self.policy.encode(prompts, targets, subjects, padding, append_eos)
        self.check_length(tokens)
        return tokens.to(self.device)

    def forward(self, tokens: Tokens) -> Tensor:
        """Return logits [B, T, V] in the model's dtype."""
        return self._call(tokens)

    def target_logits(
        self, tokens: Tokens, above: int = 0, hidden_BTH: Tensor | None = None
    ) -> Tensor:
        """Return fp32 logits [N, V] that predict the target tokens; the head runs only there.

        Args:
            tokens: Rows with targets.
            above: First block to run; the blocks below are skipped.
            hidden_BTH: States that enter block `above`, from `hidden_before`.
        """
        with select_head_rows(self.model.get_output_embeddings(), tokens.predicts_BT):
            if above == 0 or hidden_BTH is None:
                return self._call(tokens)[0].float()
            below = self.blocks[:above]
            with bypass(below, hidden_BTH, self.block_gives_tuple):
                return self._call(tokens)[0].float()

    @torch.no_grad()
    def hidden_before(self, layer: int, tokens: Tokens) -> Tensor:
        """Return the states [B, T, H] that enter block `layer`; the blocks above do not run."""
        with tap(self.blocks[layer], inputs=True, stop=True) as found:
            self._call(tokens)
        return found[0]

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str] | Tokens,
        max_new_tokens: int = 50,
        stop: tuple[str, ...] = (),
    ) -> list[str]:
        """Continue prompts greedily, all rows together, with a KV cache.

        Args:
            prompts: Texts, or encoded prompts padded on either side.
            max_new_tokens: Budget per row; a row also ends at the model's last position.
            stop: A row ends with the first token whose text holds one of these.

        Returns:
            The new text of each row up to EOS, without its leading space.

        Raises:
            ValueError: If a prompt exceeds the model's positions.
        """
        tokens = prompts if isinstance(prompts, Tokens) else self.encode(prompts, padding="left")
        rows = decode_ids(self, tokens, max_new_tokens, stop)
        return self.texts(rows)

    def texts(self, rows: list[list[int]]) -> list[str]:
        """Turn new ids into text, without special tokens and the leading space."""
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.removeprefix(" ") for text in texts]

    @property
    def vocabulary(self) -> int:
        """Number V of logits, also where the head's weight is stored packed."""
        head: Any = self.model.get_output_embeddings()
        return int(getattr(head, "out_features", None) or head.weight.shape[0])

    @property
    def max_positions(self) -> int:
        """Most tokens of a row, by the model's config; a very large number where it names none."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return int(limit) if limit else 2**31

    @property
    @torch.no_grad()
    def block_gives_tuple(self) -> bool:
        """Whether blocks return tuples here (transformers 4); found once by running one token."""
        if self._block_gives_tuple is None:
            block = self.blocks[0]
            with record_output_type(block) as seen, tap(block, stop=True):
                self._call(self.policy.pad([[0]], [[]], [-1]).to(self.device))
            self._block_gives_tuple = seen[0]
        return self._block_gives_tuple

    def check_length(self, tokens: Tokens) -> None:
        """Refuse rows beyond the model's positions, in words rather than in a device assert."""
        longest = int(tokens.mask_BT.sum(1).max())
        if longest > self.max_positions:
            raise ValueError(
                f"a row of {longest} tokens exceeds the {self.max_positions} positions of "
                f"{self.spec.id}; shorten its text"
            )

    def _call(self, tokens: Tokens) -> Tensor:
        """Run the HF model on whole rows, with the scope set, and return its logits."""
        self.scope.prompt_BT = tokens.prompt_BT
        try:
            out = self.model(
                input_ids=tokens.ids_BT,
                attention_mask=tokens.mask_BT.long(),
                position_ids=tokens.positions_BT,
                use_cache=False,
            )
        finally:
            self.scope.prompt_BT = None
        logits: Tensor = out.logits
        return logits
