"""How WISE and REPAIR train a shard: masked descent on rows of edits, held against other texts.

Legend: E edits, R rows of an edit, N unrelated texts of an edit, B rows of all, T tokens, D layer
output, F layer input, C kept inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editkit.adapters.side import SideMemory
from editkit.descend import descend
from editkit.functional.losses import activation_margins, inner_distillation
from editkit.lm.rows import SiteRows
from editkit.methods.shards import Distillation, Fitting, Margins, Mask

SETTLED, DONE = 1e-4, 0.02  # the released code stops where the loss changes and is less than these


@dataclass(frozen=True)
class Wanted:
    """What a shard is trained for.

    Args:
        fitting: How it is descended on.
        margins: Margins.
        unit: Score that counts as one.
        distillation: What draws the edits of a batch together.
        as_released: Weigh, stop and decay as the released code does.
    """

    fitting: Fitting
    margins: Margins
    unit: float
    distillation: Distillation
    as_released: bool


@dataclass(frozen=True)
class Lesson:
    """Edits to train on together.

    Args:
        rows: Rows of the edits, edit by edit, E x R; further rows behind them are not trained on.
        edits: Number E.
        per_edit: Number R.
        others_BTF: The site's inputs for the unrelated texts, edit by edit, E x N.
        others_BT: Their prompt tokens.
    """

    rows: SiteRows
    edits: int
    per_edit: int
    others_BTF: Tensor
    others_BT: Tensor

    def part(self, edits: list[int]) -> Lesson:
        """Return the lesson of these edits, in their order; nothing runs again."""
        index_e = torch.tensor(edits, device=self.others_BT.device)

        def of_each(many: int) -> Tensor:
            place_m = torch.arange(many, device=index_e.device)
            return (index_e[:, None] * many + place_m).flatten()

        others = of_each(len(self.others_BT) // self.edits)
        rows = self.rows.at(of_each(self.per_edit))
        return Lesson(
            rows, len(edits), self.per_edit, self.others_BTF[others], self.others_BT[others]
        )


@dataclass(frozen=True)
class Fit:
    """What training has found.

    Args:
        delta_DC: The shard's change at its kept inputs.
        losses_E: Last loss of each edit's own rows, nats per token.
        inside_E: Last mean score of each edit's rows.
        outside_E: Last mean score of each edit's unrelated texts.
        signature_ED: Direction in which each edit's prompt moves the output, at its last token.
        steps: Steps taken.
    """

    delta_DC: Tensor
    losses_E: Tensor
    inside_E: Tensor
    outside_E: Tensor
    signature_ED: Tensor
    steps: int


class _Loss:
    """The loss of a lesson, and what it last saw.

    Edits that are done leave, and their rows with them. Where all have left, all are looked at
    again: what others did since may have undone some.
    """

    def __init__(
        self,
        memory: SideMemory,
        lesson: Lesson,
        mask: Mask,
        leaf_DC: Tensor,
        origin_DC: Tensor,
        wanted: Wanted,
    ) -> None:
        self.memory, self.whole, self.mask = memory, lesson, mask
        self.leaf_DC, self.origin_DC, self.wanted = leaf_DC, origin_DC, wanted
        blank_E = leaf_DC.new_zeros(lesson.edits)
        blank_ED = leaf_DC.new_zeros(lesson.edits, len(leaf_DC))
        self.found = blank_E, blank_E.clone(), blank_E.clone(), blank_ED
        self.before_E: Tensor | None = None
        self._turn_to(list(range(lesson.edits)))

    def __call__(self, step: int) -> Tensor:
        total, going = self._look()
        if not going and len(self.edits) < self.whole.edits:
            self._turn_to(list(range(self.whole.edits)))
            total, going = self._look()
        if going and len(going) < len(self.edits) and not self.wanted.as_released:
            self._turn_to(going)
        return total

    def _turn_to(self, edits: list[int]) -> None:
        """Look at these edits alone."""
        every = len(edits) == self.whole.edits
        self.edits, lesson = edits, self.whole if every else self.whole.part(edits)
        self.lesson, rows = lesson, lesson.rows
        self.n = lesson.edits * lesson.per_edit
        self.rows_BTC = rows.inputs_BTF.float()[..., self.mask.columns_C]
        self.others_BTC = lesson.others_BTF.float()[..., self.mask.columns_C]
        size_B = rows.tokens.target_BT.sum(1)[: self.n]
        released = self.wanted.as_released
        self.weight_B = size_B / (size_B + 1) if released else torch.ones_like(size_B)
        place_T = torch.arange(rows.tokens.prompt_BT.shape[1], device=size_B.device)
        bare = slice(0, self.n, lesson.per_edit)
        self.last_E = (rows.tokens.prompt_BT[bare] * place_T).argmax(1)

    def _look(self) -> tuple[Tensor, list[int]]:
        """Return the loss of the edits that are looked at, and which of them go on."""
        leaf_DC, gate_DC = self.leaf_DC - self.origin_DC, self.mask.gate_DC
        if gate_DC is not None:  # the same values; gradients where the gate is open
            leaf_DC = torch.where(gate_DC, leaf_DC, leaf_DC.detach())
        with torch.autocast(leaf_DC.device.type, enabled=False):
            change_BTD = self.rows_BTC @ leaf_DC.T
            others_BTD = self.others_BTC @ leaf_DC.T
        edits, margins = self.lesson.edits, self.wanted.margins
        loss_B = self.lesson.rows.losses(change_BTD)[: self.n] * self.weight_B
        loss_E = loss_B.view(edits, -1).mean(1)
        inside_ER, outside_EN = self._scores(change_BTD, others_BTD)
        margin_E = activation_margins(
            inside_ER, outside_EN, margins.outside, margins.inside, margins.apart
        )
        signature_ED = change_BTD[: self.n : self.lesson.per_edit][
            torch.arange(edits, device=change_BTD.device), self.last_E
        ]
        total_E = loss_E + margins.weight * margin_E
        done = self._are_done(total_E.detach()).tolist()
        self._note(loss_E, inside_ER.mean(1), outside_EN.mean(1), signature_ED)
        going = [edit for edit, is_done in zip(self.edits, done, strict=True) if not is_done]
        total = total_E[[n for n, is_done in enumerate(done) if not is_done]].sum()
        pull = self.wanted.distillation
        if pull.weight > 0 and going:
            together_ED = self.found[3].index_copy(0, self._index(), signature_ED)
            pulled = inner_distillation(together_ED, pull.cosine, pull.variance)
            total = total + pull.weight * pulled
        return total, going

    def _index(self) -> Tensor:
        return torch.tensor(self.edits, device=self.leaf_DC.device)

    def _note(self, *found: Tensor) -> None:
        """Keep what was found of the edits that are looked at."""
        for kept, now in zip(self.found, found, strict=True):
            kept.index_copy_(0, self._index(), now.detach().to(kept))

    def _scores(self, change_BTD: Tensor, others_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the routing scores of the edits' rows [E, R] and of the other texts [E, N]."""
        lesson, n = self.lesson, self.n
        inside_B = self.memory.score(
            lesson.rows.inputs_BTF[:n], change_BTD[:n], lesson.rows.tokens.prompt_BT[:n]
        )
        outside_B = self.memory.score(lesson.others_BTF, others_BTD, lesson.others_BT)
        unit = self.wanted.unit
        return (inside_B / unit).view(lesson.edits, -1), (outside_B / unit).view(lesson.edits, -1)

    def _are_done(self, total_E: Tensor) -> Tensor:
        """Return which edits take no further step, bool [E]."""
        if not self.wanted.as_released:
            return total_E <= self.wanted.fitting.stop_below
        before_E, self.before_E = self.before_E, total_E
        if before_E is None:
            return torch.zeros_like(total_E, dtype=torch.bool)
        return ((total_E - before_E).abs() <= SETTLED) & (total_E <= DONE)


def train_shard(
    memory: SideMemory, lesson: Lesson, start_DC: Tensor, mask: Mask, wanted: Wanted
) -> Fit:
    """Descend on a shard from where it stands.

    Raises:
        ValueError: If the loss is not finite.
    """
    fitting = wanted.fitting
    # as released the weight itself is moved, and all of it decays
    origin_DC = memory.weight_oi.float() if wanted.as_released else torch.zeros_like(start_DC)
    leaf_DC = (origin_DC + start_DC.detach()).requires_grad_()
    low_DC, high_DC = origin_DC - fitting.clamp, origin_DC + fitting.clamp

    @torch.no_grad()
    def project() -> None:
        leaf_DC.copy_(leaf_DC.clamp(low_DC, high_DC))

    loss = _Loss(memory, lesson, mask, leaf_DC, origin_DC, wanted)
    descent = descend(
        [leaf_DC],
        loss,
        fitting.steps,
        fitting.lr,
        stop_below=0.0,  # the sum over the edits that are not done
        weight_decay=fitting.weight_decay,
        project=project,
        optimizer=torch.optim.SGD if fitting.optimizer == "sgd" else torch.optim.AdamW,
    )
    return Fit(leaf_DC.detach() - origin_DC, *loss.found, descent.steps)
