"""The nonlinearity of a model's feed-forward layers, by its config."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers.activations import ACT2FN

from editkit.lm.editable import EditableLM

NAMES = ("hidden_act", "hidden_activation", "activation_function")


def activation(lm: EditableLM) -> Callable[[Tensor], Tensor]:
    """Return the function.

    Raises:
        ValueError: If the config names none.
    """
    named = [getattr(lm.model.config, name, None) for name in NAMES]
    found = next((name for name in named if name), None)
    if found is None:
        raise ValueError(f"the config of {lm.spec.id} names no activation; it has none of {NAMES}")
    function: Callable[[Tensor], Tensor] = ACT2FN[found]
    return function
