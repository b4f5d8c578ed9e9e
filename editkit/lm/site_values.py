"""Values that take the place of a site's output at some tokens of the rows they are trained on.

Legend: E values, B rows (the same number for each value), T tokens, D width of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from editkit.lm.rows import SiteRows


class SiteValues:
    """Loss of each value; a `RowLoss`.

    Args:
        rows: Rows of the values, value by value.
        layer: The site's own layer.
        here_BT: Tokens at which a row takes its value.
        each: Rows of a value.
        stop_below: Loss in nats per token at which a value is done.
    """

    def __init__(
        self, rows: SiteRows, layer: nn.Module, here_BT: Tensor, each: int, stop_below: float
    ) -> None:
        self.rows = rows
        with torch.no_grad():
            self.output_BTD: Tensor = layer(rows.inputs_BTF)
        self.here_BT = here_BT
        self.each = each
        self.stop_below = stop_below
        self.going_E = torch.arange(len(here_BT) // each, device=here_BT.device)
        self.last_E = torch.zeros_like(self.going_E, dtype=torch.float32)

    def __call__(self, value_ED: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean target NLL of each value's rows, and whether it is done."""
        value_B1D = value_ED.repeat_interleave(self.each, dim=0)[:, None]
        added_BTD = torch.where(self.here_BT[..., None], value_B1D - self.output_BTD, 0)
        loss_E = self.rows.losses(added_BTD).view(-1, self.each).mean(1)
        self.last_E[self.going_E] = loss_E.detach()
        return loss_E, loss_E.detach() <= self.stop_below

    def project(self, value_ED: Tensor) -> None:
        """Leave the values where they are."""

    def keep(self, values: list[int]) -> None:
        """Go on with these of the values."""
        at_E1 = torch.tensor(values, device=self.here_BT.device)[:, None]
        index_B = (at_E1 * self.each + torch.arange(self.each, device=at_E1.device)).flatten()
        self.going_E = self.going_E[at_E1[:, 0]]
        columns_T = self.rows.columns(index_B)
        self.rows = self.rows.at(index_B)
        self.output_BTD = self.output_BTD[index_B][:, columns_T]
        self.here_BT = self.here_BT[index_B][:, columns_T]
