"""WISE: edits train masked shards of a side memory, merge, and claim prompts by how far they move.

Source: Wang, Li, Zhang, Xu, Yao, Jiang, Xie, Huang, Chen, "WISE: Rethinking the Knowledge Memory
for Lifelong Model Editing of Large Language Models", NeurIPS 2024 (arXiv 2405.14768); released
code: zjunlp/EasyEdit at 6906666 (easyeditor/models/wise).

Equations: y_t = (W + D_p) a_t at one down-projection, D_p a pool of the side memory, for prompts
that p claims; W a_t for all others, bit for bit. The score of a prompt in p is the mean over its
tokens of |D_p a_t| (eq. 5); p claims what exceeds `act_ratio` times the smallest score among its
own edits. An edit minimises -1/|y| log p(y | c x), meaned over contexts c, plus margins between
the scores of its rows and of unrelated texts (eq. 6, `activation_margins`), by SGD on the entries
that the mask of its shard leaves open. After `shards.save` edits a shard is closed, after
`shards.merge` edits the closed ones are merged by TIES (`functional/merge.py`). WISE-Retrieve
keeps every merged memory; WISE-Merge (`shards.retrieve: false`) merges the shards, weight 0.4,
with what was merged before, weight 0.6.

Deviations:
    - Routing reads prompt tokens only, is decided once at prefill and held while decoding, for
      each row by itself. The release scores answers and padding too, decides anew at every token
      and takes one row at a time (`routing.over: all` scores as it does).
    - The score is the paper's. The release passes the outputs through the model's nonlinearity
      first (`routing.score: wise`), on whose scale the published margins 2/20/10 were tuned.
      `margins.relative` gives margins in units of the layer's own output.
    - A pool's smallest score is found again, on bare prompts, after a shard is closed or merged;
      the release keeps what it measured in training, before merging. In an open shard it is the
      smallest of those seen right after each edit.
    - Of several pools the one with the largest multiple of its threshold answers; the release
      takes the largest score (`routing.pick: released`), which favours pools of large norm.
    - Weight decay is 0; the release decays all of W' by 1e-5 at each step, masked or not, which
      fp16 rounds away there and which moves every prompt's score here.
    - Unrelated texts are an edit's `negatives`, then texts of the corpus; several at a time.
    - In a batch of edits all are trained together, each until it is done.
    - WISE-Merge answers with closed shards until they are merged; a last merge is made by
      `finish`, in the release by the first call for inference. Replay, off in all published
      settings, and the masks of texts that contain the subject are left out.
    - `compat` trains as released: left padding, the unrelated text among the rows, one token too
      many in each row's mean, its stopping rule, all of W' under `fitting.weight_decay`, thresholds
      from training. Its scores, margins and picks are settings of their own, which
      experiments/method/wise_released.yaml has all together.

Undo is exact where an edit has a pool to itself; otherwise it shares weights and is refused.

Costs: one D x F matrix in fp32 for each pool (Llama-3-8B: 235 MB), with `mask: columns` the share
of inputs that the shards of a merged pool draw between them, and `routing.sketch` + 64 rows beside
its D. Blocks below the site run once for each edit. Among many pools a prompt is compared with
those rows first, and with the few pools whole that it may belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from editkit.edits import Edit
from editkit.lm.rows import SiteRows
from editkit.methods.shard_training import Fit, Lesson
from editkit.methods.shards import Mask, merged
from editkit.methods.side import SideEdit
from editkit.methods.wordings import as_asked

OLD, NEW = 0.6, 0.4  # weights of what was merged before and of the shards in WISE-Merge


class WISE(SideEdit):
    """Writes edits into masked shards of a side memory, which are merged."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mask_seed = 0  # of the open shard
        self.in_shard = 0  # edits written to it
        self.unmerged = 0  # closed shards, the last pools but the open one
        self._mask: tuple[int, Mask] | None = None

    def edit(self, edits: list[Edit]) -> dict[str, float]:
        """Descend on the open shard; close and merge shards when it is time."""
        self.check_made()
        pool = self._open_pool()
        if pool is None:
            self.mask_seed = self.draw_seed()
        if self._mask is None or self._mask[0] != self.mask_seed:
            self._mask = self.mask_seed, self.draw_mask(self.mask_seed)
        mask = self._mask[1]
        fit = self.fit_shard(edits, mask, pool)
        pool = self.memory.write(pool, fit.delta_DC, mask.columns_C)
        self.enrol(edits, pool)
        self._lower_floor(pool, edits, fit)
        numbers = {
            "steps": float(fit.steps),
            "loss": float(fit.losses_E.mean()),
            "inside": float(fit.inside_E.mean()),
            "outside": float(fit.outside_E.mean()),
        }
        self.in_shard += len(as_asked(edits))
        if self.in_shard >= self.shards.save:
            self._close(pool)
            if self.unmerged * self.shards.save >= self.shards.merge:
                self._merge()
            numbers["false_activations"] = self.false_activations()
        return {**numbers, "pools": float(len(self.memory.pools))}

    def finish(self) -> None:
        """Merge what WISE-Merge has not merged yet; WISE-Retrieve is done."""
        pool = self._open_pool()
        if self.shards.retrieve or len(self.memory.pools) < 2:
            return
        if pool is not None:
            self._close(pool)
        if self.unmerged:
            self._merge()

    def forget_pool(self, pool: int) -> None:
        """Drop a pool; a new shard is opened where it was the open one."""
        if pool == self._open_pool():
            self.in_shard = 0
        elif pool >= self._first_shard():
            self.unmerged -= 1
        super().forget_pool(pool)

    def rekey(self, edits: list[Edit]) -> None:
        """Find the scores of each pool's own edits again, which thresholds rest on."""
        self.made = {e.id: e for e in edits if e.id in self.memory.pools.homes}
        for pool in range(len(self.memory.pools)):
            self._measure(pool)

    def lesson(self, edits: list[Edit], beside: Sequence[int] = ()) -> Lesson:
        """Return the rows of edits and what they are held against, run to the site."""
        return self._released_lesson(edits) if self.compat else super().lesson(edits, beside)

    def stream_state(self) -> dict[str, Any]:
        """Return where the shards stand."""
        names = ("mask_seed", "in_shard", "unmerged")
        return {**super().stream_state(), "shards": {name: getattr(self, name) for name in names}}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        super().load_stream_state(state)
        for name, value in state["shards"].items():
            setattr(self, name, value)

    # private

    def _released_lesson(self, edits: list[Edit]) -> Lesson:
        """Return a lesson as released: all rows in one batch, padded on the left."""
        others: list[str] = []
        for edit in edits:
            given = list(edit.negatives)[: self.fitting.irrelevant]
            drawn = self._draw(self.fitting.irrelevant - len(given), edit)
            others += given + [self.unrelated[i] for i in drawn]
        fronts = ["", *(f"{context} " for context in self.contexts or [])]
        cut = [text.rpartition(" ") for text in others]
        if any(not head for head, _, _ in cut):
            raise ValueError(f"unrelated texts of one word among {others}; compat needs two")
        n = len(edits) * len(fronts)
        rows = SiteRows(
            self.lm,
            self.site,
            self.adds_up,
            [f + e.prompt for e in edits for f in fronts] + [head for head, _, _ in cut],
            [e.target for e in edits for _ in fronts] + [tail for _, _, tail in cut],
            self.append_eos,
            padding="left",
        )
        return Lesson(rows, len(edits), len(fronts), rows.inputs_BTF[n:], rows.tokens.prompt_BT[n:])

    def _open_pool(self) -> int | None:
        """Return the pool that is being written."""
        found = self.memory.pools.open_P.nonzero()[:, 0].tolist()
        return found[0] if found else None

    def _first_shard(self) -> int:
        """Return the first pool that is a shard."""
        open_pools = int(self._open_pool() is not None)
        return len(self.memory.pools) - self.unmerged - open_pools

    def _lower_floor(self, pool: int, edits: list[Edit], fit: Fit) -> None:
        """Let the pool's smallest score be that of the new edits where these are below it."""
        pools, own = self.memory.pools, [*as_asked(edits).values()]
        own_E = fit.inside_E[: len(own)] * self.unit
        if not self.compat:
            own_E = self.own_scores(own, pool)
        pools.floor_P[pool].clamp_(max=float(own_E.min()))
        pools.typical_P[pool] = (
            own_E.mean()
            if self.in_shard == 0
            else pools.typical_P[pool].lerp(own_E.mean(), len(own) / (self.in_shard + len(own)))
        )
        if self.compat and not self.shards.retrieve:  # as released: one smallest score for all
            pools.floor_P.fill_(float(pools.floor_P.min()))

    def _close(self, pool: int) -> None:
        """Close the open shard."""
        self.memory.pools.open_P[pool] = False
        self.unmerged, self.in_shard = self.unmerged + 1, 0
        self._measure(pool)

    def _merge(self) -> None:
        """Merge the closed shards, in WISE-Merge with what was merged before."""
        pools, keep = self.memory.pools, self.shards.keep
        first = self._first_shard()
        shards = list(range(first, first + self.unmerged))
        old = [] if self.shards.retrieve or first == 0 else [0]
        weights_S = torch.tensor([NEW / len(shards)] * len(shards) + [OLD]) if old else None
        changes = [(pools.deltas.detach()[p], pools.columns_PC[p]) for p in shards + old]
        delta_DC, columns_C = merged(pools, changes, weights_S, keep)
        members = [i for p in old + shards for i in pools.members(p)]
        floor, typical = pools.floor_P[shards + old].min(), pools.typical_P[shards + old].mean()
        new = self.memory.write(None, delta_DC, columns_C)
        pools.open_P[new], pools.floor_P[new], pools.typical_P[new] = False, floor, typical
        pools.house(members, new)
        self.memory.drop(shards + old)
        self.unmerged = 0
        self._measure(len(pools) - 1)

    def _measure(self, pool: int) -> None:
        """Find the smallest score of a pool's own edits again; the release does not."""
        members = self.memory.pools.members(pool)
        if members and not self.compat:
            edits = [self.made[i] for i in members]
            own_E = self.own_scores(edits, pool)
            self.memory.pools.floor_P[pool] = own_E.min()
            self.memory.pools.typical_P[pool] = own_E.mean()
