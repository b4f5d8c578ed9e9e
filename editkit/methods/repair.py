"""REPAIR: WISE's shards in windows of like edits, checked through the router and rebuilt.

Source: "REPAIR: Robust Editing via Progressive Adaptive Intervention and Reintegration"
(arXiv 2510.01879). Its released code (sci-m-wang/REPAIR at a4e4e08) is WISE with uniform merging
and has none of the loop, batching, distillation and weighted merge of the paper. What follows is
built from the paper's Algorithms 1-4 and is not the authors' code.

Equations, and where: a window of edits is dealt into batches of like ones (eq. 5, Alg. 3:
`functional/clusters.py`, on the unedited block's state at the last prompt token). A batch trains a
fresh shard together on L_edit + lambda_a L_a + lambda_KD L_KD (eq. 6-7, `functional/losses.py`).
An edit whose direction of change is further than `regroup.consistency` from its seed's leaves for
a later window, and the shard is trained again without it. The shards of a window merge by TIES
with weights exp(-alpha L_i) (section 2.5, `functional/merge.py`). Every edit is then asked
through the router (`methods/health.py`); r_j is the share of pool j's edits that fail. While some
r_j > `loop.prune` or more than `loop.errors` edits fail, the worst pool is pruned, and its edits
and all that fail are regrouped and trained into a new one (Alg. 4).

Deviations from the paper, which leaves much open:
    - An edit is written at once, into a shard of its own, and answers from there; the last ones of
      a stream, fewer than a window, stay there. The others are trained again with their window; a
      batch of edits that fills the window goes straight into it and is trained once.
      With the loop on, a window is taken only if every edit that was answered right still is. Those
      of its own that are not answer from their shards again; if that does not help, it is trained
      again without them, up to three times. They wait for a later window, `regroup.deferrals`
      times at most, and keep their shard for good then.
    - An edit of a batch that is done leaves the descent, with its rows; all are looked at again
      when all have left, and those that others have moved since go on.
    - Each batch gets a fresh shard. Assignment by largest score, as printed, sends all to one.
    - Where an edit brings too few `negatives` for `fitting.irrelevant`, prompts of other edits,
      those of the same window first, fill up at most half of the unrelated texts.
    - r_j counts all edits that live in j. Counted among failures alone, as printed, it is 1.
    - A pruned pool is trained from zero with new masks; noise, as printed, makes it claim anything.
    - A rebuilt pool is taken only if fewer edits fail, no edit fails that did not, and not more of
      the held-out unrelated prompts are claimed; else all is put back, bit for bit. A pool, not an
      edit, is tried `loop.retries` times, with half as many steps again each time, within
      `loop.budget`. A rebuilding that diverges is one that was refused.
    - Distillation is of the direction in which a prompt moves the output, not of features, which
      no gradient reaches, nor of logits: edits of a batch have different answers.
    - Weights that sum to one would shrink a change that stands alone; the disjoint mean does not.
      Signs are settled by election (`merge.conflict: winner` is Alg. 4's rule).
    - An edit of a prompt that was edited before takes its place.
    - A pool's threshold is also kept above what other edits score there, where that leaves its own
      above it (eq. 3: edits > tau > unrelated). Routing, scores and margins are as in WISE here.

Counted, logged, and told in the summary and the report: windows and edits trained, pools rebuilt,
accepted and refused, edits that find their own pool, another or none, and edits that fail, whose
number no rebuilding may raise.

What the parts are worth on fact-world (`experiments/results/repair_ablations`, 120 edits, three
seeds): the loop keeps one edit in a hundred that is lost without it, and where pools are picked by
multiples of thresholds still loses three. Distillation, regrouping and weights in the merge change
nothing that three seeds could show; merging itself costs .03 of locality.

Undo drops the shard of an edit that has one to itself: what it wrote is gone exactly, thresholds
are found again from the edits that stay. Those that were trained beside it stay as they were held
apart from it. An edit that shares its shard, or is merged, is refused.

Costs: beside WISE's, each edit that comes alone is trained twice, and its inputs and states at the
site are kept (Llama-3-8B in bf16, 30 tokens: 1.1 MB) to check it without running the model below.
Pools are one for a window, and one for each edit that no window can keep (fact-world, 1,000 edits:
244 to 422 with `regroup.consistency: 1`; more with less); `editkit plan` counts one for each edit.
"""

