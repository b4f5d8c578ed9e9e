"""The floors: a module imports only from its own or lower floors, and what is heavy waits."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "editkit"
FLOORS = {
    "edits": 0, "functional": 0, "descend": 0, "parallel": 0, "adapters": 1, "lm": 2, "data": 3,
    "metrics": 3, "methods": 4, "callbacks": 5, "export": 6, "api": 6, "composition": 6, "verbs": 6,
    "plan": 6, "workload": 6, "growth": 6, "strategy": 6, "trainer_cli": 6, "cli": 6,
    "__main__": 6, "report": 6, "harness": 6, "retention": 6, "study": 6,
}  # fmt: skip
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")
LAZY = {"wandb", "datasets", "matplotlib", "bitsandbytes", "pandas", "jinja2", "lm_eval", "sklearn"}


def imports(path: Path, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def floor(module: str) -> int | None:
    parts = module.split(".")
    return FLOORS.get(parts[1]) if parts[0] == "editkit" and len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_own_or_lower_floors(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in FLOORS, f"give {own} a floor"
    for module in imports(path):
        level = floor(module)
        assert level is None or level <= FLOORS[own], f"{path} imports {module}"
        if own == "data":
            assert not module.startswith(("transformers", "tokenizers", "editkit.lm"))
        if own in ("functional", "adapters"):
            assert not module.startswith("transformers")


def test_methods_do_not_import_each_other_or_data():
    families = {"base", "steps", "artefact", "locate", "targets", "memory", "column_search"}
    families |= {"side", "shards", "shard_training", "health", "wordings", "value_search"}
    # a method that is another one with parts added
    parents = {"windows": {"wise"}, "repair": {"windows"}}
    for path in (PACKAGE / "methods").glob("*.py"):
        for module in imports(path):
            assert not module.startswith("editkit.data")
            if module.startswith("editkit.methods.") and path.stem not in families:
                allowed = families | parents.get(path.stem, set())
                assert module.split(".")[2] in allowed, f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_only_where_used(path):
    assert not {m.split(".")[0] for m in imports(path, top_level=True)} & LAZY


def test_no_file_is_above_250_lines():
    long = {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 250}
    assert not long


PROBE = """
import os, random, sys, time
environment, state = dict(os.environ), random.getstate()
start = time.process_time()
import editkit
seconds = time.process_time() - start
assert dict(os.environ) == environment, "an environment variable changed"
assert random.getstate() == state, "the random state changed"
heavy = {"torch", "transformers", "lightning", "peft", "numpy"} & set(sys.modules)
assert not heavy, heavy
assert seconds < 1, seconds
import lightning.pytorch, peft, torchmetrics, transformers  # these have effects of their own
import torch
heavy = {"wandb", "datasets", "matplotlib", "bitsandbytes"} - set(sys.modules)
environment, state = dict(os.environ), random.getstate()
before = torch.random.get_rng_state()
import editkit.api
assert dict(os.environ) == environment, set(os.environ.items()) ^ set(environment.items())
assert torch.equal(torch.random.get_rng_state(), before), "torch's random state changed"
assert random.getstate() == state, "the random state changed"
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert "wandb" in heavy
"""


def test_import_is_light_and_changes_nothing():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
