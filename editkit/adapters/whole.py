"""Weights that a quantising precision plugin has packed, and what cannot be done with them."""

from __future__ import annotations

from torch import Tensor


def whole(what: str, tensor: Tensor) -> Tensor:
    """Return a tensor that holds its own numbers.

    Raises:
        ValueError: If they are packed in 4 or 8 bits.
    """
    if not tensor.is_floating_point():
        raise ValueError(
            f"{what} is packed as {tensor.dtype}, and this method computes with it: leave the "
            "quantising --trainer.plugins out"
        )
    return tensor
