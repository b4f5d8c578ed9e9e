"""Health: which pool the router gives each edit, and whether it is answered right there.

What enters the site, and what its block makes of it, never changes for a prompt: both are kept for
each edit, from running it once by itself. A check then scores the edits in pools that are new
since the last one, and answers those only whose pool has changed.

Legend: E edits, P pools, B rows, T tokens, F layer input, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from editkit.adapters.pools import Pools
from editkit.adapters.routed import groups_of
from editkit.adapters.side import GAP, SideMemory
from editkit.edits import Edit
from editkit.functional.routing import TINY
from editkit.lm.editable import EditableLM
from editkit.lm.rows import SiteRows
from editkit.lm.sites import Site
from editkit.methods.shards import Loop

AT_ONCE = 256  # edits that are answered at a time
Found = tuple[Tensor, list[int], list[int], dict[int, tuple[int, bool]]]
NOTHING: Found = torch.zeros(0, 0, dtype=torch.float32), [], [], {}


@dataclass(frozen=True)
class _Kept:
    """One edit's row, run by itself."""

    head: list[int]
    tail: list[int]
    inputs_TF: Tensor
    hidden_TH: Tensor


def worst_pool(pools: Pools, wrong: list[int], tried: dict[int, int], loop: Loop) -> int | None:
    """Return the pool that is to be rebuilt: that with the largest share of failing edits (Alg. 4).

    Args:
        pools: All pools; those still open are not asked.
        wrong: Edits that fail.
        tried: How often a pool was tried, by its name.
        loop: From when a pool is rebuilt.
    """
    failing_M = torch.isin(pools.edit_M, pools.edit_M.new_tensor(wrong))
    total_P = pools.home_M.bincount(minlength=len(pools))
    rate_P = pools.home_M[failing_M].bincount(minlength=len(pools)) / total_P
    least = 0.0 if len(wrong) > loop.errors else loop.prune
    asked = [
        (rate, -p)
        for p, (rate, name) in enumerate(zip(rate_P.tolist(), pools.name_P.tolist(), strict=True))
        if rate > least and tried.get(name, 0) < loop.retries and not bool(pools.open_P[p])
    ]
    return -max(asked)[1] if asked else None


