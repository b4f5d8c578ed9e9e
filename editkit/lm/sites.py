"""Sites: the linear layers that can be edited, found from the module structure.

No model is known by name. The blocks are the longest list of like modules; inside a block a
linear layer is recognised by the part it sits in (attention or not) and its leaf name, by the
one small table below, and checked against its shape.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

# Architecture facts: role -> leaf names (Llama/Mistral/Qwen/Gemma, GPT-2, GPT-J, GPT-NeoX, Phi).
MLP_ROLES = {
    "mlp.down": ("down_proj", "c_proj", "fc_out", "dense_4h_to_h", "fc2", "w2"),
    "mlp.up": ("up_proj", "c_fc", "fc_in", "dense_h_to_4h", "gate_up_proj", "fc1", "w3"),
    "mlp.gate": ("gate_proj", "w1"),
}
ATTENTION_ROLES = {
    "attn.out": ("o_proj", "c_proj", "out_proj", "dense"),
    "attn.qkv": ("c_attn", "query_key_value", "qkv_proj"),
    "attn.q": ("q_proj",),
    "attn.k": ("k_proj",),
    "attn.v": ("v_proj",),
}


@dataclass(frozen=True, slots=True)
class Site:
    """One editable linear layer.

    Args:
        path: Dotted module path.
        layer: Index of its block.
        role: Part it plays, such as `mlp.down`.
        in_features: Width F of its input.
        out_features: Width D of its output.
    """

    path: str
    layer: int
    role: str
    in_features: int
    out_features: int


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map: a 2-d weight with in and out features, or a Conv1D."""
    return isinstance(module, nn.Linear) or hasattr(module, "nf")


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a Linear or Conv1D."""
    if hasattr(module, "nf"):
        return int(module.weight.shape[0]), int(module.weight.shape[1])  # type: ignore[union-attr, index]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return path and list of the decoder blocks.

    Raises:
        ValueError: If the model has no list of like modules that hold linear layers.
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and len({type(block) for block in module}) == 1
        and any(is_linear(m) for m in module[0].modules())
    ]
    outermost = [
        (path, module)
        for path, module in found
        if not any(path.startswith(other + ".") for other, _ in found)
    ]
    if not outermost:
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks to edit")
    return max(outermost, key=lambda item: len(item[1]))


def _role(path_in_block: str) -> str | None:
    """Return the role of a linear layer from its path inside the block."""
    *parts, leaf = path_in_block.split(".")
    in_attention = any("attn" in part or "attention" in part for part in parts)
    roles = ATTENTION_ROLES if in_attention else MLP_ROLES
    return next((role for role, leaves in roles.items() if leaf in leaves), None)


def find_sites(model: nn.Module) -> list[Site]:
    """Return all editable sites of a causal LM in block order.

    Raises:
        ValueError: If no block holds a known linear layer.
    """
    blocks_path, blocks = find_blocks(model)
    sites = []
    for layer, block in enumerate(blocks):
        for path, module in block.named_modules():
            if path.endswith("base_layer") or ".base_layer." in path:
                continue
            linear = getattr(module, "base_layer", module)
            role = _role(path) if is_linear(linear) else None
            if role is not None:
                shape = linear_shape(linear)
                sites.append(Site(f"{blocks_path}.{layer}.{path}", layer, role, *shape))
    if not sites:
        names = sorted({name for name, m in blocks[0].named_modules() if is_linear(m)})
        raise ValueError(
            f"no editable site in {type(model).__name__}: its blocks hold {names}, none of which "
            "editkit.lm.sites knows; add the leaf name to its table"
        )
    return sites


def propose_causal_layers(n_layers: int) -> list[int]:
    """Propose the blocks that recall facts: an eighth to a quarter of the depth.

    MEMIT's choices by causal trace are 4-8 of 32 (Llama-3-8B) and 3-8 of 28 (GPT-J).
    """
    return list(range(n_layers // 8, n_layers // 4 + 1))


def propose_memory_layer(n_layers: int) -> int:
    """Propose the block for a memory: 85 % of the depth (MEMOIR and WISE: 27 of 32)."""
    return min(n_layers - 1, int(0.85 * n_layers))
