"""Codebook: GRACE's layer, which puts a learned value in the place of its output near a key.

The key of a prompt is the layer's input at the prompt's last token. A prompt within the radius of
its nearest key is answered with that key's value, at the tokens that `replacement` names.

Legend: D layer output, F layer input, B rows, R rows that are answered, T tokens, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from editkit.adapters.routed import Route, RoutedLayer
from editkit.functional.codebook import Book, distances

Replacement = Literal["replace_last", "replace_prompt", "replace_all"]


@dataclass(frozen=True, slots=True)
class _Before:
    """What the newest change replaced."""

    book: Book
    values_KD: Tensor
    was_written: bool


class Codebook(RoutedLayer):
    """Keys, radii and values around a layer, all fp32 in every precision.

    Args:
        base_layer: The linear layer to wrap.
        replacement: Tokens of an answered row that take the value: the prompt's last, those before
            it, or all.
    """

    values: nn.Parameter
    key_KF: Tensor
    radius_K: Tensor
    label_K: Tensor
    edit_K: Tensor
    text_K: Tensor
    is_shaped_K: Tensor

    def __init__(self, base_layer: nn.Module, replacement: Replacement) -> None:
        super().__init__(base_layer)
        self.replacement = replacement
        (outputs, inputs), device = self.shape_oi, self.device
        none = torch.zeros(0, device=device)
        self.values = nn.Parameter(none.new_zeros(0, outputs, dtype=torch.float32))
        for name in Book._fields:
            dtype = {"key_KF": torch.float32, "radius_K": torch.float32, "is_shaped_K": torch.bool}
            table = none.to(dtype.get(name, torch.long))
            self.register_buffer(name, table.view(0, inputs) if name == "key_KF" else table)
        self._before: _Before | None = None

    @property
    def book(self) -> Book:
        """The tables as they are."""
        return Book(*(getattr(self, name) for name in Book._fields))

    def query(self, x_BTF: Tensor, prompt_BT: Tensor) -> Tensor:
        """Return the layer's input at each prompt's last token, fp32 [B, F]."""
        place_T = torch.arange(1, x_BTF.shape[1] + 1, device=x_BTF.device)
        last_B = (prompt_BT * place_T).argmax(1)
        return x_BTF[torch.arange(len(x_BTF), device=x_BTF.device), last_B].float()

    def places(self, prompt_BT: Tensor) -> Tensor:
        """Return the tokens that take the value in rows with these prompts, bool [B, T]."""
        if self.replacement == "replace_all":
            return torch.ones_like(prompt_BT)
        is_followed_BT = F.pad(prompt_BT[:, 1:], (0, 1))
        if self.replacement == "replace_last":
            return prompt_BT & ~is_followed_BT
        return prompt_BT & is_followed_BT

    def nearest(self, query_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distance of each query to its nearest key [B], and that key (int64 [B])."""
        found = distances(query_BF, self.key_KF).min(dim=1)
        return found.values, found.indices

    @torch.no_grad()
    def route(self, x_BTF: Tensor, prompt_BT: Tensor) -> Route:
        """Find each row's nearest key, in one call; a match is 1 / (1 + distance)."""
        if len(self.key_KF) == 0:
            none_B = torch.full((len(x_BTF),), -1, device=x_BTF.device)
            return Route.of(none_B, torch.zeros_like(none_B, dtype=torch.float32))
        distance_B, key_B = self.nearest(self.query(x_BTF, prompt_BT))
        return Route.of(key_B.where(distance_B <= self.radius_K[key_B], -1), 1 / (1 + distance_B))

    def recall(self, x_RTF: Tensor, route: Route) -> Tensor:
        """Return the slots' values [R, 1, D], which take the place of the base's output."""
        return self.values.detach()[route.slot_B][:, None]

    def edited(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y with the value at the tokens that take it, [B, T, D]."""
        held, prompt_BT = self.scope.routes.get(self), self.scope.prompt_BT
        route = self._current_route(x)
        is_decoding = route is held
        if len(route.rows_R) == 0 or (is_decoding and self.replacement != "replace_all"):
            return y
        here_BT = self.places(x.new_ones(x.shape[:2]).bool() if prompt_BT is None else prompt_BT)
        here_BT = here_BT & (route.slot_B >= 0)[:, None]
        return torch.where(here_BT[..., None], self.recall(x, route).to(y.dtype), y)

    # writing

    @torch.no_grad()
    def write(self, book: Book, values_KD: Tensor, former_K: Tensor) -> None:
        """Take a book and its values over, after noting what `take_back` puts there again.

        Args:
            book: The keys.
            values_KD: Their values, fp32.
            former_K: Where each key stood in the present book; beyond its end for new keys.

        Raises:
            ValueError: If a value is not finite; nothing is written then.
        """
        if not bool(values_KD.isfinite().all()):
            raise ValueError("refusing to write values that are not finite: lower lr")
        self._before = _Before(self.book, self.values.detach(), self.is_written)
        is_old_K = former_K < len(self.values)
        moved = [values_KD[is_old_K] - self.values[former_K[is_old_K]], values_KD[~is_old_K]]
        self._set(book, values_KD)
        self.note_change(float(torch.cat(moved).norm()))

    def take_back(self) -> bool:
        """Undo the newest write, bit for bit; False where that is not known."""
        if self._before is None:
            return False
        self._set(self._before.book, self._before.values_KD)
        self.is_written = self._before.was_written
        self._before = None
        return True

    def drop(self, edit_id: int) -> None:
        """Forget the key of an edit, with its value."""
        kept_K = self.edit_K != edit_id
        self._set(Book(*(table[kept_K] for table in self.book)), self.values.detach()[kept_K])
        self._before = None

    def move(self, keys: list[int], query_AF: Tensor) -> None:
        """Put keys elsewhere."""
        key_KF = self.key_KF.clone()
        key_KF[keys] = query_AF.to(key_KF)
        self.key_KF, self._before = key_KF, None

    def _set(self, book: Book, values_KD: Tensor) -> None:
        for name, table in zip(Book._fields, book, strict=True):
            setattr(self, name, table)
        self.values.data = values_KD

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as usual; what was known of the former state goes."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._before = None
