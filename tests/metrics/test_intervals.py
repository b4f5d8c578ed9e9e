"""The clustered bootstrap, against enumeration, resampling by hand, and theory."""

import math
import random

import numpy as np
import pytest

from editkit.metrics import intervals
from editkit.metrics.intervals import estimate, estimate_harmonic


def test_the_value_is_the_mean_over_rows_not_over_edits():
    found = estimate([1.0, 0.0, 0.0, 0.0], [0, 1, 1, 1])
    assert found["value"] == 0.25
    assert (found["n"], found["edits"]) == (4, 2)


def test_three_edits_span_from_the_worst_to_the_best():
    # a resample is one edit thrice with probability 1/27 each, more than the 2.5 % in each tail
    found = estimate([0.2, 0.4, 0.5, 0.7, 0.9], [5, 5, 6, 7, 7])
    assert found["low"] == pytest.approx(0.3)
    assert found["high"] == pytest.approx(0.8)


def test_repeating_every_row_of_an_edit_makes_nothing_more_certain():
    draw = random.Random(0)
    values = [float(draw.random() < 0.6) for _ in range(50)]
    ids = list(range(50))
    once = estimate(values, ids)
    often = estimate([v for v in values for _ in range(7)], [i for i in ids for _ in range(7)])
    assert (often["low"], often["high"]) == (once["low"], once["high"])
    alone = estimate([v for v in values for _ in range(7)], [None] * 350)
    assert alone["high"] - alone["low"] < 0.5 * (often["high"] - often["low"])


def test_the_interval_is_that_of_resampling_by_hand():
    draw = np.random.default_rng(1)
    ids = draw.integers(0, 40, size=200)
    values = (draw.random(200) < 0.2 + 0.015 * ids).astype(float)
    rows = {i: values[ids == i] for i in set(ids.tolist())}
    means = []
    for _ in range(4000):
        chosen = draw.choice(list(rows), size=len(rows))
        means.append(np.concatenate([rows[i] for i in chosen]).mean())
    found = estimate(values.tolist(), ids.tolist())
    width = found["high"] - found["low"]
    assert found["low"] == pytest.approx(np.quantile(means, 0.025), abs=0.1 * width)
    assert found["high"] == pytest.approx(np.quantile(means, 0.975), abs=0.1 * width)


def test_lone_rows_have_the_interval_of_the_normal_approximation():
    values = np.random.default_rng(2).normal(3.0, 2.0, size=900)
    found = estimate(values.tolist(), [None] * 900)
    half = 1.96 * values.std() / math.sqrt(900)
    assert found["edits"] == 900
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_the_order_of_rows_does_not_matter_and_the_seed_does():
    draw = random.Random(3)
    pairs = [(draw.random(), draw.choice([None, 1, 2, 3, 4, 5])) for _ in range(60)]
    first = estimate(*zip(*pairs, strict=True))
    draw.shuffle(pairs)
    assert estimate(*zip(*pairs, strict=True)) == pytest.approx(first, rel=1e-12)
    assert estimate(*zip(*pairs, strict=True), seed=1)["low"] != first["low"]


def test_memory_is_bounded_and_does_not_change_the_interval(monkeypatch):
    values, ids = [float(i % 3 == 0) for i in range(200)], list(range(200))
    whole = estimate(values, ids)
    monkeypatch.setattr(intervals, "BATCH_ENTRIES", 600)
    assert estimate(values, ids) == whole


def test_nothing_to_score_has_no_value():
    empty = {"value": None, "low": None, "high": None, "n": 0, "edits": 0}
    assert estimate([], []) == empty
    assert estimate([math.nan], [3]) == empty


def test_one_edit_has_a_value_and_no_interval():
    found = estimate([1.0, 0.0], [4, 4])
    assert found == {"value": 0.5, "low": None, "high": None, "n": 2, "edits": 1}


def test_nan_is_left_out():
    assert estimate([1.0, math.nan, 0.0], [0, 1, 2]) == estimate([1.0, 0.0], [0, 2])


def test_equal_scores_have_an_interval_of_no_width():
    found = estimate([1.0] * 20, list(range(20)))
    assert found["value"] == found["low"] == found["high"] == 1.0


def parts_of(seed, edits=60, rows=(1, 2, 10)):
    """Scores of three kinds whose success hangs together within an edit."""
    draw = np.random.default_rng(seed)
    ease = draw.random(edits)
    made = []
    for p, count in enumerate(rows):
        ids = np.repeat(np.arange(edits), count)
        values = (draw.random(len(ids)) < 0.3 + 0.6 * ease[ids] * (1 - 0.2 * p)).astype(float)
        made.append((values.tolist(), ids.tolist()))
    return made


def test_the_harmonic_mean_is_that_of_the_means_over_rows():
    parts = parts_of(0)
    means = [np.mean(values) for values, _ in parts]
    found = estimate_harmonic(parts)
    assert found["value"] == pytest.approx(3 / sum(1 / m for m in means))
    assert (found["n"], found["edits"]) == (60 * 13, 60)
    assert found["low"] < found["value"] < found["high"]


def test_the_interval_of_the_harmonic_mean_is_that_of_resampling_by_hand():
    parts, draw, found = parts_of(1), np.random.default_rng(9), []
    rows = [{i: np.array(values)[np.array(ids) == i] for i in range(60)} for values, ids in parts]
    for _ in range(3000):
        chosen = draw.integers(0, 60, size=60)
        means = [np.concatenate([part[i] for i in chosen]).mean() for part in rows]
        found.append(3 / sum(1 / m for m in means))
    result = estimate_harmonic(parts)
    width = result["high"] - result["low"]
    assert result["low"] == pytest.approx(np.quantile(found, 0.025), abs=0.1 * width)
    assert result["high"] == pytest.approx(np.quantile(found, 0.975), abs=0.1 * width)


def test_of_one_part_the_harmonic_mean_is_the_mean():
    (values, ids), *_ = parts_of(2)
    first, second = estimate(values, ids), estimate_harmonic([(values, ids)])
    width = first["high"] - first["low"]
    assert second["value"] == pytest.approx(first["value"])
    assert second["low"] == pytest.approx(first["low"], abs=0.1 * width)


def test_lone_rows_are_clusters_of_their_own_in_each_part():
    found = estimate_harmonic([([1.0, 0.0], [None, None]), ([1.0, 1.0], [3, None])])
    assert found["edits"] == 4
    assert found["value"] == pytest.approx(2 / (2 + 1))


@pytest.mark.parametrize("parts", [[], [([1.0], [0]), ([], [])]])
def test_without_rows_of_a_part_there_is_no_harmonic_mean(parts):
    assert estimate_harmonic(parts)["value"] is None


def test_a_mean_of_nothing_right_makes_the_harmonic_mean_nothing():
    found = estimate_harmonic([([0.0, 0.0], [0, 1]), ([1.0, 1.0], [0, 1])])
    assert (found["value"], found["low"], found["high"]) == (0.0, 0.0, 0.0)
    one = estimate_harmonic([([1.0], [4]), ([0.5], [4])])
    assert one["value"] == pytest.approx(2 / 3)
    assert one["low"] is None


def test_memory_of_the_harmonic_mean_is_bounded(monkeypatch):
    parts = parts_of(3)
    whole = estimate_harmonic(parts)
    monkeypatch.setattr(intervals, "BATCH_ENTRIES", 600)
    assert estimate_harmonic(parts) == pytest.approx(whole, abs=0.02)
