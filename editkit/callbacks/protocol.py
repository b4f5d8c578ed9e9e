"""What is stamped on every number: base, stream, precision, versions, commit."""

from __future__ import annotations

import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch import Trainer

import editkit
from editkit.data.source import sha256_of, sha256_of_probes
from editkit.lm.load import weight_hash
from editkit.methods.base import EditModule


def stamp(trainer: Trainer, method: EditModule) -> dict[str, Any]:
    """Return the descriptor of a run; figures with different descriptors do not compare."""
    data = trainer.datamodule
    spec = method.spec
    return {
        "base_id": spec.id,
        "base_revision": spec.revision,
        "base_hash": weight_hash(spec),
        "template": "chat" if spec.chat_template else "none",
        "dtype": str(next(method.lm.model.parameters()).dtype).removeprefix("torch."),
        "precision": str(trainer.precision),
        "data": type(data).__name__,
        "data_sources": dict(data.sources),
        "data_sha256": sha256_of(data.edits),
        "probes_sha256": sha256_of_probes(data.probes),
        "data_start": data.start,
        "data_order": data.order,
        "n_edits": len(data.edits),
        "edits_per_step": data.edits_per_step,
        "seed": method.seed,
        "data_seed": data.seed,
        "method_arguments": method.init_args(),
        "devices": trainer.world_size,
        "commit": commit(),
        "editkit": editkit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """Return editkit's own git commit, `+dirty` where files are changed; None outside git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        state = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+dirty" if state.stdout.strip() else "")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: on the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
