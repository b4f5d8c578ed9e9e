"""Bad input of every sort: one clear sentence, an exit code that is not 0, nothing written over."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import editkit
from editkit.adapters.io import CONFIG, TENSORS
from editkit.cli import main

GOOD = {"prompt": "the capital of Alba is", "target": "Oslo", "subject": "Alba"}


@pytest.fixture(autouse=True)
def quiet_argv(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["editkit"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("logging.raiseExceptions", False)


def contents(folder):
    """Return what lies in a folder: names and hashes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_refused(args, match, capsys, folder):
    """The command ends in one sentence that has these words; the folder is as it was."""
    before = contents(folder)
    code = main(args)
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if line.startswith("editkit: error:")]
    assert code in (1, 2), err
    assert len(told) == 1, err
    matches = [match] if isinstance(match, str) else match
    assert any(words in told[0] for words in matches)
    assert "Traceback" not in err
    assert contents(folder) == before


# rows

ROWS = {
    "no prompt": ({"target": "Oslo"}, "'prompt' is missing"),
    "no target": ({"prompt": "a b"}, "'target' is missing"),
    "empty prompt": ({**GOOD, "prompt": "  "}, "prompt"),
    "empty target": ({**GOOD, "target": ""}, "target"),
    "number for a target": ({**GOOD, "target": 5}, "target"),
    "list for a prompt": ({**GOOD, "prompt": ["a"]}, "prompt"),
    "subject elsewhere": ({**GOOD, "subject": "Bera"}, "Bera"),
    "subject of another type": ({**GOOD, "subject": 3}, "subject"),
    "misspelt field": ({**GOOD, "rephrase_": ["x"]}, "rephrase_"),
    "misspelt kind of probe": ({**GOOD, "probes": {"localty": ["x y"]}}, "localty"),
    "probes of another type": ({**GOOD, "probes": ["x"]}, "probes"),
    "portability without a target": (
        {**GOOD, "probes": {"portability": [{"prompt": "x"}]}},
        "target",
    ),
    "text that is trained on and asked": (
        {**GOOD, "rephrases": ["a b c"], "probes": {"generalization": ["a b c"]}},
        "a b c",
    ),
    "not an object": (["prompt", "target"], "object"),
    "a bare number": (7, "object"),
    "not JSON": ("{'prompt': 1}", "JSON"),
    "cut short": ('{"prompt": "the cap', "JSON"),
}


@pytest.fixture
def fit(tiny, tmp_path):
    """Return the arguments of a run into runs/x."""
    (tmp_path / "edits.jsonl").write_text(json.dumps(GOOD) + "\n")

    def args(*more):
        return [
            "fit", "--model=editkit.methods.ft.FT", f"--model.lm.id={tiny('llama')}",
            "--model.steps=2", "--data=editkit.data.jsonl.JSONL", "--data.path=edits.jsonl",
            "--trainer.default_root_dir=runs/x", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false", "--model.evaluation.max_new_tokens=3", *more,
        ]  # fmt: skip

    return args


def test_all_bad_rows_are_told_at_once_with_their_lines(fit, tmp_path, capsys):
    rows = [GOOD, *(row for row, _ in ROWS.values())]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines) + "\n")
    check_refused(fit(), f"{len(ROWS)} of {len(rows)} rows", capsys, tmp_path)


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_named_with_its_line(name, tmp_path):
    from editkit.data.jsonl import JSONL

    row, match = ROWS[name]
    path = tmp_path / "bad.jsonl"
    bad = row if isinstance(row, str) else json.dumps(row)
    path.write_text(json.dumps({**GOOD, "prompt": "the capital of Alba was"}) + "\n" + bad + "\n")
    with pytest.raises(ValueError, match=match) as told:
        JSONL(str(path)).setup()
    assert "line 2" in str(told.value) or ":2" in str(told.value)


# artefacts


