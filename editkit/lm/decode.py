"""Greedy decoding of many rows at once, equal to decoding each row alone.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from editkit.lm.tokens import Tokens

if TYPE_CHECKING:
    from editkit.lm.editable import EditableLM

CHECK_EVERY = 8  # steps between two looks at whether all rows are done: on a GPU each is a sync


def align_left(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return (ids, mask) of the prompts with all padding moved to the left."""
    order_BT = tokens.prompt_BT.long().argsort(dim=1, stable=True)
    keep = int(tokens.prompt_BT.sum(1).max())
    ids_BT = tokens.ids_BT.gather(1, order_BT)[:, -keep:]
    mask_BT = tokens.prompt_BT.gather(1, order_BT)[:, -keep:]
    return ids_BT, mask_BT


def stop_ids(tokenizer: Any, stop: tuple[str, ...], size: int) -> Tensor:
    """Return a bool [V]: the tokens whose own text holds a stop string."""
    pieces = tokenizer.batch_decode([[i] for i in range(size)])
    return torch.tensor([any(s in piece for s in stop) for piece in pieces])


def decode_greedy(
    lm: EditableLM, tokens: Tokens, max_new_tokens: int, stop: tuple[str, ...]
) -> list[str]:
    """Decode as `EditableLM.generate` describes; routes and scope are set at prefill only."""
    ids_BT, mask_BT = align_left(tokens)
    ends_V = _ends(lm, stop)
    check_every = 1 if ids_BT.device.type == "cpu" else CHECK_EVERY
    position_B1 = mask_BT.sum(1, keepdim=True)
    room_B = (lm.max_positions - position_B1[:, 0]).clamp_max(max_new_tokens)
    done_B = room_B <= 0
    step: dict[str, Any] = {
        "input_ids": ids_BT,
        "position_ids": (mask_BT.long().cumsum(1) - 1).clamp_min(0),
    }
    if getattr(lm.model, "_supports_cache_class", False):  # transformers 4: Gemma-2's own is short
        step["past_key_values"] = DynamicCache()
    new: list[Tensor] = []
    lm.scope.prompt_BT = mask_BT
    try:
        for count in range(1, max_new_tokens + 1):
            out = lm.model(**step, attention_mask=mask_BT.long(), use_cache=True)
            lm.scope.prompt_BT = None
            next_B = out.logits[:, -1].float().argmax(-1)
            new.append(next_B)
            done_B = done_B | ends_V[next_B] | (room_B <= count)
            if count % check_every == 0 and bool(done_B.all()):
                break
            mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
            step = {
                "input_ids": next_B[:, None],
                "position_ids": (position_B1 + count - 1).clamp_max(lm.max_positions - 1),
                "past_key_values": out.past_key_values,
            }
    finally:
        lm.scope.prompt_BT = None
    rows = torch.stack(new, dim=1).tolist() if new else [[] for _ in ids_BT]
    return _texts(lm, rows, room_B.tolist(), ends_V.tolist())


def _ends(lm: EditableLM, stop: tuple[str, ...]) -> Tensor:
    """Return a bool [V]: tokens after which a row is done. Kept on the LM per stop tuple."""
    if stop not in lm.ends:
        size = lm.model.get_output_embeddings().weight.shape[0]
        ends_V = torch.zeros(size, dtype=torch.bool)
        known = min(size, len(lm.tokenizer))
        if stop:
            ends_V[:known] = stop_ids(lm.tokenizer, stop, known)
        ends_V[list(lm.eos_ids)] = True
        lm.ends[stop] = ends_V
    return lm.ends[stop].to(lm.device)


def _texts(lm: EditableLM, rows: list[list[int]], room: list[int], ends: list[bool]) -> list[str]:
    """Turn new ids into text, each row up to its own end, without the leading space.

    What a row was given while its batch-mates went on is dropped; so is a closing EOS.
    """
    cut, eos_ids = [], lm.eos_ids
    for row, most in zip(rows, room, strict=True):
        last = next((i for i, token in enumerate(row) if ends[token]), len(row))
        own = row[: min(last + 1, most)]
        cut.append(own[:-1] if own and own[-1] in eos_ids else own)
    texts: list[str] = lm.tokenizer.batch_decode(cut, skip_special_tokens=True)
    return [text.removeprefix(" ") for text in texts]
