from __future__ import annotations

import hashlib
import json

import pytest

from editkit.retention.outcome import against_control, control_rates, rates


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
    assert summary["drift"]["kl"] > 0
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


def test_a_killed_arm_goes_on_and_ends_the_same(retain, monkeypatch):
    from editkit.retention import arms

    args = ("--retain.arms=[edited]", "--retain.checkpoint_every=2")
    _, straight = retain(*args, out="straight")

    class Killed(Exception):
        pass

    real = arms.Watch.on_train_batch_end

    def kill(self, trainer, *rest):
        real(self, trainer, *rest)
        if trainer.global_step == 3:
            raise Killed

    monkeypatch.setattr(arms.Watch, "on_train_batch_end", kill)
    with pytest.raises(Killed):
        retain(*args, out="cut")
    monkeypatch.setattr(arms.Watch, "on_train_batch_end", real)
    code, cut = retain(*args, out="cut")
    assert code == 0
    assert lines_of(cut) == lines_of(straight)
    assert summary_of(cut)["drift"] == summary_of(straight)["drift"]
    assert not list(cut.rglob("*.ckpt"))
    assert not list(cut.rglob("*.safetensors"))


def test_controls_are_shared_by_runs_that_differ_in_nothing_they_depend_on(retain, tmp_path):
    shared = f"--retain.controls={tmp_path / 'controls'}"
    _, one = retain(shared, out="one")
    made = list((tmp_path / "controls").iterdir())
    stamp = (made[0] / "done.json").stat().st_mtime_ns
    retain(shared, out="two")
    assert [p.name for p in (tmp_path / "controls").iterdir()] == [made[0].name]
    assert (made[0] / "done.json").stat().st_mtime_ns == stamp
    retain(shared, "--model.lr=0.02", out="three")
    assert len(list((tmp_path / "controls").iterdir())) == 2
    assert "control" in summary_of(one)


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
        (["--trainer.max_epochs=3"], "the length is --data.steps"),
        (["--evaluation.scorers=[nll]"], "lacks ['generation']"),
        (["--data=Maths"], "needs `question`"),
        (["--data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["--model.lr=-1"], "model.lr is -1"),
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