@pytest.fixture(scope="module")
def saved(tiny, edits, tmp_path_factory):
    """A saved run."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    lm = editkit.load(tiny("llama"), method="ft", steps=2)
    lm.edit_batch(edits[:2])
    lm.save(folder)
    return folder


def config_with(**changes):
    def change(run):
        path = run / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def config_without(name):
    def change(run):
        path = run / CONFIG
        kept = json.loads(path.read_text())
        del kept[name]
        path.write_text(json.dumps(kept))

    return change


def tensors_with(rename, and_hash):
    def change(run):
        path = run / TENSORS
        found = {rename(k): v.clone() for k, v in load_file(path).items()}
        save_file(found, path)
        if and_hash:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            config_with(tensors_sha256=digest)(run)

    return change


def flipped(run):
    blob = bytearray((run / TENSORS).read_bytes())
    blob[-5] ^= 1
    (run / TENSORS).write_bytes(bytes(blob))


def cut(name, count):
    def change(run):
        (run / name).write_bytes((run / name).read_bytes()[:-count])

    return change


def without(name):
    return lambda run: (run / name).unlink()


def other_arguments(run):
    path = run / CONFIG
    kept = json.loads(path.read_text())
    kept["init_args"]["layer"] = 1
    path.write_text(json.dumps(kept))


ARTEFACTS = {
    "not there": (lambda run: shutil.rmtree(run), "adapter_config.json"),
    "no config": (without(CONFIG), "has no adapter_config.json"),
    "no tensors": (without(TENSORS), "has no adapter_model.safetensors"),
    "config cut short": (cut(CONFIG, 20), "is damaged"),
    "config is a list": (lambda run: (run / CONFIG).write_text("[]"), "is damaged"),
    "tensors cut short": (cut(TENSORS, 10), "truncated or was changed"),
    "tensors empty": (lambda run: (run / TENSORS).write_bytes(b""), "truncated or was changed"),
    "one bit flipped": (flipped, "truncated or was changed"),
    "newer format": (config_with(format=99), "format 99, this editkit reads up to"),
    "format is a word": (config_with(format="two"), "is damaged"),
    "no class path": (config_without("class_path"), "class_path"),
    "no arguments": (config_without("init_args"), "init_args"),
    "no base": (config_without("base"), "base"),
    "no hash of the tensors": (config_without("tensors_sha256"), "tensors_sha256"),
    "class that is not there": (config_with(class_path="editkit.methods.ft.FTT"), "FTT"),
    "class that is no method": (config_with(class_path="editkit.methods.ft.descend"), "descend"),
    "class from elsewhere": (config_with(class_path="os.system"), "trust=True"),
    "argument of no method": (config_with(init_args={"depth": 3}), "depth"),
    "base that is not there": (config_with(lm={"id": "./nowhere"}), "'./nowhere' does not exist"),
    "base of other weights": (
        config_with(base={"id": "elsewhere", "hash": "0" * 64}),
        "made on 'elsewhere' (weights 000000000000), but the base here is",
    ),
    "tensors of another method": (tensors_with(lambda k: k + "s", True), "another method"),
    "tensors of another layer": (other_arguments, "another method"),
    "ledger cut short": (cut("edits.jsonl", 9), "edits.jsonl"),
    "base with a field that it does not have": (config_with(lm={"name": "x"}), CONFIG),
    "base that is no record": (config_with(lm="llama"), CONFIG),
    "weights that are no record": (config_with(base="x"), CONFIG),
    "weights without a hash": (config_with(base={"id": "x"}), CONFIG),
    "arguments that are no record": (config_with(init_args=[1]), CONFIG),
    "edits that are no number": (config_with(edits_seen="many"), CONFIG),
}


@pytest.mark.parametrize("name", ARTEFACTS)
def test_an_artefact_that_is_not_whole_is_refused(name, saved, tmp_path, capsys):
    spoil, match = ARTEFACTS[name]
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    spoil(run)
    check_refused(["generate", str(run), "the capital of Alba is"], match, capsys, tmp_path)


def test_an_artefact_on_another_base_names_both_hashes(saved, tiny, tmp_path):
    from editkit.lm.spec import LMSpec

    other = tmp_path / "other"
    shutil.copytree(tiny("llama"), other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    own, its = json.loads((saved / CONFIG).read_text())["base"]["hash"], LMSpec(id=str(other))
    with pytest.raises(ValueError, match=own[:12]) as told:
        editkit.load_edited(saved, lm=its)
    assert str(told.value).count("weights ") == 2


def written(name, text):
    return lambda run: (run / name).write_text(text)


def ledger_with(line):
    def change(run):
        kept = (run / "edits.jsonl").read_text().splitlines()
        (run / "edits.jsonl").write_text(f"{kept[0]}\n{line}\n")

    return change


def with_summary(text):
    def change(run):
        data = "data: {class_path: editkit.data.factworld.FactWorld, init_args: {limit: 2}}\n"
        (run / "config.yaml").write_text(data)
        (run / "summary.json").write_text(text)

    return change


EDITED_RUNS = {
    "edits that are no record": (config_with(lm="llama"), CONFIG),
    "a line with nothing in it": (ledger_with("{}"), "line 2 of"),
    "a line that is a list": (ledger_with("[1]"), "line 2 of"),
    "an edit without a number": (ledger_with('{"edit_id": "a", "prompt": "p", "target": "t", '
                                             '"undone": false}'), "an edit_id is 'a'"),
    "a ledger that lacks a line": (
        lambda run: written("edits.jsonl", (run / "edits.jsonl").open().readline())(run),
        "names 1 of the 2 edits",
    ),
    "config broken": (written("config.yaml", "data: [x\n"), "config.yaml' is damaged"),
    "config is a list": (written("config.yaml", "[1]\n"), "config.yaml' is damaged"),
    "data is a word": (written("config.yaml", "data: x\n"), "config.yaml' is damaged"),
    "summary cut short": (with_summary('{"prot'), "summary.json' is damaged"),
    "summary is a list": (with_summary("[]"), "summary.json' is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITED_RUNS)
def test_a_run_that_is_not_whole_is_not_fine_tuned(name, saved, tmp_path, capsys):
    spoil, match = EDITED_RUNS[name]
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    spoil(run)
    task = ["--data=editkit.retention.tasks.Text", "--data.path=texts.txt"]
    check_refused(["retain", f"--run={run}", *task], match, capsys, tmp_path)


# checkpoints and configs


def not_ours(path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.5.0"}, path)


CHECKPOINTS = {
    "not there": (lambda path: None, "does not exist"),
    "empty": (lambda path: path.write_bytes(b""), "is no whole checkpoint"),
    "text": (lambda path: path.write_text("a checkpoint"), "is no whole checkpoint"),
    "cut short": (lambda path: (not_ours(path), cut(path.name, 40)(path.parent)), "is no whole"),
    "of something else": (not_ours, "was not written by editkit"),
    "a folder": (lambda path: path.mkdir(), "is no whole checkpoint"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_gone_on_with_is_refused(name, fit, tmp_path, capsys):
    make, match = CHECKPOINTS[name]
    make(tmp_path / "bad.ckpt")
    check_refused(fit("--ckpt_path=bad.ckpt"), match, capsys, tmp_path)


CONFIGS = {
    "option": (
        ["--model.lrr=3"],
        "error: option 'lrr' is not accepted by editkit.methods.ft.FT; `editkit fit",
    ),
    "diverging edit": (["--model.lr=3e37"], "learning rate"),
    "weights cut short": (["--model.lm.id=./cut"], "truncated or damaged"),
    "weights that lack a tensor": (["--model.lm.id=./holes"], "lack 1 tensors"),
    "method": (["--model=editkit.methods.ft.FTT"], "FTT"),
    "value of another type": (["--model.lr=fast"], "fast"),
    "choice": (["--model.order=sideways"], "sideways"),
    "no steps": (["--model.steps=0"], "steps is 0"),
    "layer": (["--model.layer=44"], "layer 44 is not in 0..3"),
    "scorer": (["--model.evaluation.scorers=[accuracy]"], "accuracy"),
    "dtype": (["--model.lm.dtype=float8"], "float8"),
    "model": (["--model.lm.id=./nowhere"], "'./nowhere' does not exist"),
    "file": (["--data.path=nowhere.jsonl"], "nowhere.jsonl"),
    "edits at once": (["--data.edits_per_step=0"], "edits_per_step is 0"),
    "start": (["--data.start=9"], "start is 9"),
    "increments": (["--data.increments=[5]"], "increments [5]"),
    "epochs": (["--trainer.max_epochs=2"], "max_epochs"),
    "accelerator": (["--trainer.accelerator=gpu"], "gpu"),
    "strategy": (["--trainer.devices=2", "--trainer.strategy=ddp_spawn"], "strategy ddp"),
    "4 bits on no GPU, or without the library": (
        [
            "--trainer.plugins=[{class_path: lightning.pytorch.plugins.precision."
            "BitsandbytesPrecision, init_args: {mode: nf4}}]"
        ],
        [
            "bitsandbytes is asked for and not installed: pip install 'editkit[quant]'",
            "Bitsandbytes is only supported on CUDA GPUs",
        ],
    ),
    "canary": (["--canary.every=0"], "canary.every is 0"),
    "conflicts": (["--conflicts.similarity=7"], "conflicts.similarity is 7"),
    "YAML": (["--model=broken.yaml"], "broken.yaml"),
    "YAML that is not there": (["-c", "nowhere.yaml"], "nowhere.yaml"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_makes_no_sense_is_refused(name, fit, tiny, tmp_path, capsys):
    more, match = CONFIGS[name]
    for copy in ("cut", "holes"):
        shutil.copytree(tiny("llama"), tmp_path / copy)
    cut("model.safetensors", 1000)(tmp_path / "cut")
    weights = load_file(tmp_path / "holes" / "model.safetensors")
    del weights["model.layers.2.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "holes" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "broken.yaml").write_text("class_path: [editkit\n")
    check_refused(fit(*more), match, capsys, tmp_path)
    assert not (tmp_path / "runs").exists()
