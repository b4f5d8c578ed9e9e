"""The inner loop against torch's own optimiser and by hand."""

import pytest
import torch

from editkit.descend import descend, descend_rows


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


class Bowls:
    """Rows that each seek a point of their own."""

    def __init__(self, goal_BD, stop_below):
        self.goal_BD = goal_BD
        self.stop_below = stop_below
        self.sizes = []

    def __call__(self, leaf_BD):
        self.sizes.append(len(leaf_BD))
        loss_B = (leaf_BD - self.goal_BD).square().sum(1)
        return loss_B, loss_B.detach() < self.stop_below

    def project(self, leaf_BD):
        leaf_BD.clamp_(max=2.0)

    def keep(self, rows):
        self.goal_BD = self.goal_BD[rows]


def alone(goal, stop_below, steps, lr):
    leaf = torch.zeros_like(goal, requires_grad=True)
    adam = torch.optim.Adam([leaf], lr=lr)
    for call in range(1, steps + 1):
        loss = (leaf - goal).square().sum()
        if loss < stop_below or call == steps:
            return leaf.detach(), call, bool(loss < stop_below)
        (leaf.grad,) = torch.autograd.grad(loss, leaf)
        adam.step()
        with torch.no_grad():
            leaf.clamp_(max=2.0)
    raise AssertionError


def test_rows_move_together_as_each_would_alone():
    torch.manual_seed(0)
    goal_BD = torch.randn(6, 3) * torch.tensor([0.01, 0.3, 1.0, 1.5, 2.0, 9.0])[:, None]
    bowls = Bowls(goal_BD, 0.05)
    found = descend_rows(torch.zeros(6, 3), bowls, steps=15, lr=0.2)
    expected = [alone(goal, 0.05, 15, 0.2) for goal in goal_BD]
    torch.testing.assert_close(found.found_BD, torch.stack([e[0] for e in expected]))
    assert found.calls_B.tolist() == [e[1] for e in expected]
    assert found.stopped_B.tolist() == [e[2] for e in expected]
    assert bowls.sizes == [sum(e[1] > i for e in expected) for i in range(15)]
    assert len(set(found.calls_B.tolist())) > 2


def test_a_row_without_a_finite_loss_is_named():
    bowls = Bowls(torch.tensor([[0.0], [float("nan")]]), -1.0)
    with pytest.raises(ValueError, match=r"loss of row 1 became nan at step 0 \(lr 0.1\)"):
        descend_rows(torch.zeros(2, 1), bowls, steps=3, lr=0.1)
