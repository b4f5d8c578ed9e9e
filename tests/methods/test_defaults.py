"""A method from Python is the method of its YAML."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import asdict, is_dataclass
from pathlib import Path

import pytest
import yaml

METHODS = Path(__file__).parents[2] / "experiments" / "method"
OWN = [p for p in sorted(METHODS.glob("*.yaml")) if "_released" not in p.stem]


def defaults(cls):
    """Return what a constructor takes where nothing is given, nearest class first."""
    found = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            for name, parameter in inspect.signature(base.__init__).parameters.items():
                if parameter.default is not inspect.Parameter.empty:
                    value = parameter.default
                    found.setdefault(name, asdict(value) if is_dataclass(value) else value)
    return found


def differs(given, default):
    if not isinstance(given, dict):
        return given != pytest.approx(default) if isinstance(given, float) else given != default
    return any(differs(value, default[name]) for name, value in given.items())


@pytest.mark.parametrize("path", OWN, ids=[p.stem for p in OWN])
def test_defaults_are_those_of_the_yaml(path):
    config = yaml.safe_load(path.read_text())
    module, _, name = config["class_path"].rpartition(".")
    if path.stem != module.rpartition(".")[2]:
        pytest.skip(f"{path.stem} is a variant of {name}")
    known = defaults(getattr(importlib.import_module(module), name))
    given = config["init_args"].items()
    assert {k: v for k, v in given if k in known and differs(v, known[k])} == {}
