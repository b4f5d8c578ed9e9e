"""EditLayer: an edit wrapped around one base layer, and nothing written into the base.

    x ──▶ base_layer ──▶ y ──▶ edited(x, y) ──▶ out        (out = y bit for bit until written)

Legend: D layer output, F layer input, B rows, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from editkit.adapters.whole import whole

if TYPE_CHECKING:
    from editkit.adapters.routed import Route


class Scope:
    """What the layers of one model may know about the forward pass under way.

    One Scope is shared by all layers of a model. `routes` holds what routed layers decided at the
    last prompt, which decoding goes on with.
    """

    def __init__(self) -> None:
        self.routes: dict[nn.Module, Route] = {}
        self._prompt_BT: Tensor | None = None

    @property
    def prompt_BT(self) -> Tensor | None:
        """Prompt tokens of the rows, bool [B, T]; None while decoding or outside `EditableLM`.

        Setting it begins a new pass, in which the routes of the last one do not count.
        """
        return self._prompt_BT

    @prompt_BT.setter
    def prompt_BT(self, prompt_BT: Tensor | None) -> None:
        self._prompt_BT = prompt_BT
        if prompt_BT is not None:
            self.routes = {}

    def keep(self, rows: Tensor) -> None:
        """Decode on with these rows only, in this order (int64 [B])."""
        self.routes = {layer: route.at(rows) for layer, route in self.routes.items()}


class EditLayer(nn.Module, ABC):
    """Base of all edit layers: wraps a linear layer and adds what edits have written.

    Values that edits change are parameters of the subclass. They are changed in one way only:
    `open()` hands out scratch leaves, an optimiser moves those, `commit()` copies them in.

    `moved` sums up the Frobenius norms of what was committed since somebody set it to 0.

    Args:
        base_layer: An `nn.Linear`, a transformers `Conv1D`, or anything with a 2-d `weight`.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.enabled = True
        self.is_written = False
        self.is_live = False  # trained in place, by an optimiser that holds the parameters
        self.moved = 0.0
        self.writes = 0  # how often what a forward pass sees was written, committed or not
        self.scope = Scope()
        self._scratch: dict[str, Tensor] = {}

    @property
    def is_transposed(self) -> bool:
        """Whether the base weight is stored [in, out], as in GPT-2's Conv1D."""
        return hasattr(self.base_layer, "nf")

    @property
    def shape_oi(self) -> tuple[int, int]:
        """Width D of the output and F of the input, also where the weight is stored packed."""
        if self.is_transposed:
            return self.weight_oi.shape[0], self.weight_oi.shape[1]
        return cast(int, self.base_layer.out_features), cast(int, self.base_layer.in_features)

    @property
    def weight_oi(self) -> Tensor:
        """Base weight, always [out, in]."""
        weight = cast(Tensor, self.base_layer.weight)
        weight = whole(f"the weight of a {type(self.base_layer).__name__}", weight)
        return weight.T if self.is_transposed else weight

    @property
    def device(self) -> torch.device:
        """Device of the base weight."""
        return cast(Tensor, self.base_layer.weight).device

    def forward(self, x: Tensor) -> Tensor:
        """Run the base layer, then add the edit: [..., F] to [..., D]."""
        y = cast(Tensor, self.base_layer(x))
        return self.edited(x, y) if self.is_active else y

    @property
    def is_active(self) -> bool:
        """Whether the edit takes part: switched on, and written or being written."""
        return self.enabled and (self.is_written or bool(self._scratch))

    @abstractmethod
    def edited(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the edited output for input `x` and base output `y`."""

    def merged_delta(self) -> Tensor | None:
        """Return the change of `weight_oi` in fp32 [D, F]; None where it depends on the input."""
        return None

    def edit_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that edits change, by name, without those of the base layer."""
        return {k: p for k, p in self.named_parameters() if "base_layer" not in k.split(".")}

    def edit_state(self) -> dict[str, Tensor]:
        """Return everything inference needs beside the base weights, detached, by name."""
        state = self.state_dict()
        return {k: v.detach() for k, v in state.items() if "base_layer" not in k.split(".")}

    def value(self, name: str) -> Tensor:
        """Return a parameter as the forward pass must see it: the scratch leaf while open."""
        parameter = self.get_parameter(name)
        return self._scratch.get(name, parameter if self.is_live else parameter.detach())

    def open(self) -> dict[str, Tensor]:
        """Start writing: return scratch leaves, clones of `edit_parameters` with gradients."""
        self._scratch = {
            name: whole(name, parameter).detach().clone().requires_grad_()
            for name, parameter in self.edit_parameters().items()
        }
        return self._scratch

    @torch.no_grad()
    def commit(self) -> None:
        """Take the scratch values over and close."""
        square = 0.0
        for name, leaf in self._scratch.items():
            parameter = self.get_parameter(name)
            square += float((leaf - parameter).square().sum())
            parameter.copy_(leaf)
        self._scratch = {}
        self.note_change(square**0.5)

    def note_change(self, norm: float) -> None:
        """Record that a change of this Frobenius norm has been written."""
        self.moved = (self.moved**2 + norm**2) ** 0.5
        self.writes += 1
        self.is_written = True
        self.changed()

    def discard(self) -> None:
        """Close without taking anything over."""
        self._scratch = {}

    def changed(self) -> None:
        """Forget what was derived from the written values; called after every change."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EditLayer:
        """Move edits with the model, but leave their precision alone (fp32 whatever the base)."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.base_layer._apply(fn)
        for name, child in self.named_children():
            if name != "base_layer":
                child._apply(keep_dtype)
        super()._apply(keep_dtype, recurse=False)
        self.changed()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept buffers that have grown since, then load as usual."""
        fit_to(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        found = [v for k, v in state_dict.items() if k.startswith(prefix) and "base_layer" not in k]

        if found:  # Lightning also loads state dicts that hold nothing of ours
            self.is_written = any(bool(v.any()) for v in found)
        self.changed()


def fit_to(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Give a module's own tensors the shapes they have in a state dict; their values are lost."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, tensor in own:
        saved = state_dict.get(prefix + name)
        if saved is not None and saved.shape != tensor.shape:
            tensor.data = tensor.new_empty(saved.shape)


def attach(model: nn.Module, path: str, make: Callable[[nn.Module], EditLayer]) -> EditLayer:
    """Wrap the module at `path` of `model` and return the new layer.

    Args:
        model: Model that holds the site.
        path: Dotted module path, as `editkit inspect` lists it.
        make: Builds the EditLayer around the module found there.

    Raises:
        ValueError: If nothing is there, it is already wrapped, or it is not a linear layer.
    """
    parent_path, _, name = path.rpartition(".")
    try:
        parent, module = model.get_submodule(parent_path), model.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"no module {path!r} in {type(model).__name__}; `editkit inspect` lists the sites"
        ) from None
    if isinstance(module, EditLayer):
        raise ValueError(f"{path!r} already carries a {type(module).__name__}; attach it once")
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        raise ValueError(
            f"{path!r} is a {type(module).__name__}, not a linear layer; "
            "`editkit inspect` lists the sites"
        )
    layer = make(module)
    setattr(parent, name, layer)
    return layer


def edit_layers(model: nn.Module) -> dict[str, EditLayer]:
    """Return all edit layers of a model by module path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, EditLayer)}


@contextmanager
def disabled(layers: list[EditLayer]) -> Iterator[None]:
    """Switch the layers off inside the context, exactly and without touching their values."""
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
