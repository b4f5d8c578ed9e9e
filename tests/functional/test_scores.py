"""The formulas of scores, against plain Python and hand-worked cases."""

import math
import random
import re
import string

import pytest
import torch

from editkit.functional.scores import (
    WORST_NLL,
    all_by_row,
    answers_match,
    cut_answer,
    inner_stops,
    mean_by_row,
    normalise_answer,
    token_hits,
    token_nll,
)

STOP = ("\n", ".")


def test_nll_is_minus_the_log_of_the_softmax():
    logits_NV = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 4
    ids_N = torch.tensor([0, 6, 3, 3, 1])
    expected = []
    for row, i in zip(logits_NV.double().tolist(), ids_N.tolist(), strict=True):
        expected.append(-math.log(math.exp(row[i]) / sum(math.exp(x) for x in row)))
    assert token_nll(logits_NV, ids_N).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_nll_of_bf16_logits_is_computed_in_fp32():
    logits_NV = (torch.randn(4, 50, generator=torch.Generator().manual_seed(1)) * 8).bfloat16()
    ids_N = logits_NV.argmax(-1)
    expected = -torch.log_softmax(logits_NV.double(), -1)[range(4), ids_N]
    assert token_nll(logits_NV, ids_N).dtype == torch.float32
    assert torch.allclose(token_nll(logits_NV, ids_N).double(), expected, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_nll_of_a_diverged_model_is_finite_and_the_worst(bad):
    logits_NV = torch.tensor([[0.0, bad, 1.0]])
    ids_N = torch.tensor([1 if bad == -math.inf else 0])
    assert token_nll(logits_NV, ids_N).item() == WORST_NLL


def test_a_hit_is_the_argmax_and_the_lowest_id_wins_a_tie():
    logits_NV = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [0.0, 0.0, 9.0]])
    assert token_hits(logits_NV, torch.tensor([1, 2, 2])).tolist() == [True, False, True]


def test_nan_logits_hit_nothing():
    logits_NV = torch.full((3, 3), math.nan)
    assert not token_hits(logits_NV, torch.tensor([0, 1, 2])).any()


def test_row_scores_are_those_of_each_row_alone():
    rows = [[1.0], [0.0, 1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    values_N = torch.tensor([v for row in rows for v in row])
    row_N = torch.tensor([b for b, row in enumerate(rows) for _ in row])
    assert mean_by_row(values_N, row_N, 4).tolist() == pytest.approx([1.0, 2 / 3, 1.0, 0.0])
    assert all_by_row(values_N.bool(), row_N, 4).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("text", "target", "answer"),
    [
        ("Paris. It is big.", "Paris", "Paris"),
        ("Paris\nQ: next", "Paris", "Paris"),
        ("Paris and more", "Paris", "Paris and more"),
        ("St. Louis. It lies", "St. Louis", "St. Louis"),
        ("St. Louis and more. It", "St. Louis", "St. Louis and more"),
        ("U.S. and", "U.S.", "U.S"),
        ("3.5. Then", "3.5", "3.5"),
        ("Louis. It is big. Yes", "St. Louis", "Louis. It is big"),
        ("Paris. It", None, "Paris"),
        ("\nParis", "Paris", ""),
        ("..", "..", ""),
        ("", "Paris", ""),
        (" Paris ", "Paris.\n", "Paris"),
    ],
)
def test_an_answer_ends_at_the_first_stop_outside_the_target(text, target, answer):
    if target == "..":  # nothing but stops: they are the target
        answer = ".."
    assert cut_answer(text, STOP, target) == answer


def test_the_longer_stop_is_seen_where_two_begin_alike():
    assert inner_stops("a\n\nb\nc", ("\n", "\n\n")) == 2


def test_without_stops_nothing_is_cut():
    assert cut_answer(" a. b\n", ()) == "a. b"


def squad(text: str) -> str:
    """The normalisation of SQuAD's evaluate-v1.1.py."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def test_normalisation_is_squads_wherever_that_leaves_something():
    draw = random.Random(0)
    words = ["The", "a", "an", "Eiffel", "TOWER", "it's", "o'clock", "1,000", "anthem", "--", "(x)"]
    compared = 0
    for _ in range(300):
        text = draw.choice([" ", "  ", "\t"]).join(draw.choices(words, k=draw.randint(1, 4)))
        if squad(text):
            compared += 1
            assert normalise_answer(text) == squad(text)
    assert compared > 200


@pytest.mark.parametrize("text", ["東京", "Ελλάδα", "القاهرة", "+", "A", "the", "...", "दिल्ली"])
def test_no_answer_is_reduced_to_nothing(text):
    assert normalise_answer(text)


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        ("The  Eiffel Tower!", "eiffel tower", True),
        ("Zu\u0308rich", "Z\u00fcrich", True),
        ("+", "-", False),
        ("", "!", False),
        ("", "", True),
        ("A", "the", False),
        ("東京", "京都", False),
        ("Paris", "Paris France", False),
    ],
)
def test_answers_match_once_normalised(first, second, match):
    assert answers_match(first, second) is match
