"""Rows of the evaluator, recomputed one by one with transformers' own forward."""

import functools
import json
import random
import string

import pytest
import torch

from editkit.edits import Probe
from editkit.lm.editable import EditableLM
from editkit.lm.reading import Reading
from editkit.lm.spec import LMSpec
from editkit.metrics.evaluate import score_probes
from editkit.metrics.protocol import EvalProtocol
from editkit.metrics.references import References

BUDGET = 12
LARGEST_LOGIT = 32.0  # of the tiny models here
PROTOCOL = EvalProtocol(max_new_tokens=BUDGET)


def plain_cut(text: str) -> str:
    """Cut at the first stop; these targets have none inside."""
    for mark in ("\n", "."):
        text = text.split(mark)[0]
    return text.strip()


def plain_words(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return [w for w in bare.split() if w not in ("a", "an", "the")]


def rows_of(lm, probes, references=None, protocol=PROTOCOL, batch_size=None):
    return score_probes(lm, probes, references or References(), protocol, batch_size)


def forced_scores(logp_NV, judged):
    hits = [int(row.argmax()) == i for row, i in zip(logp_NV, judged, strict=True)]
    nll = [-float(row[i]) for row, i in zip(logp_NV, judged, strict=True)]
    return {
        "token_accuracy": sum(hits) / len(hits),
        "sequence_accuracy": float(all(hits)),
        "nll": sum(nll) / len(nll),
    }


def expected_rows(twins, probe):
    """One probe alone, by plain models: the base and the base with the change in its weight.

    Returns (kind, scores, answer, reference) per row.
    """
    budget = BUDGET
    if probe.target is not None:
        budget = max(BUDGET, len(twins.forced(twins.after, probe.prompt, probe.target)[1]) + 8)
    said = plain_cut(twins.free(twins.after, probe.prompt, budget))
    if probe.kind != "locality":
        logp_NV, ids = twins.forced(twins.after, probe.prompt, probe.target)
        match = float(plain_words(said) == plain_words(probe.target))
        return [(probe.kind, forced_scores(logp_NV, ids) | {"generation": match}, said, None)]
    base_said = plain_cut(twins.free(twins.before, probe.prompt, budget))
    text = probe.target or base_said or "."
    logp_NV, ids = twins.forced(twins.after, probe.prompt, text)
    base_ids = twins.forced(twins.before, probe.prompt, text)[0].argmax(-1).tolist()
    match = float(plain_words(said) == plain_words(base_said))
    scores = forced_scores(logp_NV, base_ids) | {"generation": match}
    rows = [("locality", scores, said, base_said)]
    if probe.target is not None:
        match = float(plain_words(said) == plain_words(probe.target))
        scores = forced_scores(logp_NV, ids) | {"generation": match}
        rows.append(("locality_gold", scores, said, None))
    return rows


def test_every_row_is_that_of_the_probe_alone_under_plain_transformers(twins, probes):
    rows = rows_of(twins.lm, probes)
    expected = [(probe, *row) for probe in probes for row in expected_rows(twins, probe)]
    for row, (probe, kind, scores, answer, reference) in zip(rows, expected, strict=True):
        assert row["scores"].keys() == scores.keys()
        assert row["scores"] == pytest.approx(scores, abs=1e-6, rel=1e-6)
        assert (row["answer"], row["reference"]) == (answer, reference)
        assert (row["kind"], row["counted"]) == (kind, True)
        assert [row[k] for k in ("probe_id", "edit_id", "axis", "prompt", "target")] == [
            probe.id,
            probe.edit_id,
            probe.axis,
            probe.prompt,
            probe.target,
        ]


def test_the_probes_of_these_tests_have_better_and_worse_answers(twins, probes):
    rows = rows_of(twins.lm, probes)
    for kind in ("reliability", "locality"):
        for scorer in ("token_accuracy", "sequence_accuracy", "generation"):
            found = {row["scores"][scorer] for row in rows if row["kind"] == kind}
            assert len(found) > 1, (kind, scorer)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_depend_on_neither_batch_size_nor_order(twins, probes, batch_size):
    expected = {(r["probe_id"], r["kind"]): r for r in rows_of(twins.lm, probes)}
    mixed = random.Random(batch_size).sample(probes, len(probes))
    rows = rows_of(twins.lm, mixed, batch_size=batch_size)
    assert [r["probe_id"] for r in rows if r["kind"] != "locality_gold"] == [p.id for p in mixed]
    assert_rows_equal({(r["probe_id"], r["kind"]): r for r in rows}, expected)


def assert_rows_equal(rows, expected):
    assert rows.keys() == expected.keys()
    for key, row in rows.items():
        assert row["scores"] == pytest.approx(expected[key]["scores"], abs=1e-5)
        assert {**row, "scores": 0} == {**expected[key], "scores": 0}
        for scorer in ("token_accuracy", "sequence_accuracy", "generation"):
            assert row["scores"][scorer] == expected[key]["scores"][scorer]


def test_scores_do_not_depend_on_the_padding_side(twins, probes, monkeypatch):
    expected = {(r["probe_id"], r["kind"]): r for r in rows_of(twins.lm, probes)}
    monkeypatch.setattr(twins.lm, "encode", functools.partial(twins.lm.encode, padding="left"))
    rows = {(r["probe_id"], r["kind"]): r for r in rows_of(twins.lm, probes)}
    assert_rows_equal(rows, expected)


def test_an_unedited_model_agrees_with_itself_whatever_the_gold_answer(twins, probes):
    with twins.lm.unedited():
        rows = rows_of(twins.lm, probes)
    local = [row["scores"] for row in rows if row["kind"] == "locality"]
    gold = [row["scores"] for row in rows if row["kind"] == "locality_gold"]
    for scorer in ("token_accuracy", "sequence_accuracy", "generation"):
        assert {scores[scorer] for scores in local} == {1.0}
    assert min(scores["sequence_accuracy"] for scores in gold) == 0.0


def test_only_the_scorers_asked_for_are_computed(twins, probes, monkeypatch):
    full = rows_of(twins.lm, probes)
    quick = EvalProtocol(scorers=("sequence_accuracy",))
    gold = [p for p in probes if p.target is not None]
    with monkeypatch.context() as patch:
        patch.delattr(EditableLM, "generate")
        rows = rows_of(twins.lm, gold, protocol=quick)
    expected = {(r["probe_id"], r["kind"]): r["scores"]["sequence_accuracy"] for r in full}
    assert rows
    for row in rows:
        key = (row["probe_id"], row["kind"])
        assert row["scores"] == {"sequence_accuracy": expected[key]}
        assert row["answer"] is None
    with monkeypatch.context() as patch:
        patch.delattr(EditableLM, "target_logits")
        rows = rows_of(twins.lm, probes, protocol=EvalProtocol(scorers=("generation",)))
    assert [r["scores"] for r in rows] == [{"generation": r["scores"]["generation"]} for r in full]


@pytest.fixture
def says(twins, monkeypatch):
    """Let the model say given texts, in turn; keep the ends that its rows were decoded with."""

    def arrange(*texts):
        said, ends = iter(texts), []
        decode = Reading.decode

        def watch(reading, given, *args):
            ends.append((reading.tokens.target_BT.sum(1).tolist(), given))
            return decode(reading, given, *args)

        monkeypatch.setattr(Reading, "decode", watch)
        monkeypatch.setattr(twins.lm, "texts", lambda rows: [next(said) for _ in rows])
        return ends

    return arrange


def test_a_budget_depends_on_the_own_answers_alone(twins, says):
    ends = says(*["w1"] * 5)
    counts = {"w1": 1, "w2": 3, "w3": 9, "w4": 20}
    asked = [Probe(p, 0, "reliability", p, " ".join(["w9"] * n)) for p, n in counts.items()]
    asked.append(Probe("w5", 0, "reliability", "w5", "w9", aliases=(" ".join(["w9"] * 11), "w8")))
    rows_of(twins.lm, asked, protocol=EvalProtocol(max_new_tokens=12))
    expected = []
    for probe in asked:
        sizes = [len(twins.forced(twins.after, probe.prompt, t)[1]) for t in answers_of(probe)]
        expected.append((sizes[0], max(12, max(sizes) + 8)))
    ((drafts, given),) = ends
    assert sorted(zip(drafts, given.room_B.tolist(), strict=True)) == sorted(expected)
    assert len(set(expected)) > 3


def answers_of(probe):
    return [probe.target, *probe.aliases]


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("St. Louis", 1.0),
        ("st. louis. It lies", 1.0),
        ("St. Louis and more", 0.0),
        ("St. Louis in w1. w2", 0.0),
        ("St", 0.0),
    ],
)
def test_a_target_with_a_stop_inside_can_be_met_and_run_on_answers_fail(twins, says, said, score):
    ends = says(said)
    (row,) = rows_of(twins.lm, [Probe("p", 0, "reliability", "w1 is in", "St. Louis.")])
    assert row["scores"]["generation"] == score
    assert ends[0][1].stops_B.tolist() == [2]  # else decoding could end behind "St."


