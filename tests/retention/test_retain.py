from __future__ import annotations

import hashlib
import json
import os
import signal
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from editkit.api import load
from editkit.retention import arms
from editkit.retention.outcome import against_control, control_rates, rates
from editkit.retention.shared import control_name, known_answers, name_of, sole


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def lines_of(folder):
    return [json.loads(line) for line in (folder / "retention.jsonl").read_text().splitlines()]


def digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_run_has_its_control_its_identity_and_leaves_the_edited_model_alone(retain, edited):
    before = digest(edited)
    code, folder = retain("--retain.at=[2]")
    assert code == 0
    assert digest(edited) == before
    summary, told = summary_of(folder), lines_of(folder)
    assert summary["identity"] == {"ERR": 1.0, "IRR": 1.0, "moved": 0, "exact": True}
    assert {r["arm"] for r in told} == {"edited", "control", "identity"}
    assert sorted({r["ckpt_step"] for r in told if r["arm"] == "edited"}) == [2, 4]
    assert [c["step"] for c in summary["checkpoints"]] == [2, 4]
    assert summary["downstream"]["tuned"] < summary["downstream"]["edited"]  # perplexity falls
    task = summary["downstream"]
    assert task["tax"] == pytest.approx(task["tuned"] - task["control"])  # lower is better
    assert summary["drift"]["kl"] > 0
    assert min(*summary["drift"]["activations"].values(), *summary["drift"]["keys"].values()) > 0
    assert not list(folder.rglob("*.ckpt"))
    # the numbers can be made again from the lines
    end = [r for r in told if r["arm"] == "edited" and r["ckpt_step"] == 4]
    never = [r for r in told if r["arm"] == "control" and r["ckpt_step"] == 4]
    assert json.loads(json.dumps(rates(end))) == summary["rates"]["generation"]
    again = json.loads(json.dumps(control_rates(never) | against_control(end, never)))
    assert {k: v for k, v in summary["control"].items() if k != "drift"} == again
    # the control has no edits: what it is compared with is the base model
    assert all(r["score_Med"] is None and r["fate"] is None for r in never)


def test_training_loses_what_was_edited(retain):
    _, folder = retain("--model.lr=0.3", "--data.steps=8", "--retain.arms=[edited]")
    found = summary_of(folder)["rates"]["generation"]
    assert found["ERR"]["n"] >= 2
    assert found["ERR"]["value"] < 1
    assert sum(found["fates"].values()) == 4


def test_a_finished_folder_is_refused_and_other_options_are_not_mixed(retain, capsys):
    code, folder = retain("--retain.arms=[edited]")
    assert code == 0
    code, _ = retain("--retain.arms=[edited]")
    assert code == 1
    assert "holds a finished run" in capsys.readouterr().err
    (folder / "summary.json").unlink()
    code, _ = retain("--retain.arms=[edited]", "--data.seed=3")
    assert code == 1
    assert "begun with other options" in capsys.readouterr().err
    code, _ = retain("--retain.arms=[edited]", "--data.seed=3", "--overwrite=true")
    assert code == 0


def test_a_folder_of_something_else_is_refused_and_left_alone(retain, edited, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    before = digest(tmp_path / "mine"), digest(edited)
    for out in ("mine", str(edited)):
        code, _ = retain("--retain.rekey=true", "--overwrite=true", out=out)
        assert code == 1
        assert "choose another --out" in capsys.readouterr().err
    assert (digest(tmp_path / "mine"), digest(edited)) == before


def test_a_run_that_fails_removes_what_it_made_and_no_more(retain, tmp_path):
    (tmp_path / "kept").mkdir()
    code, _ = retain("--retain.rekey=true", out="kept/new/out")
    assert code == 1
    assert (tmp_path / "kept").is_dir()
    assert not (tmp_path / "kept" / "new").exists()


def test_a_run_goes_on_with_options_that_came_later_or_change_no_number(retain):
    args = ("--retain.arms=[edited]",)
    with stopped_at(3, kill), pytest.raises(Killed):
        retain(*args, "--retain.checkpoint_every=2", out="cut")
    _, folder = retain(*args, out="straight")
    config = folder.with_name("cut") / "config.yaml"
    told = config.read_text()
    assert "  drift_edits: 100\n" in told
    config.write_text(told.replace("  drift_edits: 100\n", ""))
    code, cut = retain(*args, out="cut")
    assert code == 0
    assert lines_of(cut) == lines_of(folder)


def test_arms_that_are_done_are_not_run_again(retain):
    _, folder = retain("--retain.arms=[edited,control]")
    done = folder / "arms" / "edited" / "done.json"
    (folder / "summary.json").unlink()
    (folder / "arms" / "control" / "done.json").unlink()
    stamp, rows = done.stat().st_mtime_ns, lines_of(folder)
    code, _ = retain("--retain.arms=[edited,control]")
    assert code == 0
    assert done.stat().st_mtime_ns == stamp
    assert lines_of(folder) == rows


class Killed(Exception):
    """What ends a run without a word."""


def kill():
    raise Killed


@contextmanager
def stopped_at(step, stop):
    """Let something happen to runs behind a step."""
    real = arms.Watch.on_train_batch_end

    def watch(self, trainer, *rest):
        real(self, trainer, *rest)
        if trainer.global_step == step:
            stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms.Watch, "on_train_batch_end", watch)
        yield


