"""Write an edited model as a plain Hugging Face folder or a PEFT adapter, or refuse and say why."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editkit.functional.spectral import low_rank
from editkit.lm.editable import EditableLM
from editkit.lm.load import load_pretrained
from editkit.lm.spec import LMSpec

CHECK_PROMPTS = ["The", "Question: Who is it? Answer:"]


def export_model(lm: EditableLM, folder: Path) -> None:
    """Merge all edits into a fresh copy of the base and save it with its tokenizer.

    The merge adds fp32 changes once. The folder is loaded again and must give the edited
    model's logits before it appears under its name.

    Args:
        lm: Edited model.
        folder: Folder to write; must not exist, or be empty.

    Raises:
        ValueError: If a layer's edit depends on the input, the folder is taken, or the saved
            model does not agree with the edited one.
    """
    deltas = merged_deltas(lm)
    with _new_folder(folder) as temporary:
        model, tokenizer = load_pretrained(lm.spec, lm.model.dtype)
        with torch.no_grad():
            for path, delta in deltas.items():
                weight = model.get_submodule(path).weight
                change = delta.T if lm.layers[path].is_transposed else delta
                weight.copy_((weight.float() + change.cpu()).to(weight.dtype))
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        saved: Any = EditableLM.load(LMSpec(id=str(temporary)), lm.model.dtype)
        _check(lm, saved.model)


def export_peft(lm: EditableLM, folder: Path) -> None:
    """Save all edits as a LoRA adapter for PEFT, exact but for rounding.

    Each change becomes a product of the rank that it has. The adapter is loaded on a fresh copy of
    the base and must give the edited model's logits before it appears under its name.

    Args:
        lm: Edited model.
        folder: Folder to write; must not exist, or be empty.

    Raises:
        ValueError: As `export_model` does, and where the changes are not of low rank.
    """
    from peft import LoraConfig, PeftModel
    from safetensors.torch import save_file

    factors = {path: low_rank(delta) for path, delta in merged_deltas(lm).items()}
    ranks = {path: len(down_RF) for path, (_, down_RF) in factors.items()}
    for path, (up_DR, down_RF) in factors.items():
        if (size := up_DR.numel() + down_RF.numel()) > up_DR.shape[0] * down_RF.shape[1]:
            raise ValueError(
                f"cannot export as a PEFT adapter: the change of {path!r} has rank {ranks[path]}, "
                f"and its two factors ({size:,} numbers) are larger than itself; export the whole "
                "model instead"
            )
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(ranks),
        fan_in_fan_out=any(layer.is_transposed for layer in lm.layers.values()),
        base_model_name_or_path=lm.spec.path,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    names = {"lora_B": 0, "lora_A": 1}
    tensors = {
        f"base_model.model.{path}.{name}.weight": pair[i].contiguous().cpu()
        for path, pair in factors.items()
        for name, i in names.items()
    }
    with _new_folder(folder) as temporary:
        temporary.mkdir()
        config.save_pretrained(str(temporary))
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        base, _ = load_pretrained(lm.spec, lm.model.dtype)
        _check(lm, PeftModel.from_pretrained(base, str(temporary)))


def merged_deltas(lm: EditableLM) -> dict[str, Tensor]:
    """Return the change of each edited weight, fp32 [D, F].

    Raises:
        ValueError: If a layer's edit depends on the input.
    """
    deltas = {path: layer.merged_delta() for path, layer in lm.layers.items()}
    if stuck := sorted(path for path, delta in deltas.items() if delta is None):
        kind = type(lm.layers[stuck[0]]).__name__
        raise ValueError(
            f"cannot export: {kind} at {stuck[0]!r} decides by its input what to add, so no "
            "weight holds its edits; serve the run with editkit.load_edited instead"
        )
    return {path: delta for path, delta in deltas.items() if delta is not None}


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to write; it takes its name at the end, or goes."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty; choose a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def _check(lm: EditableLM, saved: Any) -> None:
    """Compare the saved model's logits with the edited model's."""
    tokens = lm.encode(CHECK_PROMPTS)
    ours_BTV = lm.forward(tokens).float().cpu()
    here = tokens.to("cpu")
    theirs_BTV = saved.eval()(
        input_ids=here.ids_BT,
        attention_mask=here.mask_BT.long(),
        position_ids=here.positions_BT,
        use_cache=False,
    ).logits.float()
    scale = float(ours_BTV.abs().max())
    # one rounding of the merged weight against one of the separate product
    bound = scale * (1e-4 if lm.model.dtype == torch.float32 else 5e-2)
    worst = float((ours_BTV - theirs_BTV)[here.mask_BT].abs().max())
    if not worst <= bound:
        raise ValueError(
            f"the exported model differs from the edited one by {worst:.3g} in its logits "
            f"(allowed {bound:.3g}); nothing was written"
        )
