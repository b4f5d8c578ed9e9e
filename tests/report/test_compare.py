"""Paired comparisons against independent computations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from editkit.report.compare import FEWEST, SAME, compare_runs, holm, mcnemar, sign_flip
from editkit.report.load import load_runs


@pytest.fixture
def compared(make_run):
    """Return comparisons by moment, kind and scorer, of runs of these chances to be right."""

    def compare(*right, edits=40, **options):
        names = "abc"[: len(right)]
        folders = [
            make_run(name, edits=edits, right=chance, seed=i, **options)
            for i, (name, chance) in enumerate(zip(names, right, strict=True))
        ]
        runs = load_runs(folders)
        found = {(c.run, c.moment, c.kind, c.scorer): c for c in compare_runs(runs)}
        return runs, found

    return compare


def scores(run, kind, scorer):
    return {r["probe_id"]: r["scores"][scorer] for r in run.last if r["kind"] == kind}


def test_the_difference_is_the_mean_over_pairs(compared):
    (a, b), found = compared(0.8, 0.4)
    for kind, scorer in itertools.product(a.summary["scores"], ("generation", "nll")):
        first, second = scores(a, kind, scorer), scores(b, kind, scorer)
        gaps = [second[name] - first[name] for name in first]
        one = found["b", "final", kind, scorer]
        assert one.difference == pytest.approx(sum(gaps) / len(gaps))
        assert (one.pairs, one.edits) == (len(gaps), 40)
        assert one.low < one.difference < one.high


def test_the_interval_resamples_edits_and_not_probes(compared):
    (a, b), found = compared(0.8, 0.4)
    first, second = scores(a, "generalization", "nll"), scores(b, "generalization", "nll")
    gap_EP = np.zeros((40, 2))
    for name in first:
        gap_EP[int(name.split(".")[0]), int(name[-1])] = second[name] - first[name]
    draw = np.random.default_rng(7)
    means = [gap_EP[draw.integers(0, 40, 40)].mean() for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    one = found["b", "final", "generalization", "nll"]
    assert one.low == pytest.approx(low, abs=0.15 * (high - low))
    assert one.high == pytest.approx(high, abs=0.15 * (high - low))


def test_discordant_probes_are_counted_and_tested_exactly(compared):
    (a, b), found = compared(0.8, 0.5)
    first, second = scores(a, "locality", "generation"), scores(b, "locality", "generation")
    only_a = sum(first[n] > second[n] for n in first)
    only_b = sum(first[n] < second[n] for n in first)
    one = found["b", "final", "locality", "generation"]
    assert (one.only_reference, one.only_run) == (only_a, only_b)
    total, least = only_a + only_b, min(only_a, only_b)
    p = 2 * sum(math.comb(total, k) for k in range(least + 1)) / 2**total
    assert one.mcnemar_p == pytest.approx(min(1.0, p))
    assert found["b", "final", "locality", "nll"].mcnemar_p is None


def test_flipped_signs_are_all_tried_where_they_are_few():
    differences = np.array([0.5, -0.2, 1.0, 0.3, 0.0, 0.7, -0.1])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=7)]
    expected = np.mean([s >= abs(differences.sum()) - 1e-12 for s in sums])
    assert sign_flip(differences) == pytest.approx(expected)


def test_one_probe_an_edit_makes_the_flips_mcnemars():
    differences = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 30)
    assert sign_flip(differences) == pytest.approx(mcnemar(2, 9))


def test_a_run_against_itself_is_the_same_everywhere(make_run):
    runs = load_runs([make_run("a", seed=3), make_run("b", seed=3)])
    for one in compare_runs(runs):
        assert one.verdict == SAME
        assert (one.difference, one.low, one.high, one.p) == (0, 0, 0, 1)


def test_fewer_right_answers_are_worse(compared):
    _, found = compared(0.9, 0.3)
    one = found["b", "final", "reliability", "generation"]
    assert one.verdict == f"worse by {-one.difference:.3g}"


def test_chance_alone_is_rarely_called_a_difference():
    draw = np.random.default_rng(5)
    p_values = [sign_flip(draw.normal(size=10)) for _ in range(200)]
    assert 0.01 < np.mean(np.array(p_values) < 0.05) < 0.1


def test_a_higher_loss_is_worse(make_run):
    folders = [make_run("a", edits=30), make_run("b", edits=30)]
    rows = make_run.read(folders[1])
    for row in rows:
        row["scores"]["nll"] += 1.0
    make_run.write(folders[1], rows)
    nll = [one for one in compare_runs(load_runs(folders)) if one.scorer == "nll"]
    assert {one.verdict for one in nll} == {"worse by 1"}


def test_too_few_edits_tell_nothing(compared):
    _, found = compared(1.0, 0.0, edits=FEWEST - 1)
    one = found["b", "final", "reliability", "generation"]
    assert one.verdict == f"too few edits to tell ({FEWEST - 1})"


def test_several_runs_are_corrected_by_holm(compared):
    _, found = compared(0.8, 0.65, 0.6)
    family = [found[run, "final", "reliability", "generation"] for run in "bc"]
    small, large = sorted(family, key=lambda one: one.p)
    assert small.p_holm == pytest.approx(min(1.0, 2 * small.p))
    assert large.p_holm == pytest.approx(min(1.0, max(large.p, 2 * small.p)))
    assert {one.reference for one in family} == {"a"}


def test_holm_equals_the_step_down_written_out():
    p_values = [0.04, 0.001, 0.03, 0.8, 0.03]
    ranked = sorted(range(5), key=lambda i: p_values[i])
    expected, least = [0.0] * 5, 0.0
    for rank, i in enumerate(ranked):
        least = max(least, (5 - rank) * p_values[i])
        expected[i] = min(1.0, least)
    assert holm(p_values) == pytest.approx(expected)


def test_only_probes_that_count_in_both_runs_are_paired(make_run):
    folders = [make_run("a"), make_run("b", seed=1)]
    rows = make_run.read(folders[1])
    final = [r for r in rows if r["moment"] == "final" and r["kind"] == "reliability"]
    final[0]["counted"] = False
    final[1]["prompt"] = "another question under the same id"
    final[2]["scores"]["nll"] = float("nan")
    make_run.write(folders[1], rows)
    found = {(c.moment, c.kind, c.scorer): c for c in compare_runs(load_runs(folders))}
    assert found["final", "reliability", "generation"].pairs == 18
    assert found["final", "reliability", "nll"].pairs == 17


def test_wordings_of_one_question_are_one_pair(make_run):
    folders = [make_run("a"), make_run("b", seed=1)]
    for folder in folders:
        rows = make_run.read(folder)
        for row in rows:
            row["group"] = "q" if row["kind"] == "generalization" else ""
        make_run.write(folder, rows)
    runs = load_runs(folders)
    found = {(c.moment, c.kind, c.scorer): c for c in compare_runs(runs)}
    one = found["final", "generalization", "generation"]
    assert one.pairs == 20
    best = {}
    for row in runs[1].last:
        if row["kind"] == "generalization":
            best[row["edit_id"]] = max(best.get(row["edit_id"], 0), row["scores"]["generation"])
    assert one.run_value == pytest.approx(sum(best.values()) / 20)
    assert found["final", "generalization", "nll"].pairs == 40


def test_the_order_of_rows_does_not_matter(make_run):
    folders = [make_run("a"), make_run("b", seed=1)]
    straight = compare_runs(load_runs(folders))
    for folder in folders:
        make_run.write(folder, make_run.read(folder)[::-1])
    key = lambda one: (one.moment, one.kind, one.scorer)  # noqa: E731
    turned = compare_runs(load_runs(folders))
    for one, other in zip(sorted(straight, key=key), sorted(turned, key=key), strict=True):
        assert one.difference == pytest.approx(other.difference)
        assert (one.low, one.high) == (pytest.approx(other.low), pytest.approx(other.high))
        assert one.verdict == other.verdict
