"""RoutedLayer: a memory that answers some prompts and leaves all others alone, bit for bit.

Which slot of the memory answers a row is decided once, from the tokens of its prompt, and held
while the row decodes. An answer that is forced on the model has no say in it, nor have padding
and batch-mates.

Where the Hugging Face model is called by itself, as by its own `generate`, nobody says which tokens
are prompt: what its attention mask counts is, in a pass of several tokens or of the first one of a
row (`tell_prompts`); a single token behind others continues the last prompt.

Legend: D layer output, F layer input, B rows, R rows that the memory answers, T tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from editkit.adapters.base import EditLayer, Scope


@dataclass(frozen=True)
class Route:
    """What a routed layer decided for the rows of a pass.

    What follows from it is found once a prompt, not at every token.

    Args:
        slot_B: Slot of the memory that answers each row, int64; -1 leaves the row to the base.
        match_B: How well that slot, or the best one that was not good enough, fits; fp32.
        gate_BF: Layer inputs that the memory reads in each row, bool; None reads all.
        rows_R: Rows that a slot answers, found from `slot_B`.
    """

    slot_B: Tensor
    match_B: Tensor
    gate_BF: Tensor | None
    rows_R: Tensor

    @classmethod
    def of(cls, slot_B: Tensor, match_B: Tensor, gate_BF: Tensor | None = None) -> Route:
        """Make a route, finding its rows once: on a GPU that is a sync which decoding spares."""
        return cls(slot_B, match_B, gate_BF, (slot_B >= 0).nonzero()[:, 0])

    @cached_property
    def answered(self) -> Route:
        """The route of the rows that a slot answers."""
        return self if len(self.rows_R) == len(self.slot_B) else self.at(self.rows_R)

    @cached_property
    def groups(self) -> list[tuple[int, Tensor]]:
        """Each slot with the rows that it answers (int64), where all rows have one."""
        return groups_of(self.slot_B)

    def at(self, rows: Tensor) -> Route:
        """Return the route of some rows (int64), in their order."""
        gate_BF = None if self.gate_BF is None else self.gate_BF[rows]
        return Route.of(self.slot_B[rows], self.match_B[rows], gate_BF)


def groups_of(slot_R: Tensor) -> list[tuple[int, Tensor]]:
    """Return each slot with the rows that have it (int64 [R], int64 each)."""
    slot_G, count_G = slot_R.unique(return_counts=True)
    rows_G = slot_R.argsort(stable=True).split(count_G.tolist())
    return list(zip(slot_G.tolist(), rows_G, strict=True))


def tell_prompts(model: nn.Module, scope: Scope) -> None:
    """Tell a scope what is prompt in those passes of a Hugging Face model that nobody else tells.

    Args:
        model: The model.
        scope: Scope of its layers.
    """
    told: Tensor | None = None

    def begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal told
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        if scope.prompt_BT is told:  # of a pass that was interrupted
            scope.prompt_BT = None
        if scope.prompt_BT is not None or given is None:
            return
        size, mask = given.shape[1], kwargs.get("attention_mask")
        if size > 1 or not _holds_tokens(kwargs.get("past_key_values")):
            counted_BT = given.new_ones(given.shape[:2])
            if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= size:
                counted_BT = mask[:, -size:]
            scope.prompt_BT = told = counted_BT.bool()

    def end(*given: Any) -> None:
        scope.prompt_BT = None

    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(end, always_call=True)


def _holds_tokens(cache: Any) -> bool:
    """Whether a cache has seen tokens; transformers 4 has tuples for some models."""
    return bool(cache if cache is None or isinstance(cache, tuple) else cache.get_seq_length())


class RoutedLayer(EditLayer):
    """An edit layer that answers row by row; rows without a slot keep the base's own bits.

    Args:
        base_layer: The linear layer to wrap.
    """

    @abstractmethod
    def route(self, x_BTF: Tensor, prompt_BT: Tensor) -> Route:
        """Decide each row's slot from the layer's input at its prompt tokens alone."""

    @abstractmethod
    def recall(self, x_RTF: Tensor, route: Route) -> Tensor:
        """Return what the slots add to the base's output [R, T, D]; every row has a slot."""

    def edited(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y with the rows that have a slot changed, [B, T, D]."""
        route = self._current_route(x)
        if len(route.rows_R) == 0:
            return y
        if len(route.rows_R) == len(x):
            return y + self.recall(x, route).to(y.dtype)
        added_RTD = self.recall(x[route.rows_R], route.answered)
        return y.index_add(0, route.rows_R, added_RTD.to(y.dtype))

    def _current_route(self, x: Tensor) -> Route:
        """Route a prompt; hold on to the last route while decoding."""
        if x.ndim != 3:
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)}; it routes rows of "
                "tokens and needs [rows, tokens, features]: choose another site"
            )
        prompt_BT = self.scope.prompt_BT
        if prompt_BT is None:
            held = self.scope.routes.get(self)
            if held is not None and x.shape[1] == 1 and len(held.slot_B) == len(x):
                return held
            prompt_BT = x.new_ones(x.shape[:2]).bool()
        route = self.route(x, prompt_BT)
        self.scope.routes[self] = route
        return route
