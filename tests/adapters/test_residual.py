"""MEMOIR's layer: masks, columns, thresholds, and what can be taken back."""

import pytest
import torch
from torch import nn

from editkit.adapters.columns import Columns
from editkit.adapters.keys import Routing
from editkit.adapters.residual import ResidualMemory
from editkit.functional.masks import pack, scattered, unpack

F, D, K = 96, 8, 24


@pytest.fixture
def make():
    def build(k=K, **routing):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        return ResidualMemory(nn.Linear(F, D), k, Routing(**routing), generator)

    return build


def prompts(rows=5, tokens=7, seed=2):
    x_BTF = torch.randn(rows, tokens, F, generator=torch.Generator().manual_seed(seed))
    prompt_BT = torch.ones(rows, tokens, dtype=torch.bool)
    prompt_BT[0, :3] = False  # padding on the left
    prompt_BT[1:2, 4:] = False  # an answer, or padding on the right
    return x_BTF, prompt_BT


def store(layer, x_BTF, prompt_BT, seed=3):
    """Write random columns for each row; edit i is row i."""
    mask_BW = layer.masks(x_BTF, prompt_BT)
    columns = layer.columns(mask_BW)
    values_DC = torch.randn(columns.values_DC.shape, generator=torch.Generator().manual_seed(seed))
    layer.write(columns.used_C, values_DC)
    rows = range(len(mask_BW))
    layer.keys.add_slots(mask_BW, rows, [100 + i for i in rows])
    return columns


def test_the_mask_marks_the_largest_of_the_centred_mean_over_the_prompt(make):
    layer = make()
    layer.mean_F.normal_()
    x_BTF, prompt_BT = prompts()
    mask_BF = unpack(layer.masks(x_BTF, prompt_BT), F)
    for b in range(5):
        centred_F = x_BTF[b][prompt_BT[b]].mean(0) - layer.mean_F
        assert set(mask_BF[b].nonzero()[:, 0].tolist()) == set(
            centred_F.abs().topk(K).indices.tolist()
        )


def test_the_last_fingerprint_is_the_prompts_last_token(make):
    layer = make(fingerprint="last")
    x_BTF, prompt_BT = prompts()
    found_BF = layer.fingerprint(x_BTF, prompt_BT)
    assert torch.equal(found_BF[[0, 1]], torch.stack([x_BTF[0, 6], x_BTF[1, 3]]))


@pytest.mark.parametrize("fingerprint", ["mean", "last"])
def test_what_is_not_prompt_has_no_part_in_a_mask(make, fingerprint):
    layer = make(fingerprint=fingerprint)
    x_BTF, prompt_BT = prompts()
    mask_BW = layer.masks(x_BTF, prompt_BT)
    other_BTF = x_BTF.masked_fill(~prompt_BT[..., None], float("nan"))
    assert torch.equal(layer.masks(other_BTF, prompt_BT), mask_BW)


def test_an_answered_row_reads_the_stored_masks_columns_on_every_token(make):
    layer = make(tau=0.5)
    x_BTF, prompt_BT = prompts()
    store(layer, x_BTF, prompt_BT)
    near_BTF = x_BTF + 0.2 * torch.randn(x_BTF.shape, generator=torch.Generator().manual_seed(9))
    assert not torch.equal(layer.masks(near_BTF, prompt_BT), layer.masks(x_BTF, prompt_BT))
    layer.scope.prompt_BT = prompt_BT
    found_BTD = layer(near_BTF) - layer.base_layer(near_BTF)
    stored_BF = unpack(layer.keys.bits_KW, F)
    for b in range(5):
        columns = layer.permutation_F[stored_BF[b]]
        wanted_TD = near_BTF[b][:, columns] @ layer.memory.detach()[:, columns].T
        assert torch.allclose(found_BTD[b], wanted_TD, atol=1e-5)