@pytest.mark.parametrize(
    ("said", "answer", "score"),
    [
        ("w7. w1", "w7", 1.0),
        ("W2. w1", "W2", 1.0),
        ("St. Louis. w1", "St. Louis", 1.0),
        ("St. w2. w1", "St", 0.0),
        ("w7 w2", "w7 w2", 0.0),
    ],
)
def test_any_alias_is_a_right_answer(twins, says, said, answer, score):
    says(said)
    probe = Probe("p", 0, "portability", "w1 is in", "w7", aliases=("w2", "St. Louis"))
    (row,) = rows_of(twins.lm, [probe])
    assert (row["answer"], row["scores"]["generation"]) == (answer, score)


def test_a_gold_answer_with_a_stop_inside_does_not_shift_where_locality_is_cut(twins, says):
    says("St. Paul", "St. Louis")  # unedited, edited
    rows = rows_of(twins.lm, [Probe("p", 0, "locality", "w1 is in", "St. Louis")])
    local, gold = rows
    assert (local["answer"], local["reference"]) == ("St", "St")
    assert (gold["answer"], gold["reference"]) == ("St. Louis", None)
    assert local["scores"]["generation"] == gold["scores"]["generation"] == 1.0


def test_where_the_unedited_model_says_nothing_its_next_token_is_compared(twins, says):
    says("", "", "")
    (row,) = rows_of(twins.lm, [Probe("p", None, "locality", "w1 is in")])
    ids = twins.tokenizer("w1 is in")["input_ids"]
    assert len(twins.forced(twins.before, "w1 is in", ".")[1]) == 1
    with torch.no_grad():
        base = int(twins.before(torch.tensor([ids])).logits[0, -1].argmax())
        logp_V = twins.after(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    assert row["scores"]["nll"] == pytest.approx(-float(logp_V[base]), abs=1e-6)
    assert row["scores"]["sequence_accuracy"] == float(int(logp_V.argmax()) == base)
    assert row["scores"]["generation"] == 1.0


def test_conditions_are_put_to_the_unedited_model(twins):
    prompt, true, edited = next(found for found in endings(twins) if found[1] != found[2])
    made = functools.partial(Probe, edit_id=0, kind="portability", prompt="w7", target="w8")
    asked = [
        made(id="met", conditions=((prompt, true),)),
        made(id="not met", conditions=((prompt, edited),)),
        made(id="half met", conditions=((prompt, true), (prompt, edited))),
        made(id="none", conditions=()),
    ]
    rows = rows_of(twins.lm, asked)
    assert [row["counted"] for row in rows] == [True, False, False, True]
    assert rows[1]["scores"] == {}
    assert rows[0]["scores"] == rows[3]["scores"] != {}


def endings(twins):
    """Yield (prompt, unedited answer, edited answer) where both are sentences that end."""
    for i in range(40):
        prompt = f"w{i} w{(i * 3) % 40} is in"
        said = [twins.free(model, prompt, BUDGET) for model in (twins.before, twins.after)]
        if all("." in text and plain_cut(text) for text in said):
            yield prompt, plain_cut(said[0]), plain_cut(said[1])


def test_a_locality_probe_with_unmet_conditions_leaves_out_both_rows(twins):
    probe = Probe("p", 0, "locality", "w1", "w2", conditions=(("w3", "w4 w4 w4 w4"),))
    rows = rows_of(twins.lm, [probe])
    assert [(r["kind"], r["counted"], r["scores"]) for r in rows] == [
        ("locality", False, {}),
        ("locality_gold", False, {}),
    ]


def test_a_probe_without_target_is_refused_unless_it_is_of_locality(twins):
    with pytest.raises(ValueError, match="probe 'p7' of kind 'intrinsic' needs a target"):
        rows_of(twins.lm, [Probe("p7", None, "intrinsic", "w1")])


def test_no_probes_give_no_rows(twins):
    assert rows_of(twins.lm, []) == []


def test_bf16_logits_are_cast_before_the_softmax(twins, probes):
    twins.lm.model.bfloat16()
    asked = [p for p in probes if p.kind == "reliability"]
    with twins.lm.unedited():
        rows = rows_of(twins.lm, asked)
    twins.before.bfloat16()
    for probe, row in zip(asked, rows, strict=True):
        logp_NV, ids = twins.forced(twins.before, probe.prompt, probe.target)
        # the softmax of bf16 logits in fp64; batching may move a logit by one unit of 8 bits
        expected = forced_scores(logp_NV, ids)["nll"]
        assert row["scores"]["nll"] == pytest.approx(expected, abs=2**-7 * LARGEST_LOGIT)
    nll = torch.tensor([row["scores"]["nll"] for row in rows])
    assert (nll != nll.bfloat16().float()).any()


def test_a_diverged_model_has_finite_scores_and_hits_nothing(twins, probes):
    layer = next(iter(twins.lm.layers.values()))
    layer.delta.data.fill_(float("nan"))
    layer.changed()
    rows = rows_of(twins.lm, [p for p in probes if p.kind == "reliability"])
    for row in rows:
        assert row["scores"]["token_accuracy"] == row["scores"]["sequence_accuracy"] == 0.0
        assert row["scores"]["nll"] == 1e4


def test_the_packaged_model_scores_the_same_one_by_one_as_together():
    lm = EditableLM.load(LMSpec())
    words = ["The capital of", "Once", "A person who lives in", "River"]
    asked = [Probe(f"{i}", i, "locality", w * (1 + i % 2)) for i, w in enumerate(words)]
    together = rows_of(lm, asked)
    for probe, row in zip(asked, together, strict=True):
        (alone,) = rows_of(lm, [probe])
        assert alone["answer"] == row["answer"] == row["reference"]
        assert alone["scores"] == pytest.approx(row["scores"], abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"scorers": ("accuracy",)}, "accuracy"),
        ({"scorers": ()}, "some of"),
        ({"scorers": ("nll", "nll")}, "each once"),
        ({"stop": ("",)}, "empty string"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"essay_tokens": 0}, "essay_tokens is 0"),
        ({"scorers": ("judge",)}, "needs a judge"),
        ({"scorers": ("consistency",)}, "reference_texts"),
        ({"compat": ("zsre",)}, "zsre_double_space"),
    ],
)
def test_a_wrong_protocol_is_refused_by_its_value(wrong, says):
    with pytest.raises(ValueError, match=says):
        EvalProtocol(**wrong)


