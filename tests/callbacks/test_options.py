"""The callbacks from the command line: a real collapse, and a stream refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from editkit.cli import main


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Return the arguments of a run of the packaged model into `run`, with more appended."""
    monkeypatch.setattr(sys, "argv", ["editkit"])
    monkeypatch.setattr("logging.raiseExceptions", False)
    monkeypatch.chdir(tmp_path)
    return lambda *more: [
        "fit",
        "--model=editkit.methods.ft.FT",
        "--model.lm.id=factworld",
        "--model.steps=3",
        "--model.evaluation.scorers=[sequence_accuracy]",
        "--data=editkit.data.factworld.FactWorld",
        "--data.limit=6",
        "--data.intrinsic=10",
        "--trainer.default_root_dir=run",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--milestones.at=[]",
        *more,
    ]


def test_a_collapse_is_taken_back_and_told(fit, capsys):
    """With this learning rate the very first edit breaks the model."""
    watched = ("--canary.action=rollback", "--canary.every=4", "--ability.every=2")
    assert main(fit("--model.lr=1.0", *watched)) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    event = summary["canary"]
    assert (event["culprit"], event["healthy_at"], summary["edits_seen"]) == ([0], 0, 0)
    assert event["rolled_back"] == [0, 1, 2, 3]
    ledger = [json.loads(line) for line in Path("run/edits.jsonl").read_text().splitlines()]
    assert [e["edit_id"] for e in ledger if e["rolled_back"]] == [0, 1, 2, 3]
    assert summary["perplexity"]["before"] == summary["perplexity"]["after"]
    (row,) = map(json.loads, Path("run/ability.jsonl").read_text().splitlines())
    assert row["facts"] == 1.0
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["canary"]["action"] == "rollback"
    assert config["ability"] == {"every": 2}
    out = " ".join(capsys.readouterr().out.split())
    assert "edit 0 did it" in out
    assert "taken back to the commit of 0 edits" in out


def test_a_stream_at_odds_with_itself_is_refused_in_a_sentence(fit, capsys, tmp_path):
    prompts = ["What team is Ann on?", "On what team is Ann?"]
    rows = [{"prompt": prompt, "target": "Oslo"} for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--data=editkit.data.jsonl.JSONL", "--data.path=rows.jsonl"]
    given = [a for a in fit("--conflicts.on_conflict=raise") if not a.startswith("--data")]
    assert main([*given, *data]) == 1
    assert "the stream is at odds with itself in 1 near repeat: edit 1 nearly repeats edit 0" in (
        capsys.readouterr().err
    )
    assert not Path("run").exists()


def test_a_canary_with_nothing_to_watch_is_refused(fit, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Alba is", "target": "big"}))
    data = ["--data=editkit.data.jsonl.JSONL", "--data.path=rows.jsonl"]
    given = [a for a in fit("--canary.action=stop") if not a.startswith("--data")]
    assert main([*given, *data]) == 1
    assert "the data has nothing to watch" in capsys.readouterr().err