def test_a_killed_arm_goes_on_and_ends_the_same(retain):
    args = ("--retain.arms=[edited]", "--retain.checkpoint_every=2")
    _, straight = retain(*args, out="straight")

    with stopped_at(3, kill), pytest.raises(Killed):
        retain(*args, out="cut")
    code, cut = retain(*args, out="cut")
    assert code == 0
    assert lines_of(cut) == lines_of(straight)
    assert summary_of(cut)["drift"] == summary_of(straight)["drift"]
    assert not list(cut.rglob("*.ckpt"))
    assert not list(cut.rglob("*.safetensors"))


def test_an_arm_that_is_killed_behind_its_last_step_is_asked_again(retain, monkeypatch):
    args = ("--retain.arms=[edited]", "--retain.checkpoint_every=2")
    _, straight = retain(*args, out="straight")
    real = arms.drift
    monkeypatch.setattr(arms, "drift", lambda *_: kill())
    with pytest.raises(Killed):
        retain(*args, out="cut")
    monkeypatch.setattr(arms, "drift", real)
    code, cut = retain(*args, out="cut")
    assert code == 0
    assert lines_of(cut) == lines_of(straight)
    assert summary_of(cut)["drift"] == summary_of(straight)["drift"]


def test_an_arm_that_is_told_to_end_says_so_and_goes_on(retain, capsys):
    args = ("--retain.arms=[edited]",)
    _, straight = retain(*args, out="straight")
    tell = partial(os.kill, os.getpid(), signal.SIGTERM)
    with stopped_at(3, tell), pytest.raises(SystemExit) as ended:
        retain(*args, out="told")
    assert ended.value.code == 143
    assert "told to end (SIGTERM); the same command goes on" in capsys.readouterr().err
    went_on = []
    with stopped_at(4, lambda: went_on.append(4)), stopped_at(3, lambda: went_on.append(3)):
        code, told = retain(*args, out="told")
    assert code == 0
    assert went_on == [4]
    assert lines_of(told) == lines_of(straight)


def test_an_arm_that_ends_by_its_steps_is_finished_where_it_was_killed_behind_them(
    retain, monkeypatch
):
    args = ("--retain.arms=[edited,identity]", "--retain.checkpoint_every=5", "--data.steps=6")
    real, calls = arms.drift, []

    def drift(*given):
        calls.append(given)
        return real(*given) if len(calls) == 1 else kill()

    monkeypatch.setattr(arms, "drift", drift)
    with pytest.raises(Killed):
        retain(*args)
    monkeypatch.setattr(arms, "drift", real)
    code, folder = retain(*args)
    assert code == 0
    assert summary_of(folder)["identity"]["exact"]


def test_a_run_that_is_told_to_end_at_the_end_of_an_arm_does_not_begin_another(retain, tmp_path):
    args = ("--retain.arms=[edited,control]",)
    with stopped_at(4, partial(os.kill, os.getpid(), signal.SIGTERM)), pytest.raises(SystemExit):
        retain(*args, out="told")
    made = [path.name for path in (tmp_path / "told" / "arms").iterdir()]
    assert made == ["edited"]


def arms_in(folder):
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("*/done.json")}


