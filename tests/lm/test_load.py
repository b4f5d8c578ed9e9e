"""Loading: what is wrong is said in one sentence, and the base has an identity."""

import shutil

import pytest
import torch

from editkit.lm.editable import EditableLM
from editkit.lm.load import resolve_dtype, weight_hash
from editkit.lm.spec import LMSpec


def test_the_hash_follows_the_weights(tiny, tmp_path):
    folder = tiny("llama")
    shutil.copytree(folder, tmp_path / "copy")
    assert weight_hash(LMSpec(id=str(tmp_path / "copy"))) == weight_hash(LMSpec(id=folder))
    path = tmp_path / "copy" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert weight_hash(LMSpec(id=str(tmp_path / "copy"))) != weight_hash(LMSpec(id=folder))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'\./nowhere' does not exist"):
        EditableLM.load(LMSpec(id="./nowhere"))
    with pytest.raises(ValueError, match=r"has no config\.json"):
        EditableLM.load(LMSpec(id=str(tmp_path)))
    with pytest.raises(ValueError, match="no weight files"):
        weight_hash(LMSpec(id=str(tmp_path)))


def test_an_unreachable_hub_id_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot load model 'nobody/nothing'"):
        EditableLM.load(LMSpec(id="nobody/nothing"))


def test_dtype_names():
    assert resolve_dtype(None, torch.bfloat16) == torch.bfloat16
    assert resolve_dtype("float16", torch.float32) == torch.float16
    with pytest.raises(ValueError, match="dtype 'fp8' is not one of"):
        resolve_dtype("fp8", torch.float32)


def test_the_packaged_model_has_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert LMSpec().path.endswith("assets/factworld")
    (tmp_path / "factworld").mkdir()
    assert LMSpec().path.endswith("assets/factworld")
    (tmp_path / "factworld" / "config.json").touch()
    assert LMSpec().path == "factworld"
