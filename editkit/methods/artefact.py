"""Save an edited model's edits with what rebuilds them, and load them onto their base again."""

from __future__ import annotations

import importlib
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import torch

import editkit
from editkit.adapters.io import CONFIG, load_adapter, read_config, save_adapter
from editkit.lm.load import weight_hash
from editkit.lm.spec import PACKAGED, LMSpec
from editkit.methods.arguments import refused
from editkit.methods.base import EditModule
from editkit.methods.steps import check_base
from editkit.metrics.protocol import EvalProtocol


def save_edits(folder: Path, method: EditModule) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` of a method into `folder`."""
    cls = type(method)
    spec = asdict(method.spec)
    spec["dtype"] = str(method.lm.model.dtype).removeprefix("torch.")
    if Path(method.spec.path).is_dir() and method.spec.id != PACKAGED:
        spec["id"] = str(Path(method.spec.path).resolve())
    config = {
        "class_path": f"{cls.__module__}.{cls.__qualname__}",
        "init_args": {**method.init_args(), **method.found_args()},
        "lm": spec,
        "base": {"id": method.spec.id, "hash": weight_hash(method.spec)},
        "edits_seen": method.edits_seen,
        "stream": method.kept_state(),
        "generator": bytes(method.generator.get_state().tolist()).hex(),
        "editkit": editkit.__version__,
    }
    save_adapter(folder, method.lm.layers, config)


def build_method(class_path: str, trust: bool = True, **arguments: Any) -> EditModule:
    """Import a method class by its path and construct it.

    Args:
        class_path: Such as `editkit.methods.ft.FT`.
        trust: Allow classes from outside `editkit.methods`: a class path is code to run.
        arguments: Constructor arguments.

    Raises:
        ValueError: If the class is not there, is no method, is not trusted, or an argument is
            not one of its own.
    """
    if not trust and not class_path.startswith("editkit.methods."):
        raise ValueError(
            f"the artefact was made by {class_path!r}, a class outside editkit.methods; loading "
            "it runs that code: pass trust=True if you trust it"
        )
    module_name, _, name = class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no method class {class_path!r}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, EditModule)):
        raise ValueError(f"{class_path!r} is not an EditModule")
    try:
        return cls(**_with_records(cls, arguments))
    except TypeError as error:
        raise ValueError(refused(class_path, error)) from error


def _with_records(cls: type[EditModule], arguments: dict[str, Any]) -> dict[str, Any]:
    """Build the dataclasses that constructors ask for from the dicts that YAML and JSON hold."""
    built = dict(arguments)
    for base in cls.__mro__:
        if issubclass(base, EditModule) and "__init__" in vars(base):
            for name, hint in get_type_hints(base.__init__).items():
                records = [t for t in (hint, *get_args(hint)) if is_dataclass(t)]
                if records and isinstance(built.get(name), dict):
                    built[name] = cast(Any, records[0])(**built[name])
    return built


def load_edits(
    folder: Path, lm: LMSpec | None, dtype: str | None, device: torch.device, trust: bool
) -> EditModule:
    """Rebuild the method of an artefact on its base, with its edits in place.

    Args:
        folder: A run folder.
        lm: Base to load on; None takes the one recorded.
        dtype: Dtype of the base; None takes the spec's.
        device: Device to run on.
        trust: Allow a method class from outside `editkit.methods`.

    Raises:
        ValueError: If the artefact is damaged, from another base, or not trusted.
    """
    config = read_config(folder, ("class_path", "init_args", "lm", "base", "edits_seen"))
    try:
        spec = lm or LMSpec(**config["lm"])
    except TypeError as error:  # a field that a spec does not have
        raise ValueError(f"{str(folder / CONFIG)!r} is damaged ('lm': {error})") from error
    spec = replace(spec, dtype=dtype or spec.dtype)
    if lm is None and spec.trust_remote_code and not trust:
        raise ValueError(
            f"the base {spec.id!r} of {str(folder)!r} runs code of its own; pass trust=True if you "
            "trust it"
        )
    if Path(spec.path).is_dir():
        check_base(config["base"], spec)
    method = build_method(
        config["class_path"], trust, lm=spec, evaluation=EvalProtocol(), **config["init_args"]
    )
    method.configure_model()
    check_base(config["base"], spec)  # a Hub id is there only now
    load_adapter(folder, method.lm.layers)
    method.edits_seen = config["edits_seen"]
    if config.get("stream"):
        method.load_stream_state(config["stream"])
    if "generator" in config:
        drawn = torch.tensor(list(bytes.fromhex(config["generator"])), dtype=torch.uint8)
        method.generator.set_state(drawn)
    return method.to(device)
