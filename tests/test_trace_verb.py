"""`editkit trace`: what it prints and writes, where its facts come from, and how mistakes end."""

import csv
import json

import pytest

from editkit.cli import main
from editkit.data.facts import known_facts, read_facts
from editkit.data.factworld import load_world


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_it_draws_a_heat_map_writes_numbers_and_proposes_layers(tmp_path, capsys):
    assert main(["trace", "factworld", "--limit=6", "--samples=2", "--out=found"]) == 0
    out = capsys.readouterr().out
    assert "causal_layers: [0, 1, 2]" in out.splitlines()
    folder = tmp_path / "found"
    assert sorted(f.name for f in folder.iterdir()) == ["trace.csv", "trace.json", "trace.png"]
    assert (folder / "trace.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "trace.json").read_text())
    assert record["model"] == "factworld"
    assert (record["facts"], record["samples"], record["window"]) == (6, 2, 1)
    assert record["causal_layers"] == [0, 1, 2]
    with (folder / "trace.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["effect"]) for row in rows] == [e["effect"] for e in record["effects"]]
    layer_0 = next(r for r in rows if r["kind"] == "mlp" and r["token"] == "last subject token")
    assert f"{float(layer_0['effect']):.3f}" in out
    assert float(layer_0["effect"]) > 0.5


def test_a_seed_decides_facts_and_noise(tiny, tmp_path):
    path = write(
        tmp_path / "f.jsonl", [{"prompt": f"{s} is", "subject": s} for s in ("Alba", "Oslo")]
    )
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        args = [f"--prompts={path}", f"--out={name}", f"--seed={seed}", "--samples=1"]
        assert main(["trace", tiny("llama"), *args]) == 0
    a, b, c = ((tmp_path / name / "trace.csv").read_text() for name in "abc")
    assert a == b != c


def test_facts_come_from_a_file_or_one_from_options(tiny, tmp_path):
    rows = [{"prompt": "the capital of Alba is", "subject": "Alba", "id": 7}]
    path = write(tmp_path / "facts.jsonl", [*rows, {"prompt": "Bera is in", "subject": "Bera"}])
    assert main(["trace", tiny("gpt2"), "--prompts", path, "--samples=1"]) == 0
    assert json.loads((tmp_path / "runs/trace/trace.json").read_text())["facts"] == 2
    one = ["--prompt", "the capital of Alba is", "--subject", "Alba", "--out=one", "--window=2"]
    assert main(["trace", tiny("gpt2"), *one]) == 0
    record = json.loads((tmp_path / "one" / "trace.json").read_text())
    assert (record["facts"], record["window"]) == (1, 2)
    assert all(cell["standard_error"] is None for cell in record["effects"])  # of one fact


def test_a_file_is_sampled_down_to_the_limit(tiny, tmp_path):
    rows = [{"prompt": f"{s} is in", "subject": s} for s in ("Alba", "Bera", "Cora")]
    path = write(tmp_path / "facts.jsonl", rows)
    assert main(["trace", tiny("llama"), "--prompts", path, "--limit=2", "--samples=1"]) == 0
    assert json.loads((tmp_path / "runs/trace/trace.json").read_text())["facts"] == 2


def test_facts_the_model_does_not_say_are_counted(tmp_path, capsys):
    facts = known_facts(load_world(), 2)
    rows = [{"prompt": f.prompt, "subject": f.subject, "target": f.target} for f in facts]
    rows[0]["target"] = "Nobody"
    path = write(tmp_path / "facts.jsonl", rows)
    assert main(["trace", "factworld", "--prompts", path, "--samples=1"]) == 0
    assert "1 facts left out, the model says otherwise" in capsys.readouterr().out


def test_files_of_known_facts_are_read_as_released(tmp_path):
    record = {
        "known_id": 0, "subject": "Alba", "attribute": "Rome", "template": "{} is in",
        "prediction": " Rome, a town", "prompt": "Alba is in", "relation_id": "P1",
    }  # fmt: skip
    path = tmp_path / "known.json"
    path.write_text(json.dumps([record, {**record, "attribute": None}], indent=2))
    one, two = read_facts(path)
    assert (one.prompt, one.subject, one.target) == ("Alba is in", "Alba", "Rome")
    assert two.target == ""


def test_known_facts_of_the_world_are_true_and_of_the_development_split():
    world = load_world()
    facts = known_facts(world, 50, seed=4)
    assert len({fact.prompt for fact in facts}) == 50
    assert facts != known_facts(world, 50, seed=5)
    for fact in facts:
        assert world.group[fact.subject] == "dev"
        assert fact.subject in fact.prompt
        assert fact.target in {f.object for f in world.facts_of(fact.subject).values()}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ([], "no facts to trace; give a file of --prompts, or --prompt and --subject"),
        (["--prompt=Alba is"], "--subject '' is not a part of --prompt 'Alba is'"),
        (["--prompt=Alba is", "--subject=Bera"], "--subject 'Bera' is not a part of --prompt"),
        (["--prompts=no.jsonl"], "no.jsonl: there is no such file"),
        (["--prompts=no.jsonl", "--prompt=a"], "give either a file of --prompts or one --prompt"),
        (["--limit=0"], "limit is 0; give at least 1"),
        (["--samples=0"], "samples is 0; give at least 1"),
        (["--noise=-1"], "noise is -1.0; give a number of standard deviations"),
    ],
)
def test_mistakes_end_in_one_sentence(tiny, capsys, options, error):
    assert main(["trace", tiny("llama"), *options]) == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("editkit: error: ")
    assert error in shown


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (
            {"subject": "Alba"},
            "facts.jsonl:2: needs a field 'prompt' that holds a text, found None",
        ),
        ({"prompt": "Alba is"}, "facts.jsonl:2: needs a field 'subject'"),
        (
            {"prompt": "Alba is", "subject": "Bera"},
            "facts.jsonl:2: subject 'Bera' is not in prompt",
        ),
        ({"prompt": "Alba is", "subject": "Alba", "target": 3}, "needs a field 'target'"),
    ],
)
def test_bad_rows_end_in_one_sentence_with_the_line(tiny, tmp_path, capsys, row, error):
    path = write(tmp_path / "facts.jsonl", [{"prompt": "Alba is", "subject": "Alba"}, row])
    assert main(["trace", tiny("llama"), "--prompts", path]) == 1
    assert error in capsys.readouterr().err
