"""Tasks before and after: equal to accuracies worked out by hand, saved, and wrong use named."""

from __future__ import annotations

import json
import math
import statistics
import sys

import pytest
import torch

import editkit
from editkit.cli import main
from editkit.data.factworld import FactWorld
from editkit.harness.compare import measure_tasks
from editkit.harness.scores import save_scores, score_table

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install editkit[eval]")
CHOICE = """
task: world_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3}}
"""
FREE = """
task: world_free
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 12, do_sample: false}}
filter_list:
  - name: clean
    filter: [{{function: remove_whitespace}}, {{function: take_first}}]
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Task files about facts that edits change or leave alone, their rows, and the edited model."""
    folder = tmp_path_factory.mktemp("tasks")
    data = FactWorld(limit=40, seed=5)
    data.setup()
    probes = [p for p in data.probes if p.kind == "locality"][:24]
    probes += [p for p in data.probes if p.kind == "reliability"][:8]
    others = sorted({p.target for p in probes})
    rows = []
    for i, probe in enumerate(probes):
        wrong = [o for o in others if o != probe.target][i % 5 : i % 5 + 3]
        choices = [*wrong[: i % 4], probe.target, *wrong[i % 4 :]]
        row = {"question": probe.prompt, "choices": choices, "answer": probe.target}
        rows.append(row | {"gold": choices.index(probe.target)})
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("choice", CHOICE), ("free", FREE)):
        (folder / f"{name}.yaml").write_text(text.format(rows=path, cache=folder / "cache"))
    lm = editkit.load("factworld", method="ft", lr=1e-2)
    for edit in data.edits[:8]:
        lm.edit(edit.prompt, edit.target)
    lm.save(folder / "run")
    return folder, rows, lm


@torch.no_grad()
def chosen(lm, row):
    """Log-likelihood of each choice, one row at a time, by the model's own forward."""
    head = lm.tokenizer(row["question"])["input_ids"]
    values = []
    for choice in row["choices"]:
        ids = lm.tokenizer(f"{row['question']} {choice}")["input_ids"]
        logits = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        values.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(head), len(ids))))
    return values


@torch.no_grad()
def is_exact(lm, row):
    ids = lm.tokenizer(row["question"], return_tensors="pt")["input_ids"]
    out = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    text = lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text.split(".")[0].strip() == row["answer"]


def by_hand(lm, rows):
    """By question: accuracy, accuracy by likelihood per character, exact match."""
    table = []
    for row in rows:
        values = chosen(lm, row)
        per_char = [v / len(c) for v, c in zip(values, row["choices"], strict=True)]
        table.append((
            float(values.index(max(values)) == row["gold"]),
            float(per_char.index(max(per_char)) == row["gold"]),
            float(is_exact(lm, row)),
        ))  # fmt: skip
    return [*zip(*table, strict=True)]


@pytest.fixture(scope="module")
def measured(world):
    folder, _, lm = world
    return measure_tasks(lm.lm, ["world_choice", "world_free"], folder, batch_size=7)


def test_scores_before_and_after_are_those_worked_out_by_hand(world, measured):
    _, rows, lm = world
    after = by_hand(lm.lm, rows)
    with lm.unedited():
        before = by_hand(lm.lm, rows)
    names = [("world_choice", "acc,none"), ("world_choice", "acc_norm,none"),
             ("world_free", "exact_match,clean")]  # fmt: skip
    moved = 0
    for (task, metric), one, other in zip(names, before, after, strict=True):
        cell = measured[task]["scores"][metric]
        changes = [b - a for a, b in zip(one, other, strict=True)]
        moved += any(changes)
        assert cell["before"] == pytest.approx(statistics.fmean(one))
        assert cell["after"] == pytest.approx(statistics.fmean(other))
        assert cell["difference"] == pytest.approx(statistics.fmean(changes))
        root = math.sqrt(len(rows))
        assert cell["before_stderr"] == pytest.approx(statistics.stdev(one) / root)
        assert cell["difference_stderr"] == pytest.approx(statistics.stdev(changes) / root)
        assert cell["higher_is_better"] is True
    assert moved == 3
    assert measured["world_choice"]["version"] == 3
    assert [measured[t]["n"] for t in measured] == [len(rows)] * 2


