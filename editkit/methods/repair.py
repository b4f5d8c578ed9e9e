"""REPAIR: WISE's shards in windows of like edits, checked through the router and rebuilt.

Source: "REPAIR: Robust Editing via Progressive Adaptive Intervention and Reintegration"
(arXiv 2510.01879), its Algorithms 1-4. The released code (sci-m-wang/REPAIR at a4e4e08) is WISE
with uniform merging: loop, batching, distillation and weighted merge are not in it.

Equations: a window of edits is dealt into batches of like ones (eq. 5, Alg. 3: `greedy_clusters`,
on the unedited block's state at the last prompt token). A batch trains a fresh shard on L_edit +
lambda_a L_a + lambda_KD L_KD (eq. 6-7, `functional/losses.py`). An edit whose direction of change
is further than `regroup.consistency` from its seed's leaves for a later window, and the shard is
trained again without it. Shards of a window merge by TIES with weights exp(-alpha L_i) (section
2.5, `functional/merge.py`). Every edit is then asked through the router (`methods/health.py`); r_j
is the share of pool j's edits that fail. While some r_j > `loop.prune` or more than `loop.errors`
edits fail, the worst pool is pruned, and its edits and all that fail are trained anew (Alg. 4).

Deviations from the paper, which leaves much open:
    - An edit is written at once, into a shard of its own, and answers from there till its window is
      full and trained; the last ones of a stream stay there. With the loop on, a window is taken
      only if all that was answered right still is: it is trained again without those of its own
      that are not, up to three times; these wait for `regroup.deferrals` later windows.
    - Each batch gets a fresh shard. Assignment by largest score, as printed, sends all to one.
    - Prompts of other edits, those of the same window first, are half of the unrelated texts.
    - r_j counts all edits that live in j. Counted among failures alone, as printed, it is 1.
    - A pruned pool is trained from zero with new masks; noise, as printed, makes it claim anything.
    - A rebuilt pool is taken only if fewer edits fail, none that did not, and no more held-out
      unrelated prompts are claimed; else all is put back, bit for bit. It is tried `loop.retries`
      times, with 1.5 times as many steps each, within `loop.budget` trainings an edit.
    - Distillation is of the direction in which a prompt moves the output: no gradient reaches
      features, and logits differ within a batch. Teachers have no gradient.
    - Weights that sum to one would shrink a change that stands alone; the disjoint mean does not.
      Signs are settled by election (`merge.conflict: winner` is Alg. 4's rule).
    - An edit of a prompt that was edited before takes its place.
    - A pool's threshold is also kept above what other edits score there, where that leaves its own
      above it (eq. 3). Routing, scores and margins are as in WISE here.

Undo is exact while an edit has a shard to itself; one that is merged is refused.
Costs: beside WISE's, each edit is trained twice or more, and its inputs and states at the site are
kept (Llama-3-8B in bf16, 30 tokens: 1.1 MB) to check it without running the model below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from editkit.edits import Edit
from editkit.functional.losses import cosine_to
from editkit.functional.merge import loss_weights
from editkit.methods.health import Health, worst_pool
from editkit.methods.shard_training import Fit
from editkit.methods.shards import Distillation, Loop, Mask, Merge, Regroup, merged
from editkit.methods.wise import WISE

MORE_STEPS, WINDOW_TRIES = 1.5, 3  # at each retry; of a window
AS_RESOLVED = Distillation(weight=1.0), Regroup(), Merge(), Loop()


class REPAIR(WISE):
    """Writes windows of edits into pools, and rebuilds the pools that fail.

    `shards.save` is the size of a batch, `shards.merge` that of a window; whole windows are merged.

    Args:
        distillation: What draws the edits of a batch together.
        regroup: How a window is dealt into batches.
        merge: How the shards of a window are merged.
        loop: When pools are pruned and rebuilt.
    """

    def __init__(
        self,
        distillation: Distillation = AS_RESOLVED[0],
        regroup: Regroup = AS_RESOLVED[1],
        merge: Merge = AS_RESOLVED[2],
        loop: Loop = AS_RESOLVED[3],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not self.shards.retrieve:
            raise ValueError("shards.retrieve is false; REPAIR keeps every pool, so leave it true")
        self.distillation = distillation
        self.regroup = regroup
        self.merge = merge
        self.loop = loop
        self.deferred: dict[int, int] = {}  # windows that an edit has waited for
        self.tried: dict[int, int] = {}  # rebuildings of a pool, by its name
        self.counts = {"trained": 0, "rebuilt": 0, "accepted": 0}

    def attach(self) -> None:
        """Attach as WISE does, and watch what comes in."""
        super().attach()
        self.health = Health(self.lm, self.site, self.memory, self.loop.correct)

    def prepare(self) -> None:
        """Prepare as WISE does; run the edits that are there already."""
        super().prepare()
        self.health.adds_up = self.adds_up
        self.health.know(self.made)

    def edit(self, edits: list[Edit]) -> dict[str, float]:
        """Write edits into a shard of their own; merge the window when it is full."""
        edits = self._make_room(edits)
        mask = self.draw_mask(self.draw_seed())
        fit = self.fit_shard(edits, mask, beside=self.waiting)
        pool = self.memory.write(None, fit.delta_DC, mask.columns_C)
        self.enrol(edits, pool)
        self._measure(pool)
        self.health.know(self.made)
        self.counts["trained"] += len(edits)
        numbers = {"steps": float(fit.steps), "loss": float(fit.losses_E.mean())}
        if len(self.waiting) >= self.shards.merge:
            numbers["false_activations"] = self._integrate()
        sizes = {"waiting": len(self.waiting), "pools": len(self.memory.pools), **self.counts}
        return numbers | self.health.rates() | {name: float(n) for name, n in sizes.items()}

    @property
    def waiting(self) -> list[int]:
        """Edits that answer from shards of their own and are still to be merged."""
        pools = self.memory.pools
        found: list[int] = pools.edit_M[pools.open_P[pools.home_M]].tolist()
        return sorted(found)

    def forget_pool(self, pool: int) -> None:
        """Drop a pool; the thresholds of the others are found again."""
        self.memory.drop([pool])
        self.health.know({i: e for i, e in self.made.items() if i in self.memory.pools.homes})
        self.health.routes()

    def stream_state(self) -> dict[str, Any]:
        """Return what has been tried beside the texts of the edits."""
        own = {"deferred": self.deferred, "tried": self.tried, "counts": self.counts}
        return {**super().stream_state(), **own, "scores": self.health.scores}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        super().load_stream_state(state)
        for name in ("deferred", "tried", "counts"):
            setattr(self, name, dict(state[name]))
        self.health.scores = state["scores"]

    # a window

    def _make_room(self, edits: list[Edit]) -> list[Edit]:
        """Let go of edits whose prompts are edited again; of several in a batch the last stays."""
        latest = {e.prompt: e for e in edits}
        gone = [i for i, e in self.made.items() if e.prompt in latest]
        if gone:
            self.memory.pools.evict(gone)
            self.made = {i: e for i, e in self.made.items() if i not in gone}
            self.memory.drop_empty()
        return list(latest.values())

    def strangers(self, edits: list[Edit], beside: Sequence[int], many: int) -> list[Tensor]:
        """Return what enters the site at other edits' prompts: those beside, then any, drawn."""
        own = {edit.id for edit in edits}
        found = self.health.prompts(own, beside, many, self.generator)
        return [x_TF[-1:] for x_TF in found] if self.routing.over == "last" else found

    def _integrate(self) -> float:
        """Merge the edits that wait; return the share of unrelated prompts that pools claim."""
        ids, before = self.waiting, self.memory.pools.tables
        known, left = set(self.health.wrong()), list[int]()
        for _ in range(WINDOW_TRIES):
            left += self._train_window([i for i in ids if i not in left])
            lost = set(self.health.wrong()) - known
            if not (self.loop.enabled and lost):
                break
            self.memory.pools.tables = before
            left += [i for i in ids if i in lost and i not in left]
            if len(left) == len(ids):
                break
        else:
            left = ids
        for i in left:
            self.deferred[i] = self.deferred.get(i, 0) + 1
            if self.deferred[i] > self.regroup.deferrals:  # its own shard is its pool for good
                self.memory.pools.open_P[self.memory.pools.homes[i]] = False
        return self._repair() if self.loop.enabled else self.false_activations()

    def _train_window(self, ids: list[int], more: float = 1.0, may_leave: bool = True) -> list[int]:
        """Train edits in batches of like ones, merge every few; return those that have left."""
        fits: list[tuple[list[int], Fit, Mask]] = []
        left: list[int] = []
        size, before = self.shards.save, self.fitting
        self.fitting = replace(before, steps=round(before.steps * more))
        for batch in self.regroup.deal(self.health.features(ids), size):
            members, mask = [ids[n] for n in batch], self.draw_mask(self.draw_seed())
            fit = self.fit_shard([self.made[i] for i in members], mask, beside=ids)
            apart_E = cosine_to(fit.signature_ED[0], fit.signature_ED)
            leaves = [False, *(apart_E[1:] > self.regroup.consistency).tolist()]  # the seed stays
            if may_leave and self.regroup.by_likeness and any(leaves):
                left += [i for i, leave in zip(members, leaves, strict=True) if leave]
                members = [i for i in members if i not in left]
                fit = self.fit_shard([self.made[i] for i in members], mask, beside=ids)
            self.counts["trained"] += len(batch)
            fits.append((members, fit, mask))
        self.fitting = before
        for n in range(0, len(fits), many := self.shards.merge // size):
            self._merge_fits(fits[n : n + many])
        self.memory.drop_empty()
        return left

    def _merge_fits(self, fits: list[tuple[list[int], Fit, Mask]]) -> None:
        """Merge shards into a closed pool, weighted by how well they have learned."""
        pools = self.memory.pools
        chosen = [pools.append(fit.delta_DC, mask.columns_C) for _, fit, mask in fits]
        loss_S = torch.stack([fit.losses_E.mean() for _, fit, _ in fits])
        weight_S = loss_weights(loss_S, self.merge.alpha)
        change = merged(pools, chosen, weight_S, self.shards.keep, self.merge.conflict)
        pools.drop(chosen)
        pool = self.memory.write(None, *change)
        self.memory.pools.open_P[pool] = False
        pools.house([i for members, _, _ in fits for i in members], pool)
        self._measure(pool)

    # the loop

    def _repair(self) -> float:
        """Rebuild the worst pool while there is one that should be, and budget."""
        wrong, false = self.health.wrong(), self.false_activations()
        while self.counts["trained"] < self.loop.budget * self.edits_seen:
            pool = worst_pool(self.memory.pools, wrong, self.tried, self.loop)
            if pool is None:
                break
            wrong, false = self._rebuild(pool, wrong, false)
        return false

    def _rebuild(self, pool: int, wrong: list[int], false: float) -> tuple[list[int], float]:
        """Train a pool's edits and all failing ones again; return who fails, and false claims."""
        pools, before = self.memory.pools, self.memory.pools.tables
        name, own, waiting = int(pools.name_P[pool]), pools.members(pool), self.waiting
        ids = own + [i for i in wrong if i not in own and i not in waiting]
        robbed = {int(pools.name_P[pools.homes[i]]) for i in ids[len(own) :]}
        tried = self.tried.get(name, 0)
        self._train_window(ids, MORE_STEPS**tried, may_leave=False)
        for p, found in enumerate(pools.name_P.tolist()):
            if found in robbed:
                self._measure(p)
        after, claims = self.health.wrong(), self.false_activations()
        self.tried[name] = tried + 1
        self.counts["rebuilt"] += 1
        if len(after) < len(wrong) and set(after) <= set(wrong) and claims <= false:
            self.counts["accepted"] += 1
            return after, claims
        pools.tables = before
        return wrong, false
