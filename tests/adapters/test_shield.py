"""Shield: what earlier edits read keeps its output, whatever a later gradient is."""

from __future__ import annotations

import pytest
import torch

from editkit.adapters.columns import Columns
from editkit.adapters.shield import Shield
from editkit.functional.solve import turned_away


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_a_turned_gradient_is_the_ridge_solution_next_to_the_plain_one(generator):
    """G (1 + C)^-1 minimises |X - G|^2 + sum_n w_n |X x_n|^2, here by least squares."""
    x_NF = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    weight_N = torch.rand(5, generator=generator, dtype=torch.float64) * 10
    grad_DF = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    turned_DF = grad_DF @ turned_away((x_NF * weight_N[:, None]).T @ x_NF)
    asked = torch.cat([torch.eye(12, dtype=torch.float64), weight_N.sqrt()[:, None] * x_NF])
    wanted = torch.cat([grad_DF.T, torch.zeros(5, 4, dtype=torch.float64)])
    assert torch.allclose(turned_DF.T, torch.linalg.lstsq(asked, wanted).solution)


def test_the_output_for_what_was_read_moves_by_its_share_and_no_other_does(generator):
    gram_FF = torch.diag(torch.tensor([9.0, 0.0, 0.0]))
    grad_DF = torch.randn(2, 3, generator=generator)
    turned_DF = grad_DF @ turned_away(gram_FF)
    assert torch.allclose(turned_DF[:, 0], grad_DF[:, 0] / 10)
    assert torch.equal(turned_DF[:, 1:], grad_DF[:, 1:])


def test_every_edit_weighs_the_same_and_old_matrices_stay(generator):
    shield = Shield(torch.device("cpu"))
    shield.add(torch.randn(3, 8, generator=generator) * 100, torch.zeros(3).long())
    before = shield.gram_FF
    kept = before.clone()
    keys = torch.randn(4, 8, generator=generator) * 9
    shield.add(keys, torch.tensor([0, 1, 1, 1]))
    added = sum(part.T @ part / part.square().sum() for part in (keys[:1], keys[1:]))
    assert torch.allclose(shield.gram_FF, kept + added, atol=1e-6)
    assert torch.equal(before, kept)
    assert torch.allclose(before.trace(), torch.tensor(1.0))
    again = Shield(torch.device("cpu"))
    again.load_state_dict(shield.state_dict())
    assert torch.equal(again.gram_FF, shield.gram_FF)


def test_an_edit_reads_its_own_columns_at_the_tokens_that_count(generator):
    x_BTF = torch.randn(4, 3, 6, generator=generator)
    columns = Columns(torch.zeros(2, 6), torch.tensor([[0, 2], [1, 5]]))
    read_BT = torch.zeros(4, 3, dtype=torch.bool)
    read_BT[1, 2] = read_BT[3, 0] = True
    found_NF, edit_N = columns.read(x_BTF, read_BT)
    wanted_NF = torch.zeros(2, 6)
    wanted_NF[0, [0, 2]] = x_BTF[1, 2, [0, 2]]
    wanted_NF[1, [1, 5]] = x_BTF[3, 0, [1, 5]]
    assert torch.equal(found_NF, wanted_NF)
    assert edit_N.tolist() == [0, 1]


def test_only_edits_with_a_weight_are_turned_each_in_its_columns(generator):
    shield, column_Ek = Shield(torch.device("cpu")), torch.tensor([[0, 1], [1, 2]])
    assert shield.turns(column_Ek, [5.0, 5.0]) == []  # nothing was read yet
    shield.add(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([0]))
    assert shield.turns(column_Ek, [0.0, 0.0]) == []
    columns = Columns(torch.zeros(2, 3), column_Ek, shield.turns(column_Ek, [0.0, 9.0]))
    loss = sum(leaf.sum() for leaf in columns.leaves)
    free, turned = torch.autograd.grad(loss, columns.leaves)
    assert torch.equal(free, torch.ones(2, 2))
    assert torch.allclose(turned, torch.tensor([[0.1, 1.0], [0.1, 1.0]]))
