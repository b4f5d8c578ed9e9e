"""DeltaLayer: an additive, mergeable change of one weight matrix, kept in fp32.

Legend: D layer output, F layer input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from editkit.adapters.base import EditLayer


class DeltaLayer(EditLayer):
    """y + Δx with Δ in fp32 [D, F], zero until written.

    Adding into bf16 weights loses most of a small update; a separate fp32 Δ does not. In a
    bf16 model the product runs in bf16 on a copy that is remade when Δ changes.

    Args:
        base_layer: The linear layer to wrap.
    """

    delta: nn.Parameter

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        device = self.device
        self.delta = nn.Parameter(torch.zeros(self.shape_oi, device=device, dtype=torch.float32))
        self._copy: Tensor | None = None

    def edited(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + Δx, [..., D], in the dtype of y."""
        if self._scratch or self.is_live or x.dtype == self.delta.dtype:
            return y + F.linear(x, self.value("delta").to(x.dtype)).to(y.dtype)
        if self._copy is None or self._copy.dtype != x.dtype:
            self._copy = self.delta.detach().to(x.dtype)
        return y + F.linear(x, self._copy)

    def add(self, delta_DF: Tensor) -> None:
        """Commit a computed change at once.

        Raises:
            ValueError: If the shape is not [D, F] or a value is not finite.
        """
        self.stage(delta_DF)
        self.commit()

    @torch.no_grad()
    def stage(self, delta_DF: Tensor) -> None:
        """Add a computed change to the scratch, for `commit` to take over or `discard` to drop.

        Raises:
            ValueError: If the shape is not [D, F] or a value is not finite.
        """
        if delta_DF.shape != self.delta.shape:
            raise ValueError(
                f"a change of shape {tuple(delta_DF.shape)} does not fit a weight of "
                f"{tuple(self.delta.shape)}"
            )
        norm = float(delta_DF.norm())
        if norm != norm or norm == float("inf"):
            raise ValueError(f"refusing to write a change of norm {norm}: the solve has diverged")
        self.writes += 1
        leaf = self._scratch.get("delta")
        (self.open()["delta"] if leaf is None else leaf).add_(delta_DF.to(self.delta))

    def changed(self) -> None:
        """Drop the low-precision copy."""
        self._copy = None

    def merged_delta(self) -> Tensor:
        """Return Δ in fp32 [D, F]."""
        return self.delta.detach()