def test_the_threshold_is_met_from_it_on(make):
    layer = make()
    x_BTF, prompt_BT = prompts()
    store(layer, x_BTF, prompt_BT)
    far_BTF = x_BTF + 1.5 * torch.randn(x_BTF.shape, generator=torch.Generator().manual_seed(9))
    match_B = layer.route(far_BTF, prompt_BT).match_B
    assert match_B.unique().numel() > 1
    for tau in match_B.unique().tolist():
        layer.tau.fill_(tau)
        route = layer.route(far_BTF, prompt_BT)
        assert torch.equal(route.slot_B >= 0, match_B >= tau)
        layer.tau.fill_(tau + 0.5 / K)
        assert torch.equal(layer.route(far_BTF, prompt_BT).slot_B >= 0, match_B > tau)


def test_permuting_columns_changes_no_route(make):
    one, other = make(tau=0.3), make(tau=0.3)
    other.permutation_F.copy_(torch.randperm(F, generator=torch.Generator().manual_seed(5)))
    x_BTF, prompt_BT = prompts()
    routes = []
    for layer in (one, other):
        store(layer, x_BTF, prompt_BT)
        routes.append(layer.route(*prompts(seed=2)))
    assert torch.equal(routes[0].match_B, routes[1].match_B)
    assert torch.equal(routes[0].slot_B, routes[1].slot_B)
    assert not torch.equal(routes[0].gate_BF, routes[1].gate_BF)


@pytest.mark.parametrize("columns", ["permuted", "drawn", "same"])
def test_an_edit_changes_its_own_k_columns_only(make, columns):
    layer = make(columns=columns)
    x_BTF, prompt_BT = prompts(rows=1)
    used = store(layer, x_BTF, prompt_BT)
    written = layer.memory.detach().any(0)
    assert int(written.sum()) == K
    mask_BF = unpack(layer.keys.bits_KW, F)
    assert torch.equal(layer.gates(layer.keys.bits_KW)[0], written)
    assert torch.equal(mask_BF[0], written) == (columns == "same")
    assert sorted(used.used_C.tolist()) == written.nonzero()[:, 0].tolist()


def test_drawn_columns_of_like_masks_have_no_more_than_chance_in_common(make):
    like_BF = torch.zeros(40, F, dtype=torch.bool)
    like_BF[:, :20] = True
    like_BF |= scattered(40, F, 2, torch.Generator().manual_seed(0))
    own_BF = make(columns="drawn").gates(pack(like_BF))
    shared_BB = (own_BF.long() @ own_BF.long().T)[~torch.eye(40, dtype=torch.bool)] / K
    assert abs(shared_BB.float().mean() - K / F) < 0.03


def test_an_empty_memory_is_the_base_bit_for_bit(make):
    layer = make(tau=0.0)
    x_BTF, _ = prompts()
    layer.is_written = True
    assert torch.equal(layer(x_BTF), layer.base_layer(x_BTF))


def test_the_memory_answers_in_the_dtype_of_the_model(make):
    layer = make(tau=0.5).bfloat16()
    x_BTF, prompt_BT = prompts()
    store(layer, x_BTF.bfloat16(), prompt_BT)
    assert layer.memory.dtype == layer.mean_F.dtype == torch.float32
    layer.scope.prompt_BT = prompt_BT
    out_BTD = layer(x_BTF.bfloat16())
    assert out_BTD.dtype == torch.bfloat16
    gate_BF = layer.scope.routes[layer].gate_BF
    added_BTD = (x_BTF * gate_BF[:, None]) @ layer.memory.detach().T
    wanted_BTD = layer.base_layer(x_BTF.bfloat16()).float() + added_BTD
    assert (out_BTD.float() - wanted_BTD).abs().max() < 0.03 * wanted_BTD.abs().max()


