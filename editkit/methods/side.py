"""SideEdit: what WISE and REPAIR share: lessons, thresholds, and the account of who lives where.

Legend: B rows, T tokens, F layer input, D layer output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from editkit.adapters.side import SideMemory, SideRouting
from editkit.edits import Edit, Probe
from editkit.functional.routing import mean_norms
from editkit.lm.activation import activation
from editkit.lm.openings import shared_prompts
from editkit.methods.base import UndoError
from editkit.methods.memory import MemoryEdit
from editkit.methods.shard_training import Fit, Lesson, Wanted, train_shard
from editkit.methods.shards import Distillation, Fitting, Margins, Mask, Shards
from editkit.methods.wordings import as_asked
from editkit.metrics.evaluate import ProbeRow

HELD_OUT, UNRELATED = 200, 300  # prompts that tell of false activations, and to train against
SHARDS, ROUTING, FITTING = Shards(), SideRouting(), Fitting(steps=30, lr=0.9)
MARGINS = Margins(outside=0.05, inside=0.5, apart=0.25, relative=True)


class SideEdit(MemoryEdit):
    """Base class of methods that write edits into pools of a side memory.

    Args:
        shards: Masks, shards and merging.
        margins: How edits are held apart from unrelated texts.
        routing: When a pool answers.
        fitting: How a shard is descended on.
        corpus: Texts of which unrelated ones are made, for edits that bring too few and to tell
            false activations: a .txt, .jsonl or folder, or a data set of the Hub; none takes the
            `corpus.txt` of the base model, else the model writes them.
        compat: Train as WISE's released code does.
    """

    memory: SideMemory
    distillation = Distillation()

    def __init__(
        self,
        shards: Shards = SHARDS,
        margins: Margins = MARGINS,
        routing: SideRouting = ROUTING,
        fitting: Fitting = FITTING,
        corpus: str | None = None,
        compat: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.shards = shards
        self.margins = margins
        self.routing = routing
        self.fitting = fitting
        self.corpus = corpus
        self.compat = compat
        self.made: dict[int, Edit] = {}  # edits that live in a pool

    def make_memory(self, base_layer: nn.Module) -> SideMemory:
        """Build the layer around a base layer."""
        width = self.shards.width(self.site.in_features)
        return SideMemory(base_layer, width, self.routing, activation(self.lm))

    def prepare(self) -> None:
        """Write prefixes; read unrelated prompts, and the norm of the output there."""
        super().prepare()
        wanted = HELD_OUT, UNRELATED
        held_out, self.unrelated = shared_prompts(self.lm, self.corpus, wanted, self.seed)
        self.quiet, self.unrelated_TF = list(self.inputs(held_out)), self._read(self.unrelated)
        norms = [mean_norms(self.memory.base_layer(x), prompt) for x, prompt in self.quiet]
        self.unit = float(torch.cat(norms).mean()) if self.margins.relative else 1.0

    # routes

    def owners(self, slot_B: Tensor) -> list[int | None]:
        """Return the first edit that lives in each pool; None for slot -1."""
        pools = self.memory.pools
        firsts = {slot: pools.members(slot)[:1] for slot in set(slot_B.tolist())}
        return [next(iter(firsts[slot]), None) for slot in slot_B.tolist()]

    def score(self, probes: list[Probe]) -> list[ProbeRow]:
        """Score probes; a pool counts as the probe's own edit where that lives in it."""
        homes = self.memory.pools.homes
        rows = super().score(probes)
        for row in rows:
            own, found = row["edit_id"], row["route"]["edit_id"]
            if own in homes and found in homes and homes[own] == homes[found]:
                row["route"]["edit_id"] = own
        return rows

    @torch.no_grad()
    def false_activations(self) -> float:
        """Return the share of the held-out unrelated prompts that some pool claims."""
        found = [self.memory.route(*pair).slot_B >= 0 for pair in self.quiet]
        return float(torch.cat(found).float().mean()) if found else float("nan")

    # training

    def draw_seed(self) -> int:
        """Draw the seed of a mask."""
        return int(torch.randint(2**62, (), generator=self.generator))

    def draw_mask(self, seed: int) -> Mask:
        """Return the mask of a seed."""
        return Mask.draw(self.memory.shape_oi, self.shards, seed, self.memory.device)

    def fit_shard(
        self, edits: list[Edit], mask: Mask, pool: int | None = None, beside: Sequence[int] = ()
    ) -> Fit:
        """Train a shard on edits together, from where a pool stands or from zero.

        Args:
            edits: Edits to train on.
            mask: Where the shard may be written.
            pool: Pool to go on with.
            beside: Edits that will share a pool with these, to be held apart first.
        """
        return self.fit_lesson(self.lesson(edits, beside), mask, pool, 1.0)

    def fit_lesson(self, lesson: Lesson, mask: Mask, pool: int | None, more: float) -> Fit:
        """Train a shard on a lesson, `more` times as many steps; see `fit_shard`."""
        shape = self.memory.shape_oi[0], len(mask.columns_C)
        start_DC = torch.zeros(shape, device=mask.columns_C.device, dtype=torch.float32)
        if pool is not None:
            start_DC = self.memory.pools.deltas[pool, :, : shape[1]]
        fitting = replace(self.fitting, steps=round(self.fitting.steps * more))
        wanted = Wanted(fitting, self.margins, self.unit, self.distillation, self.compat)
        return train_shard(self.memory, lesson, start_DC, mask, wanted)

    def lesson(self, edits: list[Edit], beside: Sequence[int] = ()) -> Lesson:
        """Return the rows of edits and what they are held against, run to the site."""
        rows, many = self.rows(edits), self.fitting.irrelevant
        given = [text for edit in edits for text in edit.negatives[:many]]
        own = iter(self._read(given))
        strange = iter(self.strangers(edits, beside, len(edits) * (many // 2)))
        found: list[Tensor] = []
        for edit in edits:
            mine = list(islice(own, len(edit.negatives[:many])))
            mine += list(islice(strange, min(many // 2, many - len(mine))))
            found += mine + [self.unrelated_TF[i] for i in self._draw(many - len(mine), edit)]
        others_BT = pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in found], True)
        inputs_BTF, per_edit = pad_sequence(found, True), len(rows.tokens.ids_BT) // len(edits)
        return Lesson(rows, len(edits), per_edit, inputs_BTF, others_BT.to(inputs_BTF.device))

    def strangers(self, edits: list[Edit], beside: Sequence[int], many: int) -> list[Tensor]:
        """Return what enters the site at the prompts of other edits, at most so many [T, F]."""
        return []

    def _read(self, prompts: list[str]) -> list[Tensor]:
        """Return what enters the site at those tokens of prompts that scores look at [T, F]."""
        first = -1 if self.routing.over == "last" else 0
        return [
            x_TF[prompt_T][first:]
            for pair in self.inputs(prompts)
            for x_TF, prompt_T in zip(*pair, strict=True)
        ]

    def _draw(self, short: int, edit: Edit) -> list[int]:
        """Draw further unrelated texts for an edit."""
        if short and not self.unrelated:
            raise ValueError(
                f"edit {edit.id} has {len(edit.negatives)} negatives, of {self.fitting.irrelevant} "
                "asked for, and the corpus has no further text; lower fitting.irrelevant"
            )
        index = torch.randint(max(1, len(self.unrelated)), (short,), generator=self.generator)
        found: list[int] = index.tolist()
        return found

    # who lives where

    @property
    def held(self) -> dict[int, int]:
        """Edits that live in a pool, and its index."""
        return self.memory.pools.homes

    def enrol(self, edits: list[Edit], pool: int) -> None:
        """Let edits live in a pool."""
        own = as_asked(edits)
        self.memory.pools.house([*own], pool)
        self.made |= own

    @torch.no_grad()
    def own_scores(self, edits: list[Edit], pool: int) -> Tensor:
        """Return the scores of the bare prompts of edits in a pool [E]."""
        pairs = self.inputs([e.prompt for e in edits])
        return torch.cat([self.memory.scores(*pair, [pool])[:, 0] for pair in pairs])

    def undo(self, edit_id: int) -> None:
        """Drop the pool of an edit that has it to itself.

        Raises:
            UndoError: If other edits share its weights.
        """
        self.check_made()
        pools = self.memory.pools
        pool = pools.homes.get(edit_id)
        others = [] if pool is None else [i for i in pools.members(pool) if i != edit_id]
        if pool is None or others:
            shared = f"shares its weights with {len(others)} others, such as {others[:3]}"
            gone = "has given its place to a later edit of the same prompt"
            raise UndoError(
                f"{type(self).__name__} cannot undo edit {edit_id}: it {shared if others else gone}"
            )
        del self.made[edit_id]
        self.forget_pool(pool)

    def check_made(self) -> None:
        """Refuse to touch pools whose edits are not known.

        Raises:
            ValueError: If they came from a saved run that does not keep their texts.
        """
        if not self.memory.pools.homes.keys() <= self.made.keys():
            raise ValueError(
                f"{type(self).__name__} needs the texts of the edits in its pools, and this run "
                "was saved without them: go on from its checkpoint (--ckpt_path last)"
            )

    def forget_pool(self, pool: int) -> None:
        """Drop a pool and what is known of it."""
        self.memory.drop([pool])

    def stream_state(self) -> dict[str, Any]:
        """Return the texts of the edits beside the prefixes."""
        return {**super().stream_state(), "made": [asdict(edit) for edit in self.made.values()]}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        super().load_stream_state(state)
        made = [Edit(**{k: _frozen(v) for k, v in edit.items()}) for edit in state["made"]]
        self.made = {edit.id: edit for edit in made}


def _frozen(value: Any) -> Any:
    """Return a field of an edit as it was before JSON made lists of tuples."""
    return tuple(value) if isinstance(value, list) else value
