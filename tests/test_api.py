"""The Python door."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import editkit
from editkit.edits import Edit, Probe
from editkit.lm.spec import LMSpec
from editkit.methods.base import UndoError

FT = {"method": "ft", "layer": 2, "steps": 60, "lr": 3e-2, "append_eos": True}
PROMPT = "the capital of Alba is"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def lm(tiny):
    return editkit.load(tiny("llama"), **FT)


def test_edits_answers_and_unedits(lm):
    before = lm.generate(PROMPT, 5)
    numbers = lm.edit(PROMPT, " Rome ", subject="Alba")
    assert numbers["loss_after"] < 0.2 < numbers["loss_before"]
    assert lm.generate(PROMPT, 5) == "Rome"
    assert lm.generate([PROMPT, PROMPT], 5) == ["Rome", "Rome"]
    with lm.unedited():
        assert lm.generate(PROMPT, 5) == before
    assert lm.ledger[0]["target"] == "Rome"


def test_scores_only_probes_of_applied_edits(lm):
    probes = [Probe(str(i), i, "reliability", PROMPT, "Rome") for i in range(2)]
    assert lm.score(probes) == []
    lm.edit(PROMPT, "Rome")
    (row,) = lm.score(probes)
    assert (row["edit_id"], row["scores"]["sequence_accuracy"]) == (0, 1.0)


def test_save_and_load_on_a_moved_base(lm, tmp_path, tiny):
    lm.edit(PROMPT, "Rome")
    lm.save(tmp_path / "run")
    again = editkit.load_edited(tmp_path / "run", lm=LMSpec(id=tiny("llama")))
    assert again.generate(PROMPT, 5) == "Rome"
    assert again.ledger == lm.ledger
    assert [json.loads(x) for x in (tmp_path / "run/edits.jsonl").read_text().splitlines()]


def test_loading_on_another_base_names_both(lm, tmp_path, tiny):
    lm.edit(PROMPT, "Rome")
    lm.save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"were made on .*llama.* the base here is .*qwen2"):
        editkit.load_edited(tmp_path / "run", lm=LMSpec(id=tiny("qwen2")))


def test_undo_refuses_unknown_edits_by_number(lm):
    with pytest.raises(UndoError, match="edit 0 is not among the 0 made"):
        lm.undo(0)


def test_bad_edits_leave_the_model_as_it_was(lm):
    before = lm.lm.forward(lm.lm.encode([PROMPT]))
    for prompt, target, subject, match in [
        ("", "Rome", None, "needs a prompt and a target"),
        (PROMPT, " ", None, "needs a prompt and a target"),
        (PROMPT, "Rome", "Oslo", "subject 'Oslo' not found"),
    ]:
        with pytest.raises(ValueError, match=match):
            lm.edit(prompt, target, subject=subject)
    with pytest.raises(ValueError, match="learning rate"):
        editkit.load(lm.method.spec.id, **{**FT, "lr": 3e37}).edit(PROMPT, "Rome")
    assert torch.equal(lm.lm.forward(lm.lm.encode([PROMPT])), before)
    assert lm.ledger == []


def test_an_id_is_used_once(lm):
    one, other = Edit(0, PROMPT, "Oslo"), Edit(0, "the capital of Bera is", "Bern")
    with pytest.raises(ValueError, match=r"id 0 of edit .*Bera is' is that of .*the next free one"):
        lm.edit_batch([one, other])
    assert lm.ledger == []
    lm.edit_batch([one, Edit(7, "Cora is a", "town")])
    with pytest.raises(ValueError, match=r"id 7 .*the next free one is 8"):
        lm.edit_batch([Edit(7, "Dora is a", "town")])
    lm.edit("Dora is a", "city")
    assert [e["edit_id"] for e in lm.ledger] == [0, 7, 8]


def test_an_edit_that_is_written_is_in_the_ledger_whatever_comes_next(lm, monkeypatch):
    losses, calls = type(lm.method).edit_losses, []

    def interrupted(self, edits):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return losses(self, edits)

    monkeypatch.setattr(type(lm.method), "edit_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lm.edit("the capital of Alba is", "Oslo")
    assert any(layer.is_written for layer in lm.lm.layers.values())
    assert lm.method.edits_seen == len(lm.ledger) == 1
    assert lm.ledger[0]["loss_after"] is None
    lm.edit("the capital of Bera is", "Bern")
    assert [e["edit_id"] for e in lm.ledger] == [0, 1]
    assert lm.ledger[1]["loss_after"] is not None


def test_a_failed_edit_discards_its_scratch(lm):
    lm.edit(PROMPT, "Rome")
    (layer,) = lm.lm.layers.values()
    kept = layer.delta.detach().clone()
    lm.method.lr = 3e37
    with pytest.raises(ValueError, match="learning rate"):
        lm.edit_batch([Edit(1, "a small town is", "Oslo")])
    assert torch.equal(layer.delta, kept)
    assert torch.equal(layer.value("delta"), kept)
    assert lm.method.edits_seen == 1


def test_wrong_methods_and_options_are_named(tiny):
    for options, match in [
        ({"method": "foo"}, "no method 'foo'; there are alphaedit, emmet, .*ft, grace, lora"),
        ({"method": "windows"}, "editkit.methods.windows holds no method"),
        ({"method": "composed"}, "editkit.methods.composed holds no method"),
        ({"method": "memit"}, r"memit needs ridge=\.\.\.; experiments/method/memit.yaml has"),
        ({"method": "ft", "device": "nowhere"}, "no device 'nowhere' here; use cpu"),
        ({"method": "base"}, "holds no method"),
        ({"method": "json.JSONDecoder"}, "is not an EditModule"),
        ({"method": "nowhere.Foo"}, "no method class"),
        ({"method": "ft", "lrr": 1}, "lrr"),
        ({"method": "ft", "dtype": "int3"}, "dtype 'int3' is not one of"),
    ]:
        with pytest.raises(ValueError, match=match):
            editkit.load(tiny("llama"), **options)


def test_the_methods_that_are_named_are_those_with_a_yaml():
    with pytest.raises(ValueError, match="no method 'foo'; there are ") as told:
        editkit.load(method="foo")
    named = str(told.value).partition("there are ")[2].split(", ")
    yamls = {path.stem for path in (ROOT / "experiments" / "method").glob("*.yaml")}
    assert named == sorted(yamls - {"ft_breadth_first", "memoir_released", "wise_released"})


@pytest.mark.parametrize("made", ["float32", "bfloat16"])
def test_a_dtype_that_is_asked_for_wins_over_the_recorded_one(made, tiny, tmp_path):
    editkit.load(tiny("llama"), **FT, dtype=made).save(tmp_path)
    for asked in (None, "float32", "bfloat16"):
        again = editkit.load_edited(tmp_path, dtype=asked)
        assert str(again.lm.model.dtype) == f"torch.{asked or made}"
    with pytest.raises(ValueError, match="dtype 'int3' is not one of"):
        editkit.load_edited(tmp_path, dtype="int3")


def test_a_class_outside_the_package_needs_trust(tiny, tmp_path, lm):
    lm.edit(PROMPT, "Rome")
    lm.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["class_path"] = "somewhere.Else"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust=True"):
        editkit.load_edited(tmp_path)


def test_export_refuses_what_cannot_be_merged(lm, tmp_path, monkeypatch):
    (layer,) = lm.lm.layers.values()
    monkeypatch.setattr(type(layer), "merged_delta", lambda self: None)
    with pytest.raises(ValueError, match=r"DeltaLayer at 'model\.layers\.2"):
        lm.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_module_attributes_are_loaded_on_demand():
    assert editkit.EditedLM.__name__ == "EditedLM"
    with pytest.raises(AttributeError, match="no attribute 'nowhere'"):
        _ = editkit.nowhere


def test_an_edit_at_odds_with_the_ledger_is_made_with_a_warning(tiny, tmp_path):
    lm = editkit.load(tiny("llama"), steps=1)
    lm.edit("the capital of Alba is", "Oslo")
    lm.edit("the capital of Bera is", "Lima")
    with pytest.warns(UserWarning, match="edit 2 contradicts edit 0: .* before .* 'Oslo'"):
        lm.edit("The capital of Alba is", "Rome")
    with pytest.warns(UserWarning, match="edit 4 repeats edit 3"):
        lm.edit_batch([Edit(3, "he works for", "Rome"), Edit(4, "he works for", "Rome")])
    assert [e["edit_id"] for e in lm.ledger] == [0, 1, 2, 3, 4]
    lm.save(tmp_path)
    with pytest.warns(UserWarning, match="edit 5 contradicts edit 1"):
        editkit.load_edited(tmp_path).edit("the capital of Bera is", "Bern")


def test_an_edit_that_is_no_longer_there_is_no_conflict(tiny, recwarn):
    lm = editkit.load(tiny("llama"), steps=1)
    lm.edit("the capital of Alba is", "Oslo")
    lm.ledger[0]["undone"] = True
    lm._made_count = -1  # as `undo` does, which FT refuses
    lm.edit("the capital of Alba is", "Rome")
    with pytest.raises(ValueError, match="subject"):
        lm.edit("he works for", "Rome", subject="Alba")
    lm.ledger[1]["rolled_back"] = True
    with pytest.raises(ValueError, match="edit 1 is not among the 1 made"):
        lm.undo(1)
    assert not [w for w in recwarn if "contradicts" in str(w.message)]
