"""Decode many rows at once, equal to decoding each row alone.

Legend: B rows, T tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editkit.lm.tokens import Tokens

if TYPE_CHECKING:
    from editkit.lm.editable import EditableLM


@dataclass(frozen=True, slots=True)
class Ends:
    """When rows are done: at EOS, at a number of stops, or out of room.

    Args:
        room_B: Most new tokens of each row.
        stops_B: Stop tokens that a row may take; the last of them ends it.
        is_stop_V: Tokens whose own text holds a stop string.
        is_eos_V: Tokens that end a text.
    """

    room_B: Tensor
    stops_B: Tensor
    is_stop_V: Tensor
    is_eos_V: Tensor

    @classmethod
    def of(
        cls, lm: EditableLM, tokens: Tokens, room: Any, stops: Any, stop: tuple[str, ...]
    ) -> Ends:
        """Make ends for rows of prompts; no row has room beyond the model's positions.

        Args:
            lm: Model that decodes.
            tokens: Rows whose prompts are continued.
            room: New tokens, one number for all rows or one a row.
            stops: Stop tokens that end a row, likewise.
            stop: Stop strings.
        """
        left_B = lm.max_positions - tokens.prompt_BT.sum(1)
        room_B = torch.as_tensor(room, device=lm.device).expand(len(left_B))
        stops_B = torch.as_tensor(stops, device=lm.device).expand(len(left_B))
        is_eos_V = torch.zeros_like(is_stop_V := _stop_tokens(lm, stop))
        is_eos_V[list(lm.eos_ids)] = True
        return cls(torch.minimum(room_B, left_B), stops_B, is_stop_V, is_eos_V)

    def reached(self, new_BN: Tensor) -> Tensor:
        """Whether each row is done at or before each of its new tokens [B, N]."""
        stops_BN = self.is_stop_V[new_BN].cumsum(1)
        at_eos_BN = self.is_eos_V[new_BN].cumsum(1) > 0
        return at_eos_BN | (stops_BN >= self.stops_B[:, None])

    def cut(self, new_BN: Tensor) -> list[list[int]]:
        """Return the ids of each row up to its own end, without a closing EOS."""
        length_B = (~self.reached(new_BN)).sum(1) + 1
        length_B = torch.minimum(length_B, self.room_B).clamp_min(0)
        last_B = new_BN.gather(1, (length_B - 1).clamp_min(0)[:, None])[:, 0]
        length_B = length_B - (self.is_eos_V[last_B] & (length_B > 0)).long()
        pairs = zip(new_BN.tolist(), length_B.tolist(), strict=True)
        return [row[:length] for row, length in pairs]


def left_aligned(tokens: Tokens, kept_BT: Tensor) -> Tokens:
    """Return the rows with the kept tokens alone, all padding on the left."""
    order_BT = kept_BT.long().argsort(dim=1, stable=True)[:, -int(kept_BT.sum(1).max()) :]
    parts = {
        name: getattr(tokens, name) & kept_BT for name in ("mask_BT", "prompt_BT", "target_BT")
    }
    parts["ids_BT"] = tokens.ids_BT
    moved = {name: part.gather(1, order_BT) for name, part in parts.items()}
    return replace(tokens, **moved, subject_B=torch.full_like(tokens.subject_B, -1))


def pick(logits_BV: Tensor, draw_B: Tensor | None, top_k: int) -> Tensor:
    """Return the most likely token of each row, or one of the `top_k` most likely.

    Args:
        logits_BV: Logits of the next token.
        draw_B: Uniform numbers in [0, 1), one a row, that choose by the tokens' probability;
            None takes the most likely token.
        top_k: Tokens to choose among.
    """
    if draw_B is None:
        return logits_BV.argmax(-1)
    best = logits_BV.topk(min(top_k, logits_BV.shape[1]))
    reached_BK = best.values.softmax(-1).cumsum(-1)[:, :-1] <= draw_B[:, None]
    return best.indices.gather(1, reached_BK.sum(1, keepdim=True))[:, 0]


def stop_ids(tokenizer: Any, stop: tuple[str, ...], size: int) -> Tensor:
    """Return a bool [V]: the tokens whose own text holds a stop string."""
    pieces = tokenizer.batch_decode([[i] for i in range(size)])
    return torch.tensor([any(s in piece for s in stop) for piece in pieces])


def _stop_tokens(lm: EditableLM, stop: tuple[str, ...]) -> Tensor:
    """Return a bool [V] of `stop_ids`, kept on the LM per stop tuple."""
    if stop not in lm.ends:
        size = lm.vocabulary
        is_stop_V = torch.zeros(size, dtype=torch.bool)
        if stop:
            known = min(size, len(lm.tokenizer))
            is_stop_V[:known] = stop_ids(lm.tokenizer, stop, known)
        lm.ends[stop] = is_stop_V
    return lm.ends[stop].to(lm.device)
