"""The YAML of each data set binds, and a run says what came of its file."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from editkit.cli import main

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "experiments/data").glob("*.yaml"))


@pytest.fixture(autouse=True)
def quiet_argv(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["editkit"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("logging.raiseExceptions", False)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_yaml_binds_with_a_path_of_ones_own(path, capsys):
    written = yaml.safe_load(path.read_text())
    own = {} if path.stem == "factworld" else {"path": "mine.json"}
    args = ["fit", "--model=editkit.methods.ft.FT", "--model.lm.id=x", f"--data={path}"]
    args += [f"--data.{name}={value}" for name, value in own.items()]
    with pytest.raises(SystemExit) as caught:
        main([*args, "--print_config"])
    assert caught.value.code in (0, None)
    bound = yaml.safe_load(capsys.readouterr().out)["data"]
    assert bound["class_path"] == written["class_path"]
    for name, value in {**written["init_args"], **own}.items():
        assert bound["init_args"][name] == value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_yaml_begins_with_what_it_is(path):
    assert path.read_text().startswith("# ")


def test_a_misspelt_option_of_a_data_set_is_named(capsys):
    path = ROOT / "experiments/data/zsre.yaml"
    args = ["fit", "--model=editkit.methods.ft.FT", "--model.lm.id=x", f"--data={path}"]
    assert main([*args, "--data.readings=answers"]) == 2
    assert "'readings' is not accepted by editkit.data.zsre.ZsRE" in capsys.readouterr().err


def test_a_run_shows_and_stamps_what_it_read(tiny, tmp_path, capsys):
    rows = [
        {
            "case_id": i,
            "prompt": f"the capital of {s} is",
            "subject": s,
            "target_new": t,
            "ground_truth": "Lima",
            "rephrase_prompt": f"{s} is where he lives in {i}",
            "locality_prompt": f"the capital of Dora is in {i}",
            "locality_ground_truth": "Lima",
        }
        for i, (s, t) in enumerate([("Alba", "Oslo"), ("Bera", "Rome"), ("Alba", "Bern")])
    ]
    source = tmp_path / "facts.json"
    source.write_text(json.dumps([*rows, {**rows[0], "case_id": 9, "target_new": " "}]))
    args = ["--model=editkit.methods.ft.FT", f"--model.lm.id={tiny('llama')}", "--model.steps=2"]
    args += ["--data=editkit.data.counterfact.CounterFact", f"--data.path={source}"]
    args += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    args += ["--trainer.default_root_dir=run"]
    assert main(["fit", *args]) == 1
    assert "facts.json:1: field 'target_new' is empty" in capsys.readouterr().err
    assert main(["fit", *args, "--data.on_bad_row=skip"]) == 0
    shown = capsys.readouterr().out
    for name, number in (("rows in", 4), ("rows used", 3), ("edits that update", 1)):
        assert any(name in x and str(number) in x.split("│")[2] for x in shown.splitlines())
    protocol = json.loads(Path("run/summary.json").read_text())["protocol"]
    assert list(protocol["data_sources"]) == ["facts.json"]
    assert len(protocol["probes_sha256"]) == 64
    probes = [json.loads(line) for line in Path("run/probes.jsonl").read_text().splitlines()]
    final = {p["probe_id"] for p in probes if p["moment"] == "final"}
    assert "2.reliability" in final
    assert "0.reliability" not in final  # overwritten by edit 2
    assert "0.reliability" in {p["probe_id"] for p in probes if p["moment"] == "immediate"}
