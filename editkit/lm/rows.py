"""Rows to train on while editing, with what the frozen blocks below made of them.

Legend: B rows, T tokens, H hidden width, N target tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from copy import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from editkit.functional.losses import target_nll
from editkit.lm.blocks import tap, tokens_at
from editkit.lm.editable import EditableLM
from editkit.lm.sites import Site
from editkit.lm.tokens import Padding, Tokens
from editkit.lm.trace import change
from editkit.parallel import ranks_of


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
            ranks = ranks_of(self.lm.model)
            own_BTH = self.lm.hidden_before(self.above, _part(tokens, ranks.own(len(heads))))
            hidden_BTH = ranks.gather(own_BTH, len(heads))
            lengths = tokens.mask_BT.sum(1).tolist()
            self.hidden_TH += [h[:n] for h, n in zip(hidden_BTH, lengths, strict=True)]
        self.heads += heads
        self.tails += tails

    def losses(self, index: Sequence[int] | None = None) -> Tensor:
        """Return the mean target NLL of the rows at `index` (all by default), nats [B]."""
        asked, ranks = range(len(self)) if index is None else index, ranks_of(self.lm.model)
        chosen = asked[ranks.own(len(asked))]
        tokens = self._tokens([self.heads[i] for i in chosen], [self.tails[i] for i in chosen])
        hidden_BTH = None
        if self.above > 0:
            hidden_BTH = pad_sequence([self.hidden_TH[i] for i in chosen], batch_first=True)
        logits_NV = self.lm.target_logits(tokens, self.above, hidden_BTH)
        loss_B = target_nll(logits_NV, tokens.target_ids_N, tokens.target_rows_N, len(chosen))
        return ranks.gather(loss_B, len(asked))

    def _tokens(self, heads: list[list[int]], tails: list[list[int]]) -> Tokens:
        return self.lm.policy.pad(heads, tails, [-1] * len(heads)).to(self.lm.device)


class SiteRows:
    """Prompts with targets, run once through all that lies below the output of one site.

    What is added to a site's output changes neither the site's input nor anything below, so each
    call of `losses` runs the blocks above only.

    On several devices each runs its share of the rows; what it found of all of them, and the losses
    and gradients of all, are the same everywhere.

    Args:
        lm: Model to edit; its edits are out of the way while the rows are run.
        site: Site whose output will change.
        adds_up: What `adds_up` found; where false, the site's block runs in every call, too.
        prompts: One text per row.
        targets: Answer per row.
        append_eos: Close each target with EOS.
        padding: Side to pad on.

    Raises:
        ValueError: As `EditableLM.encode` does.
    """

    def __init__(
        self,
        lm: EditableLM,
        site: Site,
        adds_up: bool,
        prompts: list[str],
        targets: list[str],
        append_eos: bool = False,
        padding: Padding = "right",
    ) -> None:
        self.lm = lm
        self.site = site
        self.adds_up = adds_up
        self.tokens = lm.encode(prompts, targets, padding=padding, append_eos=append_eos)
        self.ranks = ranks_of(lm.model)
        self._share_out()
        with lm.unedited():
            inputs_BTF, hidden_BTH = run_to_site(lm, site, self.own)
            if not adds_up:
                hidden_BTH = lm.hidden_before(site.layer, self.own)
        self.inputs_BTF = self.ranks.gather(inputs_BTF, len(prompts))
        self.hidden_BTH = self.ranks.gather(hidden_BTH, len(prompts))

    def _share_out(self) -> None:
        """Find this device's rows, and what of them the blocks above the site need."""
        self.own = _part(self.tokens, self.ranks.own(len(self.tokens.ids_BT)))
        self.partly = partly_needed(self.lm, self.site.layer + 1, self.own)

    def __len__(self) -> int:
        return len(self.hidden_BTH)

    def columns(self, rows: Tensor) -> Tensor:
        """Return the tokens, bool [T], that `at` leaves of some rows (int64): up to the longest."""
        return self.tokens.mask_BT[rows].any(0)

    def at(self, rows: Tensor) -> SiteRows:
        """Return these rows (int64), in their order; nothing runs again."""
        part, columns_T = copy(self), self.columns(rows)
        part.tokens = self.tokens.rows(rows)
        part._share_out()
        part.inputs_BTF = self.inputs_BTF[rows][:, columns_T]
        part.hidden_BTH = self.hidden_BTH[rows][:, columns_T]
        return part

    @classmethod
    def stored(
        cls, lm: EditableLM, site: Site, adds_up: bool, tokens: Tokens, *states_BT: Tensor
    ) -> SiteRows:
        """Return rows whose `inputs_BTF` and `hidden_BTH` are known already."""
        rows = cls.__new__(cls)
        rows.lm, rows.site, rows.adds_up, rows.tokens = lm, site, adds_up, tokens
        rows.ranks = ranks_of(lm.model)
        rows._share_out()
        rows.inputs_BTF, rows.hidden_BTH = states_BT
        return rows

    def losses(self, added_BTD: Tensor) -> Tensor:
        """Return each row's mean target NLL, nats [B], with `added_BTD` added to the site's output.

        Gradients reach `added_BTD`.
        """
        logits_NV, tokens = self._own_logits(added_BTD), self.own
        own_B = target_nll(logits_NV, tokens.target_ids_N, tokens.target_rows_N, len(tokens.ids_BT))
        return self.ranks.gather(own_B, len(added_BTD))

    @torch.no_grad()
    def hits(self, added_BTD: Tensor) -> Tensor:
        """Return the share of each row's target tokens that come out likeliest, fp32 [B]."""
        tokens = self.own
        right_N = (self._own_logits(added_BTD).argmax(-1) == tokens.target_ids_N).float()
        size_B = tokens.target_BT.sum(1)
        found_B = right_N.new_zeros(len(size_B)).index_add(0, tokens.target_rows_N, right_N)
        return self.ranks.gather(found_B / size_B, len(added_BTD))

    def _own_logits(self, added_BTD: Tensor) -> Tensor:
        """Return fp32 logits [N, V] that predict the target tokens of this device's rows."""
        lm, tokens = self.lm, self.own
        own_BTH = self.hidden_BTH[self.ranks.own(len(added_BTD))]
        added_BTD = self.ranks.scatter(added_BTD)
        with ExitStack() as stack:
            stack.enter_context(lm.unedited())
            if self.adds_up:
                above = self.site.layer + 1
                hidden_BTH = own_BTH + added_BTD.to(own_BTH)
            else:
                above, hidden_BTH = self.site.layer, own_BTH
                add = {self.site.path: lambda y_BTD: y_BTD + added_BTD.to(y_BTD)}
                stack.enter_context(change(lm.model, add))
            for module, flat_N in self.partly:
                stack.enter_context(tokens_at(module, flat_N, spread=True))
            return lm.target_logits(tokens, above, hidden_BTH)


