"""How far fine-tuning has moved an edited model: its words, weights, activations and keys.

Legend: N places, V vocabulary, F layer input, H hidden width, E edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
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
        seen: At the edits' subjects, the input of each edit layer (`keys.` and its path), [E, F],
            and the output of each block (`activations.` and its number), [E, H].
    """

    log_p_NV: Tensor
    seen: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Keep it for a resumed run."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({"log_p": self.log_p_NV.contiguous(), **self.seen}, temporary)

    @classmethod
    def load(cls, path: Path) -> Before:
        """Take it back."""
        tensors = load_file(path)
        return cls(tensors.pop("log_p"), tensors)


def look(lm: EditableLM, texts: Sequence[str], edits: Sequence[Edit]) -> Before:
    """Read held-out texts and the edited prompts with the model as it stands."""
    return Before(_log_probabilities(lm, texts), _at_subjects(lm, edits))


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
        at the edits' subjects. `activations`: by block, the same of its output.
    """
    return {
        "kl": mean_kl(now.log_p_NV, before.log_p_NV) if len(now.log_p_NV) else None,
        "weights": _weights(lm, start),
        "keys": _shifts(before, now, "keys."),
        "activations": _shifts(before, now, "activations."),
    }


def _shifts(before: Before, now: Before, kind: str) -> dict[str, float]:
    """Return the mean of ||after - before|| / ||before|| over edits, by name."""
    return {
        name.removeprefix(kind): float(
            ((now.seen[name] - rows).norm(dim=1) / rows.norm(dim=1)).mean()
        )
        for name, rows in before.seen.items()
        if name.startswith(kind)
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
def _at_subjects(lm: EditableLM, edits: Sequence[Edit]) -> dict[str, Tensor]:
    """Return inputs of edit layers and outputs of blocks at the edits' subjects (else the ends)."""
    found: dict[str, list[Tensor]] = {}
    blocks = [(f"activations.{i}", block) for i, block in enumerate(lm.blocks)]
    for start in range(0, len(edits), ROWS):
        part = edits[start : start + ROWS]
        tokens = lm.encode([e.prompt for e in part])
        at_B = _places(lm, part, tokens.prompt_BT.sum(1) - 1)
        rows_B = torch.arange(len(part), device=at_B.device)
        with ExitStack() as taps:
            seen = {f"keys.{s}": taps.enter_context(tap(m, True)) for s, m in lm.layers.items()}
            for name, block in blocks:
                seen[name] = taps.enter_context(tap(block, stop=block is blocks[-1][1]))
            lm.forward(tokens)
        for name, tensors in seen.items():
            found.setdefault(name, []).append(tensors[0][rows_B, at_B].float().cpu())
    return {name: torch.cat(rows) for name, rows in found.items()}


def _places(lm: EditableLM, edits: Sequence[Edit], last_B: Tensor) -> Tensor:
    """Return where each edit's subject ends, [B]; the prompt's end where it names none."""
    named = [i for i, e in enumerate(edits) if e.subject]
    if named:
        prompts = [edits[i].prompt for i in named]
        at = lm.policy.subject_indices(prompts, [edits[i].subject or "" for i in named])
        last_B[named] = last_B.new_tensor(at)
    return last_B


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
