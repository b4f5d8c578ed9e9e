"""The inner loop against torch's own optimiser and by hand."""

import pytest
import torch

from editkit.descend import descend


def test_takes_adams_steps():
    target = torch.tensor([1.0, -2.0])
    leaf = torch.zeros(2, requires_grad=True)
    descend([leaf], lambda step: (leaf - target).square().sum(), steps=7, lr=0.1)
    expected = torch.zeros(2, requires_grad=True)
    adam = torch.optim.Adam([expected], lr=0.1)
    for _ in range(7):
        adam.zero_grad()
        (expected - target).square().sum().backward()
        adam.step()
    assert torch.equal(leaf, expected)


def test_stops_without_a_step_once_the_loss_is_low():
    leaf = torch.tensor([2.0], requires_grad=True)
    descent = descend([leaf], lambda step: leaf.abs().sum(), steps=100, lr=0.5, stop_below=1.0)
    assert descent.stopped_early
    assert descent.losses[-1] <= 1.0 < descent.losses[-2]
    assert descent.steps == len(descent.losses) - 1


def test_an_epoch_ends_the_loop_by_its_mean_and_skips_what_is_learnt():
    leaf = torch.tensor([0.0], requires_grad=True)
    values = [5.0, 0.1, 0.3, 0.2, 9.0]
    descent = descend(
        [leaf], lambda step: leaf.sum() * 0 + values[step], steps=5, lr=0.1, stop_below=0.5, epoch=2
    )
    assert descent.losses == pytest.approx([5.0, 0.1, 0.3, 0.2])
    assert descent.steps == 1
    assert descent.stopped_early


def test_project_is_applied_after_every_step():
    leaf = torch.zeros(1, requires_grad=True)

    def project():
        with torch.no_grad():
            leaf.clamp_(max=0.2)

    descend([leaf], lambda step: -leaf.sum(), steps=9, lr=0.1, project=project)
    assert leaf.item() == pytest.approx(0.2)


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_rate():
    leaf = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match=r"became nan at step 0 .*lr 0.1"):
        descend([leaf], lambda step: leaf.sum() / 0 * 0, steps=3, lr=0.1)