def _part(tokens: Tokens, rows: slice) -> Tokens:
    """Return some of the rows, as wide as they all are."""
    return Tokens(**{name: getattr(tokens, name)[rows] for name in Tokens.__slots__})


def partly_needed(lm: EditableLM, first: int, tokens: Tokens) -> list[tuple[nn.Module, Tensor]]:
    """Return the token-wise modules from block `first` on, each with the tokens that count there.

    A token counts where it predicts the target or a later one does; padding and the target's last
    token do not. In the last block only keys and values of the former are needed.
    """
    predicts_BT = tokens.predicts_BT
    used_BT = tokens.mask_BT & (predicts_BT.flip(1).cumsum(1).flip(1) > 0)
    used_N, predicts_N = (m.flatten().nonzero()[:, 0] for m in (used_BT, predicts_BT))
    found = []
    for layer in range(first, len(lm.blocks)):
        paths = {s.path: s.role for s in lm.sites if s.layer == layer and s.role[:4] == "attn"}
        downs = [s.path for s in lm.sites if s.layer == layer and s.role == "mlp.down"]
        if len(downs) == 1:
            paths[downs[0].rpartition(".")[0]] = "mlp"
        for path, role in paths.items():
            is_read = role in ("attn.k", "attn.v", "attn.qkv") or layer < len(lm.blocks) - 1
            module = lm.model.get_submodule(path)
            if module is not lm.blocks[layer]:
                found.append((module, used_N if is_read else predicts_N))
    return found


@torch.no_grad()
def run_to_site(lm: EditableLM, site: Site, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return the site's input [B, T, F] and its block's output [B, T, H]; nothing above runs."""
    module = lm.model.get_submodule(site.path)
    with tap(module, inputs=True) as inputs, tap(lm.blocks[site.layer], stop=True) as outputs:
        lm.forward(tokens)
    return inputs[0], outputs[0]


@torch.no_grad()
def adds_up(lm: EditableLM, site: Site) -> bool:
    """Whether what is added to a site's output leaves its block as it was added.

    So it is at the end of every part that a block sums up; a norm behind the site (Gemma-2)
    prevents it, or an activation.
    """
    tokens = lm.encode(["What is added up?"])
    before_BTH = run_to_site(lm, site, tokens)[1].float()
    if site.out_features != before_BTH.shape[-1]:
        return False
    added_BTH = before_BTH.roll(1, dims=-1)
    with change(lm.model, {site.path: lambda y_BTD: y_BTD + added_BTH.to(y_BTD)}):
        after_BTH = run_to_site(lm, site, tokens)[1].float()
    return float((after_BTH - before_BTH - added_BTH).norm()) < 0.05 * float(added_BTH.norm())
