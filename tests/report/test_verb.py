"""`editkit report`, and the report that every run of `fit` leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from editkit.cli import main


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["editkit"])
    monkeypatch.setattr("logging.raiseExceptions", False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fit(tiny, tmp_path):
    """Run `editkit fit` on three edits."""
    rows = [
        {"prompt": f"the capital of {s} is", "target": t, "probes": {"locality": [f"{s} is a"]}}
        for s, t in [("Alba", "Oslo"), ("Bera", "Lima"), ("Cora", "Bern")]
    ]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(*more):
        return main([
            "fit", "--model=editkit.methods.ft.FT", f"--model.lm.id={tiny('llama')}",
            "--model.lr=1e-2", "--data=editkit.data.jsonl.JSONL", "--data.path=edits.jsonl",
            "--trainer.default_root_dir=runs/x", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false", *more,
        ])  # fmt: skip

    return run


def test_runs_are_given_one_after_another(make_run, capsys):
    folders = [str(make_run(name, seed=i)) for i, name in enumerate("abc")]
    assert main(["report", *folders, "--out", "out/all.html", "--tables=out/tables"]) == 0
    assert "saved out/all.html" in capsys.readouterr().out
    text = Path("out/all.html").read_text()
    assert "3 runs" in text
    assert "corrected by Holm" in text
    assert Path("out/tables/comparison.csv").exists()
    assert main(["report", folders[1]]) == 0
    assert Path(folders[1], "report.html").exists()


def test_mixed_runs_are_an_error_of_one_line(make_run, stamp, capsys):
    folders = [str(make_run("a")), str(make_run("b"))]
    stamp(Path(folders[1]), edits_per_step=5)
    assert main(["report", *folders]) == 1
    told = capsys.readouterr().err
    assert "edits_per_step is 1 and 5" in told
    assert told.count("\n") == 1
    assert main(["report", *folders, "--allow_mixed", "true"]) == 0


def test_what_is_no_run_is_an_error_that_names_it(capsys):
    assert main(["report", "nowhere"]) == 1
    assert "no folder 'nowhere'" in capsys.readouterr().err


def test_help_shows_the_options_and_that_runs_may_be_many(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for part in ("runs [runs ...]", "--out", "--tables", "--allow_mixed", "reference"):
        assert part in told


def test_a_fit_leaves_a_report_and_what_the_unedited_model_said(fit, capsys):
    assert fit() == 0
    assert "report: runs/x/report.html" in capsys.readouterr().out
    text = Path("runs/x/report.html").read_text()
    summary = json.loads(Path("runs/x/summary.json").read_text())
    assert f"{summary['scores']['reliability']['generation']['value']:.3f}" in text
    lines = [json.loads(line) for line in Path("runs/x/unedited.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in Path("runs/x/probes.jsonl").read_text().splitlines()]
    final = {r["probe_id"]: r for r in rows if r["moment"] == "final"}
    assert {line["probe_id"] for line in lines} == set(final)
    for line in lines:
        if line["kind"] == "locality":  # the unedited model agrees with itself
            assert line["answer"] == final[line["probe_id"]]["reference"]
            assert line["scores"]["generation"] == line["scores"]["token_accuracy"] == 1


def test_a_report_that_fails_leaves_the_results(fit, capsys, monkeypatch):
    def fail(folders):
        raise ValueError("no ink")

    monkeypatch.setattr("editkit.trainer_cli.write_report", fail)
    assert fit() == 0
    assert "no report.html (no ink)" in capsys.readouterr().err
    assert Path("runs/x/summary.json").exists()
    assert not Path("runs/x/report.html").exists()
