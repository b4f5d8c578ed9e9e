"""Windowed: WISE that trains windows of edits in batches of like ones and merges their shards.

It is REPAIR without its loop: who is trained with whom, against what, and how shards become a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from editkit.edits import Edit
from editkit.functional.losses import cosine_to
from editkit.functional.merge import loss_weights
from editkit.lm.rows import adds_up
from editkit.methods.health import NOTHING, Health
from editkit.methods.shard_training import Fit
from editkit.methods.shards import Distillation, Mask, Merge, Regroup, merged
from editkit.methods.wise import WISE
from editkit.methods.wordings import as_asked, expanded, undisputed

DISTILLATION, REGROUP, MERGE = Distillation(weight=1.0), Regroup(), Merge()


class Windowed(WISE):
    """Base class of methods that write windows of edits.

    `shards.save` is the size of a batch, `shards.merge` that of a window; whole windows are merged.

    Args:
        distillation: What draws the edits of a batch together.
        regroup: How a window is dealt into batches.
        merge: How the shards of a window are merged.
    """

    tau = 0.0  # share of right target tokens that an edit must exceed

    def __init__(
        self,
        distillation: Distillation = DISTILLATION,
        regroup: Regroup = REGROUP,
        merge: Merge = MERGE,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not self.shards.retrieve:
            raise ValueError("shards.retrieve is false; REPAIR keeps every pool, so leave it true")
        self.distillation = distillation
        self.regroup = regroup
        self.merge = merge
        self.trained = 0  # trainings of edits

    def attach(self) -> None:
        """Attach as WISE does, and watch what comes in."""
        super().attach()
        self.health = Health(self.lm, self.site, self.memory, self.tau)

    def prepare(self) -> None:
        """Prepare as WISE does; run the edits that are there already."""
        super().prepare()
        self.health.adds_up = self.adds_up
        self.health.know(self.made)

    @property
    def waiting(self) -> list[int]:
        """Edits that answer from shards of their own and are still to be merged."""
        pools = self.memory.pools
        found: list[int] = pools.edit_M[pools.open_P[pools.home_M]].tolist()
        return sorted(found)

    def undo(self, edit_id: int) -> None:
        """Undo as WISE does, with what the edits are asked by."""
        if not self.is_prepared:  # loaded from a saved run
            self.start()
        super().undo(edit_id)

    def forget_pool(self, pool: int) -> None:
        """Drop a pool; the thresholds of the others are found again."""
        self.memory.drop([pool])
        self.health.know({i: e for i, e in self.made.items() if i in self.memory.pools.homes})
        self.health.routes()

    def rekey(self, edits: list[Edit]) -> None:
        """Find all scores again, of edits in their own pools and in others."""
        self.made = {e.id: e for e in edits if e.id in self.memory.pools.homes}
        with self.lm.unedited():
            self.health.adds_up = adds_up(self.lm, self.site)
        self.health.kept, self.health.found = {}, NOTHING
        self.health.know(self.made)
        for pool in range(len(self.memory.pools)):
            super()._measure(pool)
        for pool in range(len(self.memory.pools)):
            self.health.place(pool)

    def make_room(self, edits: list[Edit]) -> list[Edit]:
        """Let go of edits whose prompts are edited again; of several in a batch the last stays."""
        edits = [edits[i] for i in undisputed(edits, [e.prompt for e in edits])]
        asked = {e.prompt for e in edits}
        gone = [i for i, e in self.made.items() if e.prompt in asked]
        if gone:
            left = self.homes_of(gone)
            self.made = {i: e for i, e in self.made.items() if i not in gone}
            self.memory.pools.evict(gone)
            self.memory.drop_empty()
            self.health.know(self.made)
            self.measure_again(left)
        return edits

    def write_apart(self, edits: list[Edit]) -> Fit:
        """Write edits into a shard of their own."""
        mask = self.draw_mask(self.draw_seed())
        fit = self.fit_shard(edits, mask, beside=self.waiting)
        pool = self.memory.write(None, fit.delta_DC, mask.columns_C)
        self.enrol(edits, pool)
        self.health.know(self.made)
        self._measure(pool)
        self.trained += len(as_asked(edits))
        return fit

    def worded(self, ids: list[int]) -> list[Edit]:
        """Return edits in all wordings that they are trained in, their own first."""
        return expanded([self.made[i] for i in ids], self.paraphrases, self.repeats)

    def admit(self, edits: list[Edit]) -> list[int]:
        """Take in edits that go straight into a window; return their ids."""
        own = as_asked(edits)
        self.made |= own
        self.health.know(self.made)
        return [*own]

    def set_apart(self, ids: list[int], before: dict[str, Tensor]) -> None:
        """Let edits answer from the shards that they had before; those without get one each."""
        pools = self.memory.pools
        left = self.homes_of(ids)
        homes = dict(zip(before["edit_M"].tolist(), before["home_M"].tolist(), strict=True))
        for i in ids:
            if i not in homes:
                self.write_apart(self.worded([i]))
                continue
            name = before["name_P"][homes[i]]
            if not (pools.name_P == name).any():
                shard = before["deltas"][homes[i]], before["columns_PC"][homes[i]]
                pool = self.memory.write(None, *shard)
                pools.name_P[pool] = name
            pool = int((pools.name_P == name).nonzero())
            pools.house([i], pool)
            self._measure(pool)
        self.memory.drop_empty()
        self.measure_again(left)

    def homes_of(self, ids: list[int]) -> set[int]:
        """Return the names of the pools in which edits live."""
        homes, names = self.memory.pools.homes, self.memory.pools.name_P.tolist()
        return {names[homes[i]] for i in ids if i in homes}

    def measure_again(self, names: set[int]) -> None:
        """Find thresholds again of pools that some edits have left, by their names."""
        for pool, name in enumerate(self.memory.pools.name_P.tolist()):
            if name in names:
                self._measure(pool)

    def strangers(self, edits: list[Edit], beside: Sequence[int], many: int) -> list[Tensor]:
        """Return what enters the site at other edits' prompts: those beside, then any, drawn."""
        own = {edit.id for edit in edits}
        near = [i for i in beside if i not in own]
        found = self.health.prompts(own, near, many, self.generator)
        return [x_TF[-1:] for x_TF in found] if self.routing.over == "last" else found

    def _measure(self, pool: int) -> None:
        """Find the scores of a pool's own edits again, and its place among the others."""
        pools, own_E = self.memory.pools, self.health.own_scores(pool)
        if len(own_E):
            pools.floor_P[pool], pools.typical_P[pool] = own_E.min(), own_E.mean()
        self.health.place(pool)

    def train_window(self, ids: list[int], more: float = 1.0, may_leave: bool = True) -> list[int]:
        """Train edits in batches of like ones, merge every few; return those that have left."""
        found: list[tuple[list[int], Fit, Mask]] = []
        size, many = self.shards.save, self.shards.merge // self.shards.save
        for batch in self.regroup.deal(self.health.features(ids), size):
            members, mask = [ids[n] for n in batch], self.draw_mask(self.draw_seed())
            worded, own = self.worded(members), len(members)
            lesson = self.lesson(worded, beside=ids)
            fit = self.fit_lesson(lesson, mask, None, more)
            apart_E = cosine_to(fit.signature_ED[0], fit.signature_ED[:own])
            far_E = apart_E > self.regroup.consistency
            stay = [n for n, is_far in enumerate(far_E.tolist()) if n == 0 or not is_far]
            if may_leave and self.regroup.by_likeness and len(stay) < len(members):
                members = [members[n] for n in stay]
                rows = [n + k for k in range(0, len(worded), own) for n in stay]
                fit = self.fit_lesson(lesson.part(rows), mask, None, more)
            self.trained += len(batch)
            found.append((members, fit, mask))
        for n in range(0, len(found), many):
            self._merge_fits(found[n : n + many])
        self.memory.drop_empty()
        kept = {i for members, _, _ in found for i in members}
        return [i for i in ids if i not in kept]

    def _merge_fits(self, found: list[tuple[list[int], Fit, Mask]]) -> None:
        """Merge shards into a closed pool, weighted by how well they have learned."""
        losses_S = torch.stack([fit.losses_E.mean() for _, fit, _ in found])
        changes = [(fit.delta_DC, mask.columns_C) for _, fit, mask in found]
        weights_S = loss_weights(losses_S, self.merge.alpha)
        pools, keep = self.memory.pools, self.shards.keep
        change = merged(pools, changes, weights_S, keep, self.merge.conflict)
        pool = self.memory.write(None, *change)
        pools.open_P[pool] = False
        pools.house([i for members, _, _ in found for i in members], pool)
        self._measure(pool)
