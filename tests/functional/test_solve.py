"""The family's formulas against the papers' own forms, written out naively in fp64."""

import pytest
import torch

from editkit.functional.grams import Batch, Grams
from editkit.functional.pairs import Pairs
from editkit.functional.solve import (
    dense_update,
    keep_largest,
    kernel_update,
    rome_residual,
    woodbury,
)
from editkit.functional.spectral import Penalty, null_projector

D, F, E = 6, 20, 4
EYE = torch.eye(F, dtype=torch.float64)


def near(one, other, tol=1e-9):
    return float((one - other).norm()) <= tol * max(1.0, float(other.norm()))


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(3)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def cov_FF(draw):
    """Moments of 500 keys with a spread of scales, condition about 1e6."""
    keys_FN = torch.logspace(0, -2.5, F, dtype=torch.float64)[:, None] * draw(F, 500)
    mix_FF = torch.linalg.qr(draw(F, F)).Q
    return mix_FF @ (keys_FN @ keys_FN.T / 500) @ mix_FF.T


def one_batch(keys_FE, resid_DE, delta_DF=None, **kwargs):
    delta_DF = torch.zeros(D, F, dtype=torch.float64) if delta_DF is None else delta_DF
    ids = tuple(range(keys_FE.shape[1]))
    return Batch(ids, keys_FE.float().double(), resid_DE, delta_DF, **kwargs)


def both_forms(batch, penalty, V=1.0):
    for form in (Pairs, Grams):
        yield form.none((D, F), "cpu").step(batch, penalty)[0]


def test_memit_is_the_ridge_regression_of_its_equation_14(draw, cov_FF):
    batch = one_batch(draw(F, E), draw(D, E))
    keys, resid = batch.keys_FE, batch.resid_DE
    expected = resid @ keys.T @ torch.linalg.inv(7.0 * cov_FF + keys @ keys.T)
    for change in both_forms(batch, Penalty(cov_FF, 7.0)):
        assert near(change, expected)
    # and the least-squares problem of which that is the solution
    root = torch.linalg.cholesky(cov_FF)
    rows = torch.cat([keys, 7.0**0.5 * root], dim=1).T
    wanted = torch.cat([resid, torch.zeros_like(resid @ keys.T)], dim=1).T
    assert near(torch.linalg.lstsq(rows, wanted).solution.T, expected, 1e-6)


def test_emmet_is_its_own_formula_and_reaches_its_targets_without_slack(draw, cov_FF):
    batch = one_batch(draw(F, E), draw(D, E), V=1 / 0.1)
    keys, resid = batch.keys_FE, batch.resid_DE
    inverse = torch.linalg.inv(3.0 * cov_FF)
    inner = keys.T @ inverse @ keys + 0.1 * torch.eye(E)
    expected = resid @ torch.linalg.inv(inner) @ keys.T @ inverse
    for change in both_forms(batch, Penalty(cov_FF, 3.0)):
        assert near(change, expected, 1e-7)
    exact = one_batch(keys, resid, V=float("inf"))
    change, _ = Pairs.none((D, F), "cpu").step(exact, Penalty(cov_FF, 3.0))
    assert near(change @ keys, resid, 1e-7)


def test_rome_is_rank_one_along_the_whitened_key_and_hits_the_bare_prompt(draw, cov_FF):
    key, bare, resid = draw(F, 1), draw(F, 1), draw(D, 1)
    penalty = Penalty(cov_FF, 1.0)
    scaled = rome_residual(key, bare, resid, penalty)
    batch = Batch((0,), key, scaled, torch.zeros(D, F, dtype=torch.float64), V=float("inf"))
    change, _ = Pairs.none((D, F), "cpu").step(batch, penalty)
    left = torch.linalg.inv(cov_FF) @ key
    left = left / left.norm()
    assert near(change, resid @ left.T / (left.T @ bare), 1e-5)  # the keys are kept in fp32
    white = penalty.whiten(key)
    pure = kernel_update(white, white.T @ white, scaled, 0.0, penalty)
    assert near(pure, resid @ left.T / (left.T @ bare), 1e-8)
    assert near(pure @ bare, resid, 1e-8)


def test_encore_adds_the_plain_norm_and_its_past_keys(draw, cov_FF):
    penalty, past = Penalty(cov_FF, 5.0, shrink=0.7), draw(F, 9).float().double()
    keys, resid = draw(F, E).float().double(), draw(D, E)
    inverse = torch.linalg.inv(5.0 * cov_FF + 0.7 * EYE + past @ past.T + keys @ keys.T)
    expected = resid @ keys.T @ inverse
    for form in (Pairs, Grams):
        state = form.none((D, F), "cpu")
        _, state = state.step(one_batch(past, torch.zeros(D, 9, dtype=torch.float64)), penalty)
        assert near(state.step(one_batch(keys, resid), penalty)[0], expected)


