"""Words and their entropy, against counting by hand and the released figures."""

import json
import math

import pytest

from editkit.functional.essays import ngram_entropy, words


def test_entropy_of_distinct_words_is_that_of_a_uniform_choice():
    text = [f"w{i}" for i in range(20)]
    assert ngram_entropy(text) == pytest.approx(math.log2(19) / 3 + math.log2(18) * 2 / 3)


def test_entropy_of_a_loop_is_that_of_its_turns():
    pairs = [6 / 11, 5 / 11]  # of a b a b a b a b a b a b
    triples = [0.5, 0.5]
    expected = [-sum(p * math.log2(p) for p in shares) for shares in (pairs, triples)]
    assert ngram_entropy(["a", "b"] * 6) == pytest.approx(expected[0] / 3 + expected[1] * 2 / 3)


@pytest.mark.parametrize("tokens", [[], ["a"], ["a", "b"], ["a", "a", "a", "a"]])
def test_nothing_new_has_no_entropy(tokens):
    assert ngram_entropy(tokens) == 0.0
    assert math.copysign(1.0, ngram_entropy(tokens)) == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 3.50, isn't it?", ["It", "'s", "3.50", ",", "is", "n't", "it", "?"]),
        ("well-known (1,000)", ["well-known", "(", "1,000", ")"]),
        ("They\u2019ll can\u2019t", ["They", "\u2019ll", "ca", "n\u2019t"]),
        ("\u6771\u4eac tower", ["\u6771", "\u4eac", "tower"]),
        ("", []),
    ],
)
def test_words_part_from_marks_and_contractions(text, expected):
    assert words(text) == expected


def test_figures_are_the_released_ones_by_their_tokens_and_by_ours(shared):
    folder = shared("parity/09_metrics_ngram")
    texts = json.loads((folder / "inputs.json").read_text())["strings"]
    golden = json.loads((folder / "expected.json").read_text())
    assert [ngram_entropy(t) for t in golden["tokens"]] == pytest.approx(
        golden["per_string"], abs=1e-9
    )
    own = [ngram_entropy(words(text)) for text in texts]
    assert own == pytest.approx(golden["per_string"], abs=1e-9)
    assert sum(own) / len(own) == pytest.approx(golden["n_gram_entropy_all"], abs=1e-9)
