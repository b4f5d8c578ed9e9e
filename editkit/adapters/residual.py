"""ResidualMemory: MEMOIR's layer, y + W_m (m ⊙ x) for the prompts that match a stored mask m.

A prompt's fingerprint is the mean of the layer's input over its tokens, centred; its mask marks
the k largest magnitudes. The best of the stored masks decides whether a prompt is answered at all,
and the *stored* mask then says which columns of W_m answer. A fixed permutation stands between
mask bits and columns. Nothing upstream depends on W_m, so the mask of a prompt never changes.

Legend: D layer output, F layer input, B rows, R rows that are answered, T tokens, W 64-bit words
of a mask, C columns, N held-out prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from editkit.adapters.columns import Columns
from editkit.adapters.keys import MaskKeys, Routing, Tables
from editkit.adapters.routed import Route, RoutedLayer
from editkit.adapters.shield import Shield
from editkit.functional.masks import (
    best_match,
    chance_threshold,
    hashed,
    largest,
    pack,
    quantile_threshold,
    scattered,
    unpack,
)

HASHED = 64  # largest magnitudes that an ablation's hash is made of: rounding hardly moves them
SLACK = 0.01  # overlaps are compared in whole ones, so that rounding of tau * k moves nothing


@dataclass(frozen=True, slots=True)
class _Before:
    """What the newest change replaced."""

    tables: Tables
    gram_FF: Tensor
    columns_C: Tensor
    values_DC: Tensor
    was_written: bool


class ResidualMemory(RoutedLayer):
    """A matrix W_m beside the base's own, zero until written, fp32 in every precision.

    Args:
        base_layer: The linear layer to wrap.
        k: Ones of a mask.
        routing: How prompts are matched.
        generator: Draws the permutation, and random masks.

    Raises:
        ValueError: If a mask of k ones does not fit the layer's input.
    """

    memory: nn.Parameter
    permutation_F: Tensor
    mean_F: Tensor
    quiet_NW: Tensor
    tau: Tensor

    def __init__(
        self, base_layer: nn.Module, k: int, routing: Routing, generator: torch.Generator
    ) -> None:
        super().__init__(base_layer)
        width, device = self.shape_oi[1], self.device
        if not 1 <= k <= width:
            raise ValueError(f"k is {k}; a mask over {width} inputs has 1 to {width} ones")
        self.k = k
        self.routing = routing
        self.generator = generator
        order_F = torch.randperm(width, generator=generator)
        words = pack(order_F[None] < 0).shape[1]
        start = chance_threshold(k, width) if routing.tau is None else routing.tau
        self.keys = MaskKeys(words, device)
        self.shield = Shield(device)
        self.memory = nn.Parameter(torch.zeros(self.shape_oi, device=device, dtype=torch.float32))
        self.register_buffer("permutation_F", order_F.to(device))
        self.register_buffer("mean_F", torch.zeros(width, device=device, dtype=torch.float32))
        self.register_buffer("quiet_NW", self.keys.bits_KW.clone())
        self.register_buffer("tau", torch.tensor(start, device=device, dtype=torch.float32))
        self._shared_N: Tensor | None = None  # ones each held-out prompt shares with its best key
        self._copy: Tensor | None = None
        self.before: _Before | None = None

    # from prompts to routes

    def fingerprint(self, x_BTF: Tensor, prompt_BT: Tensor) -> Tensor:
        """Return each row's fingerprint before centring, fp32 [B, F]."""
        x_BTF = x_BTF.float()
        if self.routing.fingerprint == "last":
            place_T = torch.arange(1, x_BTF.shape[1] + 1, device=x_BTF.device)
            last_B = (prompt_BT * place_T).argmax(1)
            return x_BTF[torch.arange(len(x_BTF), device=x_BTF.device), last_B]
        in_prompt_BTF = x_BTF.masked_fill(~prompt_BT[..., None], 0)
        return in_prompt_BTF.sum(1) / prompt_BT.sum(1, keepdim=True)

    def masks(self, x_BTF: Tensor, prompt_BT: Tensor) -> Tensor:
        """Return each row's mask as routing compares it, packed [B, W]."""
        centred_BF = self.fingerprint(x_BTF, prompt_BT) - self.mean_F
        if self.routing.mask == "random":
            rows, width = centred_BF.shape
            mask_BF = scattered(rows, width, self.k, self.generator).to(centred_BF.device)
        elif self.routing.mask == "hash":
            mask_BF = hashed(largest(centred_BF, min(HASHED, self.k)), self.k)
        else:
            mask_BF = largest(centred_BF, self.k)
        return pack(mask_BF)

    @torch.no_grad()
    def route(self, x_BTF: Tensor, prompt_BT: Tensor) -> Route:
        """Match each row's mask with all keys, in one call."""
        if len(self.keys) == 0:
            none_B = torch.full((len(x_BTF),), -1, device=x_BTF.device)
            return Route.of(none_B, torch.zeros_like(none_B, dtype=torch.float32))
        return self.route_masks(self.masks(x_BTF, prompt_BT))

    def route_masks(self, query_BW: Tensor) -> Route:
        """Return the route of packed masks; there must be a key."""
        key_B, shared_B = self.keys.match(query_BW)
        match_B, slot_B = shared_B.float() / self.k, self.keys.slot_K[key_B]
        if self.routing.own_mask:
            return Route.of(slot_B, match_B, self.gates(query_BW))
        slot_B = slot_B.where(shared_B >= self.tau * self.k - SLACK, -1)
        route = Route.of(slot_B, match_B)
        if len(route.rows_R) == 0:
            return route
        gate_BF = self.gates(self.keys.bits_KW[slot_B.clamp_min(0)])
        return Route(slot_B, match_B, gate_BF, route.rows_R)

    def gates(self, bits_BW: Tensor) -> Tensor:
        """Return the columns that packed masks open, bool [B, F]; with π, bit j opens π(j)."""
        mask_BF = unpack(bits_BW, self.shape_oi[1])
        if self.routing.columns == "same":
            return mask_BF
        if self.routing.columns == "drawn":
            return hashed(mask_BF, self.k)
        index_BF = self.permutation_F.expand_as(mask_BF)
        return torch.zeros_like(mask_BF).scatter_(1, index_BF, mask_BF)

    def recall(self, x_RTF: Tensor, route: Route) -> Tensor:
        """Return W_m (m ⊙ x) [R, T, D] in the dtype of x."""
        assert route.gate_BF is not None, "answered rows have a gate"
        if self.is_live or self._copy is None or self._copy.dtype != x_RTF.dtype:
            self._copy = self.value("memory").to(x_RTF.dtype)
        return F.linear(x_RTF * route.gate_BF[:, None], self._copy)

    # writing

    def columns(self, mask_EW: Tensor, shield_E: Sequence[float] = ()) -> Columns:
        """Return a working copy of the columns that masks open, turned away as `Shield` does."""
        column_Ek = self.gates(mask_EW).nonzero()[:, 1].view(len(mask_EW), self.k)
        return Columns(self.memory.detach(), column_Ek, self.shield.turns(column_Ek, shield_E))

    @property
    def norm(self) -> float:
        """Frobenius norm of W_m."""
        return float(self.memory.detach().norm())

    @property
    def is_centred(self) -> bool:
        """Whether unrelated prompts have been looked at."""
        return bool(self.mean_F.any()) or len(self.quiet_NW) > 0

    @torch.no_grad()
    def write(self, columns_C: Tensor, values_DC: Tensor, shrink: float = 1.0) -> None:
        """Set some columns of W_m, after noting what the next `take_back` puts there again.

        Args:
            columns_C: Columns to set, each once.
            values_DC: Their new values, fp32.
            shrink: Factor on all other columns (weight decay, as released).

        Raises:
            ValueError: If a value is not finite; nothing is written then.
        """
        if not bool(values_DC.isfinite().all()):
            raise ValueError("refusing to write values that are not finite: lower lr")
        touched_C = columns_C if shrink == 1 else torch.arange(self.shape_oi[1]).to(columns_C)
        before_DC = self.memory[:, touched_C]
        self.before = _Before(
            self.keys.tables, self.shield.gram_FF, touched_C, before_DC, self.is_written
        )
        if shrink != 1:
            self.memory.mul_(shrink)
        self.memory[:, columns_C] = values_DC
        self.note_change(float((self.memory[:, touched_C] - before_DC).norm()))

    @torch.no_grad()
    def take_back(self) -> bool:
        """Undo the newest write and all keys since, bit for bit; False where that is not known."""
        if self.before is None:
            return False
        self.keys.tables = self.before.tables
        self.shield.gram_FF = self.before.gram_FF
        self.memory[:, self.before.columns_C] = self.before.values_DC
        self.is_written = self.before.was_written
        self.forget_history()
        return True

    def forget(self, edit_id: int) -> None:
        """Drop an edit's keys: its prompts are routed as if it had never been made."""
        self.keys.drop(edit_id)
        self.forget_history()

    def forget_history(self) -> None:
        """Note that keys went: nothing can be taken back, and tau is to be found from all keys."""
        self.before = self._shared_N = None
        self.changed()

    def calibrate(self, added_AW: Tensor | None = None) -> float:
        """Set tau by the held-out prompts and the present keys, unless it is given.

        Args:
            added_AW: Keys that are new since the last call; None looks at all keys.

        Returns:
            Share of the held-out prompts that the memory answers; nan where there are none.
        """
        if len(self.quiet_NW) == 0 or len(self.keys) == 0:
            return 0.0 if len(self.quiet_NW) else float("nan")
        known_N = None if added_AW is None else self._shared_N
        asked_AW = self.keys.bits_KW if known_N is None or added_AW is None else added_AW
        shared_N = best_match(self.quiet_NW, asked_AW)[1]
        if known_N is not None:
            shared_N = torch.maximum(shared_N, known_N)
        self._shared_N = shared_N
        if self.routing.tau is None:
            rate = self.routing.false_positives
            self.tau.fill_(quantile_threshold(shared_N, rate, self.k))
        return float((shared_N >= self.tau * self.k - SLACK).float().mean())

    def changed(self) -> None:
        """Drop the low-precision copy."""
        self._copy = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as usual; what was known of the former state goes."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.forget_history()