def test_calibration_follows_the_keys_and_says_what_it_lets_through(make):
    layer = make(false_positives=0.05)
    layer.quiet_NW = pack(scattered(200, F, K, torch.Generator().manual_seed(4)))
    x_BTF, prompt_BT = prompts(rows=60)
    mask_BW, taus = layer.masks(x_BTF, prompt_BT), []
    for i, mask_W in enumerate(mask_BW):
        layer.keys.add_slots(mask_W[None], [i], [i])
        rate = layer.calibrate(mask_W[None])
        answered = layer.route_masks(layer.quiet_NW).slot_B >= 0
        assert rate == pytest.approx(float(answered.float().mean()))
        assert rate < 0.05 + 1e-6
        taus.append(float(layer.tau))
    assert taus == sorted(taus)
    assert taus[-1] > taus[0]
    step_by_step = float(layer.tau)
    layer.forget_history()
    layer.calibrate()
    assert float(layer.tau) == step_by_step


def test_a_given_threshold_is_kept_and_none_is_above_chance(make):
    layer = make(tau=0.4)
    layer.quiet_NW = pack(scattered(50, F, K, torch.Generator().manual_seed(4)))
    store(layer, *prompts())
    rate = layer.calibrate()
    assert float(layer.tau) == pytest.approx(0.4)
    answered = layer.route_masks(layer.quiet_NW).slot_B >= 0
    assert rate == pytest.approx(float(answered.float().mean()))
    bare = make()
    store(bare, *prompts())
    assert bare.calibrate() != bare.calibrate()  # nan: nothing to calibrate on
    assert float(bare.tau) == pytest.approx(K / F + 0.16 * (1 - K / F))


def test_the_newest_write_is_taken_back_bit_for_bit_once(make):
    layer = make()
    store(layer, *prompts(rows=2))
    before = {name: value.clone() for name, value in layer.edit_state().items()}
    x_BTF, prompt_BT = prompts(rows=3, seed=8)
    mask_BW = layer.masks(x_BTF, prompt_BT)
    columns = layer.columns(mask_BW)
    layer.write(columns.used_C, columns.values_DC + 1, shrink=0.9)
    layer.keys.add_slots(mask_BW[:1], [9], [900])
    assert layer.take_back()
    after = layer.edit_state()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not layer.take_back()


def test_values_that_are_not_finite_are_refused(make):
    layer = make()
    columns = layer.columns(layer.masks(*prompts(rows=1)))
    with pytest.raises(ValueError, match="not finite"):
        layer.write(columns.used_C, columns.values_DC / 0)
    assert not layer.is_written
    assert not layer.memory.any()


def test_a_mask_must_fit_the_layer(make):
    with pytest.raises(ValueError, match=r"k is 97; a mask over 96 inputs has 1 to 96 ones"):
        make(k=97)


def test_shared_columns_take_the_sum_and_disjoint_ones_move_alone():
    matrix_DF = torch.randn(3, 10)
    columns = Columns(matrix_DF, torch.tensor([[0, 4, 7], [2, 4, 9]]))
    change = [torch.randn(3, 3), torch.randn(3, 3)]
    with torch.no_grad():
        for leaf, moved in zip(columns.leaves, change, strict=True):
            leaf += moved
    columns.merge()
    wanted_DF = matrix_DF.clone()
    wanted_DF[:, [0, 4, 7]] += change[0]
    wanted_DF[:, [2, 4, 9]] += change[1]
    assert torch.allclose(columns.values_DC, wanted_DF[:, columns.used_C], atol=1e-6)
    for leaf, place in zip(columns.leaves, columns.place_Ek, strict=True):
        assert torch.equal(leaf, columns.values_DC[:, place])
    x_BTF = torch.randn(4, 5, 10)
    added_BTD = columns.products(columns.inputs(x_BTF))
    for b in range(4):
        own = columns.column_Ek[b // 2]
        assert torch.allclose(added_BTD[b], x_BTF[b][:, own] @ wanted_DF[:, own].T, atol=1e-5)
