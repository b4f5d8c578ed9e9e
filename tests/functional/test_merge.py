"""Merging: worked by hand, against loops in float64, and on the released code's own numbers."""

import json

import pytest
import torch
from peft.utils.merge_utils import ties
from safetensors.torch import load_file

from editkit.functional.merge import loss_weights, ties_merge, trim


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def by_loop(deltas, weights, density=1.0, rule="elect"):
    """TIES and Alg. 4 entry by entry, in Python's floats."""
    shards, rows, columns = deltas.shape
    kept = [[float(v) for v in delta.flatten()] for delta in deltas]
    for entries in kept:
        order = sorted(range(len(entries)), key=lambda i: (-abs(entries[i]), i))
        for i in order[int(density * len(entries)) :]:
            entries[i] = 0.0
    weights = [float(w) for w in weights]
    merged = []
    for p in range(rows * columns):
        column = [entries[p] for entries in kept]
        is_split = any(v > 0 for v in column) and any(v < 0 for v in column)
        size = [w * abs(v) for w, v in zip(weights, column, strict=True)]
        total = sum(w * v for w, v in zip(weights, column, strict=True))
        sign = 1 if total >= 0 else -1
        agreeing = [i for i in range(shards) if column[i] * sign > 0]
        if rule != "elect" and is_split:
            merged.append(column[size.index(max(size))])
        else:
            share = sum(weights[i] for i in agreeing)
            merged.append(sum(weights[i] * column[i] for i in agreeing) / share if share else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view(rows, columns)


WORKED = torch.tensor([[[4.0, 3.0, 0.0, 1.0]], [[2.0, -1.0, 5.0, -1.0]], [[0.0, -4.0, 0.0, 0.0]]])


def test_three_vectors_worked_by_hand():
    # agree (4, 2); split 3 - 5 < 0: mean of -1 and -4; alone 5; split 1 - 1 = 0 counts as plus
    assert ties_merge(WORKED, density=1.0).tolist() == [[3.0, -2.5, 5.0, 1.0]]
    # weights 2, 1, 1: (8 + 2) / 3; 6 - 1 - 4 > 0; 5; 2 - 1 > 0
    heavy_S = torch.tensor([2.0, 1.0, 1.0])
    want = torch.tensor([[10 / 3, 3.0, 5.0, 1.0]])
    assert torch.allclose(ties_merge(WORKED, heavy_S, density=1.0), want)
    # the winners of the split entries are -4 and, first of two equals, 1
    assert ties_merge(WORKED, density=1.0, conflict="winner").tolist() == [[3.0, -4.0, 5.0, 1.0]]


def test_trimming_keeps_the_largest_magnitudes_of_each_change():
    deltas = torch.tensor([[[1.0, -3.0, 2.0, 3.0]], [[2.0, 0.0, 2.5, 0.1]]])
    kept = trim(deltas, 0.5)
    assert kept.tolist() == [[[0.0, -3.0, 0.0, 3.0]], [[2.0, 0.0, 2.5, 0.0]]]
    assert trim(kept, 0.5) is kept


def test_ties_of_equal_weights_is_peft_s(generator):
    deltas = torch.randn(5, 9, 8, generator=generator)
    want = ties(list(deltas), torch.ones(5), 0.4)
    assert torch.allclose(ties_merge(deltas, density=0.4), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("density", [0.3, 0.53, 1.0])
@pytest.mark.parametrize("rule", ["elect", "winner"])
def test_ties_is_the_loop_in_float64(density, rule, generator):
    deltas = torch.randn(4, 6, 11, generator=generator, dtype=torch.float64)
    deltas *= torch.rand(4, 6, 11, generator=generator) < 0.7
    weights = torch.rand(4, generator=generator, dtype=torch.float64) + 0.1
    found = ties_merge(deltas, weights, density, rule)
    assert torch.allclose(found, by_loop(deltas, weights, density, rule), rtol=1e-13, atol=0)
    assert torch.allclose(ties_merge(deltas, 7 * weights, density, rule), found, rtol=1e-13)


@pytest.mark.parametrize("conflict", ["elect", "winner"])
def test_changes_under_disjoint_masks_merge_to_their_sum(conflict, generator):
    owner_DF = torch.randint(0, 3, (8, 16), generator=generator)
    deltas = torch.randn(8, 16, generator=generator) * torch.stack(
        [owner_DF == i for i in range(3)]
    )
    weights = loss_weights(torch.tensor([0.1, 1.0, 3.0]), 1.0)
    assert torch.allclose(ties_merge(deltas, weights, conflict=conflict), deltas.sum(0), rtol=1e-6)


def test_loss_weights_are_a_softmax_and_alpha_zero_is_stock_ties(generator):
    losses = torch.tensor([0.5, 0.1, 2.0])
    weights = loss_weights(losses, 2.0)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(weights[1] / weights[2]) == pytest.approx(2.718281828 ** (2 * 1.9), rel=1e-5)
    assert loss_weights(losses, 0.0).tolist() == pytest.approx([1 / 3] * 3, abs=1e-7)
    deltas = torch.randn(3, 5, 7, generator=generator)
    assert torch.equal(ties_merge(deltas, loss_weights(losses, 0.0)), ties_merge(deltas))
    assert not torch.allclose(ties_merge(deltas, weights), ties_merge(deltas), rtol=1e-2)


def test_merging_in_half_precision_is_reckoned_in_fp32(generator):
    deltas = torch.randn(3, 4, 6, generator=generator).bfloat16()
    merged = ties_merge(deltas, torch.tensor([0.2, 0.3, 0.5]))
    assert merged.dtype == torch.float32
    assert torch.allclose(merged.double(), by_loop(deltas, [0.2, 0.3, 0.5], 0.53), rtol=1e-5)


def test_ties_is_the_released_code_s(shared):
    folder = shared("parity/06_wise_ties")
    given, want = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "expected"))
    cases = json.loads((folder / "inputs.json").read_text())["cases"]
    for c, case in enumerate(cases):
        names = case.get("tensors") or [f"case{c}.shard{i}" for i in range(case["n_shards"])]
        deltas = torch.stack([given[name] for name in names]) - given["base"]
        merged = given["base"] + ties_merge(deltas, torch.tensor(case["weights"]), case["density"])
        assert torch.equal(merged, want[f"case{c}.merged"])


def test_merges_of_a_stream_of_edits_are_the_released_code_s(shared):
    want = load_file(shared("parity/06_wise_merge") / "expected.safetensors")
    base = want["W0"]
    deltas = torch.stack([want["merge0.shard0"], want["merge0.shard1"]]) - base
    assert torch.equal(base + ties_merge(deltas), want["merge0.result"])
    # later merges hold 0.6 of what was merged before, and 0.4 of what is new
    deltas = torch.stack([want["merge1.shard0"], want["merge1.layer_before"]]) - base
    merged = base + ties_merge(deltas, torch.tensor([0.4, 0.6]))
    assert torch.equal(merged, want["merge1.result"])
