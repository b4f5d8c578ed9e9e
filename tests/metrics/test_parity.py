"""Scores of the released evaluation code (LyapLock c5e6186), through the evaluator's own door.

CounterFact: mean NLL per target token, success by comparison of two answers, and whether all
target tokens are the likeliest. zsRE: which target tokens are the likeliest, with the quirks of
that code switched on by name; on Llama those change every figure, on GPT-2 none.
"""

import json
import math

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from editkit.edits import Probe
from editkit.lm.editable import EditableLM
from editkit.lm.spec import LMSpec
from editkit.metrics.evaluate import score_probes
from editkit.metrics.protocol import EvalProtocol
from editkit.metrics.references import References
from editkit.metrics.summary import counterfact_score, score_table

PAIRS = EvalProtocol(scorers=("sequence_accuracy", "nll", "pair", "pair_diff"))
QUIRKS = {
    "gpt2": ("zsre_retokenised",),
    "llama": ("zsre_retokenised", "zsre_double_space", "zsre_bos_answer"),
}


@pytest.fixture
def case(shared):
    """Return (edited model, inputs, expected) of a case by name."""

    def load(name):
        folder = shared(f"parity/{name}")
        inputs = json.loads((folder / "inputs.json").read_text())
        expected = json.loads((folder / "expected.json").read_text())
        path = folder / inputs["model"]
        model = AutoModelForCausalLM.from_pretrained(path)
        overwrite = inputs["overwrite_weights"]
        tensors = load_file(folder / overwrite["source"])
        for weight, key in overwrite["tensors"].items():
            model.get_parameter(weight).data.copy_(tensors[key])
        lm = EditableLM(model, AutoTokenizer.from_pretrained(path), LMSpec(id=str(path)))
        return lm, inputs["records"], expected

    return load


def counterfact_probes(number, record):
    request = record["requested_rewrite"]
    new, true = request["target_new"]["str"], request["target_true"]["str"]
    prompt = request["prompt"].format(request["subject"])
    asked = [("reliability", prompt, new, true)]
    asked += [("generalization", p, new, true) for p in record["paraphrase_prompts"]]
    asked += [("locality", p, true, new) for p in record["neighborhood_prompts"]]
    return [
        Probe(f"{number}.{i}", number, kind, text, target, rival=rival)
        for i, (kind, text, target, rival) in enumerate(asked)
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_counterfact_scores_are_the_released_ones(case, family):
    lm, records, expected = case(f"09_metrics_counterfact_{family}")
    probes = [p for i, record in enumerate(records) for p in counterfact_probes(i, record)]
    rows = score_probes(lm, probes, References(), PAIRS)
    rows = [row for row in rows if row["kind"] != "locality"]
    golden = []
    for record in expected["records"]:
        for kind in ("rewrite", "paraphrase", "neighborhood"):
            is_near = kind == "neighborhood"
            own, other = ("target_true", "target_new")[:: 1 if is_near else -1]
            derived = record["derived"][{"rewrite": "efficacy"}.get(kind, kind)]
            nlls, correct = record[f"{kind}_prompts_probs"], record[f"{kind}_prompts_correct"]
            for nll, hit, all_hit in zip(nlls, derived, correct, strict=True):
                golden.append((nll[own], nll[other], hit, all_hit))
    assert len(rows) == len(golden) > 100
    for row, (own, other, hit, correct) in zip(rows, golden, strict=True):
        scores = row["scores"]
        assert scores["nll"] == pytest.approx(own, rel=1e-4, abs=1e-5)
        difference = math.exp(-own) - math.exp(-other)
        assert scores["pair_diff"] == pytest.approx(difference, rel=1e-4, abs=1e-5)
        assert scores["pair"] == float(hit)
        assert scores["sequence_accuracy"] == float(correct)
    table = score_table(rows)
    names = {"efficacy": "reliability", "paraphrase": "generalization"}
    means = expected["mean"]
    for name, mean in means.items():
        found = table[names.get(name, "locality_gold")]["pair"]["value"]
        assert found == pytest.approx(mean)
    harmonic = 3 / sum(1 / mean for mean in means.values())
    assert counterfact_score(rows)["value"] == pytest.approx(harmonic)


def zsre_probes(number, record):
    request = record["requested_rewrite"]
    target = request["target_new"]["str"]
    pieces = [p for p in record["neighborhood_prompts"] if not p["target"].startswith("<|")]
    answer = "".join(piece["target"] for piece in pieces).strip()
    question = record["neighborhood_prompts"][0]["prompt"]
    prompt = request["prompt"].format(request["subject"])
    return [
        Probe(f"{number}.rewrite", number, "reliability", prompt, target),
        Probe(
            f"{number}.paraphrase",
            number,
            "generalization",
            record["paraphrase_prompts"][0],
            target,
        ),
        Probe(f"{number}.neighborhood", number, "locality", question, answer),
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_zsre_token_accuracy_is_the_released_one_with_its_quirks(case, family):
    lm, records, expected = case(f"09_metrics_zsre_{family}")
    probes = [p for i, record in enumerate(records) for p in zsre_probes(i, record)]
    scorers = ("token_accuracy", "sequence_accuracy")

    def scored(compat):
        rows = score_probes(lm, probes, References(), EvalProtocol(scorers, compat=compat))
        return {r["probe_id"]: r["scores"] for r in rows if r["kind"] != "locality"}

    golden = {
        f"{i}.{name}": hits
        for i, record in enumerate(expected["records"])
        for name in ("rewrite", "paraphrase", "neighborhood")
        for hits in [record[f"{name}_prompts_correct"]]
    }
    assert any(any(hits) for hits in golden.values())
    found = scored(QUIRKS[family])
    for name, hits in golden.items():
        assert found[name]["token_accuracy"] == pytest.approx(sum(hits) / len(hits))
        assert found[name]["sequence_accuracy"] == float(all(hits))
    for name in ("rewrite", "paraphrase", "neighborhood"):
        own = [found[f"{i}.{name}"]["token_accuracy"] for i in range(len(records))]
        assert sum(own) / len(own) == pytest.approx(expected["mean"][f"{name}_prompts_correct"])
    assert (found == scored(())) == (family == "gpt2")


def test_each_quirk_of_zsre_does_what_its_name_says(case):
    lm, records, _ = case("09_metrics_zsre_llama")
    probes = [p for i, record in enumerate(records) for p in zsre_probes(i, record)]
    asked = []
    ids = lm.policy.ids

    def watch(texts):
        asked.extend(texts)
        return ids(texts)

    lm.policy.ids = watch
    for compat in QUIRKS["llama"]:
        asked.clear()
        protocol = EvalProtocol(("token_accuracy",), compat=(compat,))
        score_probes(lm, probes, References(), protocol)
        partial = [t for t in asked if any(t.startswith(p.prompt + " ") for p in probes)]
        assert any("  " in text for text in partial) == (compat == "zsre_double_space")
        with_bos = [t for t in asked if lm.tokenizer.bos_token in t[1:]]
        assert bool(with_bos) == (compat == "zsre_bos_answer")
