"""The locate-then-edit family: all or nothing, streams, queues, undo, what a saved run can do."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

import editkit
from editkit.api import load
from editkit.edits import Edit
from editkit.functional.grams import Grams
from editkit.functional.pairs import Pairs
from editkit.functional.queue import QueueSettings
from editkit.functional.regression import Rules
from editkit.functional.spectral import null_projector, preservation_loss
from editkit.methods import locate
from editkit.methods.alphaedit import AlphaEdit
from editkit.methods.base import UndoError
from editkit.methods.emmet import EMMET
from editkit.methods.encore import ENCORE
from editkit.methods.lyaplock import LyapLock
from editkit.methods.memit import MEMIT
from editkit.methods.memit_seq import MEMITSeq
from editkit.methods.prune import PRUNE
from editkit.methods.rect import RECT
from editkit.methods.rome import ROME
from editkit.workload import work_of

FAMILY = [AlphaEdit, EMMET, ENCORE, LyapLock, MEMIT, MEMITSeq, PRUNE, RECT, ROME]
BOOSTED = [AlphaEdit, ENCORE, MEMIT, PRUNE, RECT]
UNDOABLE = [AlphaEdit, EMMET, ENCORE, LyapLock, MEMIT, MEMITSeq, PRUNE, ROME]
REMEMBERING = [AlphaEdit, ENCORE, LyapLock, MEMITSeq, PRUNE]


@pytest.fixture
def make(tiny, located):
    """Load a method on a tiny model: `make(MEMIT, ridge=2.0)`."""
    return lambda cls, model="llama", **more: load(tiny(model), cls, **{**located(cls), **more})


@pytest.fixture
def drawn(monkeypatch):
    """Draw keys and values at random, by edit and layer, in the place of the model's."""

    def draw(seed, size, columns):
        dice = [torch.Generator().manual_seed(1000 * seed + column) for column in columns]
        return torch.stack([torch.randn(size, generator=d) for d in dice], dim=1)

    class Drawn:
        scale = 1.0

        def __init__(self, lm, edits, prefixes, sites, *args):
            self.ids, self.width = [e.id for e in edits], sites[0].out_features

        def find_values(self, search):
            ones = torch.ones(len(self.ids))
            z_DE = self.scale * draw(7, self.width, self.ids)
            return SimpleNamespace(z_DE=z_DE, passes_E=ones, stopped_E=ones)

        def keys(self, site, weights=None):
            return draw(site.layer, site.in_features, self.ids)

        def states(self):
            return torch.zeros(self.width, len(self.ids))

    monkeypatch.setattr(locate, "SubjectRows", Drawn)
    return Drawn


def stream(count, size=1, start=0):
    edits = [Edit(i, f"city {i} of Alba is", "Rome", "Alba") for i in range(start, start + count)]
    return [edits[i : i + size] for i in range(0, count, size)]


def state(lm):
    return {path: layer.delta.detach().clone() for path, layer in lm.lm.layers.items()}


def same(one, other):
    return all(torch.equal(one[path], other[path]) for path in one)


def near(one, other, tol=1e-5):
    return all((one[p] - other[p]).norm() <= tol * (1 + other[p].norm()) for p in one)


def resumed(make, lm, cls, **arguments):
    """Return a fresh method with what a checkpoint of `lm` holds."""
    again = make(cls, **arguments)
    file = io.BytesIO()
    torch.save([lm.method.stream_state(), state(lm)], file)
    file.seek(0)
    held, deltas = torch.load(file, weights_only=True)
    again.method.load_stream_state(held)
    again.method.edits_seen = lm.method.edits_seen
    for path, layer in again.lm.layers.items():
        layer.load_state_dict({"delta": deltas[path]}, strict=False)
    return again


# all or nothing


