"""What a value z is searched by: the terms of its loss and when it stops.

Legend: E edits, B rows, N target tokens, V vocabulary, D width of a value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from editkit.functional.losses import kl_from
from editkit.lm.row_states import RowStates
from editkit.lm.suffix import SuffixRows


@dataclass(frozen=True)
class ValueSearch:
    """Constants of the search for values z (MEMIT, eq. 16; ROME, eq. 4).

    Args:
        steps: Most forward passes per edit; one Adam step fewer.
        lr: Adam's learning rate.
        clamp: Largest norm of the change of a value, relative to the value it starts from.
        weight_decay: Weight of |delta| / |start|^2.
        kl: Weight of KL(changed || start) at the subject's last token of "{} is a".
        stop_below: An edit whose total loss is below this takes no further step.
        rank_stop: An edit stops once its target has been the likeliest answer behind all
            generated prefixes this many times (ENCORE), or where there are none behind the bare
            prompt; none never does.
        micro_batch: Edits that are searched for together; bounds memory, changes no result.
    """

    steps: int = 25
    lr: float = 0.5
    clamp: float = 0.75
    weight_decay: float = 0.5
    kl: float = 0.0625
    stop_below: float = 0.05
    rank_stop: int | None = None
    micro_batch: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1 or self.micro_batch < 1:
            raise ValueError(
                f"steps is {self.steps}, micro_batch is {self.micro_batch}; both must be at least 1"
            )
        if self.rank_stop is not None and self.rank_stop < 1:
            raise ValueError(f"rank_stop is {self.rank_stop}; give a count of 1 or more, or none")


class ValueLoss:
    """Loss of each edit's value z; a `RowLoss`.

    Args:
        states: The edits' rows, run below the value.
        search: Weights of the terms.
    """

    def __init__(self, states: RowStates, search: ValueSearch) -> None:
        self.search = search
        self.each = states.each
        self.norm_E = states.init_ED.norm(dim=1)
        self.going_E = torch.arange(states.n_edits, device=states.init_ED.device)
        self.ranked_E = torch.zeros_like(self.going_E)
        self.terms_3E = states.init_ED.new_zeros(3, states.n_edits)
        self.start_EV: Tensor | None = None
        owners = [edit for edit in range(states.n_edits) for _ in range(self.each)]
        anchors = range(states.n_edits if search.kl > 0 else 0)
        self.rows = SuffixRows(states, [*owners, *anchors])
        self._point()

    def __call__(self, delta_ED: Tensor) -> tuple[Tensor, Tensor]:
        """Return the total loss of each edit, and whether it has stopped."""
        search, going_E = self.search, self.going_E
        logits_NV = self.rows.logits(delta_ED)
        nll_E, missed_E = self._nll(logits_NV, len(delta_ED))
        kl_E = torch.zeros_like(nll_E)
        if search.kl > 0:
            anchors_EV = logits_NV[self.anchor_E]
            if self.start_EV is None:
                self.start_EV = anchors_EV.detach().log_softmax(-1)
            kl_E = search.kl * kl_from(self.start_EV, anchors_EV)
        decay_E = search.weight_decay * delta_ED.norm(dim=1) / self.norm_E[going_E] ** 2
        terms_3E = torch.stack([nll_E, kl_E, decay_E])
        self.terms_3E[:, going_E] = terms_3E.detach()
        total_E = terms_3E.sum(0)
        is_done_E = total_E.detach() < search.stop_below
        if search.rank_stop is not None:
            self.ranked_E[going_E] += missed_E == 0
            is_done_E |= self.ranked_E[going_E] >= search.rank_stop
        return total_E, is_done_E

    def _nll(self, logits_NV: Tensor, n_edits: int) -> tuple[Tensor, Tensor]:
        """Return NLL [E], and how many of the target tokens that rank are not the likeliest [E]."""
        rows = self.rows
        ids_N, is_target_N = rows.target_N, rows.target_N >= 0
        nll_N = F.cross_entropy(logits_NV, ids_N, ignore_index=-1, reduction="none")
        share_N = nll_N / (rows.targets_N.clamp_min(1) * self.each)
        nll_E = nll_N.new_zeros(n_edits).index_add(0, rows.owner_N, share_N)
        missed_E = torch.zeros_like(nll_E, dtype=torch.long)
        if self.search.rank_stop is not None:
            ranks_N = is_target_N & ((rows.lead_N > 0) | (self.each == 1))
            missed_N = (logits_NV.argmax(-1) != ids_N) & ranks_N
            missed_E.index_add_(0, rows.owner_N, missed_N.long())
        return nll_E, missed_E

    def _point(self) -> None:
        """Note where the anchors' logits stand, edit by edit."""
        is_anchor_N = self.rows.targets_N == 0
        where_E = is_anchor_N.nonzero()[:, 0]
        self.anchor_E = where_E[self.rows.owner_N[where_E].argsort()]

    def project(self, leaf_BD: Tensor) -> None:
        """Clamp every change to its share of the value it started from."""
        norm_B = leaf_BD.norm(dim=1)
        limit_B = self.search.clamp * self.norm_E[self.going_E]
        leaf_BD.mul_(torch.where(norm_B > limit_B, limit_B / norm_B, 1.0)[:, None])

    def keep(self, rows: list[int]) -> None:
        """Go on with these edits."""
        self.going_E = self.going_E[rows]
        self.rows.keep(rows)
        self.start_EV = None if self.start_EV is None else self.start_EV[rows]
        self._point()
