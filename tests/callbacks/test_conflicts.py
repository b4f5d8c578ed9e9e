"""A stream at odds with itself is told of, or refused, before anything is written."""

from __future__ import annotations

import json

import pytest

from editkit.callbacks.conflicts import Conflicts
from editkit.callbacks.run_folder import RunFolder
from editkit.edits import Edit
from editkit.lm.spec import LMSpec
from editkit.methods.ft import FT
from editkit.metrics.protocol import EvalProtocol


@pytest.fixture
def method(tiny):
    protocol = EvalProtocol(scorers=("sequence_accuracy",))
    return FT(lm=LMSpec(id=tiny("llama")), evaluation=protocol, steps=1)


@pytest.fixture
def odd(stream):
    """A stream whose last three edits repeat, contradict and nearly repeat earlier ones."""

    class Odd(stream):
        def load(self):
            edits, probes = super().load()
            texts = [("the capital of Alba is", "Oslo"), ("The capital of Bera is:", "Rome"),
                     ("of the capital Cora is", "Bern")]  # fmt: skip
            return [*edits, *(Edit(9 + n, *t) for n, t in enumerate(texts))], probes

    return Odd()


def test_conflicts_are_told_written_and_counted_and_all_edits_made(
    method, odd, train, tmp_path, capsys
):
    train(method, tmp_path, RunFolder(), Conflicts(), stream=odd)
    assert method.edits_seen == 12
    rows = [json.loads(line) for line in (tmp_path / "conflicts.jsonl").read_text().splitlines()]
    told = [(r["kind"], r["edit_id"], r["earlier_id"]) for r in rows]
    assert told == [("duplicate", 9, 0), ("contradiction", 10, 1), ("near", 11, 2)]
    ledger = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    for row in rows:
        earlier = next(e for e in ledger if e["edit_id"] == row["earlier_id"])
        assert (earlier["prompt"], earlier["target"]) == (
            row["earlier_prompt"],
            row["earlier_target"],
        )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["conflicts"] == {"duplicate": 1, "contradiction": 1, "near": 1}
    assert "1 duplicate, 1 contradiction, 1 near repeat" in capsys.readouterr().out


def test_conflicts_are_refused_before_the_model_is_loaded(method, odd, train, tmp_path):
    with pytest.raises(ValueError, match=r"edit 9 repeats edit 0.*on_conflict to report"):
        train(method, tmp_path, RunFolder(), Conflicts("raise"), stream=odd)
    assert method.lm is None
    assert not (tmp_path / "probes.jsonl").exists()


def test_a_stream_at_one_with_itself_leaves_nothing(method, stream, train, tmp_path, capsys):
    train(method, tmp_path, RunFolder(), Conflicts("raise"), stream=stream())
    assert not (tmp_path / "conflicts.jsonl").exists()
    assert "conflicts" not in json.loads((tmp_path / "summary.json").read_text())
    assert "at odds" not in capsys.readouterr().out


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="use report or raise"):
        Conflicts("skip")
    with pytest.raises(ValueError, match="similarity is 2"):
        Conflicts(similarity=2)
