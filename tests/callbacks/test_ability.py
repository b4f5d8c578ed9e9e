"""Ability during the stream: what a plain measurement gives, when it is due, and on resume."""

from __future__ import annotations

import json
import math

import pytest
import torch
from lightning.pytorch import Callback

from editkit.callbacks.ability import Ability, measure_ability
from editkit.callbacks.run_folder import RunFolder
from editkit.edits import Probe
from editkit.lm.spec import LMSpec
from editkit.methods.ft import FT
from editkit.metrics.protocol import EvalProtocol


@pytest.fixture
def method(tiny):
    """A new method, each time it is called."""
    protocol = EvalProtocol(scorers=("generation",), max_new_tokens=4)
    return lambda: FT(lm=LMSpec(id=tiny("llama")), evaluation=protocol, steps=3, lr=1e-3)


@pytest.fixture
def facts(method, stream):
    """Return a stream with two facts that its model knows and one that it does not."""
    lm = method()
    lm.start()
    words = ["the", "capital", "is", "city", "town", "big", "small", "lives", "a", "he", "and"]
    known = []
    for prompt in (f"{one} {other}" for one in words for other in words):
        ids = lm.lm.tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            best = int(lm.lm.model(torch.tensor([ids])).logits[0, -1].argmax())
        target = lm.lm.tokenizer.decode([best]).strip()
        if target and lm.lm.tokenizer(f"{prompt} {target}")["input_ids"] == [*ids, best]:
            known.append((prompt, target))

    class WithFacts(stream):
        def load(self):
            edits, probes = super().load()
            facts = [*known[:2], ("a small city", "Lima Lima")]
            asked = [Probe(f"fact{n}", None, "intrinsic", *f) for n, f in enumerate(facts)]
            return edits, probes + asked

    data = WithFacts()
    data.setup()
    return data


def rows(folder):
    return [json.loads(line) for line in (folder / "ability.jsonl").read_text().splitlines()]


def by_hand(lm, data):
    """Perplexity and known facts by the model's own forward, a text at a time."""
    total = count = known = 0.0
    facts = [p for p in data.probes if p.kind == "intrinsic"]
    with torch.no_grad():
        for text in data.texts:
            ids = lm.tokenizer(text, return_tensors="pt")["input_ids"]
            logp = lm.model(ids).logits[0].log_softmax(-1)
            total -= float(logp[:-1].gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
        for fact in facts:
            head = len(lm.tokenizer(fact.prompt)["input_ids"])
            ids = lm.tokenizer(f"{fact.prompt} {fact.target}", return_tensors="pt")["input_ids"]
            best = lm.model(ids).logits[0].argmax(-1)
            known += bool((best[head - 1 : -1] == ids[0, head:]).all())
    return math.exp(total / count), known / len(facts)


def test_a_reading_is_what_the_models_own_forward_gives(method, facts):
    lm = method()
    lm.start()
    lm.apply_edits(facts.edits[:3])
    reading = measure_ability(lm, facts)
    value, share = by_hand(lm.lm, facts)
    assert reading["perplexity"] == pytest.approx(value, rel=1e-5)
    assert reading["facts"] == share
    with lm.lm.unedited():
        assert by_hand(lm.lm, facts)[1] == measure_ability(lm, facts)["facts"] == 2 / 3


@pytest.mark.parametrize(
    ("every", "expected"), [(2, [0, 1, 2, 4, 6, 8, 9]), (None, [0, 1, 9]), (100, [0, 1, 9])]
)
def test_read_at_milestones_every_few_batches_and_at_the_end(
    method, facts, train, tmp_path, every, expected
):
    trained = method()
    train(trained, tmp_path, RunFolder(), Ability(every), stream=facts)
    assert [r["edits_seen"] for r in rows(tmp_path)] == expected
    last = measure_ability(trained, facts)
    assert rows(tmp_path)[-1]["perplexity"] == last["perplexity"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    with trained.lm.unedited():
        before = measure_ability(trained, facts)["perplexity"]
    assert summary["perplexity"] == {"before": before, "after": last["perplexity"]}


def test_readings_are_curves(method, facts, train, tmp_path):
    seen = {}

    class Listen(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            names = ("perplexity", "facts")
            seen[trainer.global_step] = [float(trainer.callback_metrics[n]) for n in names]

    train(method(), tmp_path, Ability(every=3), Listen(), stream=facts)
    for row in rows(tmp_path)[1:]:
        assert seen[row["edits_seen"]] == pytest.approx([row["perplexity"], row["facts"]])


def test_a_resumed_run_has_the_rows_of_a_straight_one(method, facts, train, tmp_path):
    train(method(), tmp_path / "straight", RunFolder(), Ability(every=2), stream=facts)
    run = tmp_path / "run"
    train(method(), run, RunFolder(), Ability(every=2), stream=facts, max_steps=7)
    with (run / "ability.jsonl").open("a") as file:
        file.write('{"edits_seen": 8, "torn')
    kept = run / "checkpoints" / "step=5.ckpt"  # rows of 6 and 7 edits are there already
    train(method(), run, RunFolder(), Ability(every=2), stream=facts, ckpt_path=kept)

    def timeless(folder):
        return [{**row, "seconds": 0} for row in rows(folder)]

    assert timeless(run) == timeless(tmp_path / "straight")


def test_without_a_callback_of_its_own_the_summary_has_perplexity(method, stream, train, tmp_path):
    trained, data = method(), stream()
    train(trained, tmp_path, RunFolder(), stream=data)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["perplexity"]["after"] == measure_ability(trained, data)["perplexity"]
    assert summary["perplexity"]["before"] != summary["perplexity"]["after"]
    assert not (tmp_path / "ability.jsonl").exists()


def test_where_there_is_nothing_to_measure_there_is_no_file(method, stream, train, tmp_path):
    data = stream()
    data.setup()
    data.texts = []
    train(method(), tmp_path, RunFolder(), Ability(), stream=data)
    assert not (tmp_path / "ability.jsonl").exists()


def test_a_run_that_ends_early_can_go_on(method, stream, train, tmp_path):
    """Also where no checkpoint of its own was due: Lightning takes a short epoch for a whole."""
    train(method(), tmp_path, RunFolder(), stream=stream(), max_steps=4)
    for path in (tmp_path / "checkpoints").glob("step*"):
        path.unlink()
    again, last = method(), tmp_path / "checkpoints" / "last.ckpt"
    trainer = train(again, tmp_path, RunFolder(), stream=stream(), ckpt_path=last)
    assert (again.edits_seen, trainer.global_step) == (9, 9)


def test_every_is_at_least_one():
    with pytest.raises(ValueError, match=r"ability\.every is 0"):
        Ability(0)
