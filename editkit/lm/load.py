"""Load a base model and its tokenizer, with errors a person can act on, and fingerprint it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from editkit.lm.spec import LMSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(name: str | None, default: torch.dtype) -> torch.dtype:
    """Return the dtype of a spec's name.

    Raises:
        ValueError: If the name is not one of float32, bfloat16, float16.
    """
    if name is None:
        return default
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_device(name: str | None = None) -> torch.device:
    """Return a device by its name; None takes the GPU where there is one.

    Raises:
        ValueError: If there is no such device here.
    """
    there = ["cuda"] if torch.cuda.is_available() else []
    try:
        device = torch.device(name or [*there, "cpu"][0])
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a name unknown to torch; not built with it
        raise ValueError(f"no device {name!r} here; use {' or '.join(['cpu', *there])}") from error
    return device


@contextmanager
def plain_linears() -> Iterator[None]:
    """Build models from torch's own `nn.Linear`, whatever stands in its place.

    Lightning's plugins for 4 and 8 bits put theirs there while a model is configured, and pack the
    layers afterwards. transformers would fill theirs with numbers that are never packed.
    """
    ours, torch.nn.Linear = nn.Linear, torch.nn.modules.linear.Linear  # type: ignore[misc]
    try:
        yield
    finally:
        torch.nn.Linear = ours  # type: ignore[misc]


def load_pretrained(spec: LMSpec, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a spec.

    Raises:
        ValueError: If the model is not there, is not a causal LM, or its files are damaged.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    _check_folder(spec)
    auto: Any = AutoModelForCausalLM
    name = "dtype" if int(__version__.split(".")[0]) >= 5 else "torch_dtype"
    options: dict[str, Any] = {name: dtype}
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    shared = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.path, **shared)
        model, info = auto.from_pretrained(spec.path, output_loading_info=True, **shared, **options)
    except SafetensorError as error:
        raise ValueError(
            f"weights of {spec.id!r} are truncated or damaged ({error}); fetch them again"
        ) from error
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot load model {spec.id!r}: {first} "
            "(give a local folder with config.json, a Hub id that is reachable, or 'factworld')"
        ) from error
    except ImportError as error:
        raise ValueError(f"cannot load model {spec.id!r}: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"the weight files of {spec.id!r} lack {len(missing)} tensors, such as "
            f"{missing[0]!r}; fetch them again"
        )
    return model, tokenizer


def load_blank(spec: LMSpec, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a spec, the model with shapes and no numbers.

    Raises:
        ValueError: If the config is not there, or is of no causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    _check_folder(spec)
    shared = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(spec.path, **shared)
        tokenizer = AutoTokenizer.from_pretrained(spec.path, **shared)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=spec.trust_remote_code
            )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot plan for model {spec.id!r}: {first}") from error
    return model.to(dtype), tokenizer


def _check_folder(spec: LMSpec) -> None:
    """Refuse a path that looks local and is no model folder, before transformers asks the Hub."""
    path = Path(spec.path)
    looks_local = spec.path.startswith((".", "/", "~")) or spec.path.count("/") > 1
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"model folder {spec.id!r} has no config.json; is it a model folder?")
    if looks_local and not path.is_dir():
        raise ValueError(f"model folder {spec.id!r} does not exist; check lm.id")


def weight_files(spec: LMSpec) -> list[Path]:
    """Return the weight files of a spec, sorted by name; of a Hub id those in the local cache."""
    folder = Path(spec.path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(spec.id, revision=spec.revision, local_files_only=True))
    for pattern in ("*.safetensors", "*.bin"):
        if found := sorted(folder.glob(pattern)):
            return found
    raise ValueError(f"no weight files in {str(folder)!r}")


def weight_hash(spec: LMSpec) -> str:
    """Return the sha256 over the weight files of a spec: the identity of the base model."""
    digest = hashlib.sha256()
    for path in weight_files(spec):
        stat = path.stat()
        digest.update(_file_hash(str(path.resolve()), stat.st_size, stat.st_mtime_ns).encode())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _file_hash(path: str, size: int, changed_ns: int) -> str:
    """Return a file's sha256; read again only when its size or time has changed."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
