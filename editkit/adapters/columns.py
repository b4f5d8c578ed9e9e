"""Columns of one matrix that several edits change at once.

Legend: E edits, k columns of an edit, C columns of any of them, D layer output, F layer input,
B rows (the same number for each edit), T tokens, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Columns:
    """A working copy of the columns that a batch of edits writes, with a leaf for each edit.

    An edit sees and moves its own k columns. After each step `merge` lets a column that several
    edits share take the sum of their changes.

    Args:
        matrix_DF: The matrix, which is left as it is.
        column_Ek: Columns of each edit, ascending.
        turns: What to multiply each edit's gradient by, [k, k] each; none leaves it as it is.
    """

    def __init__(self, matrix_DF: Tensor, column_Ek: Tensor, turns: Sequence[Tensor] = ()) -> None:
        self.column_Ek = column_Ek
        self.used_C = column_Ek.unique()
        self.values_DC = matrix_DF[:, self.used_C]
        self.place_Ek = torch.searchsorted(self.used_C, column_Ek)
        self.leaves = [self.values_DC[:, place_k].requires_grad_() for place_k in self.place_Ek]
        for leaf_Dk, turn_kk in zip(self.leaves, turns, strict=False):
            leaf_Dk.register_hook(lambda grad_Dk, turn_kk=turn_kk: grad_Dk @ turn_kk)

    def inputs(self, x_BTF: Tensor) -> list[Tensor]:
        """Return what each edit's columns see of its own rows, fp32 [B / E, T, k] each."""
        parts = x_BTF.chunk(len(self.column_Ek))
        return [x[..., column].float() for x, column in zip(parts, self.column_Ek, strict=True)]

    def read(self, x_BTF: Tensor, read_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the edits' columns see of their rows' tokens that count (bool [B, T]).

        Returns:
            The inputs, 0 in all other columns, fp32 [N, F], and the edit of each, int64 [N].
        """
        edits = len(self.column_Ek)
        edit_N = read_BT.nonzero()[:, 0] // (len(read_BT) // edits)
        open_EF = torch.zeros(edits, x_BTF.shape[2]).to(x_BTF.device, torch.float32)
        open_EF.scatter_(1, self.column_Ek, 1.0)
        return x_BTF[read_BT].float() * open_EF[edit_N], edit_N

    def products(self, inputs: list[Tensor]) -> Tensor:
        """Return what the columns add to the layer's output, fp32 [B, T, D], with gradients."""
        with torch.autocast(inputs[0].device.type, enabled=False):
            return torch.cat([x @ leaf.T for x, leaf in zip(inputs, self.leaves, strict=True)])

    @torch.no_grad()
    def merge(self) -> None:
        """Add up what the leaves have changed, and let them go on from there."""
        change_DC = torch.zeros_like(self.values_DC)
        for leaf_Dk, place_k in zip(self.leaves, self.place_Ek, strict=True):
            change_DC.index_add_(1, place_k, leaf_Dk - self.values_DC[:, place_k])
        self.values_DC += change_DC
        for leaf_Dk, place_k in zip(self.leaves, self.place_Ek, strict=True):
            leaf_Dk.copy_(self.values_DC[:, place_k])