def test_a_protocol_can_be_stamped():
    stamp = EvalProtocol(compat=("zsre_bos_answer",)).describe()
    assert stamp["stop"] == ["\n", "."]
    assert stamp["compat"] == ["zsre_bos_answer"]
    assert stamp["judge"] is None
    assert json.loads(json.dumps(stamp)) == stamp


@pytest.mark.parametrize("extra", [{"rival": "w2"}, {"choices": ("w2", "w3")}])
def test_rivals_and_choices_need_a_target(twins, extra):
    with pytest.raises(ValueError, match="probe 'p' of kind 'locality' needs a target"):
        rows_of(twins.lm, [Probe("p", 0, "locality", "w1", **extra)])


def test_a_probe_has_no_score_that_it_has_no_data_for(twins):
    asked = [
        Probe("bare", 0, "reliability", "w1 is in", "w2"),
        Probe("rival", 0, "reliability", "w1 is in", "w2", rival="w3", group="g"),
        Probe("choices", 0, "locality", "w1 is in", "w2", choices=("w3", "w4")),
    ]
    bare, rival, local, gold = rows_of(twins.lm, asked)
    base = ["token_accuracy", "sequence_accuracy", "generation", "nll"]
    assert list(bare["scores"]) == list(local["scores"]) == base
    assert list(rival["scores"]) == [*base, "pair", "pair_diff"]
    assert list(gold["scores"]) == [*base, "choice", "choice_norm"]
    assert (rival["rival"], rival["group"], bare["rival"], bare["group"]) == ("w3", "g", None, "")
