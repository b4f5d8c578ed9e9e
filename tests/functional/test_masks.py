"""Masks: exactly k ones, packed without loss, matched as counting by hand matches them."""

import pytest
import torch

from editkit.functional import masks
from editkit.functional.masks import (
    best_match,
    chance_threshold,
    hashed,
    largest,
    overlaps,
    pack,
    quantile_threshold,
    scattered,
    unpack,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_largest_marks_the_k_largest_magnitudes(generator):
    values_BF = torch.randn(20, 100, generator=generator)
    mask_BF = largest(values_BF, 28)
    assert (mask_BF.sum(1) == 28).all()
    inside = values_BF.abs().masked_fill(~mask_BF, float("inf")).amin(1)
    assert (inside >= values_BF.abs().masked_fill(mask_BF, 0).amax(1)).all()


def test_ties_go_to_the_lower_index():
    values_BF = torch.tensor([[1.0, -2.0, 2.0, 2.0, -1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert largest(values_BF, 2).long().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize("width", [1, 63, 64, 65, 1408])
def test_packing_loses_nothing(width, generator):
    mask_BF = torch.rand(7, width, generator=generator) < 0.4
    packed_BW = pack(mask_BF)
    assert packed_BW.shape == (7, -(-width // 64))
    assert torch.equal(unpack(packed_BW, width), mask_BF)


@pytest.mark.parametrize("width", [64, 100, 1408])
def test_overlaps_count_shared_ones(width, generator):
    one_BF, other_KF = (torch.rand(n, width, generator=generator) < 0.5 for n in (5, 40))
    one_BF[0], other_KF[0] = True, True  # full words, sign bit included
    counted_BK = (one_BF[:, None] & other_KF).sum(-1)
    assert torch.equal(overlaps(pack(one_BF), pack(other_KF)), counted_BK)


def test_the_best_match_is_the_earliest_of_the_best_in_any_number_of_parts(generator, monkeypatch):
    one_BF, other_KF = scattered(6, 130, 40, generator), scattered(99, 130, 40, generator)
    other_KF[70] = other_KF[20] = one_BF[0]
    counted_BK = (one_BF[:, None] & other_KF).sum(-1)
    found = []
    for words in (1, 50, 10**9):
        monkeypatch.setattr(masks, "CPU_WORDS", words)
        found.append(best_match(pack(one_BF), pack(other_KF)))
    for index_B, best_B in found:
        assert torch.equal(best_B, counted_BK.amax(1))
        first_B = (counted_BK == best_B[:, None]).long().argmax(1)
        assert torch.equal(index_B, first_B)
    assert found[0][0][0] == 20
    assert found[0][1][0] == 40


def test_random_masks_share_what_chance_gives(generator):
    mask_BF = scattered(50, 14336, 4096, generator)
    assert (mask_BF.sum(1) == 4096).all()
    shared_BB = overlaps(pack(mask_BF), pack(mask_BF)) / 4096
    assert torch.equal(shared_BB.diagonal(), torch.ones(50))
    apart = shared_BB[~torch.eye(50, dtype=torch.bool)]
    assert abs(apart.mean() - 4096 / 14336) < 0.002
    assert (apart - 4096 / 14336).abs().max() < 0.03  # standard deviation 0.006


def test_hashed_masks_are_the_same_for_the_same_mask_only(generator):
    mask_BF = scattered(30, 1024, 300, generator)
    near_BF = mask_BF.clone()
    place = int(near_BF[0].long().argmax())
    near_BF[:, place] = ~near_BF[:, place]
    one_BF, again_BF, near_BF = (hashed(m, 300) for m in (mask_BF, mask_BF.clone(), near_BF))
    assert (one_BF.sum(1) == 300).all()
    assert torch.equal(one_BF, again_BF)
    for other_BF in (near_BF, one_BF.roll(1, 0)):
        shared_B = (one_BF & other_BF).sum(1) / 300
        assert abs(shared_B.mean() - 300 / 1024) < 0.02
    assert (one_BF.float().mean(0) - 300 / 1024).abs().max() < 0.4  # no favourite column


def test_the_chance_threshold_is_the_papers_at_its_width():
    assert chance_threshold(4096, 14336) == pytest.approx(0.4, abs=1e-3)
    assert chance_threshold(768, 768) == 1.0
    for k, width in ((32, 128), (4096, 11008), (219, 768)):
        assert k / width < chance_threshold(k, width) < 1


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5])
def test_the_quantile_threshold_is_the_lowest_that_keeps_the_rate(rate, generator):
    best_B = torch.randint(20, 60, (333,), generator=generator)
    tau = quantile_threshold(best_B, rate, 100)
    assert (best_B / 100 >= tau).float().mean() <= rate
    assert (best_B / 100 >= tau - 0.01).float().mean() > rate


def test_a_perfect_match_stays_a_match():
    assert quantile_threshold(torch.full((9,), 50), 0.0, 50) == 1.0