def test_what_runs_have_in_common_is_found_once_and_changes_nothing(retain, tmp_path):
    shared = f"--retain.shared={tmp_path / 'shared'}"
    _, alone = retain(out="alone")
    _, one = retain(shared, out="one")
    made = arms_in(tmp_path / "shared")
    answers = {p: p.stat().st_mtime_ns for p in (tmp_path / "shared").glob("answers-*")}
    assert (len(made), len(answers)) == (1, 2)  # a control; the base's answers and the edited's
    _, two = retain(shared, out="two")
    assert arms_in(tmp_path / "shared") == made
    assert {p: p.stat().st_mtime_ns for p in answers} == answers
    assert lines_of(alone) == lines_of(one) == lines_of(two)
    _, other = retain(shared, "--model.lr=0.02", out="other")
    assert len(arms_in(tmp_path / "shared")) == 2
    assert {p: p.stat().st_mtime_ns for p in answers} == answers
    assert "control" in summary_of(other)


def test_a_control_that_another_run_is_at_is_waited_for_last(retain, tmp_path, monkeypatch):
    from editkit.retention import cli

    order, real = [], cli.Retention._run
    busy = [True]

    @contextmanager
    def sole(folder, is_shared, wait):
        yield not is_shared or wait or not busy[0]

    def run(self, arm, folder):
        order.append(arm)
        real(self, arm, folder)

    monkeypatch.setattr(cli, "sole", sole)
    monkeypatch.setattr(cli.Retention, "_run", run)
    args = (f"--retain.shared={tmp_path / 'shared'}", "--retain.arms=[edited,control]")
    retain(*args, out="late")
    busy[0] = False
    retain(*args, "--model.lr=0.02", out="first")
    assert order == ["edited", "control", "control", "edited"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_control_goes_on_where_a_run_with_edits_elsewhere_was_killed(
    retain, base, edits, tmp_path, kind
):
    lm = load(base, method="ft", layer=1, lr=0.01, steps=60, append_eos=True)
    lm.edit_batch(edits)
    lm.save(tmp_path / "elsewhere")
    args = ("--retain.arms=[edited,control]", "--retain.checkpoint_every=2",
            f"--model.kind={kind}", "--model.adapter.r=2")  # fmt: skip
    shared = f"--retain.shared={tmp_path / 'shared'}"
    _, alone = retain(*args, out="alone", run=tmp_path / "elsewhere")

    with stopped_at(3, kill), pytest.raises(Killed):
        retain(*args, shared, out="cut")  # edits of layer 2
    assert len([*(tmp_path / "shared").rglob("last.ckpt")]) == 1
    code, after = retain(*args, shared, out="after", run=tmp_path / "elsewhere")
    assert code == 0
    assert len(arms_in(tmp_path / "shared")) == 1
    assert lines_of(after) == lines_of(alone)


@pytest.mark.parametrize(
    ("change", "is_for_answers"),
    [
        (lambda made: made.run.artefact["lm"].update(dtype="bfloat16"), True),
        (lambda made: made.run.artefact["lm"].update(chat_template=True), True),
        (lambda made: setattr(made.objective, "measure", "final_number"), False),
        (lambda made: made.run.data.texts.append("he works"), False),
    ],
)
def test_what_outcomes_depend_on_is_in_the_names(
    edited, texts, facts, tiny_options, tmp_path, change, is_for_answers
):
    from editkit.retention.cli import Retention
    from editkit.retention.settings import parser

    made = parser()
    args = ["--data=editkit.retention.tasks.Text", f"--data.path={texts}", *tiny_options]
    args += [f"--run={edited}", f"--out={tmp_path / 'out'}", "--trainer.devices=1"]
    args += [f"--retain.shared={tmp_path / 'shared'}", f"--probes.facts={facts}"]
    run = Retention(made, made.parse_args(args))
    before = control_name(run), name_of([*known_answers(run).told])
    change(run)
    after = control_name(run), name_of([*known_answers(run).told])
    assert before[0] != after[0]
    assert (before[1] != after[1]) == is_for_answers


def test_a_shared_control_is_held_by_one_run(tmp_path):
    with sole(tmp_path / "a" / "b", True, False) as first:
        with sole(tmp_path / "a" / "b", True, False) as second:
            assert first
            assert not second
        with sole(tmp_path / "a" / "b", False, False) as own:
            assert own
    with sole(tmp_path / "a" / "b", True, False) as again:
        assert again


def test_edits_put_on_afterwards_and_the_protocol_of_wen_and_zhang(retain):
    code, folder = retain(
        "--data=Mentions", "--data.path=factworld", "--data.about=new", "--retain.reapply=true",
        "--model.kind=dora", "--model.adapter.r=2", "--retain.mode=ret_faithful",
        "--retain.arms=[edited,control]",
    )  # fmt: skip
    assert code == 0
    summary, told = summary_of(folder), lines_of(folder)
    assert {r["arm"] for r in told} == {"edited", "control", "reapplied"}
    assert {r["scorer"] for r in told} >= {"first_token", "substring"}
    faithful = summary["rates"]["ret_faithful"]
    assert (
        faithful["ERR"]
        == rates([r for r in told if r["arm"] == "edited"], "first_token", "substring")["ERR"]
    )
    assert summary["reapplied"]["ERR"]["n"] == summary["rates"]["generation"]["ERR"]["n"]
    assert summary["manifest"]["model"]["kind"] == "dora"


@pytest.fixture(scope="module")
def remembered(base, edits, tmp_path_factory):
    """A folder of four edits by GRACE, which finds its keys by distance."""
    folder = tmp_path_factory.mktemp("edited") / "grace"
    lm = load(base, method="grace", layer=2, eps=1e-3, replacement="replace_all", append_eos=True)
    lm.edit_batch(edits)
    lm.save(folder)
    return folder


def test_a_memory_finds_its_keys_again(retain, remembered):
    code, folder = retain("--retain.arms=[edited]", "--retain.rekey=true", run=remembered)
    assert code == 0
    summary, told = summary_of(folder), lines_of(folder)
    assert {r["arm"] for r in told} == {"edited", "rekeyed"}
    routes = {
        arm: [r["route"]["edit_id"] for r in told if r["arm"] == arm
              and (r["prompt_kind"], r["scorer"], r["ckpt_step"]) == ("rewrite", "generation", 4)]
        for arm in ("edited", "rekeyed")
    }  # fmt: skip
    assert routes["edited"] == [None] * 4  # fine-tuning has moved the prompts
    assert routes["rekeyed"] == [0, 1, 2, 3]
    assert summary["rekeyed"]["ERR"]["value"] > summary["rates"]["generation"]["ERR"]["value"]
    assert "rekeyed" in summary["downstream"]


def test_methods_without_keys_refuse_before_they_train(retain, capsys):
    code, folder = retain("--retain.rekey=true", "--retain.arms=[edited]")
    assert code == 1
    assert "FT has no keys to find again" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_order_swapped_edits_the_tuned_base_as_a_run_of_its_own_would(
    retain, edited, edits, kind, tmp_path, monkeypatch
):
    from editkit.retention import afterwards

    kept = {}
    real = afterwards.edited_afresh

    def keep(method, run, folder):
        fresh = real(method, run, tmp_path / "tuned")
        with method.lm.unedited():
            kept["tuned"] = method.lm(method.lm.encode([e.prompt for e in edits]))
        with fresh.lm.unedited():
            kept["base"] = fresh.lm(fresh.lm.encode([e.prompt for e in edits]))
        kept["edited"] = {p: d.merged_delta().clone() for p, d in fresh.lm.layers.items()}
        return fresh

    monkeypatch.setattr(afterwards, "edited_afresh", keep)
    code, folder = retain(
        "--retain.arms=[edited,control]", "--retain.reedit=true", f"--model.kind={kind}",
        "--model.adapter.r=2", "--model.lr=0.01",
    )  # fmt: skip
    assert code == 0
    assert float((kept["tuned"] - kept["base"]).abs().max()) < 1e-4
    alone = load(str(tmp_path / "tuned"), method="ft", layer=2, lr=0.01, steps=60, append_eos=True)
    alone.edit_batch(edits)
    for path, layer in alone.lm.layers.items():
        assert torch.equal(layer.merged_delta(), kept["edited"][path])
    summary = summary_of(folder)
    assert summary["reedited"]["ERR"]["value"] == 1.0
    assert "reedited" in {r["arm"] for r in lines_of(folder)}


def test_lost_edits_are_learned_again_beside_new_ones_and_nothing_is_left_of_it(
    retain, remembered, monkeypatch
):
    real = arms.relearn

    def twice(*given):
        found = real(*given)
        assert real(*given) == found  # nor is a gradient of fine-tuning's in the first time
        return found

    monkeypatch.setattr(arms, "relearn", twice)
    args = ("--model.lr=0.01", "--retain.arms=[edited]", "--retain.rekey=true")
    _, plain = retain(*args, out="plain", run=remembered)
    code, folder = retain(*args, "--retain.relearn=3", out="again", run=remembered)
    assert code == 0
    assert lines_of(folder) == lines_of(plain)  # those asked behind it (rekeyed) among them
    told = [json.loads(line) for line in (folder / "arms/edited/relearned.jsonl").open()]
    latent = summary_of(folder)["latent"]
    assert latent["pairs"] == len(told) > 0
    lost = {r["item_id"] for r in lines_of(folder) if r["scorer"] == "generation"
            and (r["score_M0"], r["score_Med"], r["score_Mft"]) == (0, 1, 0)}  # fmt: skip
    assert {row["item_id"] for row in told} <= lost
    assert len({row["partner_id"] for row in told}) == len(told)
    known = {r["item_id"] for r in lines_of(folder) if r["set"] == "K" and r["score_M0"] == 1
             and r["scorer"] == "generation"}  # fmt: skip
    assert {row["partner_id"] for row in told} <= known
    log_p = {r["item_id"]: r["logp_Mft"] for r in lines_of(folder) if r["arm"] == "edited"}
    for row in told:
        assert len(row["lost"]["nll"]) == 4
        assert row["lost"]["nll"][0] == pytest.approx(-log_p[row["item_id"]], abs=1e-4)
        assert row["partner"]["nll"][-1] < row["partner"]["nll"][0]
    saved = [row["partner"]["learned_at"] - row["lost"]["learned_at"] for row in told]
    assert latent["steps_saved"]["value"] == pytest.approx(sum(saved) / len(saved))


def test_preferences_are_learnt_from_the_start_of_each_arm(retain, tmp_path):
    path = tmp_path / "pairs.jsonl"
    names = ("Elda", "Lima", "Paris", "Louis", "Rome", "he", "she", "town")
    rows = [{"prompt": f"where lives {n} ?", "chosen": "big city", "rejected": "small town"}
            for n in names]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, folder = retain(
        "--data=Preference", f"--data.path={path}", "--data.decontaminate=false",
        "--data.test=2", "--model.lr=0.01", "--retain.arms=[edited]", "--data.steps=12",
    )  # fmt: skip
    assert code == 0
    summary = summary_of(folder)
    assert summary["downstream"]["tuned"] == 1.0
    assert summary["manifest"]["loss"] < 0.6  # log 2 at the start


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.kind=lora", "--model.adapter.roles=[mouth]"], "leaves nothing to train"),
        (["--retain.arms=[control]"], "the edited arm must be among them"),
        (["--data.replay=0.01"], "of 4 rows that is none"),
        (["--data.limit=0"], "data.limit is 0"),
        (["--retain.at=[2,5]"], "retain.at has 5; the steps are 1 to 4"),
        (["--retain.at=[0]"], "retain.at has 0"),
        (["--retain.drift_texts=-1"], "retain.drift_texts is -1"),
        (["--retain.drift_edits=-1"], "retain.drift_edits is -1"),
        (["--retain.checkpoint_every=0"], "retain.checkpoint_every is 0"),
        (["--retain.relearn=-2"], "retain.relearn is -2"),
        (["--probes.rephrases=-1"], "probes.rephrases is -1"),
        (["--model.schedule.warmup=1"], "schedule.warmup is 1"),
        (["--trainer.max_epochs=3"], "the length is --data.steps"),
        (["--evaluation.scorers=[nll]"], "lacks ['generation']"),
        (["--data=Maths"], "needs `question`"),
        (["--data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["--model.lr=-1"], "model.lr is -1"),
        (["--retain.reedit=true", "--model.kind=dora"], "use model.kind full or lora"),
        (["--retain.shared=x", "--trainer.devices=2"], "retain.shared is for runs on one device"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(retain, capsys, args, words):
    code, folder = retain(*args)
    assert code == 1
    assert words in capsys.readouterr().err
    assert not (folder / "arms").exists()


def test_a_folder_without_edits_is_refused(retain, tmp_path, capsys):
    code, _ = retain(run=tmp_path)
    assert code == 1
    assert "give the folder of a finished run" in capsys.readouterr().err
