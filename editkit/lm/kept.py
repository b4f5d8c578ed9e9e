"""Tensors kept in the cache folder, each under the identity of all that decided it.

A file is named after the hash of its identity and carries the identity itself with a hash of its
numbers, so one that is torn, changed, renamed or from elsewhere is noticed and never used. Files
are written under a temporary name and renamed: processes that write the same one do no harm.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from editkit.adapters.io import replacing
from editkit.lm.editable import EditableLM
from editkit.lm.load import weight_hash

log = logging.getLogger(__name__)

FORMAT = 1
SAMPLED = 64  # numbers of each weight that tell models in memory apart
Identity = dict[str, Any]


def identity_of(lm: EditableLM) -> Identity | None:
    """Return what tells a base model apart: files, weights in memory, config, dtype, tokenizer.

    None where it has no weight files, such as a model made in memory: nothing can be kept for it.
    """
    try:
        files = weight_hash(lm.spec)
    except (OSError, ValueError):
        return None
    return {
        "format": FORMAT,
        "weights": files,
        "sample": _weight_sample(lm),
        "config": _config_hash(lm.model.config),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "tokenizer": _tokenizer_hash(lm.tokenizer),
    }


class KeptTensors:
    """A folder of kept tensors.

    Args:
        folder: Where they lie.
        identity: What decided them all; None keeps nothing.
    """

    def __init__(self, folder: Path, identity: Identity | None) -> None:
        self.folder = folder
        self.identity = identity

    def load(self, name: str) -> tuple[Tensor, dict[str, str]] | None:
        """Return a tensor and the notes beside it; None where it is not there or cannot be trusted.

        What cannot be trusted is said in the log.
        """
        if self.identity is None or not (file := self._file(name)).is_file():
            return None
        try:
            with safe_open(file, "pt") as opened:
                notes = opened.metadata() or {}
                tensor: Tensor = opened.get_tensor("tensor")
        except (SafetensorError, OSError) as error:
            log.warning("%s is torn or no safetensors file (%s); measuring again", file, error)
            return None
        if notes.get("identity") != self._identity(name):
            log.warning("%s is of something else, by its own header; measuring again", file)
            return None
        if notes.get("sha256") != _hash(tensor):
            log.warning("%s is not what was written; measuring again", file)
            return None
        return tensor, notes

    def check_writable(self) -> None:
        """Refuse a folder that cannot be written, before the work and not after it.

        Raises:
            ValueError: If it cannot.
        """
        if self.identity is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(
                f"cannot write to the cache folder {str(self.folder)!r} ({error.strerror}); set "
                "`cache` or the environment variable EDITKIT_CACHE to a folder that can be written"
            ) from error

    def save(self, name: str, tensor: Tensor, **notes: str) -> None:
        """Keep a tensor on the CPU; a failure is logged, for the tensor itself is at hand."""
        if self.identity is None:
            return
        notes |= {"identity": self._identity(name), "sha256": _hash(tensor)}
        try:
            with replacing(self._file(name)) as temporary:
                save_file({"tensor": tensor}, temporary, metadata=notes)
        except (OSError, SafetensorError) as error:
            log.warning("%s is measured but cannot be kept: %s", name, error)

    def _file(self, name: str) -> Path:
        digest = hashlib.sha256(self._identity(name).encode()).hexdigest()[:16]
        return self.folder / f"{name}-{digest}.safetensors"

    def _identity(self, name: str) -> str:
        return json.dumps({**(self.identity or {}), "name": name}, sort_keys=True)


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().data).hexdigest()


def _weight_sample(lm: EditableLM) -> str:
    """Hash some numbers of every base weight, whichever layers are wrapped."""
    wrapped = tuple(f"{path}." for path in lm.layers)
    digest = hashlib.sha256()
    sampled = {}
    for name, weight in lm.model.named_parameters():
        if not name.startswith(wrapped) or ".base_layer." in name:
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            picked = whole.detach().reshape(-1)[:: max(1, whole.numel() // SAMPLED)]
            sampled[name.replace(".base_layer.", ".")] = picked.double().cpu().numpy().tobytes()
    for name in sorted(sampled):
        digest.update(name.encode() + sampled[name])
    return digest.hexdigest()


def _config_hash(config: Any) -> str:
    """Hash a model's config, wherever it lies and whoever wrote it."""
    state = config.to_dict()
    for passing in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        state.pop(passing, None)
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()


def _tokenizer_hash(tokenizer: Any) -> str:
    """Hash what a tokenizer makes of texts, without how it was last told to pad or truncate."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for passing in ("padding", "truncation"):
        state.pop(passing, None)
    about = [type(tokenizer).__name__, tokenizer.special_tokens_map, state]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
