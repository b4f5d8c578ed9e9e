"""Verdicts: asked once, kept on disk, and never made up."""

import json
import re

import pytest

from editkit.edits import Probe
from editkit.lm.editable import EditableLM
from editkit.lm.spec import LMSpec
from editkit.metrics.evaluate import score_probes
from editkit.metrics.judge import CallableJudge, Case, Judge, JudgeError, LocalJudge
from editkit.metrics.protocol import EvalProtocol
from editkit.metrics.references import References

CASES = [Case("the capital is", ("Rome", "Roma"), a) for a in ("Rome", "Oslo", "in Rome", "Rome")]


class Contains(Judge):
    """Right is what holds the target; counts what it was asked."""

    def __init__(self, cache, verdict=bool):
        super().__init__(cache)
        self.asked = []
        self.verdict = verdict

    def judge(self, cases):
        self.asked += cases
        return [self.verdict(case.expected[0] in case.answer) for case in cases]


def test_each_case_is_judged_once_in_this_run_and_the_next(tmp_path):
    judge = Contains(tmp_path)
    assert judge.verdicts(CASES) == [True, False, True, True]
    assert judge.verdicts(CASES[::-1]) == [True, True, False, True]
    assert judge.asked == CASES[:3]
    again = Contains(tmp_path)
    assert again.verdicts(CASES) == [True, False, True, True]
    assert again.asked == []
    other = Case("the capital is", ("Rome",), "Rome")  # judged against other answers
    assert again.verdicts([other]) == [True]
    assert again.asked == [other]


def test_verdicts_are_kept_readably_and_apart_by_judge(tmp_path):
    Contains(tmp_path).verdicts(CASES[:1])

    class Stern(Contains):
        def judge(self, cases):
            return [False for _ in cases]

    assert Stern(tmp_path).verdicts(CASES[:1]) == [False]
    lines = [json.loads(p.read_text()) for p in tmp_path.glob("*.jsonl")]
    assert sorted(line["verdict"] for line in lines) == [False, True]
    assert {line["answer"] for line in lines} == {"Rome"}
    assert all("Stern" in line["judge"] or "Contains" in line["judge"] for line in lines)


def test_a_line_cut_short_is_judged_again_and_spoils_no_other(tmp_path):
    Contains(tmp_path).verdicts(CASES)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-20] + b"}")
    judge = Contains(tmp_path)
    assert judge.verdicts(CASES) == [True, False, True, True]
    assert judge.asked == [CASES[2]]
    assert Contains(tmp_path).verdicts(CASES) == [True, False, True, True]
    again = Contains(tmp_path)
    again.verdicts(CASES)
    assert again.asked == []


def test_answers_with_line_separators_are_kept_like_others(tmp_path):
    odd = Case("q\x85", ("Rome",), "Rome\u2028or\nnot \u00e9}")
    Contains(tmp_path).verdicts([odd, *CASES])
    again = Contains(tmp_path)
    assert again.verdicts([odd, *CASES]) == [True, True, False, True, True]
    assert again.asked == []


@pytest.mark.parametrize("verdict", [float, str, lambda right: None])
def test_what_is_no_truth_value_is_an_error_and_is_not_kept(tmp_path, verdict):
    with pytest.raises(JudgeError, match=r"Contains returned .* for 3 cases; return one True"):
        Contains(tmp_path, verdict).verdicts(CASES)
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_judge_that_leaves_cases_out_is_an_error(tmp_path):
    class Lazy(Contains):
        def judge(self, cases):
            return super().judge(cases)[1:]

    with pytest.raises(JudgeError, match="for 3 cases"):
        Lazy(tmp_path).verdicts(CASES)


def test_a_function_is_named_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "my_grading.py").write_text(
        "def is_right(question, expected, answer):\n    return answer in expected\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    judge = CallableJudge("my_grading.is_right", cache=tmp_path / "kept")
    assert judge.verdicts(CASES) == [True, False, False, True]
    assert "my_grading.is_right" in judge.name


@pytest.mark.parametrize(
    ("path", "says"),
    [("nowhere.is_right", "no judge 'nowhere.is_right'"), ("math.pi", "a float, not a function")],
)
def test_a_path_without_a_function_is_refused(path, says):
    with pytest.raises(ValueError, match=says):
        CallableJudge(path)


def test_a_local_model_judges_by_its_first_letter(tiny, tmp_path, monkeypatch):
    prompts = []

    def generate(lm, texts, max_new_tokens):
        prompts.extend(texts)
        replies = ["A", "B.", "(A) correct", "**B**"]
        return [replies[len(prompts) % 2 * 2 + ("Oslo" in text)] for text in texts]

    monkeypatch.setattr(EditableLM, "generate", generate)
    judge = LocalJudge(LMSpec(id=tiny("llama")), cache=tmp_path)
    braces = Case("{answer} is", ("{expected}",), "{question}")
    assert judge.verdicts([*CASES, braces]) == [True, False, True, True, True]
    assert len(prompts) == 4
    assert "Rome or Roma" in prompts[0]
    assert "The question or unfinished sentence: {answer} is\n" in prompts[3]
    assert re.search(r"model's answer: \{question\}\n", prompts[3])


def test_a_local_model_that_says_neither_letter_is_an_error_with_its_reply(tiny, tmp_path):
    judge = LocalJudge(LMSpec(id=tiny("llama")), cache=tmp_path, batch_size=1)
    short = LocalJudge(judge.spec, "{question} {expected} {answer}", cache=tmp_path)
    with pytest.raises(JudgeError, match=r"the judge replied .* to 'the capital is' -> 'Rome'"):
        short.verdicts(CASES)


def test_a_judge_is_known_by_its_weights_and_template(tiny, tmp_path):
    names = {
        LocalJudge(LMSpec(id=tiny(family), chat_template=chat), template, cache=tmp_path).name
        for family in ("llama", "gpt2")
        for chat in (True, False)
        for template in ("{question} {expected} {answer}", "{answer} {expected} {question}")
    }
    assert len(names) == 8


def test_a_template_must_hold_all_fields(tiny):
    with pytest.raises(ValueError, match=r"lacks \['answer', 'expected'\]"):
        LocalJudge(LMSpec(id=tiny("llama")), "Is this right? {question}")


def test_rows_get_the_judges_verdict_on_what_was_said(twins, tmp_path):
    judge = Contains(tmp_path)
    protocol = EvalProtocol(("judge",), max_new_tokens=12, judge=judge)
    probes = [
        Probe("a", 0, "reliability", "w1 is in", "w2", aliases=("w3",)),
        Probe("b", 0, "locality", "w1 is in w4", "w5"),
        Probe("c", 0, "reliability", "w1", "w2", conditions=(("w3", "w4 w4 w4 w4"),)),
    ]
    rows = score_probes(twins.lm, probes, References(), protocol)
    own, local, gold, left_out = rows
    assert left_out["scores"] == {}
    for row, expected in ((own, ("w2", "w3")), (local, (local["reference"],)), (gold, ("w5",))):
        assert Case(row["prompt"], expected, row["answer"]) in judge.asked
        assert row["scores"] == {"judge": float(expected[0] in row["answer"])}
    assert protocol.describe()["judge"] == judge.name


def test_a_failing_judge_fails_the_evaluation(twins, tmp_path):
    protocol = EvalProtocol(("judge",), judge=Contains(tmp_path, str), max_new_tokens=12)
    with pytest.raises(JudgeError):
        score_probes(twins.lm, [Probe("a", 0, "reliability", "w1", "w2")], References(), protocol)