@pytest.mark.parametrize("cls", [AlphaEdit, LyapLock, MEMIT, PRUNE, RECT, ROME])
def test_an_edit_that_fails_halfway_leaves_everything_as_it_was(make, cls, edits, monkeypatch):
    lm = make(cls)
    lm.edit_batch(edits[:2])
    before, method = state(lm), lm.method
    known, last = dict(method.regressions), method.sites[-1]
    solve = cls.solve

    def broken(self, site, keys, resid):
        change = solve(self, site, keys, resid)
        return change * float("nan") if site == last else change

    monkeypatch.setattr(cls, "solve", broken)
    with pytest.raises(ValueError, match="refusing to write a change of norm nan"):
        lm.edit_batch(edits[2:])
    assert same(state(lm), before)
    assert method.regressions == known
    assert lm.method.edits_seen == len(lm.ledger) == method.known == 2
    monkeypatch.setattr(cls, "solve", solve)
    lm.edit_batch(edits[2:])
    straight = make(cls)
    straight.edit_batch(edits[:2])
    straight.edit_batch(edits[2:])
    assert same(state(lm), state(straight))


@pytest.mark.parametrize("cls", [LyapLock, ROME])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_have_diverged_leave_everything_as_it_was(make, drawn, cls, value):
    lm = make(cls)
    lm.edit_batch(stream(1)[0])
    before, known = state(lm), lm.method.regressions
    drawn.scale = value
    with pytest.raises(ValueError, match=r"refusing to write|cannot solve"):
        lm.edit_batch(stream(2, 2, 1)[0])
    assert same(state(lm), before)
    assert lm.method.regressions is known


@pytest.mark.parametrize("cls", [LyapLock, ROME])
def test_an_edit_without_a_subject_is_refused_at_once(make, cls, edits):
    lm = make(cls)
    bare = Edit(17, "the capital of Alba is", "Oslo")
    with pytest.raises(ValueError, match=r"edit 17 .* has no subject, .* give `subject`"):
        lm.edit_batch([*edits[:1], bare])
    assert not any(delta.any() for delta in state(lm).values())


@pytest.mark.parametrize("cls", [EMMET, LyapLock, MEMIT, ROME])
def test_edits_of_one_subject_or_one_key_do_not_crash(make, cls):
    lm = make(cls)
    texts = [("the capital of Alba is", "Oslo"), ("Alba is a", "town"), ("Alba is a", "city")]
    lm.edit_batch([Edit(i, p, t, "Alba") for i, (p, t) in enumerate(texts)])
    lm.edit_batch([Edit(3, "the capital of Alba is", "Bern", "Alba")])
    assert all(bool(delta.isfinite().all()) for delta in state(lm).values())


# what is written


