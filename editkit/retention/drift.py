"""How far fine-tuning has moved an edited model: its words, its weights, and what its edits see.

Legend: N places, V vocabulary, F layer input, E edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from editkit.adapters.io import replacing
from editkit.edits import Edit
from editkit.functional.retention import cosine, mean_kl, relative_change
from editkit.lm.blocks import tap
from editkit.lm.editable import EditableLM
from editkit.lm.tokens import TokenPolicy
from editkit.retention.trainable import changes

PLACES = 512  # places at which the words are compared; on a large vocabulary each is half a MB
LONGEST = 64  # tokens of a text that are read
ROWS = 16


@dataclass
class Before:
    """What the edited model says and sees before fine-tuning.

    Args:
        log_p_NV: Log probabilities at places of held-out texts.
        keys: Input of each edit layer at the edits' subjects, [E, F], by site path.
    """

    log_p_NV: Tensor
    keys: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Keep it for a resumed run."""
        tensors = {"log_p": self.log_p_NV, **{f"keys.{k}": v for k, v in self.keys.items()}}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)

    @classmethod
    def load(cls, path: Path) -> Before:
        """Take it back."""
        tensors = load_file(path)
        log_p_NV = tensors.pop("log_p")
        return cls(log_p_NV, {k.removeprefix("keys."): v for k, v in tensors.items()})


def look(lm: EditableLM, texts: Sequence[str], edits: Sequence[Edit]) -> Before:
    """Read held-out texts and the edited prompts with the model as it stands."""
    return Before(_log_probabilities(lm, texts), _keys(lm, edits))


def drift(lm: EditableLM, before: Before, now: Before, start: dict[str, Tensor]) -> dict[str, Any]:
    """Return every covariate of forgetting.

    Args:
        lm: The fine-tuned model.
        before: What `look` found before.
        now: What it finds now.
        start: Values of the trained parameters at the start.

    Returns:
        `kl`: KL(fine-tuned || edited) on held-out text, nats per token. `weights`: by matrix
        `relative` = ||dW|| / ||W|| and `cosine` with what the edits wrote there, where that is one
        change of the matrix. `keys`: by edited site, mean ||k_ft - k_ed|| / ||k_ed|| of the input
        at the edits' subjects.
    """
    return {
        "kl": mean_kl(now.log_p_NV, before.log_p_NV) if len(now.log_p_NV) else None,
        "weights": _weights(lm, start),
        "keys": {
            site: float(((now.keys[site] - keys).norm(dim=1) / keys.norm(dim=1)).mean())
            for site, keys in before.keys.items()
        },
    }


@torch.no_grad()
def _log_probabilities(lm: EditableLM, texts: Sequence[str]) -> Tensor:
    """Return fp32 log probabilities at the first places of the texts, [N, V], on the CPU."""
    found: list[Tensor] = []
    policy, places = TokenPolicy(lm.tokenizer), 0
    for start in range(0, len(texts), ROWS):
        tokens = policy.encode(list(texts[start : start + ROWS])).to(lm.device)
        kept_BT = tokens.mask_BT.clone()
        kept_BT[:, LONGEST:] = False
        logits_NV = lm.forward(tokens)[kept_BT][: PLACES - places].float()
        found.append(logits_NV.log_softmax(-1).cpu())
        places += len(logits_NV)
        if places == PLACES:
            break
    return torch.cat(found) if found else torch.zeros(0, 1)


@torch.no_grad()
def _keys(lm: EditableLM, edits: Sequence[Edit]) -> dict[str, Tensor]:
    """Return the inputs of every edit layer at the edits' subjects (else at the prompts' ends)."""
    found: dict[str, Tensor] = {}
    for site, layer in lm.layers.items():
        parts = []
        for start in range(0, len(edits), ROWS):
            part = edits[start : start + ROWS]
            prompts = [e.prompt for e in part]
            tokens = lm.encode(prompts)
            last_B = tokens.prompt_BT.sum(1) - 1
            named = [i for i, e in enumerate(part) if e.subject]
            if named:
                at = lm.policy.subject_indices(
                    [prompts[i] for i in named], [part[i].subject or "" for i in named]
                )
                last_B[named] = last_B.new_tensor(at)
            with tap(layer, inputs=True, stop=True) as seen:
                lm.forward(tokens)
            rows = torch.arange(len(part), device=last_B.device)
            parts.append(seen[0][rows, last_B].float().cpu())
        found[site] = torch.cat(parts)
    return found


def _weights(lm: EditableLM, start: dict[str, Tensor]) -> dict[str, dict[str, float | None]]:
    """Return how far each matrix has moved, and whether along its edits."""
    now = dict(lm.model.named_parameters())
    edits = {}
    for path, layer in lm.layers.items():
        delta = layer.merged_delta()
        if delta is not None:
            flat = delta.detach().cpu().float()
            edits[path] = flat.T if layer.is_transposed else flat
    found: dict[str, dict[str, float | None]] = {}
    for name, change in changes(lm, start).items():
        weight = start.get(name)
        weight = now[name].detach().cpu() if weight is None else weight
        site = name.partition(".base_layer")[0]
        entry: dict[str, float | None] = {"relative": relative_change(weight, weight + change)}
        if site in edits and ".base_layer" in name:
            entry["cosine"] = cosine(change, edits[site])
        found[name] = entry
    return found
