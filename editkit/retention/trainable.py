"""What fine-tuning may touch: the backbone or an adapter on it, less what is frozen.

The edited blocks are found from where edit layers sit, whatever the method. Adapters are PEFT's; it
is shown the linear layers alone, so that edit layers of its own kind stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor, nn

from editkit.adapters.base import EditLayer
from editkit.functional.retention import dora_change
from editkit.lm.editable import EditableLM
from editkit.lm.sites import Site

ADAPTER = "finetune"
Kind = Literal["full", "lora", "dora"]
Scope = Literal["backbone", "backbone+memory"]
Policy = Literal["none", "modules", "blocks", "prefix", "random", "others"]


@dataclass(frozen=True)
class Freeze:
    """Which part of the backbone stays as it is.

    Args:
        policy: `modules`: the edited matrices; `blocks`: the blocks that hold them; `prefix`: every
            block up to the last edited one; `random`: as much as `like` freezes, elsewhere, a
            control; `others`: all but the edited blocks, an attack.
        embeddings: Freeze the embeddings, too; with tied weights that is the head as well.
        seed: Seed of what is drawn at random.
        like: What `random` is the control of: for `modules` as many matrices of the same size
            without an edit, for `blocks` and `prefix` as many blocks, others first.
    """

    policy: Policy = "none"
    embeddings: bool = False
    seed: int = 0
    like: Literal["modules", "blocks", "prefix"] = "blocks"


@dataclass(frozen=True)
class Adapter:
    """The adapter of `kind: lora` and `kind: dora`.

    Args:
        r: Rank.
        alpha: Scale; the adapter's output is multiplied by alpha / r.
        dropout: Dropout in front of it.
        roles: Roles of the layers to adapt, as `editkit inspect` names them; those that a model
            does not have are left out.
    """

    r: int = 32
    alpha: float = 64.0
    dropout: float = 0.0
    roles: tuple[str, ...] = ("attn.q", "attn.k", "attn.v", "attn.qkv", "mlp.up", "mlp.down")


def edited_blocks(lm: EditableLM) -> list[int]:
    """Return the blocks that hold an edit layer."""
    return sorted({site.layer for site in lm.sites if site.path in lm.layers})


def frozen_blocks(lm: EditableLM, freeze: Freeze) -> list[int]:
    """Return the blocks that a policy freezes whole."""
    every, edited = range(len(lm.blocks)), edited_blocks(lm)
    if freeze.policy == "blocks":
        return edited
    if freeze.policy == "prefix":
        return [*range(max(edited) + 1)]
    if freeze.policy == "others":
        return [block for block in every if block not in edited]
    if freeze.policy == "random" and freeze.like != "modules":
        rng, taken = Random(f"freeze {freeze.seed}"), frozen_blocks(lm, _model_of(freeze))
        others = [block for block in every if block not in taken]
        if not others:
            raise ValueError(
                f"freeze.like is {freeze.like!r}, which freezes all {len(taken)} blocks here: "
                "nothing else is left to draw; use modules"
            )
        drawn = rng.sample(others, min(len(taken), len(others)))
        return sorted(drawn + rng.sample(taken, len(taken) - len(drawn)))
    return []


def frozen_matrices(lm: EditableLM, freeze: Freeze) -> list[Site]:
    """Return the matrices that a policy freezes by themselves."""
    if freeze.policy == "modules":
        return [site for site in lm.sites if site.path in lm.layers]
    if freeze.policy != "random" or freeze.like != "modules":
        return []
    rng, drawn = Random(f"freeze {freeze.seed}"), list[Site]()
    for edited in frozen_matrices(lm, _model_of(freeze)):
        size = edited.in_features * edited.out_features
        free = [
            site
            for site in lm.sites
            if site.in_features * site.out_features == size
            and site.path not in lm.layers
            and site not in drawn
        ]
        if not free:
            raise ValueError(
                f"freeze.like is 'modules': no matrix as large as {edited.path} is left without an "
                "edit; use blocks"
            )
        drawn.append(rng.choice(free))
    return drawn


def _model_of(control: Freeze) -> Freeze:
    """Return the policy that a random one is the control of."""
    return replace(control, policy=control.like)


def choose_trainable(
    lm: EditableLM, kind: Kind, scope: Scope, freeze: Freeze, adapter: Adapter, seed: int
) -> dict[str, nn.Parameter]:
    """Put adapters in place, let the chosen parameters take gradients and no others.

    Args:
        lm: The edited model; changed in place.
        kind: All weights, or an adapter.
        scope: Whether the values of the edits may move, too.
        freeze: What stays as it is.
        adapter: Sizes of an adapter.
        seed: Seed of an adapter's start.

    Returns:
        The parameters to train, by name.

    Raises:
        ValueError: If nothing is left to train.
    """
    memory = {id(p) for layer in lm.layers.values() for p in layer.edit_parameters().values()}
    frozen = _frozen(lm, freeze)
    chosen: set[int] = set()
    if kind == "full":
        chosen = {id(p) for p in lm.model.parameters()} - memory - frozen
    else:
        chosen = {id(p) for p in _inject(lm, kind, adapter, frozen, seed)}
    if scope == "backbone+memory":
        chosen |= memory
    for layer in lm.layers.values():
        layer.is_live = scope == "backbone+memory"
        layer.changed()
    found = {}
    for name, parameter in lm.model.named_parameters():
        parameter.requires_grad_(id(parameter) in chosen)
        if id(parameter) in chosen:
            found[name] = parameter
    if not found:
        raise ValueError(
            f"freeze.policy {freeze.policy!r} leaves nothing to train by kind {kind!r}: the edited "
            f"blocks are {edited_blocks(lm)} of {len(lm.blocks)}; choose another policy or kind"
        )
    return found


def _frozen(lm: EditableLM, freeze: Freeze) -> set[int]:
    """Return the ids of the parameters that a policy freezes."""
    modules: list[nn.Module] = [lm.blocks[i] for i in frozen_blocks(lm, freeze)]
    modules += [linear_at(lm, site) for site in frozen_matrices(lm, freeze)]
    if freeze.embeddings:
        modules.append(lm.model.get_input_embeddings())
    return {id(p) for module in modules for p in module.parameters()}


def linear_at(lm: EditableLM, site: Site) -> nn.Module:
    """Return the linear layer of a site, inside its edit layer where there is one."""
    module = lm.model.get_submodule(site.path)
    return module.base_layer if isinstance(module, EditLayer) else module


def _inject(
    lm: EditableLM, kind: Kind, adapter: Adapter, frozen: set[int], seed: int
) -> list[nn.Parameter]:
    """Let PEFT wrap linear layers apart from their model, and put them back where they were."""
    from peft import LoraConfig, inject_adapter_in_model

    sites = [s for s in lm.sites if s.role in adapter.roles]
    linear = {s.path: linear_at(lm, s) for s in sites}
    linear = {path: m for path, m in linear.items() if id(m.weight) not in frozen}
    if not linear:
        return []
    holder = nn.ModuleDict({str(i): module for i, module in enumerate(linear.values())})
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=[*holder],
        use_dora=kind == "dora",
        fan_in_fan_out=hasattr(next(iter(linear.values())), "nf"),
    )
    places = _places(lm.model, [*linear.values()])
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # PEFT draws A from the global generator
        inject_adapter_in_model(config, holder, ADAPTER)
    found: list[nn.Parameter] = []
    for wrapped, at in zip(holder.values(), places, strict=True):
        for parent, name in at:
            setattr(parent, name, wrapped)
        found += [p for n, p in wrapped.named_parameters() if "base_layer" not in n.split(".")]
    return found


def _places(model: nn.Module, modules: list[nn.Module]) -> list[list[tuple[nn.Module, str]]]:
    """Return every (parent, name) under which each module hangs in a model."""
    index = {id(module): i for i, module in enumerate(modules)}
    found: list[list[tuple[nn.Module, str]]] = [[] for _ in modules]
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and id(child) in index:
                found[index[id(child)]].append((parent, name))
    return found


def unwrapped(name: str) -> str:
    """Return the name that a parameter has where no edit layer and no adapter wraps its layer."""
    return name.replace(".base_layer", "")


def changes(lm: EditableLM, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return how far each matrix of the backbone has moved, fp32 on the CPU, by parameter name.

    Args:
        lm: The fine-tuned model.
        start: Values of the trained parameters at the start, on the CPU.
    """
    now: dict[str, Any] = dict(lm.model.named_parameters())
    found = {
        name: now[name].detach().cpu().float() - before.float()
        for name, before in start.items()
        if before.ndim == 2 and ADAPTER not in name.split(".")
    }
    for name, module in lm.model.named_modules():
        if hasattr(module, "get_delta_weight") and ADAPTER in getattr(module, "lora_A", {}):
            delta = module.get_delta_weight(ADAPTER).detach().cpu().float()
            if ADAPTER in module.lora_magnitude_vector:  # of DoRA
                size = module.lora_magnitude_vector[ADAPTER].weight.detach().cpu().float()
                weight = module.get_base_layer().weight.detach().cpu().float()
                delta = dora_change(weight, delta, size, module.fan_in_fan_out)
            found[f"{name}.base_layer.weight"] = delta
    return found
