"""The artefact: whole or refused."""

import pytest
import torch
from torch import nn

from editkit.adapters.delta import DeltaLayer
from editkit.adapters.io import (
    CONFIG,
    TENSORS,
    load_adapter,
    load_tensors,
    read_config,
    replacing,
    save_adapter,
)


@pytest.fixture
def layer():
    layer = DeltaLayer(nn.Linear(3, 5))
    layer.add(torch.arange(15.0).reshape(5, 3))
    return layer


@pytest.fixture
def folder(tmp_path, layer):
    save_adapter(tmp_path / "run", {"a.b": layer}, {"edits_seen": 3})
    return tmp_path / "run"


def test_round_trip_is_exact_and_leaves_no_temporary_file(folder, layer):
    fresh = DeltaLayer(nn.Linear(3, 5))
    load_adapter(folder, {"a.b": fresh})
    assert torch.equal(fresh.delta, layer.delta)
    assert read_config(folder)["edits_seen"] == 3
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS]


def test_tensors_and_layers_must_match():
    layer = DeltaLayer(nn.Linear(3, 5))
    with pytest.raises(ValueError, match=r"no tensor 'a\.delta'"):
        load_tensors({}, {"a": layer})
    with pytest.raises(ValueError, match=r"no edit layer takes tensor 'b\.delta'"):
        load_tensors({"a.delta": torch.ones(5, 3), "b.delta": torch.ones(1)}, {"a": layer})


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write_half():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
