"""The constructor arguments of a method, as JSON has them: what rebuilds it."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from typing import Any

NOT_SAVED = ("self", "lm", "evaluation")


def kept_arguments(method: object, base: type) -> dict[str, Any]:
    """Return the arguments that a method's classes take, from the attributes they keep them in.

    Args:
        method: The method.
        base: Class from which on constructors count.

    Raises:
        ValueError: If an argument is not kept under its own name, or has no place in JSON.
    """
    names: dict[str, None] = {}
    for cls in type(method).__mro__:
        if issubclass(cls, base) and "__init__" in vars(cls):
            for name, parameter in inspect.signature(cls.__init__).parameters.items():
                if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    names[name] = None
    found = {}
    for name in names:
        if name not in NOT_SAVED:
            if not hasattr(method, name):
                raise ValueError(
                    f"{type(method).__name__} does not keep its argument {name!r}; write "
                    f"`self.{name} = {name}` in its __init__, so that a run can be saved"
                )
            found[name] = getattr(method, name)
    try:
        plain: dict[str, Any] = json.loads(json.dumps(found, default=_plain, allow_nan=False))
    except ValueError as error:
        raise ValueError(
            f"an argument of {type(method).__name__} cannot be saved ({error}): {found}"
        ) from error
    return plain


def without(arguments: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return arguments without some, of which `a.b` is the field `b` of the record `a`."""
    kept = copy.deepcopy(arguments)
    for name in names:
        *path, last = name.split(".")
        place: Any = kept
        for part in path:
            place = place.get(part)
        if isinstance(place, dict):
            place.pop(last, None)
    return kept


def _plain(value: object) -> object:
    """Return what JSON can hold of a constructor argument: a record's fields, or its text."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def refused(class_path: str, error: TypeError) -> str:
    """Return what a constructor's error says, naming what is missing as it would be given.

    >>> error = TypeError("MEMIT.__init__() missing 1 required positional argument: 'ridge'")
    >>> refused("editkit.methods.memit.MEMIT", error)
    "memit needs ridge=...; experiments/method/memit.yaml has the paper's"
    """
    _, is_missing, names = str(error).partition(" missing ")
    if not is_missing or not class_path.startswith("editkit.methods."):
        return f"{class_path}: {error}"
    stem, lacking = class_path.split(".")[-2], re.findall(r"'(\w+)'", names)
    given = ", ".join(f"{name}=..." for name in lacking)
    return f"{stem} needs {given}; experiments/method/{stem}.yaml has the paper's"