def test_an_edit_moves_the_subject_to_its_value(make, edits):
    """With next to no ridge, the state behind the last layer is the value that was searched."""
    lm = make(MEMIT, ridge=1e-6)
    lm.method.start()
    rows = locate.SubjectRows(lm.lm, edits[:2], (), lm.method.sites, 2)
    z_DE = rows.find_values(lm.method.search).z_DE
    lm.edit_batch(edits[:2])
    after_DE = locate.SubjectRows(lm.lm, edits[:2], (), lm.method.sites, 2).states()
    assert torch.allclose(after_DE, z_DE, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_rome_puts_the_value_at_the_bare_prompt_whatever_the_prefixes(make, edits, model):
    lm = make(ROME, model, prefixes=["he works for Rome . ", "a big town . "])
    lm.method.start()

    def rows():
        return locate.SubjectRows(
            lm.lm, edits[:1], lm.method.contexts, lm.method.sites, 1, "mlp", "flat"
        )

    z_DE = rows().find_values(lm.method.search).z_DE
    lm.edit_batch(edits[:1])
    assert torch.allclose(rows().states(), z_DE, rtol=1e-4, atol=1e-4)
    assert torch.linalg.matrix_rank(next(iter(state(lm).values()))) == 1


def test_rome_edits_each_fact_of_a_batch_under_those_before_it(make, edits):
    together, apart = make(ROME), make(ROME)
    together.edit_batch(edits[:3])
    for edit in edits[:3]:
        apart.edit_batch([edit])
    assert near(state(together), state(apart))
    with pytest.raises(ValueError, match=r"ROME edits one layer, got layers \[1, 2\]"):
        make(ROME, layers=[1, 2])


def test_emmet_meets_a_single_value_exactly_and_two_with_slack(make, drawn):
    lm = make(EMMET, ridge=10.0, slack=0.5)
    for batch, is_exact in ((stream(1)[0], True), (stream(2, 2, 1)[0], False)):
        before = state(lm)
        lm.edit_batch(batch)
        rows = drawn(lm.lm, batch, (), lm.method.sites)
        for n, site in enumerate(lm.method.sites):
            moved = (state(lm)[site.path] - before[site.path]) @ rows.keys(site)
            wanted = rows.find_values(None).z_DE / (2 - n)
            assert torch.allclose(moved, wanted, atol=1e-3) == is_exact


def test_rect_writes_the_share_it_keeps(make, edits):
    lm, whole = make(RECT, keep=0.25), make(MEMIT)
    lm.edit_batch(edits)
    whole.edit_batch(edits)
    for path, delta in state(lm).items():
        assert (delta != 0).float().mean() == pytest.approx(0.25, abs=1e-3)
        assert torch.equal(delta, torch.where(delta != 0, state(whole)[path], 0.0))


def test_alphaedit_hardly_moves_what_the_corpus_uses(make, edits):
    lm = make(AlphaEdit)
    lm.edit_batch(edits)
    free = make(MEMIT)
    free.edit_batch(edits)
    for site in lm.method.sites:
        cov = free.method.regressions[site.path].penalty.cov_FF
        values, vectors = torch.linalg.eigh(cov)
        used = vectors[:, values >= 5.0].float()
        delta = state(lm)[site.path]
        assert (delta @ used).norm() < 1e-5 * delta.norm()
    with pytest.raises(ValueError, match=r"nullspace_threshold 1e-09; here they go from"):
        make(AlphaEdit, nullspace_threshold=1e-9).edit_batch(edits)


def test_prune_compresses_once_at_the_end_and_goes_on_from_the_whole_change(make, drawn):
    lm, whole = make(PRUNE), make(MEMIT)
    drawn.scale = 100.0
    for batch in stream(6, 2):
        lm.edit_batch(batch)
        whole.edit_batch(batch)
    assert same(state(lm), state(whole))
    lm.method.finish()
    finished = state(lm)
    lm.method.finish()
    assert same(state(lm), finished)
    for path, layer in lm.lm.layers.items():
        largest = torch.linalg.matrix_norm(layer.weight_oi, ord=2)
        before, after = (torch.linalg.svdvals(s[path]) for s in (state(whole), finished))
        expected = torch.where(before > largest, (before / largest).log() + largest, before)
        assert before[0] > largest
        assert torch.allclose(after, expected, rtol=1e-4, atol=1e-4)
    lm.undo(5)
    whole.undo(5)
    assert not same(state(lm), finished)
    for some in (lm, whole):
        some.edit_batch(stream(2, 2, 6)[0])
    assert same(state(lm), state(whole))


# streams


@pytest.mark.parametrize("queue", [None, {"alpha": 1.05}], ids=["still", "moving"])
def test_more_edits_than_inputs_turn_into_sums_and_change_nothing(make, drawn, monkeypatch, queue):
    """70 edits at a site of 64 inputs, against the same stream kept as pairs throughout."""
    options = {"ridge": 40.0} if queue is None else {"ridge": 40.0, "alpha": 1.05}
    cls = MEMITSeq if queue is None else LyapLock
    lm, pairs = make(cls, **options), make(cls, **options)
    for batch in stream(70, 7):
        lm.edit_batch(batch)
        for site in pairs.method.sites if pairs.method.regressions else []:
            known = pairs.method.regressions[site.path]
            pairs.method.regressions[site.path] = type(known)(
                known.rules, known.penalty, known.cov_FF, (32, 10_000), known.past, known.queue
            )
        numbers = pairs.edit_batch(batch)
    forms = [{type(r.past) for r in some.method.regressions.values()} for some in (lm, pairs)]
    assert forms == [{Grams}, {Pairs}]
    assert near(state(lm), state(pairs))
    if queue is not None:
        assert numbers["kappa/1"] > 1.5


@pytest.mark.parametrize(("cls", "size"), [(LyapLock, 1), (LyapLock, 8), (AlphaEdit, 8)])
def test_state_stops_growing_with_the_stream(make, drawn, cls, size):
    lm, sizes = make(cls), []
    for batch in stream(80, size):
        lm.edit_batch(batch)
        held = lm.method.stream_state()["sites"].values()
        tensors = [t for s in held for t in s["past"].values() if torch.is_tensor(t)]
        sizes.append(sum(t.numel() for t in tensors))
    assert len(set(sizes[-16 // size :])) == 1


@pytest.mark.parametrize("cls", FAMILY)
def test_a_resumed_stream_ends_with_the_same_bits(make, drawn, cls):
    """Cut while pairs are kept, right before they become sums, and after."""
    straight = make(cls)
    batches, cuts = stream(80, 8), {3, 8, 9}
    for batch in batches:
        straight.edit_batch(batch)
    again = make(cls)
    for n, batch in enumerate(batches):
        again = resumed(make, again, cls) if n in cuts else again
        again.edit_batch(batch)
    assert same(state(again), state(straight))


@pytest.mark.parametrize("cls", [LyapLock, MEMIT, MEMITSeq, RECT])
@pytest.mark.parametrize("count", [12, 80])
def test_the_memory_of_a_past_is_forecast(make, drawn, cls, count):
    """Where pairs have become sums, as those before the last pairs did."""
    lm, most = make(cls), 0
    for batch in stream(count, 4):
        lm.edit_batch(batch)
        pasts = [r.past for r in lm.method.regressions.values() if r.past is not None]
        found = [t for past in pasts for t in vars(past).values() if torch.is_tensor(t)]
        most = max(most, sum(t.numel() * t.element_size() for t in found))
    few, many = (work_of(lm.method, n, count) for n in (3, 6))
    assert few.held["earlier edits"] == most
    assert many.rows * many.passes == 2 * few.rows * few.passes  # micro_batch is 3
    alone = make(ROME).method
    one, ten = (work_of(alone, n, count) for n in (1, 10))
    assert (ten.passes, ten.solves, ten.rows) == (10 * one.passes, 10 * one.solves, one.rows)


@pytest.mark.parametrize("cls", [AlphaEdit, ENCORE])
def test_the_memory_of_sums_kept_from_the_start_is_forecast(make, drawn, cls):
    """Under a queue a penalty on increments needs them, however few edits there are."""
    lm = make(cls, queue=QueueSettings())
    for batch in stream(8, 4):
        lm.edit_batch(batch)
    pasts = [regression.past for regression in lm.method.regressions.values()]
    sums = [t for past in pasts for t in (past.keys_FF, past.targets_DF)]
    assert all(past.inverse_FF is None for past in pasts)
    found = work_of(lm.method, 4, 8).held["earlier edits"]
    assert found == sum(t.numel() * t.element_size() for t in sums)


def test_rules_that_forget_the_norm_of_increments_are_refused_under_a_queue(
    make, drawn, monkeypatch
):
    def forgetful(method):
        return Rules(remembers=True, queue=method.queue)

    monkeypatch.setattr(ENCORE, "rules", property(forgetful))
    make(ENCORE).edit_batch(stream(2, 2)[0])  # without a queue it makes no difference
    with pytest.raises(ValueError, match=r"increments by 0\.5, and the rules say shrinks=False"):
        make(ENCORE, queue=QueueSettings()).edit_batch(stream(2, 2)[0])


def test_the_queue_bounds_the_drift_of_what_is_written(make, drawn):
    """mean PL <= D (1 + (kappa - 1) / T) at every T and layer, and PL is that of the layers."""
    lm, sums = make(LyapLock, ridge=5.0, alpha=1.05), {1: 0.0, 2: 0.0}
    for t, batch in enumerate(stream(60, 3), start=1):
        numbers = lm.edit_batch(batch)
        for site in lm.method.sites:
            layer = site.layer
            cov = lm.method.regressions[site.path].cov_FF
            PL, D = numbers[f"PL/{layer}"], numbers[f"D/{layer}"]
            assert pytest.approx(preservation_loss(state(lm)[site.path], cov)) == PL
            assert numbers[f"PL_per_D/{layer}"] == pytest.approx(PL / D)
            sums[layer] += PL
            bound = D * (1 + (numbers[f"kappa/{layer}"] - 1) / t)
            assert numbers[f"kappa/{layer}"] >= 1
            assert sums[layer] / t <= bound * (1 + 1e-9)
    assert numbers["kappa/1"] > 1
    assert {"change/1", "residual/2", "value_passes", "stopped_early"} <= numbers.keys()


def test_single_edits_get_the_budget_of_a_batch(make, drawn):
    batched = make(LyapLock, ridge=5.0, alpha=2.0, history="desired")
    single = make(LyapLock, ridge=5.0, alpha=2.0, history="desired", d_base_edits=12)
    one = batched.edit_batch(stream(12, 12)[0])
    for batch in stream(12):
        numbers = single.edit_batch(batch)
        assert numbers["kappa/1"] == 1
        assert ("D/1" in numbers) == (batch[0].id == 11)
    assert numbers["D/1"] == pytest.approx(one["D/1"], rel=0.2)


# the queue as a booster


def naive_boosted(cls, lm, batches, drawn, kappas):
    """The reconstruction written out: history where the method has one, penalties anchored."""
    method, S, H, delta = lm.method, {}, {}, {}
    for t, batch in enumerate(batches):
        rows = drawn(lm.lm, batch, (), method.sites)
        for n, site in enumerate(method.sites):
            path, layer = site.path, site.layer
            K, R = rows.keys(site).double(), rows.find_values(None).z_DE.double() / (2 - n)
            cov, shrink = method.regressions[path].cov_FF, 0.0
            if cls is AlphaEdit:
                P = null_projector(cov, method.nullspace_threshold)
                K, cov, shrink = P @ K, P @ cov @ P, method.l2
            if cls is ENCORE:
                shrink = method.norm_weight
            W, zero = delta.get(path, torch.zeros(32, 64).double()), torch.zeros(64, 64).double()
            past, held = S.get(path, zero), H.get(path, torch.zeros(32, 64).double())
            if cls is MEMIT:
                past, held = zero, 0 * held
            anchor = kappas[t][layer] * method.ridge
            A = K @ K.T + past + anchor * cov + shrink * torch.eye(64).double()
            left = R @ K.T + held - W @ past - anchor * W @ cov
            X = torch.linalg.solve(A, left.T).T
            if cls is RECT:
                score = (X / (lm.lm.layers[path].weight_oi.double() + W + 1e-8)).abs()
                X = torch.where(score >= score.flatten().kthvalue(int(0.6 * 2048)).values, X, 0.0)
            delta[path] = W = W + X
            S[path], H[path] = past + K @ K.T, held + (W @ K) @ K.T
    return delta


@pytest.mark.parametrize("cls", BOOSTED)
def test_a_boosted_method_solves_its_anchored_problem(make, drawn, cls):
    lm = make(cls, queue={"alpha": 1.01}, ridge=4.0)
    batches, kappas = stream(20, 4), [{1: 1.0, 2: 1.0}]
    for batch in batches:
        numbers = lm.edit_batch(batch)
        kappas.append({layer: numbers[f"kappa/{layer}"] for layer in (1, 2)})
    expected = naive_boosted(cls, lm, batches, drawn, kappas)
    assert near(state(lm), expected, 2e-2 if cls is RECT else 1e-4)
    assert cls is MEMIT or max(kappas[-1].values()) > 1
    reason = "largest entries" if cls is RECT else "order of all edits"
    if cls is PRUNE:
        lm.undo(19)
    else:
        with pytest.raises(UndoError, match=reason):
            lm.undo(19)


def test_boosted_memit_keeps_the_newest_batch_only(make, drawn):
    """As its card says: without memory, an anchored penalty takes the earlier batches back."""
    plain, boosted = make(MEMIT, ridge=0.5), make(MEMIT, ridge=0.5, queue={"alpha": 60})
    for batch in stream(8, 4):
        plain.edit_batch(batch)
        boosted.edit_batch(batch)
    rows = drawn(plain.lm, stream(4, 4)[0], (), plain.method.sites)
    site = plain.method.sites[0]
    wanted = rows.find_values(None).z_DE / 2
    kept = [
        float((state(lm)[site.path] @ rows.keys(site) * wanted).sum()) for lm in (plain, boosted)
    ]
    assert kept[0] > 0.5 * float(wanted.square().sum())
    assert kept[1] < 0.3 * kept[0]


# undo


@pytest.mark.parametrize("cls", UNDOABLE)
def test_undoing_the_only_edit_is_the_base_model(make, cls, edits):
    lm = make(cls)
    lm.edit_batch(edits[:1])
    lm.undo(0)
    assert near(state(lm), {path: 0 * delta for path, delta in state(lm).items()}, 1e-5)


@pytest.mark.parametrize("cls", UNDOABLE)
def test_undoing_the_last_batch_is_the_state_before_it_and_forgets_it(make, drawn, cls):
    """Edit by edit; then the stream goes on as if the batch had never been, queue included."""
    options = {"ridge": 5.0, "alpha": 1.05} if cls is LyapLock else {}
    lm, never = make(cls, **options), make(cls, **options)
    batches = stream(15, 3)
    for batch in batches[:4]:
        lm.edit_batch(batch)
        never.edit_batch(batch)
    before = state(lm)
    lm.edit_batch(batches[4])
    assert not near(state(lm), before)
    for edit in batches[4]:
        lm.undo(edit.id)
    assert near(state(lm), before)
    more = stream(3, 3, 20)[0]
    numbers = [some.edit_batch(more) for some in (lm, never)]
    assert near(state(lm), state(never))
    kappas = [n.get("kappa/1", 1.0) for n in numbers]
    assert kappas[0] == pytest.approx(kappas[1], rel=1e-5)
    assert (kappas[0] > 1) == (cls is LyapLock)


@pytest.mark.parametrize("cls", [MEMITSeq, ENCORE])
def test_undo_of_an_early_edit_is_the_fit_to_the_pairs_that_remain(make, drawn, cls):
    lm = make(cls)
    for batch in stream(12, 3):
        lm.edit_batch(batch)
    pairs = {site: lm.method.regressions[site.path] for site in lm.method.sites}
    lm.undo(4)
    for site, known in pairs.items():
        keep = [n for n in range(12) if n != 4]
        K, wanted = known.past.keys_FN[:, keep].double(), known.past.wanted_DN[:, keep]
        gram = known.penalty.added_to(K @ K.T, 1.0, 1.0)
        expected = wanted @ K.T @ torch.linalg.inv(gram)
        assert torch.allclose(state(lm)[site.path].double(), expected, atol=1e-5)


def test_undo_is_refused_with_the_reason_and_changes_nothing(make, drawn, tmp_path):
    long = make(MEMITSeq)
    for batch in stream(70, 10):
        long.edit_batch(batch)
    rect = make(RECT)
    rect.edit_batch(stream(2, 2)[0])
    saved = make(MEMIT)
    saved.edit_batch(stream(2, 2)[0])
    saved.save(tmp_path / "run")
    loaded = editkit.load_edited(tmp_path / "run")
    reasons = [(long, 69, "64 edits"), (rect, 1, "largest entries"), (loaded, 1, "was loaded")]
    for lm, edit_id, reason in reasons:
        before = state(lm)
        with pytest.raises(UndoError, match=rf"cannot undo edit {edit_id}: .*{reason}"):
            lm.undo(edit_id)
        assert same(state(lm), before)
    loaded.edit_batch(stream(2, 2, 2)[0])
    before = state(loaded)
    loaded.edit_batch(stream(1, 1, 4)[0])
    loaded.undo(4)
    assert near(state(loaded), before)
    with pytest.raises(UndoError, match="cannot undo edit 1: it was made before"):
        loaded.undo(1)


# loading, statistics, prefixes, arguments


@pytest.mark.parametrize("cls", FAMILY)
def test_a_loaded_run_is_edited_further_or_refused_with_the_reason(make, cls, edits, tmp_path):
    lm = make(cls)
    lm.edit_batch(edits[:2])
    lm.save(tmp_path / "run")
    again = editkit.load_edited(tmp_path / "run")
    before = state(again)
    assert same(before, state(lm))
    if cls in REMEMBERING:
        with pytest.raises(ValueError, match=r"needs what it knew of all 2 edits .*--ckpt_path"):
            again.edit_batch(edits[2:])
        assert same(state(again), before)
    else:
        again.edit_batch(edits[2:])
        lm.edit_batch(edits[2:])
        assert same(state(again), state(lm))


def test_statistics_are_those_of_the_unedited_model_also_after_loading(make, edits, tmp_path):
    lm = make(MEMIT, cache=str(tmp_path / "one"))
    lm.edit_batch(edits[:2])
    lm.save(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    config["init_args"]["cache"] = str(tmp_path / "two")  # so that they are measured again
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(config))
    again = editkit.load_edited(tmp_path / "run")
    again.method.start()
    for path, known in lm.method.regressions.items():
        assert torch.equal(known.penalty.cov_FF, again.method.regressions[path].penalty.cov_FF)


def test_statistics_wait_for_the_first_edit(make, edits, tmp_path):
    lm = make(MEMIT, corpus=str(tmp_path / "nowhere.txt"))
    lm.generate("the capital of", max_new_tokens=2)
    with pytest.raises(ValueError, match=r"nowhere.txt"):
        lm.edit_batch(edits)
    assert lm.ledger == []


def test_prefixes_follow_the_seed_and_are_kept_with_the_run(make, edits, tmp_path):
    lm, other = make(MEMIT, prefixes=None), make(MEMIT, prefixes=None)
    for some in (lm, other):
        some.edit_batch(edits[:2])
    assert same(state(lm), state(other))
    assert lm.method.contexts == other.method.contexts
    assert len(lm.method.contexts) == 5
    lm.save(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["init_args"]["prefixes"] == list(lm.method.contexts)
    again = resumed(make, lm, MEMIT, prefixes=None)
    again.edit_batch(edits[2:])
    assert again.method.contexts == lm.method.contexts
    rome = make(ROME, prefixes=None)
    rome.edit_batch(edits[:1])
    assert len(rome.method.contexts) == 20


def test_a_queue_survives_a_saved_run(make, edits, tmp_path):
    lm = make(ENCORE, queue={"alpha": 7, "history": "desired"}, search={"steps": 4, "lr": 0.2})
    lm.edit_batch(edits[:2])
    lm.save(tmp_path / "run")
    again = editkit.load_edited(tmp_path / "run").method
    assert again.init_args() == {**lm.method.init_args(), "prefixes": []}
    assert (again.queue.alpha, again.queue.history, again.search.lr) == (7, "desired", 0.2)
    with pytest.raises(ValueError, match="alpah"):
        make(ENCORE, queue={"alpah": 7})


def test_a_stream_goes_on_with_the_corpus_it_was_begun_with(make, edits, tmp_path):
    lm = make(MEMIT)
    lm.edit_batch(edits[:2])
    told = lm.method.for_summary()["corpus"]
    assert told["tokens"] > 0
    assert told["added"].keys() == lm.lm.layers.keys()
    (tmp_path / "other.txt").write_text("where lives a big town\n")
    state = {**lm.method.stream_state()}
    other = make(MEMIT, corpus=str(tmp_path / "other.txt"))
    other.method.load_stream_state(state)
    with pytest.raises(ValueError, match=rf"{told['sha256'][:12]}.*other.txt' is another now"):
        other.method.start()
    del state["statistics"]  # as checkpoints were
    other.method.load_stream_state(state)
    other.method.start()
    assert other.method.for_summary()["corpus"]["sha256"] != told["sha256"]


def test_options_without_a_say_in_results_may_change_on_resuming(make, edits):
    one = make(MEMIT)
    one.edit_batch(edits[:1])
    checkpoint = {"state_dict": {}}
    one.method._trainer = SimpleNamespace()
    one.method.on_save_checkpoint(checkpoint)
    search = one.method.search
    other = make(MEMIT, cache="elsewhere", search={**asdict(search), "micro_batch": 1})
    other.method.on_load_checkpoint(checkpoint)
    assert other.method.edits_seen == 1
    third = make(MEMIT, search={**asdict(search), "lr": 0.1})
    with pytest.raises(ValueError, match="resume with the settings it was begun with"):
        third.method.on_load_checkpoint(checkpoint)


def test_what_cannot_be_written_is_known_before_the_first_edit(make, edits):
    method = make(MEMIT, paraphrases=1).method
    method.check(edits)
    for bad, match in [
        (replace(edits[0], subject=None), r"edit 0 .* has no subject, .* give `subject`"),
        (replace(edits[0], subject="Elda"), "subject 'Elda' not found in prompt"),
        (replace(edits[0], rephrases=()), "edit 0 .* has 0 rephrases"),
        (replace(edits[0], prompt="Alba " * 150), "edit 0: a row of .* exceeds the 128 positions"),
    ]:
        with pytest.raises(ValueError, match=match):
            method.check([*edits[1:], bad])
    assert not method.is_prepared


def test_memit_refuses_a_history_that_it_does_not_hold(make):
    with pytest.raises(ValueError, match=r"queue.history is 'desired', and MEMIT .* LyapLock"):
        make(MEMIT, queue={"history": "desired"})
    assert make(RECT, queue={"history": "desired"}).method.queue.history == "desired"


def test_prefixes_with_text_behind_the_braces_are_refused_before_moments(make, tmp_path):
    with pytest.raises(ValueError, match=r"prefix 'a town {} is': a prompt stands behind"):
        make(MEMIT, prefixes=["a town {} is"])
    assert make(MEMIT, prefixes=["", "a town. {}"]).method.contexts == ("a town. ",)


@pytest.mark.parametrize(
    ("cls", "argument", "value"),
    [
        (MEMIT, "layers", []), (MEMIT, "layers", [99]), (MEMIT, "ridge", -1.0),
        (EMMET, "slack", -0.1), (RECT, "keep", 0.0), (AlphaEdit, "l2", 0.0),
        (LyapLock, "alpha", 0.0), (LyapLock, "kappa_max", 0.5), (LyapLock, "history", "both"),
    ],
)  # fmt: skip
def test_an_argument_that_makes_no_sense_is_refused(make, edits, cls, argument, value):
    with pytest.raises(ValueError, match=argument.removesuffix("s")):
        make(cls, **{argument: value}).edit_batch(edits)
