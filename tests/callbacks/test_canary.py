"""The canary: a collapse is noticed, its edit named, and what it did taken back bit for bit."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from editkit.api import load_edited
from editkit.callbacks import canary as canary_module
from editkit.callbacks.ability import Ability, Reading
from editkit.callbacks.canary import Canary
from editkit.callbacks.run_folder import RunFolder
from editkit.data.factworld import FactWorld
from editkit.edits import Edit
from editkit.lm.spec import LMSpec
from editkit.methods.artefact import build_method
from editkit.methods.ft import FT
from editkit.methods.lora import LoRA
from editkit.methods.snapshot import restore_snapshot, take_snapshot
from editkit.metrics.protocol import EvalProtocol

METHODS = Path(__file__).parents[2] / "experiments" / "method"
YAMLS = [METHODS / f"{name}.yaml" for name in ("ft", "ft_breadth_first", "lora")]
BAD = 5  # the edit after which the model counts as collapsed, where a test fakes it


def make(path, folder, **overrides):
    config = yaml.safe_load(Path(path).read_text())
    arguments = {**config.get("init_args", {}), **overrides}
    for name in {"steps", "z_steps"} & arguments.keys():
        arguments[name] = min(arguments[name], 3)
    protocol = EvalProtocol(scorers=("sequence_accuracy",))
    return build_method(
        config["class_path"], lm=LMSpec(id=folder), evaluation=protocol, **arguments
    )


def state(method):
    return {
        f"{path}.{name}": tensor.clone()
        for path, layer in method.lm.layers.items()
        for name, tensor in layer.edit_state().items()
    }


def same(one, other):
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def timeless(ledger):
    return [{**entry, "time": 0, "seconds": 0} for entry in ledger]


@pytest.fixture
def faked(monkeypatch):
    """Let the model count as collapsed as soon as edit `BAD` is in its ledger; count readings."""
    taken = []

    def reading(method, data):
        bad = any(e["edit_id"] == BAD and not e.get("rolled_back") for e in method.ledger)
        taken.append(method.edits_seen)
        enabled = any(layer.enabled for layer in method.lm.layers.values())
        return Reading(edits_seen=method.edits_seen, perplexity=1e9 if bad and enabled else 10.0,
                       facts=None, seconds=0.0)  # fmt: skip

    monkeypatch.setattr("editkit.callbacks.ability.measure_ability", reading)
    monkeypatch.setattr(canary_module, "measure_ability", reading)
    return taken


@pytest.mark.parametrize("path", YAMLS, ids=[p.stem for p in YAMLS])
def test_a_rollback_leaves_the_healthy_commit_bit_for_bit(path, tiny, tmp_path, faked, train):
    folder = tiny("llama")
    straight = make(path, folder)
    train(straight, tmp_path / "straight", max_steps=BAD)
    method = make(path, folder)
    train(method, tmp_path / "run", RunFolder(), Ability(), Canary("rollback", every=4))
    assert method.edits_seen == BAD
    assert same(state(method), state(straight))
    assert same(method.stream_state(), straight.stream_state())
    assert same(method.generator.get_state(), straight.generator.get_state())
    assert timeless(method.ledger[:BAD]) == timeless(straight.ledger)
    assert [e["edit_id"] for e in method.ledger if e.get("rolled_back")] == [5, 6, 7]
    saved = load_edited(tmp_path / "run", trust=True)
    assert same(state(saved.method), state(straight))


def test_a_snapshot_of_an_unedited_model_is_the_base_again(tiny):
    for cls in (FT, LoRA):
        method = cls(lm=LMSpec(id=tiny("llama")), evaluation=EvalProtocol())
        method.start()
        kept = take_snapshot(method)
        tokens = method.lm.encode(["the capital of Alba is"])
        base = method.lm.forward(tokens)
        method.apply_edits([Edit(0, "the capital of Alba is", "Oslo")])
        assert not torch.equal(method.lm.forward(tokens), base)
        restore_snapshot(method, kept)
        assert torch.equal(method.lm.forward(tokens), base)
        assert not any(layer.is_written for layer in method.lm.layers.values())


@pytest.mark.parametrize(
    ("every", "per_step"), [(1, 1), (2, 1), (4, 1), (100, 1), (1, 2), (100, 2)]
)
def test_the_culprit_is_the_batch_behind_the_last_healthy_commit(
    tiny, tmp_path, faked, every, per_step, train, stream
):
    method = make(METHODS / "ft.yaml", tiny("llama"))
    watch = Canary("rollback", every=every)
    train(method, tmp_path, Ability(), watch, stream=stream(edits_per_step=per_step))
    first = BAD // per_step * per_step
    (event,) = watch.events
    assert event["culprit"] == list(range(first, first + per_step))
    assert event["healthy_at"] == method.edits_seen == first
    assert event["rolled_back"] == list(range(first, event["edits_seen"]))
    named = "edit 5 did it" if per_step == 1 else "the batch of edits 4 to 5 did it"
    assert named in event["message"]


def test_finding_the_culprit_takes_few_readings(tiny, tmp_path, faked, train):
    method = make(METHODS / "ft.yaml", tiny("llama"))
    train(method, tmp_path, Ability(), Canary("stop", every=100))
    assert len(faked) <= 1 + 1 + 1 + 4  # unedited, milestone 1, end, and 9 batches in halves


def test_stop_ends_the_run_as_it_is(tiny, tmp_path, faked, train):
    path, folder = METHODS / "ft.yaml", tiny("llama")
    straight, method = make(path, folder), make(path, folder)
    train(straight, tmp_path / "straight", max_steps=8)
    train(method, tmp_path / "run", RunFolder(), Ability(), Canary("stop", every=4))
    assert method.edits_seen == 8
    assert same(state(method), state(straight))
    assert timeless(method.ledger) == timeless(straight.ledger)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["canary"]["culprit"] == [BAD]
    assert summary["canary"]["rolled_back"] == []


class Stop(Callback):
    """Stops a run after three batches, as a time limit does."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == 3