def test_alphaedit_is_its_released_formula_and_leaves_the_corpus_alone(draw, cov_FF):
    values = torch.linalg.eigvalsh(cov_FF)
    threshold = float(values[F // 2])
    projector = null_projector(cov_FF, threshold)
    past, keys, resid = draw(F, 3), draw(F, E), draw(D, E)
    left = projector @ (keys @ keys.T + past @ past.T) + 2.0 * EYE
    expected = torch.linalg.solve(left, projector @ keys @ resid.T).T
    penalty = Penalty(None, 0.0, shrink=2.0)
    for form in (Pairs, Grams):
        state = form.none((D, F), "cpu")
        zeros = torch.zeros(D, 3, dtype=torch.float64)
        _, state = state.step(one_batch(projector @ past, zeros), penalty)
        change, _ = state.step(one_batch(projector @ keys, resid), penalty)
        assert near(change, expected, 1e-6)  # projected keys are kept in fp32
    vectors = torch.linalg.eigh(cov_FF).eigenvectors[:, values >= threshold]
    assert float((change @ vectors).norm()) < 1e-6 * float(change.norm())


def test_a_larger_ridge_protects_the_corpus_more(draw, cov_FF):
    keys, resid = draw(F, E), draw(D, E)
    drift = []
    for ridge in (1.0, 1e3, 1e6):
        change, _ = Pairs.none((D, F), "cpu").step(one_batch(keys, resid), Penalty(cov_FF, ridge))
        drift.append(float((change @ cov_FF * change).sum()))
    assert drift[0] > drift[1] > 30 * drift[2] > 0


def test_the_order_of_edits_within_a_batch_does_not_matter(draw, cov_FF):
    keys, resid, order = draw(F, E), draw(D, E), torch.tensor([2, 0, 3, 1])
    penalty = Penalty(cov_FF, 2.0)
    shuffled = one_batch(keys[:, order], resid[:, order])
    plain = one_batch(keys, resid)
    for one, other in zip(both_forms(plain, penalty), both_forms(shuffled, penalty), strict=True):
        assert near(one, other)


def test_the_kernel_solve_may_run_in_fp32_where_a_dense_one_may_not(draw):
    """Whitened once in fp64, the rest is well conditioned at any condition of the moments."""
    keys, resid = draw(F, E), draw(D, E)
    for condition in (1e4, 1e6, 1e8):
        mix = torch.linalg.qr(draw(F, F)).Q
        scales = torch.logspace(0, -torch.log10(torch.tensor(condition)), F, dtype=torch.float64)
        cov = mix @ torch.diag(scales) @ mix.T
        penalty = Penalty(cov, 10.0)
        white = penalty.whiten(keys)
        exact = kernel_update(white, white.T @ white, resid, 1.0, penalty)
        white32 = white.float()
        single = kernel_update(white32, white32.T @ white32, resid.float(), 1.0, penalty)
        assert float((single - exact).norm() / exact.norm()) < 3e-6
    gram32 = (10.0 * cov + keys @ keys.T).float()
    with pytest.raises(ValueError, match="is singular"):
        dense_update((resid @ keys.T).float(), gram32 - 1e-6 * torch.eye(F))


def test_woodbury_is_the_inverse_of_the_larger_matrix(draw, cov_FF):
    keys = draw(F, 2)
    inverse = woodbury(torch.linalg.inv(cov_FF), keys)
    assert near(inverse, torch.linalg.inv(cov_FF + keys @ keys.T), 1e-8)


def test_small_batches_run_on_one_inverse_and_do_not_drift(draw):
    """200 single edits in dense form, whose inverse is updated 64 times before it is renewed."""
    wide = 40
    cov = torch.eye(wide, dtype=torch.float64) * torch.logspace(0, -4, wide, dtype=torch.float64)
    penalty, state, delta = Penalty(cov, 3.0), Grams.none((D, wide), "cpu"), torch.zeros(D, wide)
    delta = delta.double()
    keys, resid, ages = draw(wide, 200), draw(D, 200), []
    for t in range(200):
        batch = Batch((t,), keys[:, t : t + 1], resid[:, t : t + 1], delta)
        change, state = state.step(batch, penalty)
        ages.append(state.age)
        past = 3.0 * cov + keys[:, : t + 1] @ keys[:, : t + 1].T
        assert near(change, resid[:, t : t + 1] @ keys[:, t : t + 1].T @ past.inverse(), 1e-8)
        delta = delta + change
    assert max(ages) == 64
    assert ages.count(0) == 4


def test_equal_keys_in_a_batch_share_the_change_where_there_is_noise(draw, cov_FF):
    key, one, other = draw(F, 1), draw(D, 1), draw(D, 1)
    batch = one_batch(torch.cat([key, key], 1), torch.cat([one, other], 1))
    for change in both_forms(batch, Penalty(cov_FF, 1e-3)):
        assert near(change @ batch.keys_FE[:, :1], (one + other) / 2, 1e-2)
    exact = one_batch(batch.keys_FE, batch.resid_DE, V=float("inf"))
    with pytest.raises(ValueError, match="cannot solve for 2 keys"):
        Pairs.none((D, F), "cpu").step(exact, Penalty(cov_FF, 1e-3))


def test_a_not_finite_solve_is_refused(draw, cov_FF):
    keys = draw(F, E)
    keys[0, 0] = float("nan")
    for form in (Pairs, Grams):
        with pytest.raises(ValueError, match="cannot solve"):
            form.none((D, F), "cpu").step(one_batch(keys, draw(D, E)), Penalty(cov_FF, 1.0))


def test_rect_keeps_the_largest_relative_changes(draw):
    change, weight = draw(5, 8), draw(5, 8)
    kept = keep_largest(change, weight, 0.4)
    scores = (change / (weight + 1e-8)).abs()
    assert int((kept != 0).sum()) == 17  # 40 entries, from the 24th smallest on
    assert scores[kept != 0].min() >= scores[kept == 0].max()
    assert torch.equal(kept[kept != 0], change[kept != 0])
    assert torch.equal(keep_largest(change, weight, 1.0), change)
    with pytest.raises(ValueError, match="keep is 0"):
        keep_largest(change, weight, 0.0)
