"""A stream at one site: LyapLock's update in its published form and in both of ours."""

from dataclasses import replace

import pytest
import torch

from editkit.functional.grams import Batch, Grams
from editkit.functional.pairs import Pairs
from editkit.functional.queue import Queue, QueueSettings
from editkit.functional.spectral import Penalty, preservation_loss

D, F, E, T = 5, 24, 3, 6
RIDGE = 4.0


def near(one, other, tol=1e-8):
    return float((one - other).norm()) <= tol * max(1.0, float(other.norm()))


@pytest.fixture(params=[1e2, 1e6], ids=["well", "ill"])
def cov_FF(request):
    generator = torch.Generator().manual_seed(1)
    mix = torch.linalg.qr(torch.randn(F, F, generator=generator, dtype=torch.float64)).Q
    scales = torch.logspace(0, -torch.log10(torch.tensor(request.param)), F, dtype=torch.float64)
    return mix @ torch.diag(scales) @ mix.T


@pytest.fixture
def stream():
    """T batches of keys [F, E] and residuals [D, E]; keys as the model gives them, fp32."""
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(F, E, generator=generator).double(),
            torch.randn(D, E, generator=generator).double(),
        )
        for _ in range(T)
    ]


def published(stream, cov, V, alpha, history="achieved", kappas=None):
    """LyapLock as released: W, S, H, VK0 = W0 C0 and the queue Z with a and a floor."""
    base = torch.randn(D, F, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weight, S, H = base.clone(), torch.zeros(F, F).double(), torch.zeros(D, F).double()
    Z = a = floor = budget = None
    for t, (K, R) in enumerate(stream):
        penalty = 1.0 if t == 0 else a * Z
        penalty = penalty if kappas is None else kappas[t]
        A = V * K @ K.T + V * S + penalty * RIDGE * cov
        left = V * R @ K.T + penalty * RIDGE * (base @ cov - weight @ cov) + V * (H - weight @ S)
        wanted = weight @ K + R
        weight = weight + torch.linalg.solve(A, left.T).T
        loss = (cov @ weight.T @ weight).trace() - 2 * (base @ cov @ weight.T).trace()
        loss = float(loss + (base @ cov @ base.T).trace())
        if t == 0:
            budget = alpha * loss
            a, Z, floor = budget**-0.5, budget**0.5, budget**0.5
        Z = max(Z + a * (loss - budget), floor)
        S = S + K @ K.T
        H = H + (weight @ K if history == "achieved" else wanted) @ K.T
        yield weight - base, a * Z, loss


def ours(form, stream, cov, V, alpha, history="achieved", always_refit=False, kappas=None):
    penalty, state = Penalty(cov, RIDGE), form.none((D, F), "cpu")
    settings = QueueSettings(alpha=alpha, V=V, history=history)
    queue, delta = Queue(), torch.zeros(D, F, dtype=torch.float64)
    for t, (K, R) in enumerate(stream):
        queue = queue if kappas is None else Queue(kappas[t], queue.D, queue.edits)
        refit = always_refit or state.kappa != queue.kappa
        ids = tuple(range(E * t, E * t + E))
        change, state = state.step(Batch(ids, K, R, delta, V, queue, refit), penalty)
        delta = delta + change
        if history == "achieved":
            state = state.settled(delta)
        loss = preservation_loss(delta, cov)
        queue = queue.after(loss, E, settings)
        yield delta, queue.kappa, loss


@pytest.mark.parametrize("history", ["achieved", "desired"])
@pytest.mark.parametrize(("alpha", "V"), [(1e6, 1.0), (1.05, 1.0), (1.05, 2.5)])
@pytest.mark.parametrize("always_refit", [False, True])
@pytest.mark.parametrize("form", [Pairs, Grams])
def test_all_forms_are_the_published_one(stream, cov_FF, history, alpha, V, always_refit, form):
    """Absolute ridge (Grams), kernel ridge (Pairs) and low rank; queue at its floor and above."""
    expected = list(published(stream, cov_FF, V, alpha, history))
    found = list(ours(form, stream, cov_FF, V, alpha, history, always_refit))
    for (delta, kappa, loss), (delta_p, kappa_p, loss_p) in zip(found, expected, strict=True):
        assert near(delta, delta_p, 1e-7)
        assert kappa == pytest.approx(kappa_p, rel=1e-7)
        assert loss == pytest.approx(loss_p, rel=1e-6)
    assert (max(kappa for _, kappa, _ in found) > 1) == (alpha == 1.05)


def test_the_pairs_become_sums_in_mid_stream_without_a_trace(stream, cov_FF):
    expected = list(ours(Pairs, stream, cov_FF, 1.0, 1.05))

    penalty, state, queue = Penalty(cov_FF, RIDGE), Pairs.none((D, F), "cpu"), Queue()
    delta = torch.zeros(D, F, dtype=torch.float64)
    for t, (K, R) in enumerate(stream):
        if t == 3:
            state = state.summed()
        batch = Batch((t,) * E, K, R, delta, 1.0, queue, state.kappa != queue.kappa)
        change, state = state.step(batch, penalty)
        delta = delta + change
        state = state.settled(delta)
        queue = queue.after(preservation_loss(delta, cov_FF), E, QueueSettings(alpha=1.05))
        assert near(delta, expected[t][0])


def test_every_achieved_edit_is_shrunk_twice_and_every_desired_one_once():
    """One fact per batch on orthogonal keys: strength after its own and after the next batch."""
    cov, eye = torch.eye(F, dtype=torch.float64), torch.eye(F, dtype=torch.float64)
    stream = [(eye[:, t : t + 1] * 5, torch.ones(D, 1).double()) for t in range(3)]
    once = 25 / (25 + RIDGE)

    def strengths(history):
        state, delta = Pairs.none((D, F), "cpu"), torch.zeros(D, F, dtype=torch.float64)
        for t, (K, R) in enumerate(stream):
            batch = Batch((t,), K, R, delta, 1.0, Queue(), state.kappa is None)
            change, state = state.step(batch, Penalty(cov, RIDGE))
            delta = delta + change
            state = state.settled(delta) if history == "achieved" else state
            yield float((delta @ stream[0][0]).mean())

    assert list(strengths("achieved")) == pytest.approx([once, once**2, once**2])
    assert list(strengths("desired")) == pytest.approx([once] * 3)


def test_desired_targets_and_a_still_kappa_are_memit_with_its_past_keys(stream, cov_FF):
    found = list(ours(Pairs, stream, cov_FF, 1.0, 1e9, "desired"))
    delta, past = torch.zeros(D, F).double(), torch.zeros(F, F).double()
    for (K, R), (mine, kappa, _) in zip(stream, found, strict=True):
        past = past + K @ K.T
        delta = delta + R @ K.T @ torch.linalg.inv(RIDGE * cov_FF + past)
        assert kappa == 1
        assert near(mine, delta)


def test_a_single_batch_is_memit_at_the_same_ridge(stream, cov_FF):
    (K, R), *_ = stream
    expected = R @ K.T @ torch.linalg.inv(RIDGE * cov_FF + K @ K.T)
    for form in (Pairs, Grams):
        ((delta, _, _),) = ours(form, stream[:1], cov_FF, 1.0, 60.0)
        assert near(delta, expected)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_kappa_and_change_do_not_depend_on_the_scale_of_the_moments(stream, cov_FF, scale):
    """C0 -> c C0 with lambda -> lambda / c."""
    plain = list(ours(Pairs, stream, cov_FF, 1.0, 1.05))
    penalty = Penalty(scale * cov_FF, RIDGE / scale)
    state, queue, delta = Pairs.none((D, F), "cpu"), Queue(), torch.zeros(D, F).double()
    for t, (K, R) in enumerate(stream):
        batch = Batch((t,) * E, K, R, delta, 1.0, queue, True)
        change, state = state.step(batch, penalty)
        delta = delta + change
        state = state.settled(delta)
        loss = preservation_loss(delta, scale * cov_FF)
        queue = queue.after(loss, E, QueueSettings(alpha=1.05))
        assert queue.kappa == pytest.approx(plain[t][1], rel=1e-7)
        assert near(delta, plain[t][0])


def test_the_bound_on_the_mean_loss_holds_where_the_queue_works(stream, cov_FF):
    for alpha in (1.05, 2.0):
        losses, kappa = [], 1.0
        for t, (_, kappa, loss) in enumerate(ours(Pairs, stream * 5, cov_FF, 1.0, alpha), start=1):
            losses.append(loss)
            assert sum(losses) / t <= alpha * losses[0] * (1 + (kappa - 1) / t) * (1 + 1e-9)


@pytest.mark.parametrize("history", ["achieved", "desired"])
def test_taking_the_last_batch_out_gives_the_fit_before_it(stream, cov_FF, history):
    """Under a kappa that moves, too: the pairs remember what each batch was solved with."""
    kappas = [1.0, 1.0, 1.5, 1.5, 2.0, 1.2]
    deltas, states = [], []
    penalty, state, delta = Penalty(cov_FF, RIDGE), Pairs.none((D, F), "cpu"), torch.zeros(D, F)
    delta = delta.double()
    for t, (K, R) in enumerate(stream):
        ids = tuple(range(E * t, E * t + E))
        refit = state.kappa != kappas[t]
        batch = Batch(ids, K, R, delta, 1.0, Queue(kappas[t]), refit)
        change, state = state.step(batch, penalty)
        delta = delta + change
        state = state.settled(delta) if history == "achieved" else state
        deltas.append(delta)
        states.append(state)
    assert near(state.fit(penalty), deltas[-1])
    for t in range(T - 1, -1, -1):
        for edit_id in range(E * t, E * t + E):
            state = state.without(edit_id)
        before = deltas[t - 1] if t else torch.zeros(D, F).double()
        assert near(state.fit(penalty), before)
        assert state.kappa == (kappas[t - 1] if t else None)
    assert not state.fit(penalty).any()


def test_taking_an_edit_out_is_the_fit_to_the_pairs_that_remain(stream, cov_FF):
    *_, (delta, _, _) = ours(Pairs, stream, cov_FF, 1.0, 1e9, "desired")
    state, penalty, before = Pairs.none((D, F), "cpu"), Penalty(cov_FF, RIDGE), delta * 0
    for t, (K, R) in enumerate(stream):
        ids = tuple(range(E * t, E * t + E))
        change, state = state.step(Batch(ids, K, R, before), penalty)
        before = before + change
    assert near(state.fit(penalty), delta)
    rest = state.without(4)
    keep = [n for n in range(E * T) if n != 4]
    K, wanted = state.keys_FN[:, keep].double(), state.wanted_DN[:, keep]
    expected = wanted @ K.T @ torch.linalg.inv(RIDGE * cov_FF + K @ K.T)
    assert near(rest.fit(penalty), expected)
    assert rest.sizes == (E, E - 1, E, E, E, E)
    assert rest.ids == tuple(keep)
    assert state.batch_of(4).ids == (3, 4, 5)


def test_whitened_keys_are_the_same_bits_when_made_again(stream, cov_FF):
    penalty, state, delta = Penalty(cov_FF, RIDGE), Pairs.none((D, F), "cpu"), torch.zeros(D, F)
    for t, (K, R) in enumerate(stream):
        _, state = state.step(Batch((t,) * E, K, R, delta.double()), penalty)
    bare = replace(state, white_FN=None, gram_NN=None, keys_FN=state.keys_FN.clone())
    again = bare.whitened(penalty)
    assert torch.equal(again.white_FN, state.white_FN)
    assert torch.equal(again.gram_NN, state.gram_NN)
