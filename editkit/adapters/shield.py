"""Shield: second moments of what earlier edits read, which new edits are turned away from.

Legend: N inputs, F layer input, E edits, k columns of an edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from editkit.adapters.base import fit_to
from editkit.functional.solve import turned_away


class Shield(nn.Module):
    """Holds an F x F matrix from the first edit it is told of; until then it holds nothing.

    Args:
        device: Where to keep it.
    """

    gram_FF: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("gram_FF", torch.zeros(0, 0, device=device, dtype=torch.float32))

    def add(self, key_NF: Tensor, edit_N: Tensor) -> None:
        """Add inputs as edits read them, those of an edit weighing 1 in all.

        The matrix is replaced and never written in place: an old one stays what it was.

        Args:
            key_NF: The inputs, fp32.
            edit_N: Whose they are, numbers from 0.
        """
        energy_N = key_NF.square().sum(1)
        energy_E = energy_N.new_zeros(len(energy_N)).index_add(0, edit_N, energy_N)
        key_NF = key_NF * energy_E[edit_N, None].clamp_min(1e-24).rsqrt()
        gram_FF = self.gram_FF if len(self.gram_FF) else key_NF.new_zeros(key_NF.shape[1:] * 2)
        self.gram_FF = torch.addmm(gram_FF, key_NF.T, key_NF)

    def turns(self, column_Ek: Tensor, weight_E: Sequence[float]) -> list[Tensor]:
        """Return for each edit what to multiply its gradient by, fp32 [k, k]; none if all are 1.

        Args:
            column_Ek: Columns of each edit.
            weight_E: Weight of an earlier edit against each edit.
        """
        if len(self.gram_FF) == 0 or not any(weight_E):
            return []
        return [
            turned_away(weight * self.gram_FF[column_k[:, None], column_k])
            for weight, column_k in zip(weight_E, column_Ek, strict=True)
        ]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept a matrix where there is none yet."""
        fit_to(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
