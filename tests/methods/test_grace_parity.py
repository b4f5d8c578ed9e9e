"""GRACE on the released code's own numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from editkit.edits import Edit
from editkit.lm.rows import SiteRows
from editkit.lm.spec import LMSpec
from editkit.methods.grace import GRACE
from editkit.metrics.protocol import EvalProtocol

CASES = ["llama_warm", "llama_cold", "gpt2_warm", "gpt2_cold"]


@pytest.fixture(params=CASES)
def case(request, shared):
    folder = shared(f"parity/08_grace_{request.param}")
    read = [json.loads((folder / f"{name}.json").read_text()) for name in ("inputs", "expected")]
    return *read, *(load_file(folder / f"{name}.safetensors") for name in ("inputs", "expected"))


@pytest.fixture
def method(case, shared):
    inputs, config = case[0], case[0]["config"]
    method = GRACE(
        lm=LMSpec(id=str(shared(f"parity/models/{inputs['model'].rpartition('/')[2]}"))),
        evaluation=EvalProtocol(),
        layer=3,
        role={"down_proj": "mlp.down", "c_fc": "mlp.up"}[inputs["layer"].split(".")[-2]],
        eps=config["eps"],
        steps=config["n_iter"],
        lr=config["edit_lr"],
        stop_below=0.0,
        val_init=config["val_init"],
        replacement=config["replacement"],
        compat=True,
    )
    method.start()
    return method


def apart(one, other):
    return float((one - other).norm() / other.norm())


def test_a_stream_of_edits_and_all_queries_are_as_released(case, method, monkeypatch):
    inputs, expected, given, want = case
    losses, start = [], GRACE._starts
    plain = SiteRows.losses

    def recorded(self, added_BTD):
        found_B = plain(self, added_BTD)
        losses.append(float(found_B.detach()))
        return found_B

    def drawn(self, *args):  # a cold start is a draw, and the case's is data
        row_1D = given[f"values_at_iter0.edit{len(self.ledger)}"][-1:]
        own_1D = start(self, *args)
        if self.val_init == "warm" and expected["edits"][len(self.ledger)]["new_key"]:
            assert apart(own_1D, row_1D) < 1e-5
        return row_1D

    monkeypatch.setattr(SiteRows, "losses", recorded)
    monkeypatch.setattr(GRACE, "_starts", drawn)
    for n, (row, found) in enumerate(zip(inputs["edits"], expected["edits"], strict=True)):
        losses.clear()
        numbers = method.apply_edits([Edit(n, row["prompt"], row["target"])])
        book = method.memory.book
        assert numbers["keys"] == found["n_keys"] == len(book.key_KF)
        assert numbers["steps"] == inputs["config"]["n_iter"]
        assert losses[:-1] == pytest.approx(found["losses"], rel=1e-4)
        assert book.edit_K.tolist().count(n) == found["new_key"]
        assert apart(book.key_KF, want[f"keys.edit{n}"]) < 1e-5
        assert apart(book.radius_K, want[f"epsilons.edit{n}"]) < 1e-5
        assert apart(method.memory.values.detach(), want[f"values.edit{n}"]) < 1e-4
    for j, query in enumerate(expected["queries"]):
        check_query(method, query, want[f"logits_last.query{j}"])


@torch.no_grad()
def check_query(method, query, logits_V):
    (pair,) = method.inputs([query["prompt"]])
    assert int(pair[1].sum()) == query["key_id"] + 1
    distance_B, key_B = method.memory.nearest(method.memory.query(*pair))
    assert int(key_B) == query["chosen"]
    assert float(distance_B) == pytest.approx(min(query["distances"]), rel=1e-4, abs=1e-5)
    (who,) = method.routes([query["prompt"]])
    fired = method.memory.edit_K.tolist()[query["chosen"]] if query["fired"] else None
    assert who.edit_id == fired
    assert who.match == pytest.approx(1 / (1 + min(query["distances"])), rel=1e-4)
    found_V = method.lm.forward(method.lm.encode([query["prompt"]]))[0, -1]
    assert (found_V - logits_V).abs().max() < 1e-4 * logits_V.abs().max()