from __future__ import annotations

import logging
from typing import Any

from editkit.adapters.side import SideRouting
from editkit.edits import Edit
from editkit.methods.health import NOTHING, worst_pool
from editkit.methods.shards import Fitting, Loop, Shards
from editkit.methods.windows import Windowed
from editkit.methods.wordings import as_asked

MORE_STEPS = 1.5  # at each retry
WINDOW_TRIES = 3
COUNTS = ("windows", "trained", "rebuilt", "accepted", "refused")
TRIED = ("deferred", "tried")
LOOP = Loop()
SHARDS = Shards(save=5, merge=15)
ROUTING = SideRouting(over="last", pick="typical")
FITTING = Fitting(steps=30, lr=0.9, irrelevant=2)
log = logging.getLogger(__name__)


class REPAIR(Windowed):
    """Writes windows of edits into pools, and rebuilds the pools that fail.

    Args:
        loop: When pools are pruned and rebuilt.
        shards: Masks, shards and merging.
        routing: When a pool answers.
        fitting: How a shard is descended on.
    """

    def __init__(
        self,
        loop: Loop = LOOP,
        shards: Shards = SHARDS,
        routing: SideRouting = ROUTING,
        fitting: Fitting = FITTING,
        **kwargs: Any,
    ) -> None:
        super().__init__(shards=shards, routing=routing, fitting=fitting, **kwargs)
        self.loop = loop
        self.tau = loop.correct
        self.deferred: dict[int, int] = {}  # windows that an edit has waited for
        self.tried: dict[int, int] = {}  # rebuildings of a pool, by its name
        self.windows = 0  # trainings of a window
        self.rebuilt = self.accepted = self.refused = 0

    def edit(self, edits: list[Edit]) -> dict[str, float]:
        """Write edits into a shard of their own, or into a pool with those that fill a window."""
        self.check_made()
        before, made, numbers = self.memory.pools.tables, dict(self.made), {}
        kept, found, deferred = self.health.kept, self.health.found, dict(self.deferred)
        try:
            edits = self.make_room(edits)
            if len(self.waiting) + len(as_asked(edits)) < self.shards.merge:
                fit = self.write_apart(edits)
                numbers = {"steps": float(fit.steps), "loss": float(fit.losses_E.mean())}
            else:
                numbers = {"false_activations": self._integrate(self.admit(edits))}
        except BaseException:  # as if the edits had not come
            self.memory.pools.tables, self.made, self.deferred = before, made, deferred
            self.health.kept, self.health.found = kept, found
            raise
        return numbers | self.counted()

    def counted(self) -> dict[str, float]:
        """Return how many edits wait and pools there are, what was tried, and who finds what."""
        sizes = {"waiting": len(self.waiting), "pools": len(self.memory.pools)}
        counts = sizes | {name: getattr(self, name) for name in COUNTS}
        return {name: float(n) for name, n in counts.items()} | self.health.rates()

    def for_summary(self) -> dict[str, Any]:
        """Return what `summary.json` tells of the loop."""
        return {"loop": self.counted()}

    def stream_state(self) -> dict[str, Any]:
        """Return what has been tried beside the texts of the edits."""
        own = {name: getattr(self, name) for name in (*TRIED, *COUNTS)}
        return {**super().stream_state(), **own, "found": self.health.found}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        super().load_stream_state(state)
        for name in COUNTS:
            setattr(self, name, state[name])
        for name in TRIED:  # JSON has no numbers for keys
            setattr(self, name, {int(key): n for key, n in state[name].items()})
        self.health.kept, self.health.found = {}, state.get("found", NOTHING)

    def kept_state(self) -> dict[str, Any]:
        """Return all but what is found again by asking."""
        return {k: v for k, v in self.stream_state().items() if k != "found"}

    def _integrate(self, fresh: list[int]) -> float:
        """Merge the edits that wait, and fresh ones, into a pool; see to it that none is lost.

        Those that are lost answer from shards of their own again. Where that does not help, the
        window is trained again without them; who cannot be kept waits on.

        Returns:
            Share of the held-out unrelated prompts that the pools claim.
        """
        ids, before = [*self.waiting, *fresh], self.memory.pools.tables
        known = set(self.health.wrong()).difference(fresh)
        left: list[int] = []
        for _ in range(WINDOW_TRIES):
            self.windows += 1
            left += self.train_window([i for i in ids if i not in left])
            if self.loop.enabled:
                lost = set(self.health.wrong()) - known
                left += [i for i in ids if i in lost and i not in left]
            self.set_apart(left, before)
            lost = set(self.health.wrong()) - known - set(fresh).intersection(left)
            if not (self.loop.enabled and lost) or len(left) == len(ids):
                break
            self.memory.pools.tables = before
        else:
            left = ids
            self.set_apart(left, before)
        self._defer(left)
        seen = self.edits_seen + len(fresh)
        return self._repair(seen) if self.loop.enabled else self.false_activations()

    def _defer(self, left: list[int]) -> None:
        """Let edits wait for a later window; those that may wait no longer keep their own pool."""
        pools = self.memory.pools
        for i in left:
            self.deferred[i] = self.deferred.get(i, 0) + 1
            if self.deferred[i] > self.regroup.deferrals:
                pools.open_P[pools.homes[i]] = False

    # the loop

    def _repair(self, seen: int) -> float:
        """Rebuild the worst pool while there is one that should be, and budget for these edits."""
        wrong, false = self.health.wrong(), self.false_activations()
        while self.trained < self.loop.budget * seen:
            pool = worst_pool(self.memory.pools, wrong, self.tried, self.loop)
            if pool is None:
                break
            failing = len(wrong)
            wrong, false = self._rebuild(pool, wrong, false)
            assert len(wrong) <= failing, "a pool that was rebuilt made edits fail"
        return false

    def _rebuild(self, pool: int, wrong: list[int], false: float) -> tuple[list[int], float]:
        """Train a pool's edits and all failing ones again; return who fails, and false claims."""
        pools, before = self.memory.pools, (self.memory.pools.tables, self.health.found)
        name, waiting = int(pools.name_P[pool]), self.waiting
        own = pools.members(pool)
        ids = own + [i for i in wrong if i not in own and i not in waiting]
        robbed = self.homes_of(ids[len(own) :])
        tried = self.tried.get(name, 0)
        self.tried[name] = tried + 1
        self.rebuilt += 1
        try:
            self.train_window(ids, MORE_STEPS**tried, may_leave=False)
            self.measure_again(robbed)
        except ValueError as error:  # the edits stand as they were
            log.warning("pool %d of %d edits not rebuilt: %s", name, len(own), error)
            self.refused += 1
            pools.tables, self.health.found = before
            return wrong, false
        after, claims = self.health.wrong(), self.false_activations()
        is_better = len(after) < len(wrong) and set(after) <= set(wrong) and claims <= false
        log.info(
            "pool %d of %d edits rebuilt and %s: %d edits failed, %d do; claims of unrelated "
            "prompts %.3f, %.3f", name, len(own), "taken" if is_better else "refused",
            len(wrong), len(after), false, claims,
        )  # fmt: skip
        if is_better:
            self.accepted += 1
            return after, claims
        self.refused += 1
        pools.tables, self.health.found = before
        return self.health.wrong(), false
