"""The command line: what a run leaves behind, and how each mistake ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from editkit.cli import main

ROOT = Path(__file__).parents[1]
SUBJECTS = ["Alba", "Bera", "Cora", "Dora", "Elda", "Rome"]


@pytest.fixture(autouse=True)
def quiet_argv(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["editkit"])
    monkeypatch.chdir(tmp_path)
    # a handler made in one test holds the stream that pytest closed behind it
    monkeypatch.setattr("logging.raiseExceptions", False)


@pytest.fixture
def stream(tmp_path):
    rows = [
        {
            "prompt": f"the capital of {s} is",
            "target": t,
            "subject": s,
            "probes": {
                "generalization": [f"where lives {s} ? Answer :"],
                "locality": [f"a small town in {s} is"],
                "portability": [{"prompt": f"{s} is a big", "target": t}],
            },
        }
        for s, t in zip(SUBJECTS, ["Oslo", "Lima", "Bern", "Rome", "Paris", "town"], strict=True)
    ]
    path = tmp_path / "edits.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.txt").write_text("the capital of Alba\nhe works for Rome and Paris\n")
    return path


@pytest.fixture
def fit(tiny, stream):
    """Return the arguments of a run into runs/x, with more appended."""

    def args(*more, verb="fit"):
        return [
            verb,
            "--model=editkit.methods.ft.FT",
            f"--model.lm.id={tiny('llama')}",
            "--model.lr=1e-2",
            "--data=editkit.data.jsonl.JSONL",
            f"--data.path={stream}",
            f"--data.text={stream.parent / 'text.txt'}",
            "--trainer.default_root_dir=runs/x",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--milestones.at=[1,3]",
            *more,
        ]

    return args


def rows_of(path="runs/x/probes.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_fit_leaves_a_complete_run_folder(fit, capsys):
    assert main(fit()) == 0
    names = {p.name for p in Path("runs/x").iterdir()} - {"hparams.yaml"}  # of Lightning 2.5
    assert names == {
        "config.yaml", "adapter_config.json", "adapter_model.safetensors", "edits.jsonl",
        "probes.jsonl", "summary.json", "metrics.csv", "checkpoints", "ability.jsonl",
        "unedited.jsonl", "report.html",
    }  # fmt: skip
    summary = json.loads(Path("runs/x/summary.json").read_text())
    assert summary["edits_seen"] == 6
    kinds = {"reliability", "generalization", "locality", "portability"}
    scorers = {"token_accuracy", "sequence_accuracy", "generation", "nll"}
    for part in (summary["scores"], summary["immediate"]):
        assert set(part) == kinds
        for cells in part.values():
            assert set(cells) == scorers
            assert all(cell["n"] == 6 for cell in cells.values())
    assert summary["perplexity"]["before"] != summary["perplexity"]["after"]
    protocol = summary["protocol"]
    assert (protocol["n_edits"], protocol["edits_per_step"], protocol["seed"]) == (6, 1, 0)
    assert len(protocol["base_hash"]) == 64
    assert protocol["scorers"]
    ledger = rows_of("runs/x/edits.jsonl")
    assert [e["edit_id"] for e in ledger] == list(range(6))
    out = capsys.readouterr().out
    assert "reliability" in out
    assert "by the number of later edits" in out


def test_probes_are_asked_right_after_at_milestones_and_at_the_end(fit):
    assert main(fit()) == 0
    asked = {}
    for row in rows_of():
        key = (row["moment"], row["edits_seen"])
        asked.setdefault(key, set()).add(row["edit_id"])
    expected = {("immediate", n): {n - 1} for n in range(1, 7)}
    expected |= {("milestone", 1): {0}, ("milestone", 3): {0, 1, 2}, ("final", 6): set(range(6))}
    assert asked == expected


def test_final_scores_are_the_mean_of_the_final_rows(fit):
    assert main(fit()) == 0
    summary = json.loads(Path("runs/x/summary.json").read_text())
    final = [r for r in rows_of() if r["moment"] == "final" and r["kind"] == "locality"]
    mean = sum(r["scores"]["token_accuracy"] for r in final) / len(final)
    assert summary["scores"]["locality"]["token_accuracy"]["value"] == pytest.approx(mean)


def test_a_finished_run_is_not_written_over_unless_told(fit, capsys):
    assert main(fit("--data.limit=2")) == 0
    before = Path("runs/x/summary.json").read_text()
    tuned = Path("runs/x/retention/text")
    (tuned / "arms" / "edited").mkdir(parents=True)
    for name in ("summary.json", "arms/edited/done.json"):
        (tuned / name).write_text("{}")
    Path("runs/x/notes.txt").write_text("mine")
    assert main(fit("--data.limit=2")) == 1
    assert tuned.exists()
    assert "holds a finished run" in capsys.readouterr().err
    assert Path("runs/x/summary.json").read_text() == before
    assert main(fit("--data.limit=3", "--run.overwrite=true")) == 0
    assert json.loads(Path("runs/x/summary.json").read_text())["edits_seen"] == 3
    assert not Path("runs/x/retention").exists()  # of the model that was here before
    assert Path("runs/x/notes.txt").exists()


def test_a_stopped_run_resumes_to_the_same_probes(fit, tmp_path):
    assert main(fit()) == 0
    straight = rows_of()
    shutil.rmtree("runs")
    checkpoint = """
