"""Rows to train on while editing, with what the frozen blocks below made of them.

Legend: B rows, T tokens, H hidden width, N target tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from editkit.functional.losses import target_nll
from editkit.lm.editable import EditableLM
from editkit.lm.tokens import Tokens


class TargetRows:
    """Prompts with targets, encoded once, run once through the blocks that editing leaves alone.

    Args:
        lm: Model whose lowest edited block is `above`.
        above: First block that an edit can change; everything below is run once per row.
        append_eos: Close each target with EOS.
    """

    def __init__(self, lm: EditableLM, above: int, append_eos: bool = False) -> None:
        self.lm = lm
        self.above = above
        self.append_eos = append_eos
        self.heads: list[list[int]] = []
        self.tails: list[list[int]] = []
        self.hidden_TH: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.heads)

    def add(self, prompts: list[str], targets: list[str]) -> None:
        """Encode further rows and run their frozen part.

        Raises:
            ValueError: As `TokenPolicy.encode` does.
        """
        heads, tails = self.lm.policy.pieces(prompts, targets, self.append_eos)
        tokens = self._tokens(heads, tails)
        if self.above > 0:
            hidden_BTH = self.lm.hidden_before(self.above, tokens)
            lengths = tokens.mask_BT.sum(1).tolist()
            self.hidden_TH += [h[:n] for h, n in zip(hidden_BTH, lengths, strict=True)]
        self.heads += heads
        self.tails += tails

    def losses(self, index: Sequence[int] | None = None) -> Tensor:
        """Return the mean target NLL of the rows at `index` (all by default), nats [B]."""
        chosen = range(len(self)) if index is None else index
        tokens = self._tokens([self.heads[i] for i in chosen], [self.tails[i] for i in chosen])
        hidden_BTH = None
        if self.above > 0:
            hidden_BTH = pad_sequence([self.hidden_TH[i] for i in chosen], batch_first=True)
        logits_NV = self.lm.target_logits(tokens, self.above, hidden_BTH)
        return target_nll(logits_NV, tokens.target_ids_N, tokens.target_rows_N, len(chosen))

    def _tokens(self, heads: list[list[int]], tails: list[list[int]]) -> Tokens:
        return self.lm.policy.pad(heads, tails, [-1] * len(heads)).to(self.lm.device)
