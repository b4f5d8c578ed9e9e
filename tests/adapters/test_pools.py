"""Pools: products with many weight changes at once are those of each by itself."""

from __future__ import annotations

import pytest
import torch

from editkit.adapters.pools import RANDOM, WIDER, Pools
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


def test_bounds_hold_and_meet_where_the_directions_span_a_change(filled):
    pools, _ = filled
    x = draw(2, 3, IN, seed=9)
    exact = pools.stacked(x).norm(dim=-1)
    least, most = (part.norm(dim=-1) for part in pools.bounds(x))
    assert (least <= exact * (1 + 1e-5)).all()
    assert (most >= exact * (1 - 1e-5)).all()
    for bound in (least, most):  # the last pool may keep more inputs than there are directions
        assert torch.allclose(bound[..., :3], exact[..., :3], rtol=1e-4)
    pools.write(1, 2 * pools.deltas.detach()[1])
    assert torch.allclose(pools.bounds(x)[0][:, :, 1].norm(dim=-1), 2 * least[:, :, 1], rtol=1e-4)


@pytest.mark.parametrize("rank", [3, 40])
def test_random_rows_stand_for_what_the_main_directions_leave_out(rank):
    pools = Pools((60, 50), 50, 4, CPU)
    for p in range(20):
        pools.append(draw(60, rank, seed=p) @ draw(rank, 50, seed=p + 100), None)
    x = draw(30, 10, 50, seed=9)
    exact = pools.stacked(x).norm(dim=-1)
    main, whole = pools.bounds(x)
    least, most = main.norm(dim=-1), whole.norm(dim=-1)
    assert (least <= exact * (1 + 1e-5)).all()
    assert (most >= exact * (1 - 1e-5)).all()
    left_out = exact.square() - least.square()
    found = (most.square() - least.square()) / WIDER**2
    if rank < 4:  # nothing is left out
        assert torch.allclose(least, exact, rtol=1e-4)
        assert torch.allclose(most, exact, rtol=1e-4)
    else:  # 6000 norms of 64 random rows
        assert torch.allclose(found.mean(), left_out.mean(), rtol=0.05)
        assert ((found / left_out).std() - (2 / RANDOM) ** 0.5).abs() < 0.05
        assert least.mean() < 0.8 * exact.mean()


def test_a_bound_fails_once_in_1e10_and_is_made_in_fp32_in_every_precision():
    half, limit = torch.tensor(RANDOM / 2).double(), torch.tensor(RANDOM / WIDER**2 / 2).double()
    assert torch.special.gammainc(half, limit) < 1e-10  # chi^2 below RANDOM / WIDER^2
    made = []
    for is_mixed in (False, True):
        made.append(Pools((60, 50), 50, 4, CPU))
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            made[-1].append(draw(60, 50), None)
    assert torch.equal(made[0].sketch_PSC, made[1].sketch_PSC)


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
