"""Pools: products with many weight changes at once are those of each by itself."""

from __future__ import annotations

import pytest
import torch

from editkit.adapters.pools import Pools
from editkit.adapters.routed import groups_of

CPU = torch.device("cpu")
OUT, IN = 6, 10


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["whole", "columns"])
def filled(request):
    """Four pools and their changes at all inputs; with columns the last one keeps more of them."""
    pools = Pools((OUT, IN), IN if request.param == "whole" else 3, OUT, CPU)
    dense = []
    for p in range(4):
        columns = torch.arange(IN)
        if request.param == "columns":
            columns = torch.randperm(IN, generator=torch.Generator().manual_seed(p))
            columns = columns[: 5 if p == 3 else 3].sort().values
        delta = draw(OUT, len(columns), seed=p)
        whole = torch.zeros(OUT, IN)
        whole[:, columns] = delta
        dense.append(whole)
        assert pools.append(delta, columns) == p
    return pools, torch.stack(dense)


def test_stacked_products_are_those_of_each(filled):
    pools, dense = filled
    x = draw(2, 3, IN, seed=9)
    wanted = torch.einsum("btf,pdf->btpd", x, dense)
    assert torch.allclose(pools.stacked(x), wanted, atol=1e-5)
    assert torch.allclose(pools.stacked(x, [2, 0]), wanted[:, :, [2, 0]], atol=1e-5)
    assert torch.allclose(pools.dense([3, 1]), dense[[3, 1]])


def test_grouped_products_are_those_of_each_row(filled):
    pools, dense = filled
    x, slot = draw(7, 3, IN, seed=9), torch.tensor([2, 0, 2, 2, 3, 0, 2])
    wanted = torch.einsum("rtf,rdf->rtd", x, dense[slot])
    assert torch.allclose(pools.grouped(x, groups_of(slot)), wanted, atol=1e-5)


def test_a_projection_shortens_and_keeps_all_that_its_directions_span(filled):
    pools, _ = filled
    x = draw(2, 3, IN, seed=9)
    found, exact = pools.projected(x).norm(dim=-1), pools.stacked(x).norm(dim=-1)
    assert (found <= exact * (1 + 1e-5)).all()
    spanned = [p for p in range(4) if pools.dense([p])[0].any(0).sum() <= len(pools.draw_SD)]
    spanned = spanned or [0, 1, 2, 3] * (len(pools.draw_SD) == OUT)
    assert len(spanned) >= 3
    assert torch.allclose(found[..., spanned], exact[..., spanned], rtol=1e-4)
    pools.write(1, 2 * pools.deltas.detach()[1])
    assert torch.allclose(pools.projected(x)[:, :, 1].norm(dim=-1), 2 * found[:, :, 1], rtol=1e-4)


def test_edits_move_and_pools_go(filled):
    pools, dense = filled
    pools.house([10, 11], 1)
    pools.house([12], 3)
    pools.house([11], 3)
    assert (pools.members(1), pools.members(3)) == ([10], [12, 11])
    names = pools.name_P.tolist()
    pools.drop([0, 2])
    assert pools.homes == {10: 0, 12: 1, 11: 1}
    assert pools.name_P.tolist() == [names[1], names[3]]
    assert torch.allclose(pools.dense([0, 1]), dense[[1, 3]])
    pools.drop([1])
    assert pools.homes == {10: 0}


def test_tables_put_all_back_but_no_name_is_given_twice(filled):
    pools, dense = filled
    pools.house([10], 0)
    before = pools.tables
    pools.drop([0, 1, 2])
    pools.append(draw(OUT, 3), torch.arange(3))
    used = pools.name_P.tolist()
    pools.tables = before
    assert torch.allclose(pools.dense([0, 1, 2, 3]), dense)
    assert pools.homes == {10: 0}
    pools.open_P[0] = False
    pools.tables = before
    assert pools.open_P.all()
    pools.append(draw(OUT, 3), torch.arange(3))
    assert pools.name_P[-1] > max(used)
