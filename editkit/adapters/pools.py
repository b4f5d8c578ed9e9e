"""Pools: weight changes of one matrix side by side, with the edits that live in each.

A change is kept at all inputs of the matrix or, where it was trained on a subset of them, at those
only. The product with all pools is a single one.

Legend: D layer output, F layer input, C kept inputs of a pool, P pools, M edits, B rows, R rows
with a pool each, T tokens, S rows of a sketch, M of them main directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from editkit.adapters.base import fit_to
from editkit.functional.routing import sketch

PER_POOL = ("columns_PC", "floor_P", "typical_P", "outer_P", "open_P", "name_P", "sketch_PSC")
RANDOM = 64  # random rows of a sketch
WIDER = 2.05  # a norm comes out shorter by this factor once in 1e10 times: chi^2(64) < 64 / 2.05^2


class Pools(nn.Module):
    """Weight changes, none at first, fp32.

    Args:
        shape_oi: Width of the matrix' output and input.
        width: Inputs that a change keeps; all of them keeps every change whole.
        directions: Main directions in which each change is kept a second time, to bound scores;
            0 keeps none.
        device: Where to keep them.
    """

    deltas: nn.Parameter
    columns_PC: Tensor
    floor_P: Tensor
    outer_P: Tensor
    typical_P: Tensor
    open_P: Tensor
    name_P: Tensor
    named: Tensor
    edit_M: Tensor
    home_M: Tensor
    sketch_PSC: Tensor
    draw_SD: Tensor

    def __init__(
        self, shape_oi: tuple[int, int], width: int, directions: int, device: torch.device
    ) -> None:
        super().__init__()
        out, self.inputs = shape_oi
        self.directions = min(directions, out, width)
        self.is_whole = width == self.inputs
        blank = torch.zeros(0, device=device, dtype=torch.float32)
        index = torch.zeros(0, device=device, dtype=torch.long)
        self.deltas = nn.Parameter(blank.new_zeros(0, out, width))
        self.register_buffer("columns_PC", index.new_zeros(0, width))
        self.register_buffer("floor_P", blank.clone())  # smallest score among a pool's own edits
        self.register_buffer("typical_P", blank.clone())  # their mean, or what else divides scores
        self.register_buffer("outer_P", blank.clone())  # largest score known of other edits
        self.register_buffer("open_P", blank.bool())
        self.register_buffer("name_P", index.clone())  # a pool's number, never given again
        self.register_buffer("named", torch.zeros((), device=device, dtype=torch.long))
        self.register_buffer("edit_M", index.clone())
        self.register_buffer("home_M", index.clone())
        rows = self.directions + RANDOM if self.directions else 0
        seeded = torch.Generator().manual_seed(0)
        draw_SD = torch.randn(rows, out, generator=seeded, dtype=torch.float32)
        self.register_buffer("draw_SD", draw_SD.to(device), persistent=False)
        self.register_buffer("sketch_PSC", blank.new_zeros(0, rows, width), persistent=False)

    def __len__(self) -> int:
        return len(self.deltas)

    @property
    def width(self) -> int:
        """Inputs C that each change has room for."""
        return self.deltas.shape[2]

    @property
    def tables(self) -> dict[str, Tensor]:
        """All there is to the pools, as it is now; setting it goes back, but for used names."""
        own = {name: b.clone() for name, b in self.named_buffers() if name != "sketch_PSC"}
        return {**own, "deltas": self.deltas.data, "sketch_PSC": self.sketch_PSC}

    @tables.setter
    def tables(self, tables: dict[str, Tensor]) -> None:
        self.deltas.data, self.sketch_PSC = tables["deltas"], tables["sketch_PSC"]
        for name in tables.keys() - {"deltas", "sketch_PSC", "named"}:
            setattr(self, name, tables[name].clone())

    # products

    def stacked(self, x_BTF: Tensor, pools: list[int] | None = None) -> Tensor:
        """Return what all pools (or some) add to the output, fp32 [B, T, P, D].

        Some take a product each: a single one would first copy their weights.
        """
        if pools is None:
            return self._product(x_BTF, self.deltas.detach(), self.columns_PC)
        return torch.stack([self._alone(x_BTF.float(), pool) for pool in pools], dim=2)

    def bounds(self, x_BTF: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is at most, and what is at least, as long as what all pools add, fp32.

        [B, T, P, M] and [B, T, P, S]. The former holds always. The latter is too short for one in
        1e10 inputs, whatever they and the changes are: its random rows depend on neither.
        """
        sketched_BTPS = self._product(x_BTF, self.sketch_PSC, self.columns_PC)
        return sketched_BTPS[..., : self.directions], sketched_BTPS

    def _product(self, x_BTF: Tensor, matrices_PxC: Tensor, columns_PC: Tensor) -> Tensor:
        pools, many, _ = matrices_PxC.shape
        if self.is_whole:
            flat_BTN = F.linear(x_BTF.float(), matrices_PxC.flatten(0, 1))
            return flat_BTN.view(*x_BTF.shape[:2], pools, many)
        x_PNC = x_BTF.flatten(0, 1).float()[:, columns_PC].transpose(0, 1)
        change_PNx = x_PNC @ matrices_PxC.transpose(1, 2)
        return change_PNx.transpose(0, 1).reshape(*x_BTF.shape[:2], pools, many)

    def grouped(self, x_RTF: Tensor, groups: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Return what each row's own pool adds to the output, fp32 [R, T, D].

        One product for each pool: a single one of them all would first copy their weights.

        Args:
            x_RTF: The layer's input.
            groups: Each pool with its rows, as `groups_of` finds them.
        """
        change_RTD = x_RTF.new_empty(*x_RTF.shape[:2], self.deltas.shape[1], dtype=torch.float32)
        for pool, rows in groups:
            change_RTD[rows] = self._alone(x_RTF[rows].float(), pool)
        return change_RTD

    def _alone(self, x_RTF: Tensor, pool: int) -> Tensor:
        """Return what one pool adds to the output."""
        x_RTC = x_RTF if self.is_whole else x_RTF[..., self.columns_PC[pool]]
        return F.linear(x_RTC, self.deltas.detach()[pool])

    # writing

    def write(self, pool: int, delta_DC: Tensor) -> float:
        """Set a pool's change; return how far it moved (Frobenius)."""
        before_DC = self.deltas.data[pool, :, : delta_DC.shape[1]]
        moved = float((delta_DC - before_DC).norm())
        before_DC.copy_(delta_DC)
        self.sketch_PSC[pool] = self._sketched(pool)
        return moved

    def append(self, delta_DC: Tensor, columns_C: Tensor | None) -> int:
        """Add a pool that is open and never fires; return its index."""
        width = delta_DC.shape[1]
        if columns_C is None:
            columns_C = torch.arange(width, device=delta_DC.device)
        self.deltas.data = _appended(self.deltas.data, delta_DC)
        self.columns_PC = _appended(self.columns_PC, columns_C)
        self.floor_P = F.pad(self.floor_P, (0, 1), value=torch.inf)
        self.typical_P = F.pad(self.typical_P, (0, 1), value=torch.inf)
        self.outer_P = F.pad(self.outer_P, (0, 1))
        self.open_P = torch.cat([self.open_P, torch.ones_like(self.floor_P[:1]).bool()])
        self.name_P = torch.cat([self.name_P, self.named[None]])
        self.named = self.named + 1
        self.sketch_PSC = _appended(self.sketch_PSC, self._sketched(len(self) - 1))
        return len(self) - 1

    def dense(self, pools: list[int]) -> Tensor:
        """Return the changes of some pools at all inputs, fp32 [len(pools), D, F]."""
        return self.spread(self.deltas.detach()[pools], self.columns_PC[pools])

    def spread(self, deltas_PDC: Tensor, columns_PC: Tensor) -> Tensor:
        """Return changes of some inputs, of pools or not, at all inputs [P, D, F]."""
        if self.is_whole:
            return deltas_PDC
        blank = deltas_PDC.new_zeros(*deltas_PDC.shape[:2], self.inputs)
        return blank.scatter_add(2, columns_PC[:, None].expand_as(deltas_PDC), deltas_PDC)

    def drop(self, pools: list[int]) -> None:
        """Forget some pools and the edits that live in them."""
        if not pools:
            return
        gone_P = torch.zeros(len(self), dtype=torch.bool, device=self.floor_P.device)
        gone_P[pools] = True
        kept_P, stays_M = ~gone_P, ~gone_P[self.home_M]
        self.deltas.data = self.deltas.data[kept_P]
        for name in PER_POOL:
            setattr(self, name, getattr(self, name)[kept_P])
        index_P = kept_P.cumsum(0) - 1
        self.edit_M, self.home_M = self.edit_M[stays_M], index_P[self.home_M[stays_M]]

    # members

    def house(self, edit_ids: list[int], pool: int) -> None:
        """Let edits live in a pool; those that lived in another leave it."""
        added_M = self.edit_M.new_tensor(edit_ids)
        self.evict(edit_ids)
        self.edit_M = torch.cat([self.edit_M, added_M])
        self.home_M = torch.cat([self.home_M, torch.full_like(added_M, pool)])

    def evict(self, edit_ids: list[int]) -> None:
        """Let edits live nowhere."""
        stays_M = ~torch.isin(self.edit_M, self.edit_M.new_tensor(edit_ids))
        self.edit_M, self.home_M = self.edit_M[stays_M], self.home_M[stays_M]

    def members(self, pool: int) -> list[int]:
        """Return the ids of the edits that live in a pool, in the order they came."""
        found: list[int] = self.edit_M[self.home_M == pool].tolist()
        return found

    @property
    def homes(self) -> dict[int, int]:
        """Pool of each edit."""
        return dict(zip(self.edit_M.tolist(), self.home_M.tolist(), strict=True))

    def _sketched(self, pool: int) -> Tensor:
        """Return the sketch of a pool's change, fp32 [S, C]; without `directions` S is 0."""
        delta_DC, many = self.deltas.detach()[pool], self.directions
        if many == 0:
            return delta_DC[:0]
        with torch.autocast(delta_DC.device.type, enabled=False):
            return sketch(delta_DC, self.draw_SD[:many], self.draw_SD[many:], WIDER)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept pools that have come and gone since."""
        fit_to(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.sketch_PSC = self.sketch_PSC.new_empty(len(self), len(self.draw_SD), self.width)
        for pool in range(len(self)):
            self.sketch_PSC[pool] = self._sketched(pool)


def _appended(table_PxC: Tensor, row_xC: Tensor) -> Tensor:
    """Return a table with one more row; the narrower of the two is padded with zeros."""
    more = row_xC.shape[-1] - table_PxC.shape[-1]
    if more > 0:  # only then: padding copies all there is
        table_PxC = F.pad(table_PxC, (0, more))
    return torch.cat([table_PxC, F.pad(row_xC, (0, max(0, -more)))[None]])