def test_limit_fewshot_and_batch_size_do_what_they_say(world):
    folder, _, lm = world
    few = measure_tasks(lm.lm, ["world_choice"], folder, limit=5, num_fewshot=2, batch_size=1)
    many = measure_tasks(lm.lm, ["world_choice"], folder, limit=5, num_fewshot=2, batch_size=64)
    assert few == many
    assert (few["world_choice"]["n"], few["world_choice"]["n_shot"]) == (5, 2)


def test_a_model_without_edits_is_measured_once(world, measured):
    folder, _, _ = world
    bare = editkit.load("factworld").lm
    found = measure_tasks(bare, ["world_choice"], folder)["world_choice"]["scores"]["acc,none"]
    assert found["before"] == measured["world_choice"]["scores"]["acc,none"]["before"]
    assert "after" not in found


def test_the_command_leaves_scores_in_the_run_folder(world, measured, capsys, monkeypatch):
    folder, _, _ = world
    monkeypatch.setattr(sys, "argv", ["editkit"])
    run = folder / "run"
    args = ["lm-eval", str(run), f"--include_path={folder}", "--batch_size=7", "--device=cpu"]
    assert main([*args, "--tasks=world_choice"]) == 0
    assert main([*args, "--tasks", "world_free"]) == 0
    saved = json.loads((run / "lm_eval.json").read_text())
    assert saved["tasks"] == measured
    assert saved["about"]["edits_seen"] == 8
    out = capsys.readouterr().out
    cell = measured["world_choice"]["scores"]["acc,none"]
    assert "unedited" in out
    assert f"{cell['difference']:+.3f} ± {cell['difference_stderr']:.3f}" in out


def test_scores_of_another_model_are_not_kept(tmp_path, measured):
    path = tmp_path / "lm_eval.json"
    save_scores(path, {"one": measured["world_choice"]}, {"edits_seen": 1})
    save_scores(path, {"two": measured["world_free"]}, {"edits_seen": 1})
    assert set(json.loads(path.read_text())["tasks"]) == {"one", "two"}
    save_scores(path, {"three": measured["world_free"]}, {"edits_seen": 2})
    assert set(json.loads(path.read_text())["tasks"]) == {"three"}
    path.write_text("[1]")
    with pytest.raises(ValueError, match="is no file of scores"):
        save_scores(path, {}, {})


def test_an_unknown_task_is_named_with_its_neighbours(monkeypatch, capsys):
    class Known:  # reading the harness' own 14,000 tasks takes seven seconds
        def __init__(self, include_path=None, include_defaults=True):
            self.all_subtasks = self.all_tasks = ["arc_easy", "hellaswag"] * include_defaults

        def match_tasks(self, names):
            return [t for t in self.all_tasks if t in names]

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Known)
    assert main(["lm-eval", "factworld", "--tasks=hellaswagg", "--limit=1"]) == 1
    assert "no task 'hellaswagg' in lm-evaluation-harness; did you mean hellaswag" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no tasks given; name some, such as --tasks arc_easy"),
        (["--tasks=x", "--include_path=nowhere"], "no folder 'nowhere'"),
    ],
)
def test_wrong_use_is_one_sentence(options, words, capsys):
    assert main(["lm-eval", "factworld", *options]) == 1
    assert words in capsys.readouterr().err


def test_a_number_below_one_is_refused(world):
    folder, _, lm = world
    for name in ("limit", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            measure_tasks(lm.lm, ["world_choice"], folder, **{name: 0})


def test_a_missing_harness_is_named_with_its_extra(capsys, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    assert main(["lm-eval", "factworld", "--tasks=arc_easy"]) == 1
    assert "pip install editkit[eval]" in capsys.readouterr().err


class Missing:
    """An importer that does not find lm_eval."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_score_of_no_number_is_left_out_of_the_table(measured):
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as capture:
        console.print(score_table(measured))
    text = capture.get()
    assert text.count("world_choice") == text.count("world_free") == 1
    assert "exact_match, clean" in text
    assert "N/A" not in text