class_path: lightning.pytorch.callbacks.ModelCheckpoint
init_args: {dirpath: runs/x/checkpoints, every_n_train_steps: 1, save_last: true,
            enable_version_counter: false}
"""
    (tmp_path / "trainer.yaml").write_text(
        yaml.safe_dump({"callbacks": [yaml.safe_load(checkpoint)], "max_steps": 3})
    )
    assert main(fit("--trainer=trainer.yaml")) == 0
    resumed = fit("--trainer=trainer.yaml", "--trainer.max_steps=-1", "--ckpt_path=last")
    assert main(resumed) == 0

    def without_the_stop(rows):
        return [r for r in rows if r["moment"] == "immediate" or r["edits_seen"] != 3]

    assert without_the_stop(rows_of()) == without_the_stop(straight)


def test_a_folder_with_a_run_in_it_is_claimed_or_refused(fit, capsys, tmp_path):
    assert main(fit("--data.limit=2")) == 0
    for name in ("summary.json", "metrics.csv"):
        assert Path("runs/x", name).exists()
    capsys.readouterr()
    kept = Path("runs/x/metrics.csv").read_text()
    assert main(fit("--data.path=nowhere.jsonl", "--run.overwrite=true")) == 1
    assert main(fit()) == 1
    assert Path("runs/x/metrics.csv").read_text() == kept
    Path("runs/x/summary.json").unlink()
    assert main(fit()) == 1
    assert "--ckpt_path last" in capsys.readouterr().err
    finished = ["--ckpt_path=runs/x/checkpoints/last.ckpt", "--data.limit=5"]
    assert main(fit(*finished)) == 1
    assert "of a finished run of 2 edits" in capsys.readouterr().err


def test_a_checkpoint_resumes_only_what_it_was_made_with(fit, capsys):
    assert main(fit("--data.limit=3")) == 0
    last = "--ckpt_path=runs/x/checkpoints/last.ckpt"
    for verb, change, match in [
        ("fit", "--model.layer=1", "resume with the settings it was begun with"),
        ("validate", "--data.start=2", "are not those of the checkpoint"),
        ("predict", "--data.order=shuffled", "are not those of the checkpoint"),
    ]:
        capsys.readouterr()
        assert main(fit(last, change, verb=verb)) == 1
        assert match in capsys.readouterr().err


def test_a_run_killed_before_its_last_validation_still_gets_final_rows(fit, monkeypatch):
    from editkit.callbacks.run_folder import RunFolder

    def killed(self, trainer, *args):
        raise RuntimeError("killed")

    every = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {dirpath: "
    every += "runs/x/checkpoints, every_n_train_steps: 1, save_last: true}}"
    options = [f"--trainer.callbacks=[{every}]", "--milestones.at=[]"]
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "on_validation_start", killed)
        assert main(fit(*options)) == 1
    assert main(fit(*options, "--ckpt_path=last")) == 0
    summary = json.loads(Path("runs/x/summary.json").read_text())
    assert summary["scores"]["reliability"]["nll"]["n"] == 6
    assert sum(r["moment"] == "final" for r in rows_of()) == 24


@pytest.mark.parametrize("edits", [3, 6])
def test_a_run_told_to_end_while_it_scores_goes_on(edits, fit, monkeypatch, capsys):
    from editkit.callbacks.run_folder import RunFolder

    asked = RunFolder.on_validation_start

    def told(self, trainer, module):
        if module.edits_seen == edits:
            signal.raise_signal(signal.SIGTERM)
        asked(self, trainer, module)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "on_validation_start", told)
        with pytest.raises(SystemExit) as ended:
            main(fit())
    assert ended.value.code == 143
    assert "go on with --ckpt_path last" in capsys.readouterr().err
    assert main(fit("--ckpt_path=last")) == 0
    summary = json.loads(Path("runs/x/summary.json").read_text())
    assert summary["scores"]["reliability"]["nll"]["n"] == 6
    moments = Counter((row["moment"], row["edits_seen"]) for row in rows_of())
    assert moments == Counter(
        {("milestone", 1): 4, ("milestone", 3): 12, ("final", 6): 24}
    ) + Counter({("immediate", n): 4 for n in range(1, 7)})


def test_an_edit_that_is_refused_late_loses_none_of_those_before_it(fit, monkeypatch, capsys):
    from editkit.methods.ft import FT

    assert main(fit("--trainer.default_root_dir=runs/straight")) == 0
    edit = FT.edit

    def refuse(self, edits):
        if edits[0].id == 3:
            raise ValueError("the loss of edit 3 became nan")
        return edit(self, edits)

    with monkeypatch.context() as patch:
        patch.setattr(FT, "edit", refuse)
        capsys.readouterr()
        assert main(fit()) == 1
    said = capsys.readouterr().err
    assert "edit 3 became nan" in said
    assert "the 3 edits before it are made" in said
    assert "--ckpt_path last" in said
    assert "removed runs" not in said
    assert main(fit("--ckpt_path=last")) == 0
    assert rows_of() == rows_of("runs/straight/probes.jsonl")


def test_a_failed_run_removes_only_its_own_folder(tmp_path):
    from editkit.callbacks.folder import tidy

    def fail(folder):
        with tidy(folder):
            (tmp_path / "runs" / "other").mkdir(parents=True)
            folder.mkdir()
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError):
        fail(tmp_path / "runs" / "mine")
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["other"]


def test_unknown_verbs_are_named_with_the_known_ones(capsys):
    assert main(["fitt"]) == 1
    assert "no verb 'fitt'; there are fit, validate" in capsys.readouterr().err


def test_validate_test_and_predict_probe_a_checkpoint(fit, capsys):
    assert main(fit()) == 0
    final = json.loads(Path("runs/x/summary.json").read_text())["scores"]
    capsys.readouterr()
    checkpoint = "--ckpt_path=runs/x/checkpoints/last.ckpt"
    for verb in ("validate", "test"):
        assert main(fit(checkpoint, verb=verb)) == 0
        out = capsys.readouterr().out
        value = final["reliability"]["nll"]["value"]
        assert "6 edits" in out
        assert f"{value:.3f}" in out
    assert main(fit(checkpoint, verb="predict")) == 0
    answers = rows_of("runs/x/predictions.jsonl")
    assert len(answers) == 24
    assert {"id", "prompt", "answer"} == set(answers[0])


def test_generate_and_export_take_a_run_folder(fit, capsys, tmp_path):
    assert main(fit()) == 0
    assert main(["generate", "runs/x", "the capital of Alba is", "--base=true"]) == 0
    assert "the capital of Alba is" in capsys.readouterr().out
    assert main(["export", "runs/x", "out"]) == 0
    assert (tmp_path / "out" / "config.json").exists()
    assert main(["export", "runs/x", "out"]) == 1
    assert "not empty" in capsys.readouterr().err
    for args in (["generate", "runs/x", "the capital"], ["export", "runs/x", "other"]):
        assert main([*args, "--device=nowhere"]) == 1
        assert "no device 'nowhere' here; use cpu" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["generate", "export", "trace", "lm-eval"])
def test_verbs_that_load_a_model_tell_of_their_device(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--device" in told
    assert "none takes the GPU where there is one" in told


def test_inspect_lists_sites_and_proposes_layers(tiny, capsys):
    assert main(["inspect", tiny("gpt2"), "--role=mlp.down"]) == 0
    out = capsys.readouterr().out
    assert "transformer.h.3.mlp.c_proj" in out
    assert "32 x 128" in out
    assert "proposed causal_layers: [0, 1], memory_layer: 3" in out
    assert main(["inspect", tiny("gpt2"), "--role=mlp.gate"]) == 1
    assert "no site of role 'mlp.gate'" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["fit", "--help"], ["export", "-h"]])
def test_help_loads_no_weights(args, monkeypatch, capsys):
    monkeypatch.setattr("editkit.lm.editable.load_pretrained", lambda *a: pytest.fail("loaded"))
    try:
        code = main(args)
    except SystemExit as done:
        code = done.code
    assert code in (0, None)
    assert "editkit" in capsys.readouterr().out


METHODS = sorted((ROOT / "experiments" / "method").glob("*.yaml"))


def is_part(small, large):
    """Whether every value of a nested dict stands in another one."""
    if not isinstance(small, dict):
        return small == large
    return all(key in large and is_part(value, large[key]) for key, value in small.items())


@pytest.mark.parametrize("path", METHODS, ids=[p.stem for p in METHODS])
def test_every_method_yaml_binds(path, capsys):
    args = ["fit", f"--model={path}", "--model.lm.id=factworld"]
    args += ["--data=editkit.data.jsonl.JSONL", f"--data.path={path}", "--print_config"]
    with pytest.raises(SystemExit) as done:
        main(args)
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    own = yaml.safe_load(path.read_text())
    assert printed["model"]["class_path"] == own["class_path"]
    assert is_part(own["init_args"], printed["model"]["init_args"])


@pytest.fixture(params=["16k", "48k", "80k", "96k"])
def small_disk(request, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(disk)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small tmpfs here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(fit, capsys, small_disk):
    """Nothing is left, or all results and no torn checkpoint beside them."""
    args = fit(f"--trainer.default_root_dir={small_disk}/x")
    assert main(args) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err or "is the disk full?" in err
    if (small_disk / "x").exists():
        summary = json.loads((small_disk / "x" / "summary.json").read_text())
        assert summary["scores"]["reliability"]["nll"]["n"] == 6
        assert not list((small_disk / "x").glob("checkpoints/*"))


METHOD = '''
from editkit.adapters.delta import DeltaLayer
from editkit.methods.base import EditModule


class Nudge(EditModule):
    """Moves one matrix along its target loss' gradient, once.

    Args:
        size: Length of the step.
    """

    def __init__(self, size: float = 0.1, **kwargs) -> None:
        super().__init__(**kwargs)
        self.size = size

    def attach(self):
        self.site = self.lm.attach(self.lm.site(1).path, DeltaLayer)

    def edit(self, edits):
        leaf = self.site.open()["delta"]
        tokens = self.lm.encode([e.prompt for e in edits], [e.target for e in edits])
        log_p = self.lm.target_logits(tokens).log_softmax(-1)
        log_p.gather(1, tokens.target_ids_N[:, None]).sum().backward()
        grad = leaf.grad
        self.site.discard()
        self.site.add(self.size * grad / grad.norm())
        return {}
'''


def test_a_users_own_method_runs_from_yaml(fit, tmp_path, monkeypatch, capsys):
    (tmp_path / "mymethod.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "nudge.yaml").write_text("class_path: mymethod.Nudge\ninit_args: {size: 0.5}\n")
    args = [a for a in fit() if not a.startswith("--model")]
    lm = next(a for a in fit() if a.startswith("--model.lm.id"))
    assert main([*args, "--model=nudge.yaml", lm]) == 0
    assert all(e["loss_after"] < e["loss_before"] for e in rows_of("runs/x/edits.jsonl"))
    assert main(["generate", "runs/x", "the town: [a, b]"]) == 1
    assert "trust" in capsys.readouterr().err
    assert main(["generate", "runs/x", "the town: [a, b]", "--trust=true"]) == 0


def test_wandb_writes_offline_files_without_a_key(fit, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = ROOT / "experiments" / "logger" / "wandb.yaml"
    assert main(fit(f"--trainer.logger={logger}", "--data.limit=2")) == 0
    assert list(tmp_path.glob("runs/wandb/offline-run-*/run-*.wandb"))


def test_a_real_checkpoint_takes_easyedits_rows(fit, shared, capsys):
    """Grouped-query attention, a SentencePiece tokenizer, and ZsRE as published."""
    model = shared("data/models/stories260K/hf")
    rows = shared("data/zsre/zsre_mend_edit.json")
    more = [f"--model.lm.id={model}", f"--data.path={rows}", "--data.limit=4"]
    assert main(fit(*more, "--model.steps=40")) == 0
    summary = json.loads(Path("runs/x/summary.json").read_text())
    kinds = {"reliability", "generalization", "locality", "locality_gold", "portability"}
    assert set(summary["scores"]) == kinds
    assert all(e["loss_after"] < e["loss_before"] for e in rows_of("runs/x/edits.jsonl"))
