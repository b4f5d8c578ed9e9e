"""Margins and distillation of side memories, term by term."""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity

from editkit.functional.losses import activation_margins, cosine_to, inner_distillation


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hinge(values):
    active = [v for v in values if v > 0]
    return sum(active) / len(active) if active else 0.0


def test_margins_are_means_over_active_entries():
    inside, outside = 4 * draw(5, 3).abs(), 4 * draw(5, 2, seed=1).abs()
    found = activation_margins(inside, outside, outside=1.0, inside=3.0, apart=1.5)
    for e in range(5):
        ins, outs = inside[e].tolist(), outside[e].tolist()
        wanted = hinge([o - 1.0 for o in outs]) + hinge([3.0 - i for i in ins])
        wanted += hinge([1.5 + o - i for o in outs for i in ins])
        assert abs(float(found[e]) - wanted) < 1e-12


def test_margins_that_are_kept_cost_nothing():
    found = activation_margins(torch.full((1, 2), 9.0), torch.zeros(1, 2), 1.0, 3.0, 2.0)
    assert found.tolist() == [0.0]


def test_distillation_is_its_two_terms():
    rows = draw(4, 6)
    unit = rows / rows.norm(dim=1, keepdim=True)
    pulled = sum(1 - float(cosine_similarity(rows[i], rows[0], dim=0)) for i in (1, 2, 3)) / 3
    spread = float((unit - unit.mean(0)).square().sum(1).mean())
    found = inner_distillation(rows, cosine=0.3, variance=0.7)
    assert abs(float(found) - (0.3 * pulled + 0.7 * spread)) < 1e-12


def test_teachers_have_no_gradient():
    rows = draw(4, 6).requires_grad_()
    inner_distillation(rows, cosine=1.0, variance=0.0).backward()
    assert not rows.grad[0].any()
    assert rows.grad[1:].any(1).all()


def test_a_row_by_itself_is_left_alone():
    rows = draw(1, 6).requires_grad_()
    loss = inner_distillation(rows, 1.0, 1.0)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not rows.grad.any()


def test_cosines_to_a_seed():
    rows = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    assert torch.allclose(cosine_to(rows[0], rows), torch.tensor([0.0, 1.0, 2.0]))
