"""Write an edited model as a plain Hugging Face folder, or refuse and say why."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

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
    deltas = {path: layer.merged_delta() for path, layer in lm.layers.items()}
    if stuck := sorted(path for path, delta in deltas.items() if delta is None):
        kind = type(lm.layers[stuck[0]]).__name__
        raise ValueError(
            f"cannot export: {kind} at {stuck[0]!r} decides by its input what to add, so no "
            "weight holds its edits; serve the run with editkit.load_edited instead"
        )
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty; choose a new folder")
    model, tokenizer = load_pretrained(lm.spec, lm.model.dtype)
    with torch.no_grad():
        for path, delta in deltas.items():
            weight = model.get_submodule(path).weight
            change = delta.T if lm.layers[path].is_transposed else delta  # type: ignore[union-attr]
            weight.copy_((weight.float() + change.cpu()).to(weight.dtype))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _check(lm, temporary)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def _check(lm: EditableLM, folder: Path) -> None:
    """Compare the saved model's logits with the edited model's."""
    saved: Any = EditableLM.load(LMSpec(id=str(folder)), lm.model.dtype)
    tokens = lm.encode(CHECK_PROMPTS)
    ours_BTV = lm.forward(tokens).float().cpu()
    theirs_BTV = saved.forward(tokens.to("cpu")).float()
    scale = float(ours_BTV.abs().max())
    # one rounding of the merged weight against one of the separate product
    bound = scale * (1e-4 if lm.model.dtype == torch.float32 else 5e-2)
    worst = float((ours_BTV - theirs_BTV)[tokens.mask_BT.cpu()].abs().max())
    if not worst <= bound:
        raise ValueError(
            f"the exported model differs from the edited one by {worst:.3g} in its logits "
            f"(allowed {bound:.3g}); nothing was written"
        )
