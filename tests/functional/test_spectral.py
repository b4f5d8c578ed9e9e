"""Moments as penalties: whitening, null spaces, preservation loss, PRUNE's singular values."""

import math

import pytest
import torch

from editkit.functional.spectral import (
    Penalty,
    compressed,
    null_projector,
    preservation_loss,
    stabilised,
)


@pytest.fixture
def keys_FN():
    return torch.randn(12, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def cov_FF(keys_FN):
    return keys_FN @ keys_FN.T / keys_FN.shape[1]


@pytest.mark.parametrize("shrink", [0.0, 0.5])
def test_whitening_turns_the_penalty_into_the_identity(cov_FF, keys_FN, shrink):
    penalty = Penalty(cov_FF, 4.0, shrink)
    full = penalty.added_to(torch.zeros_like(cov_FF), 1.0, 1.0)
    expected = 4.0 * cov_FF + shrink * torch.eye(12, dtype=torch.float64)
    assert torch.allclose(full, expected)
    white = penalty.whiten(keys_FN[:, :5])
    assert torch.allclose(white.T @ white, keys_FN[:, :5].T @ expected.inverse() @ keys_FN[:, :5])
    assert torch.allclose(penalty.lift(white.T), keys_FN[:, :5].T @ expected.inverse())


def test_only_the_moments_part_is_weighed_by_kappa(cov_FF):
    both = Penalty(cov_FF, 4.0, 0.5).added_to(cov_FF, 3.0, 2.0)
    expected = cov_FF + 2.0 * (3.0 * 4.0 * cov_FF + 0.5 * torch.eye(12, dtype=torch.float64))
    assert torch.allclose(both, expected)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, 2.0), (1.0, -0.1)])
def test_a_penalty_that_holds_nothing_back_is_refused(cov_FF, weights):
    with pytest.raises(ValueError, match="ridge is"):
        Penalty(cov_FF, *weights)


def test_good_moments_are_left_alone_and_singular_ones_just_made_invertible(cov_FF, keys_FN):
    same, jitter = stabilised(cov_FF)
    assert jitter == 0
    assert torch.equal(same, cov_FF)
    few = keys_FN[:, :5] @ keys_FN[:, :5].T / 5  # fewer tokens than inputs
    full, jitter = stabilised(few)
    scale = float(few.diagonal().mean())
    assert 0 < jitter <= 1e-10 * scale
    assert torch.allclose(full, few + jitter * torch.eye(12, dtype=torch.float64))
    assert bool(Penalty(full, 1.0).map_FF.isfinite().all())
    for broken in (torch.zeros(3, 3), torch.full((3, 3), float("nan"))):
        with pytest.raises(ValueError, match="statistics are damaged"):
            stabilised(broken)


def test_null_projector_is_a_projector_on_what_the_corpus_does_not_use(keys_FN):
    basis = torch.linalg.qr(keys_FN[:, :8]).Q
    cov = basis @ basis.T + 1e-4 * torch.eye(12, dtype=torch.float64)
    projector = null_projector(cov, 1e-2)
    assert torch.allclose(projector @ projector, projector)
    assert torch.allclose(projector, projector.T)
    assert round(float(projector.trace())) == 4
    assert float((projector @ basis).norm()) < 1e-9
    with pytest.raises(ValueError, match=r"nullspace_threshold 1e-06; here they go from 0.0001 to"):
        null_projector(cov, 1e-6)


def test_preservation_loss_is_the_mean_change_of_the_corpus_outputs(cov_FF, keys_FN):
    delta = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    direct = float((delta.double() @ keys_FN).square().sum(0).mean())
    assert math.isclose(preservation_loss(delta, cov_FF), direct, rel_tol=1e-12)
    assert preservation_loss(torch.zeros(5, 12), cov_FF) == 0.0
    assert preservation_loss(-delta, cov_FF) > 0


def test_prune_squeezes_only_the_singular_values_above_the_base_weights():
    left = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64)).Q
    sigma = torch.tensor([50.0, 7.0, 3.0, 0.2], dtype=torch.float64)
    pressed = torch.linalg.svdvals(compressed(left * sigma @ right.T, 5.0))
    expected = [math.log(50) - math.log(5) + 5, math.log(7) - math.log(5) + 5, 3.0, 0.2]
    assert torch.allclose(pressed[:4], torch.tensor(expected, dtype=torch.float64))
    small = left * sigma @ right.T
    assert torch.allclose(compressed(small, 50.0), small)
