"""Rows of which one token's state changes: what stands below it and left of it is run once.

                  left of the place       from the place on
    blocks above  keys and values ──────▶ run at every pass
    blocks below  run once                run once; the change is added at the place

By causality nothing left of the place and nothing below the changed module depends on the change.
Gradients reach the change alone, for nothing before it keeps a graph.

Legend: B rows, E changes, P tokens left of the place, S tokens from it on, N wanted tokens,
V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from editkit.lm.blocks import tokens_at
from editkit.lm.editable import EditableLM
from editkit.lm.passes import above, inputs_of, parts_of, run_spans
from editkit.lm.prefix_cache import PrefixCache, stacked
from editkit.lm.row_states import RowStates
from editkit.lm.trace import change


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of like length, which run together; flat_N counts through all their tokens."""

    inputs: dict[str, Any]
    hidden_BSH: Tensor | None
    at_B: Tensor
    owner_B: Tensor
    flat_N: Tensor


class SuffixRows:
    """Rows that run again and again under changing states.

    Args:
        states: The rows, run once up to the module whose output changes.
        owners: Number of each row's change; several rows may share one. Rows beyond the owners
            given are left out.
    """

    def __init__(self, states: RowStates, owners: Sequence[int]) -> None:
        self.lm = states.lm
        self.path = states.path
        self.shortcuts = states.shortcuts
        self.first = states.first if self.shortcuts.below else 0
        self.last_mlp = _last_mlp(self.lm, self.path) if self.shortcuts.last else None
        rows = range(len(owners))
        cuts = [states.places[b] if self.shortcuts.left else 0 for b in rows]
        spans = [states.spans[b].beyond(cuts[b]) for b in rows]
        order = sorted(rows, key=lambda b: len(spans[b].ids))
        self.owners = [owners[b] for b in order]
        self.rows = [states.rows[b] for b in order]
        self.spans = [spans[b] for b in order]
        self.hidden_BSH = None
        if self.first > 0:
            parts = [states.hidden_TH[b][cuts[b] :] for b in order]
            self.hidden_BSH = pad_sequence(parts, batch_first=True)
        self.cache: PrefixCache | None = None
        if self.first < len(self.lm.blocks) and any(span.start for span in spans):
            self.cache = self._record(states, order)
        self._split()

    def logits(self, change_EH: Tensor) -> Tensor:
        """Return fp32 logits [N, V] of the wanted tokens, row by row, under one change an owner."""
        return torch.cat([self._run(part, change_EH) for part in self.parts])

    def keep(self, owners: Sequence[int]) -> None:
        """Go on with these owners' rows, numbered in this order."""
        number = {owner: i for i, owner in enumerate(owners)}
        kept = [b for b, owner in enumerate(self.owners) if owner in number]
        self.rows, self.spans = [self.rows[b] for b in kept], [self.spans[b] for b in kept]
        self.owners = [number[self.owners[b]] for b in kept]
        rows_B = torch.tensor(kept, device=self.lm.device)
        if self.hidden_BSH is not None:
            self.hidden_BSH = self.hidden_BSH[rows_B]
        if self.cache is not None:
            self.cache = self.cache.keep(rows_B)
        self._split()

    def _split(self) -> None:
        """Part the rows, and note what is wanted of them."""
        lengths = [len(span.ids) for span in self.spans]
        parts = parts_of(self.lm, lengths)  # the rows stand shortest first, so parts are slices
        self.parts = [self._part(slice(part[0], part[-1] + 1)) for part in parts]
        wanted = [
            (owner, row.targets[n] if row.targets else -1, row.lead, len(row.targets))
            for owner, row in zip(self.owners, self.rows, strict=True)
            for n in range(len(row.wanted))
        ]
        of_4N = torch.tensor(wanted, device=self.lm.device).T
        self.owner_N, self.target_N, self.lead_N, self.targets_N = of_4N

    def _part(self, here: slice) -> _Part:
        """Lay out rows that run together."""
        device, rows, spans = self.lm.device, self.rows[here], self.spans[here]
        width, left = len(spans[-1].ids), max(span.start for span in spans)
        cache = self.cache.part(here, left) if self.cache is not None and left > 0 else None
        flat = [
            b * width + t - span.start
            for b, (row, span) in enumerate(zip(rows, spans, strict=True))
            for t in row.wanted
        ]
        at = [row.place - span.start for row, span in zip(rows, spans, strict=True)]
        return _Part(
            inputs=inputs_of(self.lm, spans, cache),
            hidden_BSH=None if self.hidden_BSH is None else self.hidden_BSH[here, :width],
            at_B=torch.tensor(at, device=device),
            owner_B=torch.tensor(self.owners[here], device=device),
            flat_N=torch.tensor(flat, device=device),
        )

    def _run(self, part: _Part, change_EH: Tensor) -> Tensor:
        """Return the logits [N, V] of one part."""
        row_B = torch.arange(len(part.at_B), device=part.at_B.device)

        def shift(output_BSH: Tensor) -> Tensor:
            moved_BH = output_BSH[row_B, part.at_B].float() + change_EH[part.owner_B]
            return output_BSH.index_put((row_B, part.at_B), moved_BH.to(output_BSH.dtype))

        with ExitStack() as stack:
            stack.enter_context(above(self.lm, self.first, part.hidden_BSH))
            stack.enter_context(change(self.lm.model, {self.path: shift}))
            if self._is_slow_fused(part.at_B.device):
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.shortcuts.head:
                head = self.lm.model.get_output_embeddings()
                stack.enter_context(tokens_at(head, part.flat_N, spread=False))
            if self.last_mlp is not None:
                stack.enter_context(tokens_at(self.last_mlp, part.flat_N, spread=True))
            logits: Tensor = self.lm.model(**part.inputs).logits
        return (logits[0] if self.shortcuts.head else logits.flatten(0, 1)[part.flat_N]).float()

    def _is_slow_fused(self, device: torch.device) -> bool:
        """Whether fused attention is the slower one: its backward is, on the CPU below fp32."""
        is_low = torch.is_autocast_enabled("cpu") or self.lm.model.dtype != torch.float32
        return device.type == "cpu" and is_low

    def _record(self, states: RowStates, order: Sequence[int]) -> PrefixCache:
        """Run what is left of the places once, and keep its keys and values."""
        lengths = torch.tensor([states.places[b] for b in order], device=self.lm.device)
        # a row with nothing there brings one token that nothing will look at
        spans = [states.spans[b].upto(max(states.places[b], 1)) for b in order]
        last, parts = [(self.lm.blocks[-1], False)], []
        for picked in parts_of(self.lm, [len(span.ids) for span in spans]):
            part, hidden_TH = [spans[i] for i in picked], None
            if self.first > 0:
                hidden_TH = [states.hidden_TH[order[i]][: len(spans[i].ids)] for i in picked]
            cache = PrefixCache(records=True)
            if states.lead_cache is not None:
                cache = states.lead_cache.spread([span.lead for span in part], records=True)
            run_spans(self.lm, part, self.first, hidden_TH, cache, last)
            parts.append((picked, cache.closed(lengths[picked])))
        return stacked(parts)


def _last_mlp(lm: EditableLM, path: str) -> nn.Module | None:
    """Return the last block's MLP, if it is a module of its own and `path` not in there."""
    last = len(lm.blocks) - 1
    downs = [site.path for site in lm.sites if site.layer == last and site.role == "mlp.down"]
    parent = downs[0].rpartition(".")[0] if len(downs) == 1 else path
    mlp = lm.model.get_submodule(parent)
    return None if path.startswith(parent) or mlp is lm.blocks[last] else mlp
