"""Sequences of batches against what the methods' released code gave, through the public classes.

Twice: with keys, values and states as recorded, which pins the solves and the order of the layers;
and from the model, with statistics and searches of our own.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from editkit.api import load
from editkit.edits import Edit
from editkit.lm.moments import Moments
from editkit.methods import locate
from editkit.methods.targets import ValueSearch

CASES = [
    "AlphaEdit_gpt2", "AlphaEdit_llama", "LyapLock_gpt2", "LyapLock_llama", "MEMIT_gpt2",
    "MEMIT_llama", "MEMIT_seq_llama", "RECT_llama",
]  # fmt: skip
FILES = {"MEMIT_seq": "memit_seq"}


class Case:
    """One recorded run: its inputs, what it gave, and our method set up alike."""

    def __init__(self, shared, name, cache):
        folder = shared(f"parity/05_seq_{name}")
        self.method = name.rpartition("_")[0]
        inputs = json.loads((folder / "inputs.json").read_text())
        self.expected = load_file(folder / "expected.safetensors")
        self.numbers = json.loads((folder / "expected.json").read_text())["batches"]
        self.names, self.layers = inputs["weight_names"], inputs["hparams"]["layers"]
        self.moments = load_file(folder / inputs["stats"] / "expected.safetensors")
        self.batches = [
            [
                Edit(r["case_id"], r["prompt"].replace("{}", r["subject"]), r["target_new"].strip(),
                     r["subject"])
                for r in batch
            ]
            for batch in inputs["batches"]
        ]  # fmt: skip
        h, texts = inputs["hparams"], json.loads(shared("parity/corpus.json").read_text())
        corpus = cache / "corpus.jsonl"
        corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        arguments = {
            "layers": self.layers,
            "search": ValueSearch(
                h["v_num_grad_steps"], h["v_lr"], h["clamp_norm_factor"], h["v_weight_decay"],
                h["kl_factor"],
            ),
            "prefixes": inputs["context_templates"][1],
            "corpus": str(corpus),
            "cache": str(cache),
        }  # fmt: skip
        if self.method == "AlphaEdit":
            arguments |= {"nullspace_threshold": h["nullspace_threshold"], "l2": h["L2"]}
        else:
            arguments["ridge"] = h["mom2_update_weight"]
        if self.method == "LyapLock":
            arguments |= {"alpha": inputs["queue"]["alpha"], "V": inputs["queue"]["V"]}
        file = FILES.get(self.method, self.method.lower())
        self.lm = load(str(folder / inputs["model"]), file, **arguments)
        self.base = {layer: self.weight(layer) for layer in self.layers}

    def weight(self, layer):
        """Return a weight with its edits, [out, in]."""
        edited = self.lm.lm.layers[self.names[str(layer)].removesuffix(".weight")]
        return edited.weight_oi + edited.delta.detach()

    def wanted(self, t, layer):
        """Return the recorded weight after batch `t`, [out, in]; before the first, the model's."""
        if t < 0:
            return self.base[layer]
        weight = self.expected[f"W.batch{t}.layer{layer}"]
        edited = self.lm.lm.layers[self.names[str(layer)].removesuffix(".weight")]
        return weight.T if edited.is_transposed else weight

    def replay(self, monkeypatch):
        """Let the method see the recorded keys, values, states and statistics."""
        case, asked = self, iter(range(len(self.batches)))

        class Recorded:
            def __init__(self, *args):
                self.t, self.layer = next(asked), None

            def find_values(self, search):
                zeros = torch.zeros(6)
                return SimpleNamespace(
                    z_DE=case.expected[f"z.batch{self.t}"].T, passes_E=zeros, stopped_E=zeros
                )

            def keys(self, site):
                self.layer = site.layer
                return case.expected[f"keys.batch{self.t}.layer{site.layer}"].T

            def states(self):
                return case.expected[f"cur_z.batch{self.t}.layer{self.layer}"].T

        def recorded(lm, sites, corpus, tokens, cache):
            return {s.path: Moments(self.rounded(s.layer), 1, 1.0) for s in sites}

        monkeypatch.setattr(locate, "SubjectRows", Recorded)
        monkeypatch.setattr(locate, "second_moments", recorded)

    def rounded(self, layer):
        """Return the moments as the released caches have them, rounded to fp32."""
        return self.moments[f"C0.layer{layer}"].float().double()


@pytest.fixture(params=CASES)
def case(request, shared, tmp_path):
    return Case(shared, request.param, tmp_path)


def relative(one, other):
    return float((one - other).norm() / other.norm())


def same_entries(case, t, layer, before_DF):
    """Where a batch wrote in both; RECT's threshold may flip 0.05 % of the entries a batch."""
    ours = case.weight(layer) != before_DF
    theirs = case.wanted(t, layer) != case.wanted(t - 1, layer)
    same = ours == theirs
    assert case.method != "RECT" or (~same).float().mean() <= 5e-4
    return same if case.method == "RECT" else torch.ones_like(same)


def check_queue(case, t, numbers, tolerance):
    if case.method == "LyapLock":
        for layer in case.layers:
            recorded = case.numbers[t][f"layer{layer}"]
            for name, theirs in (("kappa", "kappa_after"), ("PL", "PL"), ("D", "D")):
                assert numbers[f"{name}/{layer}"] == pytest.approx(recorded[theirs], rel=tolerance)


def test_solves_as_released_from_recorded_keys_and_values(case, monkeypatch):
    case.replay(monkeypatch)
    tolerance = 2e-4 if case.method == "AlphaEdit" else 2e-5  # AlphaEdit was solved in fp32
    before = case.base
    for t, batch in enumerate(case.batches):
        numbers = case.lm.edit_batch(batch)
        for layer in case.layers:
            moved = case.wanted(t, layer) - case.wanted(t - 1, layer)
            same = same_entries(case, t, layer, before[layer])
            ours = case.weight(layer) - before[layer]
            assert relative(ours[same], moved[same]) < tolerance
        before = {layer: case.weight(layer) for layer in case.layers}
        check_queue(case, t, numbers, 1e-5)
    if case.method == "LyapLock":
        assert max(numbers[f"kappa/{layer}"] for layer in case.layers) > 1.1


def test_edits_as_released_from_the_model(case):
    before, same = case.base, dict.fromkeys(case.layers, True)
    for t, batch in enumerate(case.batches):
        numbers = case.lm.edit_batch(batch)
        for layer in case.layers:
            same[layer] = same[layer] & same_entries(case, t, layer, before[layer])
            ours, theirs = case.weight(layer)[same[layer]], case.wanted(t, layer)[same[layer]]
            assert relative(ours, theirs) < 1e-3
            if t == 0:
                base = case.base[layer][same[layer]]
                assert relative(ours - base, theirs - base) < 1e-4
        before = {layer: case.weight(layer) for layer in case.layers}
        check_queue(case, t, numbers, 1e-3)