@pytest.mark.parametrize("rolled_back", [False, True])
def test_a_stopped_stream_is_finished_before_all_is_asked(
    tiny, tmp_path, faked, train, monkeypatch, rolled_back
):
    told = []
    monkeypatch.setattr(FT, "finish", lambda self: told.append("finish"))
    monkeypatch.setattr(FT, "on_validation_epoch_end", lambda self: told.append(self.edits_seen))
    watch = [Ability(), Canary("rollback", every=4)] if rolled_back else [Stop()]
    train(make(METHODS / "ft.yaml", tiny("llama")), tmp_path, *watch)
    assert told == ([1, BAD] if rolled_back else [1, "finish", 3])


def test_warn_tells_once_and_changes_nothing(tiny, tmp_path, faked, caplog, train):
    path, folder = METHODS / "lora.yaml", tiny("llama")
    straight, method = make(path, folder, steps=5), make(path, folder, steps=5)
    train(straight, tmp_path / "straight")
    with caplog.at_level(logging.WARNING):
        train(method, tmp_path / "run", Ability(), Canary("warn", every=2))
    assert same(state(method), state(straight))
    assert timeless(method.ledger) == timeless(straight.ledger)
    told = [r.getMessage() for r in caplog.records if "edit 5 did it" in r.getMessage()]
    assert len(told) == 1
    assert "after 6 edits the model has collapsed: perplexity is 1e+09, above 100" in told[0]


