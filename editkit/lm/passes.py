"""Passes over rows that stand for a stretch of their tokens, with what lies left of it in a cache.

Legend: B rows, S tokens of a pass, P tokens in the cache, T = P + S, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from editkit.lm.blocks import bypass, tap
from editkit.lm.editable import EditableLM
from editkit.lm.prefix_cache import PrefixCache

PASS_COST = {"cpu": 64, "cuda": 512}  # tokens that one more pass is worth; moves no result


Watched = tuple[nn.Module, bool]  # a module, and whether its input is wanted or its output


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a row.

    Args:
        ids: Its tokens.
        start: How many tokens stand left of them.
        lead: Which lead those are the tokens of.
    """

    ids: list[int]
    start: int
    lead: int = 0

    def upto(self, length: int) -> Span:
        """Return the first tokens."""
        return Span(self.ids[:length], self.start, self.lead)

    def beyond(self, length: int) -> Span:
        """Return the tokens behind the first ones."""
        return Span(self.ids[length:], self.start + length, self.lead)


def inputs_of(lm: EditableLM, spans: Sequence[Span], cache: PrefixCache | None) -> dict[str, Any]:
    """Return the model's inputs for spans padded on the right, behind what a cache gives.

    What pads them is not masked: no token looks to its right, and a row without any token to look
    at would give NaN.

    Args:
        lm: Model.
        spans: Spans, each behind `start` tokens of the cache's, which stand at its right end.
        cache: What stands on the left; none if nothing does.
    """
    ids_BS = pad_sequence([torch.tensor(s.ids, dtype=torch.long) for s in spans], batch_first=True)
    ids_BS = ids_BS.to(lm.device)
    starts_B1 = torch.tensor([[span.start] for span in spans], device=lm.device)
    span_S = torch.arange(ids_BS.shape[1], device=lm.device)
    mask_BT = torch.ones_like(ids_BS)
    if cache is not None and cache.length > 0:
        span_P = torch.arange(cache.length, device=lm.device)
        mask_BT = torch.cat([(span_P >= cache.length - starts_B1).long(), mask_BT], 1)
    return {
        "input_ids": ids_BS,
        "attention_mask": mask_BT,
        "position_ids": (starts_B1 + span_S).clamp_max(lm.max_positions - 1),
        "past_key_values": cache,
        "use_cache": False,  # transformers 4 would look for what bypassed blocks do not give
    }


@contextmanager
def above(lm: EditableLM, block: int, hidden_BSH: Tensor | None) -> Iterator[None]:
    """Run the model from `block` on, on states that enter it; all of it where there are none."""
    if hidden_BSH is None:
        yield
    else:
        with bypass(lm.blocks[:block], hidden_BSH, lm.block_gives_tuple):
            yield


def parts_of(lm: EditableLM, lengths: Sequence[int]) -> list[list[int]]:
    """Part rows of these lengths so that padding and passes together cost least."""
    cost = PASS_COST.get(lm.device.type, max(PASS_COST.values()))
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    parts = split_by_length([lengths[b] for b in order], cost)
    return [order[part] for part in parts]


def split_by_length(lengths: Sequence[int], pass_cost: int) -> list[slice]:
    """Part rows, shortest first, so that padding and passes together cost least.

    Args:
        lengths: Tokens of each row, ascending.
        pass_cost: Tokens that one more pass is worth.
    """
    ends = [b for b in range(1, len(lengths)) if lengths[b] > lengths[b - 1]] + [len(lengths)]
    best: dict[int, tuple[int, list[slice]]] = {0: (0, [])}
    for end in ends:
        costs = {b: cost + (end - b) * lengths[end - 1] for b, (cost, _) in best.items()}
        start = min(costs, key=costs.__getitem__)
        best[end] = (costs[start] + pass_cost, [*best[start][1], slice(start, end)])
    return best[len(lengths)][1]


@torch.no_grad()
def run_spans(
    lm: EditableLM,
    spans: Sequence[Span],
    block: int,
    hidden_TH: Sequence[Tensor] | None,
    cache: PrefixCache | None,
    watched: Sequence[Watched],
) -> list[list[Tensor]]:
    """Run spans together up to the last of the watched modules.

    Args:
        lm: Model.
        spans: Spans.
        block: First block to run.
        hidden_TH: States of each span that enter it; none runs from the embedding on.
        cache: What stands on the left.
        watched: Modules to watch.

    Returns:
        For each of them what it took or gave [T, .] of each span.
    """
    hidden_BTH = None if hidden_TH is None else pad_sequence(list(hidden_TH), batch_first=True)
    with ExitStack() as stack:
        taps = [
            stack.enter_context(tap(module, inputs, stop=i == len(watched) - 1))
            for i, (module, inputs) in enumerate(watched)
        ]
        stack.enter_context(above(lm, block, hidden_BTH))
        lm.model(**inputs_of(lm, spans, cache))
    return [
        [states[: len(span.ids)] for states, span in zip(tapped[0], spans, strict=True)]
        for tapped in taps
    ]
