"""Many pools: bounds spare those that cannot win, and change nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from editkit.adapters.side import FEW, SideMemory, SideRouting

MANY, D, F = 3 * FEW, 24, 40


def filled(noise: float, kept: int = F, **routing) -> SideMemory:
    """Pools of low rank and noise, each with a threshold of its own."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    made = SideMemory(nn.Linear(F, D), kept, SideRouting(**routing), nn.Identity())
    for _ in range(MANY):
        columns_C = None if kept == F else torch.randperm(F, generator=draw)[:kept]
        change_DC = normal(D, 3) @ normal(3, kept) / 3 + noise * normal(D, kept)
        pool = made.write(None, change_DC, columns_C)
        made.pools.floor_P[pool] = 60 + 30 * torch.rand((), generator=draw)
        made.pools.typical_P[pool] = 60 + 60 * torch.rand((), generator=draw)
    return made


def prompts(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs from far below to far above the thresholds, and which tokens are a prompt's."""
    draw = torch.Generator().manual_seed(1)
    scale_B11 = torch.linspace(0, 4, rows)[:, None, None]
    prompt_BT = torch.arange(5) < 1 + torch.arange(rows)[:, None] % 5
    return scale_B11 * torch.randn(rows, 5, F, generator=draw), prompt_BT


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kept", [F, F // 2])
@pytest.mark.parametrize("over", ["prompt", "last", "all"])
@pytest.mark.parametrize("pick", ["relative", "typical"])
def test_bounds_change_no_route(noise, kept, over, pick):
    memory = filled(noise, kept, over=over, pick=pick, sketch=8)
    x_BTF, prompt_BT = prompts(200)
    want_B, ratio_B = memory.choose(memory.scores(x_BTF, prompt_BT))
    assert 0 < (want_B < 0).sum() < 200
    assert len(want_B.unique()) > 4
    is_found_B, whole = want_B >= 0, memory.route(x_BTF, prompt_BT)
    assert torch.allclose(whole.match_B[is_found_B], ratio_B[is_found_B], rtol=1e-5)
    assert (whole.match_B[~is_found_B] <= ratio_B[~is_found_B] * (1 + 1e-5)).all()
    assert whole.match_B[~is_found_B].sum() > 0.6 * ratio_B[~is_found_B].sum()
    for rows in (slice(None), slice(120, 121), slice(40, 44)):
        route = memory.route(x_BTF[rows], prompt_BT[rows])
        assert torch.equal(route.slot_B, want_B[rows])
        assert torch.allclose(route.match_B, whole.match_B[rows], rtol=1e-5)


@pytest.mark.parametrize("kept", [F, F // 2])
@pytest.mark.parametrize("pick", ["relative", "typical"])
def test_pools_that_cannot_win_are_not_scored(monkeypatch, kept, pick):
    memory = filled(0.0, kept, pick=pick, sketch=8)
    exactly, asked = memory.scores, []

    def scores(x_BTF, prompt_BT, pools=None):
        asked.append(MANY if pools is None else len(pools))
        return exactly(x_BTF, prompt_BT, pools)

    monkeypatch.setattr(memory, "scores", scores)
    x_BTF, prompt_BT = prompts(200)
    slot_B, _ = memory.choose(exactly(x_BTF, prompt_BT))
    for row in ((slot_B < 0).nonzero()[-1], (slot_B >= 0).nonzero()[0]):
        memory.route(x_BTF[row], prompt_BT[row])
    assert max(asked) < MANY // 4
    many = len(asked)
    memory.pools.floor_P *= 1e6  # nothing can match
    assert memory.route(x_BTF[[120]], prompt_BT[[120]]).slot_B == -1
    assert len(asked) == many


def test_bounds_follow_what_is_written_dropped_and_loaded():
    memory = filled(0.1, F // 2, sketch=8)
    memory.write(3, 2 * memory.pools.deltas.detach()[5], None)
    memory.drop([0, 7])
    again = SideMemory(nn.Linear(F, D), F // 2, SideRouting(sketch=8), nn.Identity())
    again.load_state_dict(memory.state_dict())
    for made in (memory, again):
        x_BTF, _ = prompts(50)
        exact = made.pools.stacked(x_BTF).norm(dim=-1)
        least, most = (part.norm(dim=-1) for part in made.pools.bounds(x_BTF))
        assert len(made.pools) == MANY - 2
        assert (least <= exact * (1 + 1e-5)).all()
        assert (exact <= most * (1 + 1e-5)).all()
        exact_P, least_P, most_P = (norm.mean((0, 1)) for norm in (exact, least, most))
        assert (least_P > 0.9 * exact_P).all()
        assert (most_P < 1.2 * exact_P).all()


@pytest.mark.parametrize("without", [{"sketch": 0}, {"score": "wise"}, {"pick": "released"}])
def test_without_bounds_nothing_is_sketched(monkeypatch, without):
    monkeypatch.setattr(torch.linalg, "qr", None)
    memory = filled(0.1, F, **without)  # all are scored in one product
    assert memory.pools.sketch_PSC.shape == (MANY, 0, F)
    memory.write(3, memory.pools.deltas.detach()[5], None)
    x_BTF, prompt_BT = prompts(50)
    want_B, _ = memory.choose(memory.scores(x_BTF, prompt_BT))
    assert torch.equal(memory.route(x_BTF, prompt_BT).slot_B, want_B)
