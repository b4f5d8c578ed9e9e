"""`editkit plan`: what a run takes, told without a weight."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning as L
import pytest

from editkit.cli import main
from editkit.data.jsonl import JSONL
from editkit.lm.spec import LMSpec
from editkit.methods.ft import FT
from editkit.methods.lora import LoRA
from editkit.methods.memit import MEMIT
from editkit.methods.memoir import MEMOIR
from editkit.metrics.protocol import EvalProtocol
from editkit.plan import forecast

ROW = {"prompt": "the capital of Alba is", "target": "Oslo", "subject": "Alba"}


@pytest.fixture
def planned(tiny, tmp_path, monkeypatch):
    """Return the forecast of a method; weights may not be read."""
    monkeypatch.setattr("editkit.lm.editable.load_pretrained", lambda *a: pytest.fail("loaded"))
    (tmp_path / "edits.jsonl").write_text(json.dumps(ROW) + "\n")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)

    def plan(cls, **arguments):
        method = cls(lm=LMSpec(tiny("llama")), evaluation=EvalProtocol(), **arguments)
        return forecast(method, JSONL(str(tmp_path / "edits.jsonl")), trainer)

    return plan


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [(FT, {}), (LoRA, {}), (MEMIT, {"ridge": 1.0, "layers": [1, 2]}), (MEMOIR, {})],
)
def test_weights_and_edits_are_counted_from_shapes(cls, arguments, planned, tiny):
    found = planned(cls, **arguments)
    file = (Path(tiny("llama")) / "model.safetensors").stat().st_size
    assert found.parts["the base model"] == pytest.approx(file, rel=0.1)
    assert found.peak == sum(found.parts.values())
    assert found.seconds > 0
    assert found.verdict.startswith("fits: ")


def test_the_moments_of_locate_methods_are_counted(planned):
    one = planned(MEMIT, ridge=1.0, layers=[1])
    two = planned(MEMIT, ridge=1.0, layers=[1, 2])
    assert two.parts["second moments"] == 2 * one.parts["second moments"] == 4 * 8 * 64**2
    assert two.disk["kept in the cache"] == 2 * 8 * 64**2
    assert two.disk["adapter"] == 2 * 4 * 32 * 64


def test_what_does_not_fit_names_the_setting_of_the_largest_part(planned, monkeypatch):
    monkeypatch.setattr("editkit.plan._room", lambda device: 1)
    monkeypatch.setattr("editkit.plan._resident", lambda: 0)
    found = planned(FT)
    largest = max(found.parts, key=found.parts.get)
    assert found.verdict.startswith("will not fit: ")
    assert found.verdict.endswith(f"most goes to {largest}, so {found.advice[largest]}")


def test_the_command_line_takes_the_options_of_a_fit(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["editkit"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("editkit.lm.editable.load_pretrained", lambda *a: pytest.fail("loaded"))
    (tmp_path / "edits.jsonl").write_text(json.dumps(ROW) + "\n")
    args = ["plan", "--model=editkit.methods.ft.FT", f"--model.lm.id={tiny('llama')}"]
    args += ["--data=editkit.data.jsonl.JSONL", "--data.path=edits.jsonl"]
    assert main([*args, "--trainer.accelerator=cpu"]) == 0
    out = capsys.readouterr().out
    assert "the base model" in out
    assert "fits: " in out
    assert [path.name for path in tmp_path.iterdir()] == ["edits.jsonl"]
    assert main([*args, "--trainer.accelerator=cpu", "--model.layer=44"]) == 1
    assert "layer 44 is not in 0..3" in capsys.readouterr().err
