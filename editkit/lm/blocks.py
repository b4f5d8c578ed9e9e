"""Run a decoder in two parts, so that blocks whose output cannot change run once.

Works on any block list: lower blocks are bypassed, the last bypassed one hands on stored states.

Legend: B rows, T tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _ReachedError(Exception):
    """Ends a forward pass once the wanted block is reached."""


@contextmanager
def capture_input(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the hidden states [B, T, H] that enter `block`, then end the forward pass."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise _ReachedError

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
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
