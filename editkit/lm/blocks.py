"""Run a decoder in two parts, so that blocks whose output cannot change run once.

Works on any block list: lower blocks are bypassed, the last bypassed one hands on stored states.

Legend: B rows, T tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from editkit.lm.trace import hidden


class _ReachedError(Exception):
    """Ends a forward pass once the wanted block is reached."""


@contextmanager
def tap(module: nn.Module, inputs: bool = False, stop: bool = False) -> Iterator[list[Tensor]]:
    """Collect what a module returns while the context is open, detached, one entry per call.

    Args:
        module: Module of a model that is run inside the context.
        inputs: Collect its first input instead, before it runs.
        stop: End the forward pass there.
    """
    found: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).detach())
        if stop:
            raise _ReachedError

    def behind(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        found.append(hidden(output).detach())
        if stop:
            raise _ReachedError

    if inputs:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(behind)
    try:
        yield found
    except _ReachedError:
        pass
    finally:
        handle.remove()


@contextmanager
def bypass(blocks: list[nn.Module], hidden_BTH: Tensor, as_tuple: bool) -> Iterator[None]:
    """Skip `blocks` and let them hand on `hidden_BTH` instead.

    Args:
        blocks: The lowest blocks of a decoder, in order.
        hidden_BTH: Hidden states behind the last of them.
        as_tuple: Whether this version's blocks return a tuple (transformers 4) or a tensor.
    """

    def stored(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        return (hidden_BTH,) if as_tuple else hidden_BTH

    for block in blocks:
        block.forward = stored
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # uncovers the class's own


@contextmanager
def select_head_rows(head: nn.Module, chosen_BT: Tensor) -> Iterator[None]:
    """Let the LM head see only the chosen positions: logits come out as [1, N, V]."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][chosen_BT.to(args[0].device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def tokens_at(module: nn.Module, flat_N: Tensor, spread: bool) -> Iterator[None]:
    """Run a token-wise module on chosen tokens only, without waiting for the device.

    Args:
        module: Module that takes and gives [B, T, .].
        flat_N: The tokens, counted through all rows.
        spread: Give [B, T, .] with zeros elsewhere, not [1, N, .].
    """
    run = module.forward

    def chosen(x_BTH: Tensor) -> Tensor:
        here_N = flat_N.to(x_BTH.device)
        out_1NH: Tensor = run(x_BTH.flatten(0, 1)[here_N][None])
        if not spread:
            return out_1NH
        blank_BTH = out_1NH.new_zeros(*x_BTH.shape[:2], out_1NH.shape[-1])
        full_BTH: Tensor = blank_BTH.flatten(0, 1).index_copy(0, here_N, out_1NH[0])
        return full_BTH.view_as(blank_BTH)

    module.forward = chosen
    try:
        yield
    finally:
        del module.forward  # uncovers the class's own


@contextmanager
def record_output_type(block: nn.Module) -> Iterator[list[bool]]:
    """Note whether `block` returns a tuple; one entry per call."""
    seen: list[bool] = []

    def record(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        seen.append(isinstance(out, tuple))

    handle = block.register_forward_hook(record)
    try:
        yield seen
    finally:
        handle.remove()