class Health:
    """Routes and answers of the edits in a side memory.

    Args:
        lm: Model that carries the memory.
        site: The memory's site.
        memory: The memory.
        tau: Share of its target's tokens that an edit must get right to count as right.
    """

    def __init__(self, lm: EditableLM, site: Site, memory: SideMemory, tau: float) -> None:
        self.lm, self.site, self.memory, self.tau = lm, site, memory, tau
        self.adds_up = False  # what `lm.rows.adds_up` finds
        self.kept: dict[int, _Kept] = {}
        self.score_EP = torch.zeros(0, 0, dtype=torch.float32)
        self.edits: list[int] = []  # rows of score_EP
        self.names: list[int] = []  # its columns
        self.answers: dict[int, tuple[int, bool]] = {}  # pool's name, and whether right

    @property
    def found(self) -> Found:
        """What is known of edits (rows) in pools (columns), on whose bits thresholds rest."""
        return self.score_EP, self.edits, self.names, dict(self.answers)

    @found.setter
    def found(self, found: Found) -> None:
        self.score_EP, self.edits, self.names, answers = found
        self.answers = dict(answers)

    def know(self, edits: dict[int, Edit]) -> None:
        """Keep the states of these edits and of no others."""
        self.kept = {i: k for i, k in self.kept.items() if i in edits}
        self.answers = {i: a for i, a in self.answers.items() if i in edits}
        for i, edit in edits.items():
            if i not in self.kept:
                self.kept[i] = self._run(edit)

    def prompts(
        self, without: set[int], first: list[int], many: int, generator: torch.Generator
    ) -> list[Tensor]:
        """Return what enters the site at the prompts of some edits and of others, drawn [T, F]."""
        near = [i for i in first if i in self.kept]
        far = [i for i in self.kept if i not in without and i not in near]
        order = torch.randperm(len(far), generator=generator).tolist()
        kept = [self.kept[i] for i in (near + [far[n] for n in order])[:many]]
        return [k.inputs_TF[: len(k.head)] for k in kept]

    def features(self, ids: list[int]) -> Tensor:
        """Return what the unedited block makes of each edit's last prompt token, [E, H]."""
        return torch.stack([self.kept[i].hidden_TH[len(self.kept[i].head) - 1] for i in ids])

    def routes(self) -> dict[int, int]:
        """Return the pool that each edit's prompt finds; -1 for none."""
        self._update()
        if not self.edits or not self.names:
            return dict.fromkeys(self.edits, -1)
        self._part()
        return dict(zip(self.edits, self.memory.choose(self.score_EP)[0].tolist(), strict=True))

    def wrong(self) -> list[int]:
        """Return the edits that are not answered right, in order."""
        routes = self.routes()
        names = {-1: -1, **dict(enumerate(self.memory.pools.name_P.tolist()))}
        asked = [
            i for i, p in routes.items() if self.answers.get(i, (-2, False))[0] != names[p]
        ]  # fmt: skip
        for start in range(0, len(asked), AT_ONCE):
            part = asked[start : start + AT_ONCE]
            right_B = self._hits(part, [routes[i] for i in part]) > self.tau
            for i, right in zip(part, right_B.tolist(), strict=True):
                self.answers[i] = names[routes[i]], right
        return [i for i in routes if not self.answers[i][1]]

    def own_scores(self, pool: int) -> Tensor:
        """Return the scores of the edits that live in a pool [E]."""
        self._update()
        row = {i: e for e, i in enumerate(self.edits)}
        return self.score_EP[[row[i] for i in self.memory.pools.members(pool)], pool]

    def place(self, pool: int) -> None:
        """Set what a pool's scores are divided by where several pools claim a prompt.

        It is the mean score of its own edits, unless that would give other pools' edits to it, or
        its own to others: then the nearest that does neither, its own edits first.
        """
        self.routes()  # scores and thresholds as they are now
        pools, threshold_P = self.memory.pools, self.memory.threshold_P
        homes = pools.homes
        home_E = torch.tensor([homes.get(i, -1) for i in self.edits], device=self.score_EP.device)
        share_EP = self.score_EP / pools.typical_P.clamp_min(TINY)
        claims_EP = share_EP.masked_fill(self.score_EP <= threshold_P, 0)
        score_E, own = self.score_EP[:, pool], home_E == pool
        theirs_E = share_EP.gather(1, home_E.clamp_min(0)[:, None])[:, 0]
        theirs_E = theirs_E.where(~own & (home_E >= 0) & (score_E > threshold_P[pool]), torch.inf)
        claims_EP[:, pool] = 0
        rivals_E = claims_EP.amax(1).where(own, 0).clamp_min(TINY)
        low = ((1 + GAP) * score_E / theirs_E.clamp_min(TINY)).max()
        high = (score_E / rivals_E / (1 + GAP)).where(own, torch.inf).min()
        pools.typical_P[pool] = pools.typical_P[pool].clamp_min(low).clamp_max(high)

    def rates(self) -> dict[str, float]:
        """Return how many edits find their own pool, another and none, and how many fail."""
        routes, homes = self.routes(), self.memory.pools.homes
        found = {
            "right_pool": sum(p == homes[i] for i, p in routes.items()),
            "wrong_pool": sum(p not in (-1, homes[i]) for i, p in routes.items()),
            "no_pool": sum(p == -1 for p in routes.values()),
            "failing": len(self.wrong()),
        }
        return {name: count / max(1, len(routes)) for name, count in found.items()}

    # private

    @torch.no_grad()
    def _run(self, edit: Edit) -> _Kept:
        rows = SiteRows(self.lm, self.site, self.adds_up, [edit.prompt], [edit.target])
        ids = rows.tokens.ids_BT[0].tolist()
        n = int(rows.tokens.prompt_BT.sum())
        return _Kept(ids[:n], ids[n:], rows.inputs_BTF[0], rows.hidden_BTH[0])

    def _rows(self, ids: list[int]) -> SiteRows:
        """Return rows of some edits, padded together."""
        kept = [self.kept[i] for i in ids]
        tokens = self.lm.policy.pad(
            [k.head for k in kept], [k.tail for k in kept], [-1] * len(kept)
        )
        states = (
            pad_sequence([k.inputs_TF for k in kept], batch_first=True),
            pad_sequence([k.hidden_TH for k in kept], batch_first=True),
        )
        return SiteRows.stored(self.lm, self.site, self.adds_up, tokens.to(self.lm.device), *states)

    @torch.no_grad()
    def _hits(self, ids: list[int], pools: list[int]) -> Tensor:
        """Return the share of right target tokens of edits answered by these pools [B]."""
        rows = self._rows(ids)
        slot_B = torch.tensor(pools, device=self.lm.device)
        shape = *rows.inputs_BTF.shape[:2], self.memory.shape_oi[0]
        added_BTD = rows.inputs_BTF.new_zeros(shape, dtype=torch.float32)
        answered = slot_B >= 0
        if bool(answered.any()):
            with torch.autocast(slot_B.device.type, enabled=False):
                groups = groups_of(slot_B[answered])
                found = self.memory.pools.grouped(rows.inputs_BTF[answered], groups)
            added_BTD[answered] = found
        return rows.hits(added_BTD)

    def _part(self) -> None:
        """Tell each pool the largest score of an edit that does not live there."""
        pools = self.memory.pools
        own_EP = torch.zeros_like(self.score_EP, dtype=torch.bool)
        row = {i: e for e, i in enumerate(self.edits)}
        own_EP[[row[i] for i in pools.edit_M.tolist()], pools.home_M] = True
        pools.outer_P = self.score_EP.masked_fill(own_EP, 0).amax(0)

    def _update(self) -> None:
        """Score new edits in all pools, and all edits in new pools."""
        names = self.memory.pools.name_P.tolist()
        row = {i: e for e, i in enumerate(self.edits)}
        known = [i for i in self.edits if i in self.kept]
        new = [i for i in self.kept if i not in row]
        place = {name: p for p, name in enumerate(self.names)}
        fresh = [p for p, name in enumerate(names) if name not in place]
        stays = [p for p, name in enumerate(names) if name in place]
        shape = len(known) + len(new), len(names)
        score_EP = torch.zeros(shape, device=self.lm.device, dtype=torch.float32)
        if known and stays:
            old = self.score_EP.to(self.lm.device)[[row[i] for i in known]][
                :, [place[names[p]] for p in stays]
            ]
            score_EP[: len(known), stays] = old
        if known and fresh:
            score_EP[: len(known), fresh] = self._scores(known, fresh)
        if new and names:
            score_EP[len(known) :] = self._scores(new)
        self.score_EP, self.edits, self.names = score_EP, known + new, names

    def _scores(self, ids: list[int], pools: list[int] | None = None) -> Tensor:
        """Score edits in pools or all, from those tokens of their prompts that scores look at."""
        if self.memory.routing.over != "last":
            rows = self._rows(ids)
            return self.memory.scores(rows.inputs_BTF, rows.tokens.prompt_BT, pools)
        last_EF = torch.stack([self.kept[i].inputs_TF[len(self.kept[i].head) - 1] for i in ids])
        ones_E1 = torch.ones(len(ids), 1, dtype=torch.bool, device=last_EF.device)
        return self.memory.scores(last_EF[:, None], ones_E1, pools)
