"""Contexts that read, replace or add activations at named modules of a model.

Modules are named as in `model.named_modules()` (`model.layers.3.mlp.down_proj`). A decoder block
returns a bare tensor in transformers 5 and a tuple in 4.x; both are met here and nowhere else.
Legend: B rows, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, arange, nn, where, zeros

Change = Callable[[Tensor], Tensor]


def module_at(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule called `name`.

    Raises:
        ValueError: No module has that name; the message lists what lies beside it.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            modules = dict(model.named_modules())
            if parent in modules:
                break
        beside = [child for child, _ in model.get_submodule(parent).named_children()]
        raise ValueError(
            f"no module {name!r} in {type(model).__name__}; {parent or 'the model'} has {beside}"
        ) from None


def hidden(output: object) -> Tensor:
    """Return the hidden state of what a module returned: the tensor, or a tuple's first entry."""
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        raise TypeError(f"expected a Tensor or a tuple led by one, got {type(first).__name__}")
    return first


@contextmanager
def read(
    model: nn.Module, names: Sequence[str], *, inputs: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Collect what the named modules return (or receive) while the context is open.

    The tensors keep their graph, so wrap the forward in `torch.no_grad()` where none is wanted. A
    module that runs several times, as while decoding, leaves the tensor of its last run.

    Args:
        model: Model that is run inside the context.
        names: Modules to listen to.
        inputs: Collect the first input instead of the output (the keys of a linear layer).

    Yields:
        Name to tensor [B, T, D], filled by each forward.
    """
    seen: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: object) -> None:
            seen[name] = hidden(_first_input(args, kwargs) if inputs else output)

        return hook

    with ExitStack() as stack:
        for name in names:
            handle = module_at(model, name).register_forward_hook(listen(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield seen


@contextmanager
def change(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """Pass the outputs of named modules through functions while the context is open.

    Args:
        model: Model that is run inside the context.
        changes: Module name to a function of its output [B, T, D], which must not write in place.
    """

    def rewrite(function: Change) -> Callable[..., object]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> object:
            changed = function(hidden(output))
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    with ExitStack() as stack:
        for name, function in changes.items():
            handle = module_at(model, name).register_forward_hook(rewrite(function))
            stack.callback(handle.remove)
        yield


@contextmanager
def replace(model: nn.Module, name: str, values_BD: Tensor, at_B: Tensor) -> Iterator[None]:
    """Put `values_BD` in the place of a module's output at one token a row.

    Args:
        model: Model that is run inside the context.
        name: Module whose output is overwritten.
        values_BD: What to put there.
        at_B: Token index in each row; a negative index leaves the row as it is.
    """

    def put(output_BTD: Tensor) -> Tensor:
        here_BT1 = _mark(output_BTD, at_B)
        return where(here_BT1, values_BD[:, None].to(output_BTD), output_BTD)

    with change(model, {name: put}):
        yield


@contextmanager
def add(model: nn.Module, name: str, delta_BD: Tensor, at_B: Tensor) -> Iterator[None]:
    """Add `delta_BD` to a module's output at one token a row; gradients reach `delta_BD`.

    Args:
        model: Model that is run inside the context.
        name: Module whose output is shifted.
        delta_BD: What to add.
        at_B: Token index in each row; a negative index leaves the row as it is.
    """

    def shift(output_BTD: Tensor) -> Tensor:
        delta_B1D = delta_BD[:, None].to(output_BTD)
        return output_BTD + where(_mark(output_BTD, at_B), delta_B1D, zeros(()).to(output_BTD))

    with change(model, {name: shift}):
        yield


def _mark(output_BTD: Tensor, at_B: Tensor) -> Tensor:
    """Mark token `at_B` of each row as [B, T, 1]; refuse positions and shapes that do not fit."""
    rows, tokens = output_BTD.shape[:2]
    if at_B.shape != (rows,) or int(at_B.max()) >= tokens:
        raise ValueError(
            f"positions {at_B.tolist()} do not fit an output of {rows} rows and {tokens} tokens"
        )
    place_T = arange(tokens, device=output_BTD.device)
    return (place_T == at_B.to(output_BTD.device)[:, None])[..., None]


def _first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    return args[0] if args else next(iter(kwargs.values()))
