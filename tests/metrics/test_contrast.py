from __future__ import annotations

import pytest

from editkit.metrics.intervals import estimate_contrast

NAN = float("nan")


def test_a_difference_and_a_ratio_of_means_are_those_of_the_rows_that_count():
    first = [1.0, 0.0, NAN, 1.0, 1.0], [0, 1, 2, 3, 4]
    second = [0.0, 1.0, 0.0, 1.0], [None] * 4
    found = estimate_contrast(first, second, "difference")
    assert found["value"] == pytest.approx(0.75 - 0.5)
    assert (found["n"], found["edits"]) == (8, 8)
    assert found["low"] <= found["value"] <= found["high"]
    assert estimate_contrast(first, second, "ratio")["value"] == pytest.approx(1.5)


def test_the_interval_covers_what_two_binomials_vary():
    one = [1.0] * 70 + [0.0] * 30, [*range(100)]
    two = [1.0] * 50 + [0.0] * 50, [None] * 100
    found = estimate_contrast(one, two, "difference", seed=1)
    wide = 1.96 * (0.7 * 0.3 / 100 + 0.5 * 0.5 / 100) ** 0.5
    assert found["low"] == pytest.approx(0.2 - wide, abs=0.02)
    assert found["high"] == pytest.approx(0.2 + wide, abs=0.02)
    assert found == estimate_contrast(one, two, "difference", seed=1)


def test_rows_of_one_edit_vary_together():
    alone = estimate_contrast(
        ([1.0, 0.0] * 20, [*range(40)]), ([1.0, 0.0], [None] * 2), "difference"
    )
    tied = [1.0] * 20 + [0.0] * 20, [0] * 20 + [1] * 20
    wide = estimate_contrast(tied, ([1.0, 0.0], [None] * 2), "difference")
    assert wide["high"] - wide["low"] > alone["high"] - alone["low"]


def test_nothing_is_made_up_where_there_are_no_rows():
    empty = estimate_contrast(([NAN], [0]), ([1.0], [None]), "difference")
    assert (empty["value"], empty["low"]) == (None, None)
    zero = estimate_contrast(([1.0], [0]), ([0.0, 0.0], [None, None]), "ratio")
    assert (zero["value"], zero["low"]) == (None, None)


def test_sets_of_the_same_models_are_resampled_together():
    clusters = [*range(20)] * 2
    first = [float(c % 2) for c in clusters]
    second = [1.0 - value for value in first]
    same = estimate_contrast((first, clusters), (first, clusters), "difference", is_joint=True)
    assert (same["value"], same["low"], same["high"]) == (0, 0, 0)
    assert (same["n"], same["edits"]) == (80, 20)
    joint = estimate_contrast((first, clusters), (second, clusters), "difference", is_joint=True)
    apart = estimate_contrast((first, clusters), (second, clusters), "difference")
    spread = [one["high"] - one["low"] for one in (joint, apart)]
    assert spread[0] > 1.2 * spread[1]  # what goes against each other adds up
    lone = estimate_contrast((first, [0] * 40), (second, [0] * 40), "difference", is_joint=True)
    assert (lone["value"], lone["low"], lone["edits"]) == (0, None, 1)
