"""Many pools: the projection ranks them, exact scores decide."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from editkit.adapters.side import EXACTLY, SideMemory, SideRouting

MANY, D, F = 3 * EXACTLY, 24, 40


@pytest.fixture
def memory():
    """Pools of low rank, as training leaves them, each with a threshold of its own."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    made = SideMemory(nn.Linear(F, D), F, SideRouting(sketch=8), nn.Identity())
    for _ in range(MANY):
        pool = made.write(None, normal(D, 3) @ normal(3, F) + 0.1 * normal(D, F))
        made.pools.floor_P[pool] = 5 + 5 * torch.rand((), generator=draw)
    return made


@pytest.mark.parametrize("rows", [1, 6])
def test_of_many_pools_the_best_is_found_though_few_are_scored(memory, rows, monkeypatch):
    x_BTF = torch.randn(rows, 5, F, generator=torch.Generator().manual_seed(1))
    prompt_BT = torch.ones(rows, 5, dtype=torch.bool)
    want_B, ratio_B = memory.choose(memory.scores(x_BTF, prompt_BT))
    assert (want_B >= 0).all()
    monkeypatch.setattr(memory, "scores", None)  # all pools exactly is what many are spared
    route = memory.route(x_BTF, prompt_BT)
    assert torch.equal(route.slot_B, want_B)
    assert torch.allclose(route.match_B, ratio_B, rtol=1e-5)


def test_all_pools_are_scored_exactly_unless_a_sketch_is_asked_for():
    draw = torch.Generator().manual_seed(0)
    made = SideMemory(nn.Linear(F, D), F, SideRouting(), nn.Identity())
    for _ in range(MANY):  # full rank: a projection tells little
        pool = made.write(None, torch.randn(D, F, generator=draw))
        made.pools.floor_P[pool] = 1.0
    x_BTF, prompt_BT = torch.randn(64, 5, F, generator=draw), torch.ones(64, 5, dtype=torch.bool)
    want_B, _ = made.choose(made.scores(x_BTF, prompt_BT))
    assert torch.equal(made.route(x_BTF, prompt_BT).slot_B, want_B)
