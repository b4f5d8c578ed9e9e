"""Routing scores and choices, against loops over rows and memories."""

from __future__ import annotations

import pytest
import torch

from editkit.functional.routing import (
    largest_norms,
    mean_norms,
    pick_relative,
    pick_released,
    pick_typical,
    sketch,
)

INF = float("inf")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 5, 2, 4)])
def test_scores_are_norms_over_counted_tokens(shape):
    change = draw(*shape)
    counted = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    for b in range(3):
        kept = change[b][counted[b]].norm(dim=-1)
        assert torch.allclose(mean_norms(change, counted)[b], kept.mean(0))
        assert torch.allclose(largest_norms(change, counted)[b], kept.amax(0))


def test_a_score_of_no_change_has_a_gradient_of_zero():
    change = torch.zeros(2, 3, 4, requires_grad=True)
    mean_norms(change, torch.ones(2, 3).bool()).sum().backward()
    assert torch.equal(change.grad, torch.zeros_like(change))


def test_a_sketch_keeps_main_coordinates_and_random_ones_of_the_rest():
    delta, start, random = draw(12, 9), draw(3, 12, seed=1), draw(5, 12, seed=2)
    found = sketch(delta, start, random, 2.0)
    # the same space by plain products: one step of (delta delta') from the starts
    basis = torch.linalg.svd(delta @ delta.T @ start.T, full_matrices=False).U
    kept = basis @ basis.T
    assert torch.allclose(found[:3].T @ found[:3], delta.T @ kept @ delta, atol=1e-4)
    rest = random @ (torch.eye(12) - kept) @ delta
    assert torch.allclose(found[3:], 2 / 5**0.5 * rest, atol=1e-4)


def test_the_largest_multiple_of_a_threshold_is_picked():
    score = torch.tensor([[3.0, 8.0], [0.5, 1.0], [0.0, 0.0]])
    pool, ratio = pick_relative(score, torch.tensor([1.0, 4.0]))
    assert pool.tolist() == [0, -1, -1]
    assert ratio.tolist() == [3.0, 0.5, 0.0]


def test_a_memory_without_a_threshold_never_fires():
    score = torch.full((2, 2), 1e30)
    assert pick_relative(score, torch.tensor([INF, INF]))[0].tolist() == [-1, -1]
    assert pick_typical(score, torch.tensor([INF, INF]), torch.ones(2))[0].tolist() == [-1, -1]
    closed = torch.tensor([False, True])
    assert pick_released(score, torch.tensor([INF, INF]), closed)[0].tolist() == [-1, -1]


def test_a_memory_must_exceed_its_threshold_and_be_most_in_its_own():
    score = torch.tensor([[4.0, 9.0], [4.0, 1.0], [0.5, 1.0]])
    threshold, typical = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 12.0])
    pool, ratio = pick_typical(score, threshold, typical)
    assert pool.tolist() == [0, 0, -1]
    assert ratio.tolist() == [4.0, 4.0, 0.5]  # of its own threshold, not the largest


def released(score, threshold, live):
    """The release's loop: the open memory first, then each that beats what is best so far."""
    best = score[live]
    chosen = live if best >= threshold[live] else -1
    for p in range(len(score)):
        if p != live and score[p] > best and score[p] > threshold[p]:
            best, chosen = score[p], p
    return chosen


def test_the_released_rule_is_its_loop():
    score, threshold = draw(200, 4).abs(), draw(4, seed=1).abs()
    is_open = torch.tensor([False, False, True, False])
    pool, _ = pick_released(score, threshold, is_open)
    wanted = [released(row, threshold.tolist(), 2) for row in score.tolist()]
    assert pool.tolist() == wanted
    assert len(set(wanted)) > 3  # all outcomes are met
