"""The artefact on disk: `adapter_config.json` and `adapter_model.safetensors`, no pickles.

Both are written under a temporary name and renamed. The config carries the tensors' hash, so a
truncated or exchanged file is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from editkit.adapters.base import EditLayer

FORMAT = 1
NEEDED = ("tensors_sha256",)
KINDS = {
    "class_path": str, "init_args": dict, "lm": dict, "base": dict, "edits_seen": int,
    "sites": list, "tensors_sha256": str,
}  # fmt: skip
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; rename it to `path` at the end, or remove it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    with replacing(path) as temporary:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(lines, encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line.

    Raises:
        ValueError: If the file is damaged.
    """
    with path.open(encoding="utf-8") as file:  # str.splitlines also splits at U+2028
        try:
            return [json.loads(line) for line in file]
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is damaged ({error}); copy it again") from error


def save_adapter(folder: Path, layers: dict[str, EditLayer], config: dict[str, Any]) -> None:
    """Write the tensors of all edit layers and the config that rebuilds them.

    Args:
        folder: Run folder; made where it is missing.
        layers: Edit layers by site path.
        config: Whatever loading needs; `format`, the sites' paths and the tensors' sha256 are
            added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{path}.{name}": tensor.cpu().contiguous()
        for path, layer in layers.items()
        for name, tensor in layer.edit_state().items()
    }
    with replacing(folder / TENSORS) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {str(folder / TENSORS)!r}: {error}") from error
        digest = _sha256(temporary)
    with replacing(folder / CONFIG) as temporary:
        record = {"format": FORMAT, **config, "sites": [*layers], "tensors_sha256": digest}
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Read an artefact's config.

    Args:
        folder: Folder of the artefact.
        needed: Further names it must have.

    Raises:
        ValueError: If the folder is no artefact, is damaged, or was written by a newer editkit.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no {CONFIG}; give the folder of a finished run")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        newest = int(config.get("format", 0))
        missing = [name for name in (*NEEDED, *needed) if name not in config]
        if newest <= FORMAT:
            _check_kinds(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); save the run again") from error
    if newest <= FORMAT and missing:
        raise ValueError(f"{str(path)!r} is damaged (it lacks {missing}); save the run again")
    if newest > FORMAT:
        raise ValueError(
            f"{str(path)!r} has format {newest}, this editkit reads up to {FORMAT}; upgrade editkit"
        )
    return config


def _check_kinds(config: dict[str, Any]) -> None:
    """Refuse values of another kind than they are written with."""
    for name, kind in KINDS.items():
        if name in config and not isinstance(config[name], kind):
            raise ValueError(f"{name!r} is {config[name]!r:.40}, no {kind.__name__}")
    for name in ("id", "hash") if "base" in config else ():
        if not isinstance(config["base"].get(name), str):
            raise ValueError(f"{name!r} of 'base' is {config['base'].get(name)!r:.40}, no str")


def load_adapter(folder: Path, layers: dict[str, EditLayer]) -> None:
    """Load an artefact's tensors into edit layers that are attached already.

    Raises:
        ValueError: If the file is missing, truncated, changed, or does not fit the layers.
    """
    path = folder / TENSORS
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no {TENSORS}; save the run again")
    if _sha256(path) != read_config(folder)["tensors_sha256"]:
        raise ValueError(
            f"{str(path)!r} is not the file that was saved (its hash differs from {CONFIG}); "
            "it is truncated or was changed, copy it again"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); copy it again") from error
    load_tensors(tensors, layers)


def load_tensors(tensors: dict[str, Tensor], layers: dict[str, EditLayer]) -> None:
    """Hand tensors named `<site path>.<name>` to the layers they belong to.

    Raises:
        ValueError: If a layer misses a tensor or a tensor has no layer.
    """
    left = set(tensors)
    for path, layer in layers.items():
        names = {f"{path}.{name}": name for name in layer.edit_state()}
        if missing := sorted(set(names) - left):
            raise ValueError(f"the artefact has no tensor {missing[0]!r}; it fits another method")
        layer.load_state_dict({name: tensors[full] for full, name in names.items()}, strict=False)
        left -= set(names)
    if left:
        raise ValueError(f"no edit layer takes tensor {min(left)!r}; it fits another method")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