def test_rows_and_checkpoint_are_of_the_healthy_commit(tiny, tmp_path, faked, train):
    path, folder = METHODS / "ft.yaml", tiny("llama")
    train(make(path, folder), tmp_path / "straight")
    run = tmp_path / "run"
    train(make(path, folder), run, RunFolder(), Ability(every=1), Canary("rollback", every=4))
    for name in ("probes.jsonl", "ability.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        assert {r["edits_seen"] for r in rows} == set(range(name == "probes.jsonl", BAD + 1))
    moments = {r["moment"] for r in map(json.loads, (run / "probes.jsonl").open())}
    assert moments == {"immediate", "milestone", "final"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["edits_seen"] == BAD
    assert summary["canary"]["rolled_back"] == [5, 6, 7]
    assert summary["perplexity"] == {"before": 10.0, "after": 10.0}
    ledger = [json.loads(line) for line in (run / "edits.jsonl").read_text().splitlines()]
    assert [e.get("rolled_back", False) for e in ledger] == [False] * BAD + [True] * 3
    kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
    expected = torch.load(
        tmp_path / "straight" / "checkpoints" / f"step={BAD}.ckpt", weights_only=False
    )
    assert kept["global_step"] == expected["global_step"] == BAD
    for name, value in expected["loops"]["fit_loop"].items():
        if "val_loop" not in name:
            assert kept["loops"]["fit_loop"][name] == value, name


@pytest.mark.parametrize("bad", [0, 3, 8])
def test_a_rolled_back_run_goes_on_from_its_checkpoint(
    tiny, tmp_path, faked, monkeypatch, bad, train
):
    path, folder = METHODS / "ft.yaml", tiny("llama")
    monkeypatch.setitem(globals(), "BAD", bad)
    straight = make(path, folder)
    train(straight, tmp_path / "straight")
    run = tmp_path / "run"
    train(make(path, folder), run, RunFolder(), Ability(), Canary("rollback", every=4))
    monkeypatch.setitem(globals(), "BAD", -1)
    again = make(path, folder)
    callbacks = RunFolder(), Ability(), Canary("rollback", every=4)
    trainer = train(again, run, *callbacks, ckpt_path=run / "checkpoints" / "last.ckpt")
    assert again.edits_seen == trainer.global_step == 9
    assert same(state(again), state(straight))
    live = [e for e in again.ledger if not e.get("rolled_back")]
    assert timeless(live) == timeless(straight.ledger)
    rows = [json.loads(line) for line in (run / "probes.jsonl").read_text().splitlines()]
    assert sorted(r["edit_id"] for r in rows if r["moment"] == "immediate") == list(range(9))
    assert {r["edits_seen"] for r in rows if r["moment"] == "final"} >= {9}


def test_a_collapsed_checkpoint_is_not_gone_on_with(tiny, tmp_path, faked, train):
    path, folder = METHODS / "ft.yaml", tiny("llama")
    train(make(path, folder), tmp_path, Ability(), max_steps=7)
    with pytest.raises(ValueError, match="checkpoint of 7 edits has collapsed already: perplexity"):
        train(make(path, folder), tmp_path, Ability(), Canary("stop"),
              ckpt_path=tmp_path / "checkpoints" / "last.ckpt")  # fmt: skip


@pytest.mark.parametrize(("cls", "every"), [(FT, 1), (LoRA, 4)])
def test_a_real_collapse_is_caught_and_taken_back(cls, every, tmp_path, monkeypatch, train):
    """One edit of the packaged model is made with a learning rate that breaks it."""
    usual = cls.edit

    def clumsy(self, edits):
        kept, self.lr = self.lr, 3.0 if edits[0].id == BAD else self.lr
        try:
            return usual(self, edits)
        finally:
            self.lr = kept

    def run(folder, *callbacks, **kwargs):
        data = FactWorld(limit=9, intrinsic=10)
        data.setup()
        data.texts = data.texts[::20]
        protocol = EvalProtocol(scorers=("sequence_accuracy",))
        method = cls(lm=LMSpec(id="factworld"), evaluation=protocol, steps=3, lr=1e-4)
        train(method, tmp_path / folder, *callbacks, stream=data, **kwargs)
        return method

    straight = run("straight", max_steps=BAD)
    monkeypatch.setattr(cls, "edit", clumsy)
    watch = Canary("rollback", every=every, perplexity_ratio=3.0)
    method = run("run", Ability(), watch)
    assert watch.events[0]["culprit"] == [BAD]
    assert watch.events[0]["facts"] < 0.5
    assert same(state(method), state(straight))


def test_lost_facts_are_a_collapse_too(tiny, tmp_path, monkeypatch, train):
    def reading(method, data):
        known = 0.4 if method.edits_seen > BAD else 0.9
        return Reading(edits_seen=method.edits_seen, perplexity=None, facts=known, seconds=0.0)

    monkeypatch.setattr("editkit.callbacks.ability.measure_ability", reading)
    monkeypatch.setattr(canary_module, "measure_ability", reading)
    method, watch = make(METHODS / "ft.yaml", tiny("llama")), Canary("stop", every=1)
    train(method, tmp_path, Ability(), watch)
    assert method.edits_seen == BAD + 1
    assert watch.events[0]["reason"] == "0.4 of the facts are known, less than 0.45 (0.9 unedited)"


def test_what_cannot_be_watched_or_meant_is_refused(tiny, tmp_path, train, stream):
    for wrong, words in [
        ({"action": "undo"}, "use warn, stop, rollback or null"),
        ({"every": 0}, "canary.every is 0"),
        ({"perplexity_ratio": 0.9}, "must be above 1"),
        ({"facts_kept": 1.5}, "from 0 to 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            Canary(**wrong)
    data = stream()
    data.setup()
    data.texts = []
    with pytest.raises(ValueError, match="the data has nothing to watch"):
        train(make(METHODS / "ft.yaml", tiny("llama")), tmp_path, Canary("stop"),
              stream=data)  # fmt: skip
