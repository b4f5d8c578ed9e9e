"""Artefacts of one base added up, and exported as PEFT adapters."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import editkit
from editkit.adapters.io import CONFIG
from editkit.functional.spectral import low_rank

PROMPTS = ["the capital of Alba is", "a small town"]


def logits(lm):
    with torch.no_grad():
        return lm.lm.forward(lm.lm.encode(PROMPTS))


def made(folder, model, edits, **arguments):
    lm = editkit.load(model, **{"method": "ft", "steps": 3, **arguments})
    lm.edit_batch(edits)
    lm.save(folder)
    return lm


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_composed_changes_are_the_sum_of_the_parts(architecture, tiny, edits, tmp_path):
    model = tiny(architecture)
    one = made(tmp_path / "a", model, edits[:2])
    two = made(tmp_path / "b", model, edits[2:3], method="lora", steps=3)
    other = made(tmp_path / "c", model, edits[3:], layer=1)
    both = editkit.compose(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        for lm in (one, two, other):
            for path, layer in lm.lm.layers.items():
                weight, delta = base.get_submodule(path).weight, layer.merged_delta()
                weight += delta.T if layer.is_transposed else delta
        tokens = both.lm.encode(PROMPTS)
        expected = base(
            input_ids=tokens.ids_BT,
            attention_mask=tokens.mask_BT.long(),
            position_ids=tokens.positions_BT,
        ).logits
    assert torch.allclose(logits(both)[tokens.mask_BT], expected[tokens.mask_BT], atol=1e-4)
    assert [entry["edit_id"] for entry in both.ledger] == [0, 1, 2, 3]
    both.save(tmp_path / "all")
    assert torch.equal(logits(editkit.load_edited(tmp_path / "all")), logits(both))
    with pytest.raises(ValueError, match="makes no edits"):
        both.edit("the capital of Alba is", "Rome")


def test_edits_of_two_parts_at_odds_are_named(tiny, edits, tmp_path):
    made(tmp_path / "a", tiny("llama"), edits[:1])
    made(tmp_path / "b", tiny("llama"), [editkit.Edit(0, edits[0].prompt, "Rome")])
    with pytest.warns(UserWarning, match="edit 1 contradicts edit 0"):
        editkit.compose(tmp_path / "a", tmp_path / "b")


def test_what_cannot_be_added_is_refused(tiny, edits, tmp_path):
    made(tmp_path / "a", tiny("llama"), edits[:1])
    made(tmp_path / "m", tiny("llama"), edits[:1], method="memoir", prefixes=[])
    with pytest.raises(ValueError, match="1 run folders given"):
        editkit.compose(tmp_path / "a")
    with pytest.raises(ValueError, match=r"ResidualMemory at .* decides by its input"):
        editkit.compose(tmp_path / "a", tmp_path / "m")
    other = tmp_path / "other"
    shutil.copytree(tiny("llama"), other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    made(tmp_path / "b", str(other), edits[1:2])
    with pytest.raises(ValueError, match=r"are of different bases: .* made on .* but the base"):
        editkit.compose(tmp_path / "a", tmp_path / "b")


def test_an_artefact_without_a_format_is_read_as_the_first(tiny, edits, tmp_path):
    lm = made(tmp_path / "a", tiny("llama"), edits[:1])
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    del config["format"]
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    assert torch.equal(logits(editkit.load_edited(tmp_path / "a")), logits(lm))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["ft", "lora"])
def test_peft_loads_what_was_exported_and_answers_alike(method, architecture, tiny, tmp_path):
    lm = editkit.load(tiny(architecture), method=method, steps=3)
    if method == "ft":  # of rank 2, as two closed-form edits are
        (layer,) = lm.lm.layers.values()
        up, down = torch.randn(layer.shape_oi[0], 2), torch.randn(2, layer.shape_oi[1])
        layer.add(0.05 * up @ down)
    else:
        lm.edit("the capital of Alba is", "Oslo")
    lm.export(tmp_path / "out", form="peft")
    base = AutoModelForCausalLM.from_pretrained(tiny(architecture))
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    tokens = lm.lm.encode(PROMPTS)
    with torch.no_grad():
        theirs = adapted(
            input_ids=tokens.ids_BT,
            attention_mask=tokens.mask_BT.long(),
            position_ids=tokens.positions_BT,
        ).logits
    ours = logits(lm)
    assert (ours - theirs)[tokens.mask_BT].abs().max() < 1e-4 * ours.abs().max()
    with lm.unedited():
        assert (logits(lm) - theirs)[tokens.mask_BT].abs().max() > 1e-3


def test_a_change_that_is_not_low_rank_is_not_exported_to_peft(tiny, tmp_path):
    lm = editkit.load(tiny("llama"))
    (layer,) = lm.lm.layers.values()
    layer.add(torch.randn(layer.shape_oi))
    with pytest.raises(ValueError, match="has rank 32, and its two factors"):
        lm.export(tmp_path / "out", form="peft")
    assert not list(tmp_path.iterdir())


def test_factors_have_the_rank_of_the_matrix_and_give_it_back():
    torch.manual_seed(0)
    matrix_DF = torch.randn(7, 3, dtype=torch.float64) @ torch.randn(3, 9, dtype=torch.float64)
    up_DR, down_RF = low_rank(matrix_DF)
    assert up_DR.shape == (7, 3)
    assert torch.allclose(up_DR @ down_RF, matrix_DF, atol=1e-12)
    assert low_rank(torch.zeros(4, 5))[0].shape == (4, 1)
