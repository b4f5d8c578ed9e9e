"""torchmetrics shells around the rows of `editkit.metrics.evaluate`.

One `EditScore` averages one scorer over one kind of row; `EditScores` is all of them at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from editkit.metrics.evaluate import ProbeRow
from editkit.metrics.intervals import Estimate, estimate
from editkit.metrics.protocol import HIT_SCORERS, LOWER_IS_BETTER, ROW_KINDS, SCORERS, Scorer

NO_EDIT = -1.0
GROUPS = 2**24 - 1  # names of groups are hashed into so many numbers, all exact in fp32


class EditScore(Metric):
    """Mean of one scorer over the counted rows of one kind, with an interval by edits.

    Rows of one edit and group count once under a scorer of 1 or 0, as the best of them.

    Args:
        kind: Kind of row, such as `reliability` or `locality_gold`.
        scorer: Name of the score to average.
        seed: Seed of the bootstrap.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If there is no such kind or scorer.
    """

    is_differentiable = False
    full_state_update = False
    values: list[Tensor]
    edit_ids: list[Tensor]
    groups: list[Tensor]

    def __init__(self, kind: str, scorer: Scorer, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if kind not in ROW_KINDS:
            raise ValueError(f"kind {kind!r} is not one of {', '.join(ROW_KINDS)}")
        if scorer not in SCORERS:
            raise ValueError(f"scorer {scorer!r} is not one of {', '.join(SCORERS)}")
        self.kind = kind
        self.scorer = scorer
        self.seed = seed
        # all of one dtype, which a rank without rows also sends; exact for ids below 2**24
        for name in ("values", "edit_ids", "groups"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Every score is better the higher, but negative log-likelihood and perplexity."""
        return self.scorer not in LOWER_IS_BETTER

    def update(self, rows: Iterable[ProbeRow]) -> None:
        """Take in the rows of this kind that count and were scored by this scorer."""
        mine = [
            row
            for row in rows
            if row["kind"] == self.kind and row["counted"] and self.scorer in row["scores"]
        ]
        if mine:
            ids = [NO_EDIT if row["edit_id"] is None else row["edit_id"] for row in mine]
            values = [row["scores"][self.scorer] for row in mine]
            is_hit = self.scorer in HIT_SCORERS
            groups = [_number_of(row.get("group") or "") if is_hit else 0 for row in mine]
            for state, numbers in (
                (self.values, values),
                (self.edit_ids, ids),
                (self.groups, groups),
            ):
                state.append(torch.tensor(numbers, dtype=torch.float32, device=self.device))

    def compute(self) -> Estimate:
        """Return value, low, high, n (rows) and edits (clusters)."""
        rows = zip(*map(_numbers, (self.values, self.edit_ids, self.groups)), strict=True)
        best: dict[tuple[float, ...], float] = {}
        for place, (value, edit_id, group) in enumerate(rows):
            name = (edit_id, group) if group else (edit_id, group, place)
            best[name] = max(value, best.get(name, value))
        ids = [None if name[0] == NO_EDIT else int(name[0]) for name in best]
        return estimate(list(best.values()), ids, self.seed)


class EditScores(nn.Module):
    """An `EditScore` for every kind of row and scorer.

    Args:
        scorers: What rows were scored by.
        kinds: Kinds of row to expect; the same on every rank.
        seed: Seed of the bootstrap.
        kwargs: Passed to `torchmetrics.Metric`.
    """

    def __init__(
        self,
        scorers: Sequence[Scorer] = SCORERS,
        kinds: Sequence[str] = ROW_KINDS,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.metrics = nn.ModuleList(
            EditScore(k, s, seed, **kwargs) for k in kinds for s in scorers
        )

    def __iter__(self) -> Iterator[EditScore]:
        return (metric for metric in self.metrics if isinstance(metric, EditScore))

    def update(self, rows: Sequence[ProbeRow]) -> None:
        """Take in rows of any kind."""
        for metric in self:
            metric.update(rows)

    def compute(self) -> dict[str, dict[str, Estimate]]:
        """Return estimates by kind and scorer, of the kinds that had rows; a collective call."""
        found: dict[str, dict[str, Estimate]] = {}
        for metric in self:
            if not metric.update_called:
                metric.update([])  # a rank without probes; torchmetrics would warn
            result = metric.compute()
            if result["n"]:
                found.setdefault(metric.kind, {})[metric.scorer] = result
        return found

    def reset(self) -> None:
        """Forget all rows."""
        for metric in self:
            metric.reset()


def _numbers(state: list[Tensor] | Tensor) -> list[float]:
    """Return a cat state as numbers, whether it was synced, or had no rows."""
    if isinstance(state, list) and not state:
        return []
    numbers: list[float] = dim_zero_cat(state).tolist()
    return numbers


def _number_of(group: str) -> int:
    """Return a number that stands for a group's name within its edit; 0 for none."""
    return zlib.crc32(group.encode()) % GROUPS + 1 if group else 0
