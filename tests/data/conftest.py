"""Small streams and files, made by hand."""

import json
import os
from pathlib import Path

import pytest

from editkit.data.base import EditDataModule
from editkit.edits import Edit, Probe


class Numbered(EditDataModule):
    """Edit i makes 'p{i} is' answer 't{i}'; three edits share each subject."""

    def __init__(self, count: int = 10, **kwargs):
        super().__init__(**kwargs)
        self.count, self.loads = count, 0

    def load(self):
        self.loads += 1
        self.texts = ["unrelated text"]
        edits = [Edit(i, f"s{i // 3} has p{i}", f"t{i}", f"s{i // 3}") for i in range(self.count)]
        probes = [
            Probe(f"{i}.{kind}", i, kind, f"s{i // 3} has p{i}", f"t{i}")
            for i in range(self.count)
            for kind in ("reliability", "generalization")
        ]
        return edits, [*probes, Probe("world", None, "intrinsic", "water is", "wet")]


@pytest.fixture
def numbered():
    return Numbered


@pytest.fixture
def write(tmp_path):
    """Write rows as JSON lines (given as texts or objects), return the path."""

    def write_rows(*rows: object, name: str = "edits.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write_rows


@pytest.fixture
def public_file():
    """Path of a public data set's file; skips the test where it is absent."""

    def find(name: str) -> Path:
        path = Path(os.environ.get("EDITKIT_SHARED", "../shared")) / "data" / name
        if not path.is_file():
            pytest.skip(f"{path} is missing")
        return path

    return find
