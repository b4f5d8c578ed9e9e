"""Read rows once, then go on from what was read: force other texts on them, let them answer.

A row is a prompt and a draft: the text forced on it, or nothing. One pass gives the logits of the
draft. Greedy decoding needs no pass of its own as far as the draft is what the model says: it goes
on from the cache where the two part. Routed layers route in that one pass, on prompt tokens.

Legend: B rows, T columns of the cache, N places or new tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from editkit.lm.blocks import select_head_rows
from editkit.lm.decode import Ends, left_aligned, pick
from editkit.lm.tokens import Tokens

if TYPE_CHECKING:
    from editkit.lm.editable import EditableLM

CHECK_EVERY = 8  # steps between two looks at which rows are done: on a GPU each is a sync
DROP_BELOW = 0.75  # share of rows under way below which those that are done leave the cache


class Reading:
    """Rows of prompt and draft after one pass of the model.

    Args:
        lm: Model to ask.
        tokens: The rows, padded on either side; the target is the draft, which may be empty.
        whole: Keep the logits of the prompt too, not only those of what follows it.

    Raises:
        ValueError: If a row exceeds the model's positions.
    """

    @torch.no_grad()
    def __init__(self, lm: EditableLM, tokens: Tokens, whole: bool = False) -> None:
        lm.check_length(tokens)
        self.lm = lm
        self.tokens = tokens = left_aligned(tokens, tokens.mask_BT)
        behind_BT = tokens.predicts_BT | tokens.target_BT
        behind_BT[:, -1] = True
        self.read_BT = tokens.mask_BT if whole else behind_BT
        self.behind_BT = behind_BT
        step: dict[str, Any] = {}
        if getattr(lm.model, "_supports_cache_class", False):  # transformers 4: Gemma-2's is short
            step["past_key_values"] = DynamicCache()
        lm.scope.prompt_BT = tokens.prompt_BT
        try:
            with select_head_rows(lm.model.get_output_embeddings(), self.read_BT):
                out = lm.model(
                    input_ids=tokens.ids_BT,
                    attention_mask=tokens.mask_BT.long(),
                    position_ids=tokens.positions_BT,
                    use_cache=True,
                    **step,
                )
        finally:
            lm.scope.prompt_BT = None
        self.logits_NV: Tensor = out.logits[0].to(lm.device)
        self.cache: Any = out.past_key_values
        self.seen_BT = tokens.mask_BT  # columns of the cache that what follows may look at

    def logits(self, places_BT: Tensor) -> Tensor:
        """Return fp32 logits [N, V] at places that were read, row by row."""
        return self.logits_NV[places_BT[self.read_BT]].float()

    @property
    def prompt_end_BT(self) -> Tensor:
        """True at the last token of each prompt, whose logits predict what follows it."""
        return self.behind_BT & self.tokens.prompt_BT

    @torch.no_grad()
    def other_logits(self, ids_BN: Tensor, is_given_BN: Tensor) -> Tensor:
        """Force another text on the prompts; return fp32 logits [M, V] that predict its tokens.

        The first token costs nothing, each further one a pass of one token a row.

        Args:
            ids_BN: Tokens that follow the prompts, instead of the drafts.
            is_given_BN: True at the M tokens there are, on the left; a row may have none.
        """
        if not self._can_rewind(ids_BN.shape[1]):
            return self._other_rows(ids_BN, is_given_BN)
        found = [self.logits(self.prompt_end_BT)[is_given_BN[:, 0]]]
        width = self.tokens.prompt_BT.shape[1]
        seen_BT = torch.zeros_like(self.seen_BT)
        seen_BT[:, :width] = self.tokens.prompt_BT
        for n in range(1, ids_BN.shape[1]):
            seen_BT = torch.cat([seen_BT, seen_BT.new_ones(len(seen_BT), 1)], dim=1)
            found.append(self._step(ids_BN[:, n - 1], seen_BT)[is_given_BN[:, n]])
        hidden_BT = seen_BT.new_zeros(len(seen_BT), seen_BT.shape[1] - self.seen_BT.shape[1])
        self.seen_BT = torch.cat([self.seen_BT, hidden_BT], dim=1)
        row_M = is_given_BN.T.nonzero()[:, 1]  # the passes' order
        return torch.cat(found)[row_M.argsort(stable=True)]

    @torch.no_grad()
    def decode(self, ends: Ends, draws_BN: Tensor | None = None, top_k: int = 5) -> list[list[int]]:
        """Let the rows answer; return the new ids of each up to its own end, without EOS.

        Rows that are done leave the cache. Ends the reading: ask for other texts before.

        Args:
            ends: When rows are done.
            draws_BN: Uniform numbers in [0, 1) that choose among the `top_k` likeliest tokens, for
                rows without draft; None decodes greedily.
            top_k: Tokens to choose among.
        """
        agreed_BT, next_B = self._agreed(None if draws_BN is None else draws_BN[:, 0], top_k)
        count_B = agreed_BT.sum(1)
        room = max(int(ends.room_B.max()), int(count_B.max()) + 1)
        new_BN = count_B.new_zeros(len(count_B), room + 1)  # the last place takes what is too much
        place_BT = agreed_BT.cumsum(1) - 1
        rows = agreed_BT.nonzero()[:, 0]
        new_BN[rows, place_BT[agreed_BT]] = self.tokens.ids_BT[agreed_BT]
        new_BN.scatter_(1, count_B[:, None], next_B[:, None])
        over_B = ends.reached(new_BN).gather(1, count_B[:, None])[:, 0]
        over_B |= count_B + 1 >= ends.room_B
        is_cut_B = count_B < self.tokens.target_BT.sum(1)
        if bool((is_cut_B & ~over_B).any()) and not self._can_rewind(room):
            alone = left_aligned(self.tokens, self.tokens.prompt_BT)
            return Reading(self.lm, alone).decode(ends)
        self.seen_BT[:, : agreed_BT.shape[1]] = self.tokens.prompt_BT | agreed_BT
        self._run(new_BN, count_B, over_B, ends, draws_BN, top_k)
        return ends.cut(new_BN[:, :-1])

    def _agreed(self, draw_B: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
        """Return the draft's tokens [B, T] that the model says too, and its token behind them."""
        tokens = self.tokens
        said_N = pick(self.logits(self.behind_BT), draw_B, top_k)
        said_BT = torch.zeros_like(tokens.ids_BT)
        said_BT[self.behind_BT] = said_N
        differs_BT = torch.zeros_like(tokens.target_BT)
        differs_BT[:, 1:] = tokens.target_BT[:, 1:] & (tokens.ids_BT[:, 1:] != said_BT[:, :-1])
        agreed_BT = tokens.target_BT & (differs_BT.cumsum(1) == 0)
        end_B = said_BT.shape[1] - 1 - tokens.target_BT.sum(1) + agreed_BT.sum(1)
        return agreed_BT, said_BT.gather(1, end_B[:, None])[:, 0]

    def _run(
        self,
        new_BN: Tensor,
        at_B: Tensor,
        over_B: Tensor,
        ends: Ends,
        draws_BN: Tensor | None,
        top_k: int,
    ) -> None:
        """Fill `new_BN` behind place `at_B` of each row until every row is over."""
        rows = torch.arange(len(new_BN), device=new_BN.device)
        stops_B = ends.is_stop_V[new_BN].cumsum(1).gather(1, at_B[:, None])[:, 0]
        check_every = 1 if new_BN.device.type == "cpu" else CHECK_EVERY
        for step in range(new_BN.shape[1]):
            if step % check_every == 0:
                going = (~over_B).nonzero()[:, 0]
                if len(going) == 0:
                    return
                if len(going) <= DROP_BELOW * len(rows):
                    self._keep(going)
                    rows, at_B, stops_B = rows[going], at_B[going], stops_B[going]
                    over_B = over_B[going]
            self.seen_BT = torch.cat([self.seen_BT, torch.ones_like(over_B)[:, None]], dim=1)
            logits_BV = self._step(new_BN[rows, at_B], self.seen_BT)
            at_B = (at_B + 1).clamp_max(new_BN.shape[1] - 1)
            draw_B = None
            if draws_BN is not None:
                draw_B = draws_BN[rows, at_B.clamp_max(draws_BN.shape[1] - 1)]
            next_B = pick(logits_BV, draw_B, top_k)
            new_BN[rows, at_B] = next_B
            stops_B = stops_B + ends.is_stop_V[next_B]
            over_B = over_B | ends.is_eos_V[next_B] | (stops_B >= ends.stops_B[rows])
            over_B |= at_B + 1 >= ends.room_B[rows]

    def _step(self, ids_B: Tensor, seen_BT: Tensor) -> Tensor:
        """Feed one token a row; return fp32 logits [B, V] of the next.

        Args:
            ids_B: The tokens.
            seen_BT: Columns of the cache to look at, that of the new token last.
        """
        position_B1 = seen_BT[:, :-1].sum(1, keepdim=True)
        out = self.lm.model(
            input_ids=ids_B[:, None],
            attention_mask=seen_BT.long(),
            position_ids=position_B1.clamp_max(self.lm.max_positions - 1),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = out.past_key_values
        logits_BV: Tensor = out.logits[:, -1].float().to(self.lm.device)
        return logits_BV

    def _keep(self, index: Tensor) -> None:
        """Go on with the rows at `index` only."""
        self.lm.scope.keep(index)
        self.seen_BT = self.seen_BT[index]
        if isinstance(self.cache, tuple):  # transformers 4: GPT-2's, GPT-J's
            self.cache = tuple(tuple(t.index_select(0, index) for t in kv) for kv in self.cache)
        else:
            self.cache.reorder_cache(index)

    def _can_rewind(self, more: int) -> bool:
        """Whether columns of the cache can be hidden: attention over all of them, by mask."""
        if not isinstance(self.cache, tuple):
            layers = getattr(self.cache, "layers", ())
            if type(self.cache) is not DynamicCache:
                return False
            if not all(getattr(layer, "is_croppable", True) for layer in layers):
                return False
        window = getattr(self.lm.model.config, "sliding_window", None)
        return window is None or self.seen_BT.shape[1] + more <= window

    def _other_rows(self, ids_BN: Tensor, is_given_BN: Tensor) -> Tensor:
        """Force another text by a pass of its own over prompts and text."""
        prompt_BT = self.tokens.prompt_BT
        none_BT, none_BN = torch.zeros_like(prompt_BT), torch.zeros_like(is_given_BN)
        tokens = Tokens(
            ids_BT=torch.cat([self.tokens.ids_BT, ids_BN], dim=1),
            mask_BT=torch.cat([prompt_BT, is_given_BN], dim=1),
            prompt_BT=torch.cat([prompt_BT, none_BN], dim=1),
            target_BT=torch.cat([none_BT, is_given_BN], dim=1),
            subject_B=self.tokens.subject_B,
        )
        other = Reading(self.lm, tokens)
        return other.logits(other.tokens.predicts_BT)


def decode_ids(
    lm: EditableLM, tokens: Tokens, max_new_tokens: int, stop: tuple[str, ...]
) -> list[list[int]]:
    """Continue prompts greedily; return each row's new ids up to its end.

    Args:
        lm: Model to ask.
        tokens: Encoded prompts, padded on either side; targets are left out.
        max_new_tokens: Budget per row; a row also ends at the model's last position.
        stop: A row ends with the first token whose text holds one of these.
    """
    reading = Reading(lm, left_aligned(tokens, tokens.prompt_BT))
    return reading.decode(Ends.of(lm, reading.tokens, max_new_tokens, 1, stop))
