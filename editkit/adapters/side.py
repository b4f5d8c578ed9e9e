"""SideMemory: WISE's layer, y + (W'_p - W) x for the prompts that pool p claims.

A prompt's score in a pool is how far that pool moves the layer's output at the prompt's tokens. A
pool claims what exceeds a share of the smallest score among its own edits and, where scores of
other edits are known, those too. All pools are scored in one product; where they are many, that of
their sketches bounds the scores first, and only pools that may win are scored.

Legend: D layer output, P pools, B rows asked about, R rows that are answered, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from editkit.adapters.pools import Pools
from editkit.adapters.routed import Route, RoutedLayer
from editkit.functional.routing import (
    LONG,
    TINY,
    largest_norms,
    mean_norms,
    pick_relative,
    pick_released,
    pick_typical,
)

FEW = 8  # pools that are scored without bounds
SLACK = 0.01  # share of a bound that rounding may take, TF32's included
GAP = 0.05  # a threshold stays this share above other edits' scores, or below its own edits'
AT_ONCE = 1 << 24  # numbers that scoring holds at a time


@dataclass(frozen=True)
class SideRouting:
    """When a pool answers a prompt.

    Args:
        act_ratio: Share of the smallest score among a pool's own edits that a prompt must exceed.
        score: `raw`: mean norm of what the pool adds to the output, as published; `wise`: of what
            it adds behind the model's nonlinearity, as released.
        over: The `prompt`'s tokens, its `last` one alone, or, as released, `all` tokens of a row,
            answers and padding too, so that its route depends on both.
        pick: Of several pools the largest multiple of its threshold (`relative`), of its own edits'
            mean score (`typical`; REPAIR moves it so that edits find their pools), or at all, as
            `released`.
        sketch: Main directions of each change by which raw scores in many pools are bounded first,
            which spares those that cannot win; a prompt that no pool claims is told the nearest by
            its bound. 0 scores all.
    """

    act_ratio: float = 0.5
    score: Literal["raw", "wise"] = "raw"
    over: Literal["prompt", "last", "all"] = "prompt"
    pick: Literal["relative", "typical", "released"] = "relative"
    sketch: int = 32

    def __post_init__(self) -> None:
        """Check user input."""
        for name, known in (
            ("score", ("raw", "wise")),
            ("over", ("prompt", "last", "all")),
            ("pick", ("relative", "typical", "released")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"routing.{name} is {getattr(self, name)!r}; use one of {known}")
        if self.act_ratio <= 0 or self.sketch < 0:
            raise ValueError(
                f"routing.act_ratio is {self.act_ratio}, sketch {self.sketch}; use > 0 and >= 0"
            )


class SideMemory(RoutedLayer):
    """Pools of weight changes beside the base's own weight.

    Args:
        base_layer: The linear layer to wrap.
        width: Inputs that a pool keeps; the layer's own number keeps all.
        routing: When a pool answers.
        act: The model's nonlinearity.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        width: int,
        routing: SideRouting,
        act: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(base_layer)
        self.routing = routing
        self.act = act
        is_bounded = routing.score == "raw" and routing.pick != "released"
        directions = routing.sketch if is_bounded else 0
        self.pools = Pools(self.shape_oi, width, directions, self.device)

    @property
    def threshold_P(self) -> Tensor:
        """Score that a prompt must exceed in each pool: above other edits, below its own."""
        pools = self.pools
        between_P = torch.minimum((1 + GAP) * pools.outer_P, (1 - GAP) * pools.floor_P)
        return torch.maximum(self.routing.act_ratio * pools.floor_P, between_P)

    def score(self, x_BTF: Tensor, change_BTD: Tensor, prompt_BT: Tensor) -> Tensor:
        """Return the scores of changes of the output, fp32: [B], or [B, P] of [B, T, P, D].

        Gradients reach the changes.
        """
        counted_BT = torch.ones_like(prompt_BT) if self.routing.over == "all" else prompt_BT
        if self.routing.over == "last":
            counted_BT = _last(prompt_BT)
        return mean_norms(self._seen(x_BTF, change_BTD), counted_BT)

    @torch.no_grad()
    def scores(self, x_BTF: Tensor, prompt_BT: Tensor, pools: list[int] | None = None) -> Tensor:
        """Return the exact scores of rows in all pools or in some, fp32 [B, P]."""
        many = len(self.pools) if pools is None else len(pools)
        x_BTF, prompt_BT = self._read(x_BTF, prompt_BT)
        with torch.autocast(x_BTF.device.type, enabled=False):
            return torch.cat([
                self.score(x, self.pools.stacked(x, pools), prompt)
                for x, prompt in _chunks(x_BTF, prompt_BT, many * self.shape_oi[0])
            ])  # fmt: skip

    @torch.no_grad()
    def route(self, x_BTF: Tensor, prompt_BT: Tensor) -> Route:
        """Let each row's best pool answer it, where that is good enough."""
        if len(self.pools) == 0:
            none_B = torch.full((len(x_BTF),), -1, device=x_BTF.device)
            return Route.of(none_B, torch.zeros_like(none_B, dtype=torch.float32))
        with torch.autocast(x_BTF.device.type, enabled=False):
            return Route.of(*self._pick(*self._read(x_BTF, prompt_BT)))

    def recall(self, x_RTF: Tensor, route: Route) -> Tensor:
        """Return what the pools add to their rows' outputs, fp32 [R, T, D]."""
        with torch.autocast(x_RTF.device.type, enabled=False):
            return self.pools.grouped(x_RTF, route.groups)

    def choose(self, score_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pool of each row, or -1, and the multiple of its threshold."""
        pools, threshold_P = self.pools, self.threshold_P
        if self.routing.pick == "released":
            return pick_released(score_BP, threshold_P, pools.open_P)
        if self.routing.pick == "typical":
            return pick_typical(score_BP, threshold_P, pools.typical_P)
        return pick_relative(score_BP, threshold_P)

    def _pick(self, x_BTF: Tensor, prompt_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pool of each row, or -1, and the multiple of its threshold."""
        if self.routing.over == "all" and x_BTF.shape[1] > LONG:
            return self.choose(self._longest(x_BTF))
        many = len(self.pools)
        if self.pools.directions == 0 or many <= FEW:
            return self.choose(self.scores(x_BTF, prompt_BT))
        least_BP, may_win_BP = self._contenders(x_BTF, prompt_BT)
        pools, score_BP = may_win_BP.any(0).nonzero()[:, 0].tolist(), least_BP.clone()
        if 2 * len(pools) > many:  # one product is faster then
            score_BP = self.scores(x_BTF, prompt_BT)
        elif pools:
            score_BP[:, pools] = self.scores(x_BTF, prompt_BT, pools)
        return self.choose(score_BP.where(may_win_BP, least_BP))

    def _read(self, x_BTF: Tensor, prompt_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens that a score may look at: one a row where that is the last."""
        if self.routing.over != "last" or x_BTF.shape[1] == 1:
            return x_BTF, prompt_BT
        rows_B = torch.arange(len(x_BTF), device=x_BTF.device)
        last_B = _last(prompt_BT).int().argmax(1)
        return x_BTF[rows_B, last_B][:, None], torch.ones_like(prompt_BT[:, :1])

    def _contenders(self, x_BTF: Tensor, prompt_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return lower bounds of all scores, and which pools may be picked, both [B, P]."""
        found = []
        for x, prompt in _chunks(x_BTF, prompt_BT, self.pools.sketch_PSC[..., 0].numel()):
            found.append([self.score(x, part, prompt) for part in self.pools.bounds(x)])
        least_BP = (1 - SLACK) * torch.cat([least for least, _ in found])
        most_BP = (1 + SLACK) * torch.cat([most for _, most in found])
        threshold_P = self.threshold_P.clamp_min(TINY)
        is_typical = self.routing.pick == "typical"
        unit_P = self.pools.typical_P.clamp_min(TINY) if is_typical else threshold_P
        sure_BP = (least_BP / unit_P).masked_fill(least_BP <= threshold_P, 0)  # pass in any case
        may_win_BP = most_BP / unit_P >= sure_BP.amax(1, keepdim=True)
        return least_BP, may_win_BP & (most_BP > threshold_P)

    def _seen(self, x_BTF: Tensor, change_BTD: Tensor) -> Tensor:
        """Return a change of the output as the score sees it."""
        if self.routing.score == "raw":
            return change_BTD
        y_BTD = F.linear(x_BTF.float(), self.weight_oi.float())
        y_BTD = y_BTD if change_BTD.ndim == 3 else y_BTD[:, :, None]
        return self.act(y_BTD + change_BTD) - self.act(y_BTD)

    def _longest(self, x_BTF: Tensor) -> Tensor:
        """Return the largest norms over all tokens [B, P], as released for long texts."""
        seen_BTPD = self._seen(x_BTF, self.pools.stacked(x_BTF))
        return largest_norms(seen_BTPD, torch.ones_like(x_BTF[..., 0], dtype=torch.bool))

    # writing

    @torch.no_grad()
    def write(self, pool: int | None, delta_DC: Tensor, columns_C: Tensor | None = None) -> int:
        """Set a pool's change, or add a pool that is open and never fires.

        Args:
            pool: Pool to set; None adds one.
            delta_DC: The change at the kept inputs, fp32.
            columns_C: The kept inputs of a new pool; None keeps all.

        Returns:
            Index of the pool.

        Raises:
            ValueError: If a value is not finite; nothing is written then.
        """
        if not bool(delta_DC.isfinite().all()):
            raise ValueError("refusing to write values that are not finite: lower lr")
        if pool is None:
            self.note_change(float(delta_DC.norm()))
            return self.pools.append(delta_DC, columns_C)
        self.note_change(self.pools.write(pool, delta_DC))
        return pool

    @torch.no_grad()
    def drop(self, pools: list[int]) -> None:
        """Forget some pools; without any, the layer is the base's own again."""
        self.pools.drop(pools)
        self.writes += 1
        self.is_written = len(self.pools) > 0

    def drop_empty(self) -> None:
        """Forget the pools in which no edit lives."""
        lived = set(self.pools.home_M.tolist())
        self.drop([pool for pool in range(len(self.pools)) if pool not in lived])


def _last(prompt_BT: Tensor) -> Tensor:
    """Mark the last token of each prompt."""
    return prompt_BT & (prompt_BT.flip(1).cumsum(1).flip(1) == 1)


def _chunks(x_BTF: Tensor, prompt_BT: Tensor, numbers: int) -> list[tuple[Tensor, Tensor]]:
    """Split rows so that `numbers` a token stay within what scoring may hold."""
    size = max(1, AT_ONCE // max(1, numbers * x_BTF.shape[1]))
    return list(zip(x_BTF.split(size), prompt_BT.split(size), strict=True))
