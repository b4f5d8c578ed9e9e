"""REPAIR: what its windows, its loop and its pools promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import editkit
from editkit.adapters.side import SideRouting
from editkit.api import EditedLM
from editkit.edits import Edit
from editkit.functional.merge import loss_weights, ties_merge
from editkit.lm.spec import LMSpec
from editkit.methods import side
from editkit.methods.base import UndoError
from editkit.methods.repair import REPAIR
from editkit.methods.shards import Distillation, Fitting, Loop, Margins, Merge, Regroup, Shards
from editkit.metrics.protocol import EvalProtocol

PROMPTS = [
    "the capital of Alba is", "Bera lives in", "where lives Cora ? Answer :", "a big town and Dora",
    "Elda works for the city of", "she was born in", "Question : is Alba small ?", "he and Bera",
    "a small city lives for", "Cora . was he born in",
]  # fmt: skip
TOWNS = ["Oslo", "Rome", "Lima", "Bern", "Paris"]
STREAM = [
    Edit(i, prompt, TOWNS[i % 5], negatives=("town and city", "the big Elda"))
    for i, prompt in enumerate(PROMPTS)
]
NO_LOOP = Loop(enabled=False)
TOGETHER = Regroup(consistency=2.0)  # none leaves its batch
FEW_STEPS = Fitting(steps=3, lr=0.3)  # too few to learn by: the loop has something to do


@pytest.fixture(autouse=True)
def few_unrelated(monkeypatch):
    monkeypatch.setattr(side, "HELD_OUT", 8)
    monkeypatch.setattr(side, "UNRELATED", 8)


@pytest.fixture
def make(tiny):
    def build(model="llama", kind=REPAIR, **kwargs):
        settings = {
            "layer": 1,
            "shards": Shards(density=0.5, save=4, merge=4),
            "margins": Margins(0.1, 1.0, 0.5, relative=True),
            "routing": SideRouting(over="last"),
            "fitting": Fitting(steps=30, lr=0.03, optimizer="adam"),
            "loop": Loop(prune=0.2, errors=3),
            "prefixes": ["I lives in"],
        }
        method = kind(
            lm=LMSpec(id=tiny(model)),
            evaluation=EvalProtocol(batch_size=4),
            **{**settings, **kwargs},
        )
        method.start()
        return EditedLM(method)

    return build


def write(lm, edits):
    return [lm.edit_batch([edit]) for edit in edits]


def state(lm):
    return {k: v.clone() for k, v in lm.method.memory.edit_state().items()}


@torch.no_grad()
def is_right(lm, edits):
    """Ask the edits through the model itself, not through what the method keeps."""
    tokens = lm.lm.encode([e.prompt for e in edits], [e.target for e in edits])
    hit_N = lm.lm.target_logits(tokens).argmax(-1) == tokens.target_ids_N
    rows_N = tokens.target_rows_N
    return [bool(hit_N[rows_N == row].all()) for row in range(len(edits))]


# windows


def test_an_edit_answers_at_once_and_its_window_merges(make):
    lm = make(regroup=TOGETHER)
    for i, numbers in enumerate(write(lm, STREAM[:3])):
        assert numbers["waiting"] == numbers["pools"] == i + 1
    assert is_right(lm, STREAM[:3]) == [True] * 3
    numbers = lm.edit_batch([STREAM[3]])
    assert numbers["waiting"] < 4
    assert numbers["pools"] < 4
    assert sorted(lm.method.memory.pools.edit_M.tolist()) == [0, 1, 2, 3]


def test_no_edit_is_lost_when_its_window_is_merged(make):
    """Also where shards of few steps merge badly: what fails there keeps its own."""
    lm = make(shards=Shards(density=0.9, save=1, merge=4, keep=0.1))
    write(lm, STREAM[:3])
    before, pools = is_right(lm, STREAM[:3]), lm.method.memory.pools
    shards = {i: pools.deltas[p].detach().clone() for i, p in pools.homes.items()}
    write(lm, STREAM[3:4])
    after = is_right(lm, STREAM[:4])
    assert all(now for was, now in zip(before, after, strict=False) if was)
    assert set(lm.method.waiting) == set(lm.method.deferred)
    kept = [i for i in lm.method.waiting if i in shards]
    assert kept
    for i in kept:  # nothing trained it again
        assert torch.equal(pools.deltas[pools.homes[i]], shards[i])


def test_a_window_that_comes_whole_is_trained_once(make):
    lm = make(regroup=TOGETHER, loop=NO_LOOP)
    numbers = lm.edit_batch(STREAM[:4])
    assert (numbers["trained"], numbers["pools"], numbers["waiting"]) == (4, 1, 0)
    assert sorted(lm.method.memory.pools.members(0)) == [0, 1, 2, 3]
    lm.edit_batch(STREAM[4:6])
    numbers = lm.edit_batch(STREAM[6:8])  # two that wait, in a shard together, and two more
    assert (numbers["trained"], numbers["pools"], numbers["waiting"]) == (10, 2, 0)


def test_of_a_whole_window_too_no_edit_is_lost(make):
    lm = make(shards=Shards(density=0.9, save=1, merge=4, keep=0.1))
    lm.edit_batch(STREAM[:4])
    assert lm.method.deferred  # merging such shards fails
    assert is_right(lm, STREAM[:4]) == [True] * 4


def test_a_whole_window_is_rebuilt_within_its_own_budget(make):
    lm = make(fitting=FEW_STEPS, regroup=TOGETHER, loop=Loop(prune=0.01, errors=0, retries=4),
              shards=Shards(density=0.5, save=4, merge=4, keep=0.1))  # fmt: skip
    rebuilt = []
    lm.method._rebuild = lambda pool, wrong, false: rebuilt.append(pool) or ([], false)
    lm.method.set_apart = lambda ids, before: None  # who fails stays in the pool
    lm.edit_batch(STREAM[:4])
    assert rebuilt == [0]


def test_wordings_of_an_edit_are_trained_with_it_and_are_no_edits(make):
    lm = make(regroup=TOGETHER, paraphrases=2, shards=Shards(density=1.0, save=2, merge=2))
    worded = [
        replace(e, rephrases=(f"Question : {e.prompt}", f"he and {e.prompt}")) for e in STREAM[:2]
    ]
    assert lm.edit_batch(worded[:1])["waiting"] == 1
    numbers = lm.edit_batch(worded[1:])
    assert sorted(lm.method.memory.pools.edit_M.tolist()) == [0, 1]
    assert [e.prompt for e in lm.method.made.values()] == [e.prompt for e in worded]
    assert numbers["right_pool"] == 1
    assert is_right(lm, worded) == [True] * 2
    others = [replace(e, prompt=text) for e in worded for text in e.rephrases]
    assert is_right(lm, others) == [True] * 4


# the descent


def test_repeats_are_trained_with_an_edit_that_is_written_apart(make, monkeypatch):
    lm, seen = make(repeats=1), []
    lesson = lm.method.lesson

    def count(edits, beside=()):
        seen.append(len(edits))
        return lesson(edits, beside)

    monkeypatch.setattr(lm.method, "lesson", count)
    lm.edit_batch(STREAM[:1])
    assert seen == [2]
    assert lm.method.memory.pools.edit_M.tolist() == [0]


def test_part_of_a_lesson_is_what_it_was_in_the_whole(make):
    lm = make()
    lesson = lm.method.lesson(STREAM[:4])
    part, many = lesson.part([3, 1]), lesson.per_edit
    out = lm.method.memory.shape_oi[0]
    added = torch.randn(*lesson.rows.inputs_BTF.shape[:2], out)
    whole_B = lesson.rows.losses(added)
    rows = [3 * many, 3 * many + 1, many, many + 1]
    index = torch.tensor(rows)
    width = lesson.rows.columns(index)
    assert many == 2
    found_B = part.rows.losses(added[index][:, width])
    assert (found_B - whole_B[index]).abs().max() < 1e-4
    each = len(lesson.others_BT) // 4
    assert torch.equal(part.others_BTF[:each], lesson.others_BTF[3 * each :])


def test_every_edit_of_a_batch_is_done_at_the_end(make):
    """Also one that left early and was moved by the others since."""
    lm = make(
        fitting=Fitting(steps=100, lr=0.03, optimizer="adam", stop_below=0.5),
        margins=Margins(weight=0.0),
        distillation=Distillation(weight=0.0),
    )
    method = lm.method
    lesson, mask = method.lesson(STREAM[:4]), method.draw_mask(1)
    fit = method.fit_lesson(lesson, mask, None, 1.0)
    assert fit.steps < 100
    loss_B = lesson.rows.losses(lesson.rows.inputs_BTF @ fit.delta_DC.T)
    assert float(loss_B.view(4, -1).mean(1).max()) <= 0.5
    assert torch.allclose(loss_B.view(4, -1).mean(1), fit.losses_E, atol=1e-5)


def test_what_may_wait_no_longer_keeps_its_own_pool_for_good(make):
    lm = make(regroup=Regroup(consistency=1e-6, deferrals=0), loop=NO_LOOP)
    write(lm, STREAM[:4])
    pools = lm.method.memory.pools
    assert lm.method.deferred
    for edit_id in lm.method.deferred:
        assert not pools.open_P[pools.homes[edit_id]]
        assert pools.members(pools.homes[edit_id]) == [edit_id]
    assert not set(lm.method.waiting) & set(lm.method.deferred)


def test_an_edit_apart_from_its_batch_leaves_no_trace_in_the_pool(make):
    """The shard is trained again without it: as a window that never had it, from its mask on."""
    lm = make(regroup=Regroup(consistency=1e-6, deferrals=5), loop=NO_LOOP)
    write(lm, STREAM[:4])
    alone = [i for i in range(4) if i not in lm.method.deferred]
    merged = [p for p in range(len(lm.method.memory.pools)) if not lm.method.memory.pools.open_P[p]]
    assert [i for p in merged for i in lm.method.memory.pools.members(p)] == alone


def test_a_window_merges_by_loss(make):
    fits = []

    class Watched(REPAIR):
        def _merge_fits(self, found):
            fits.append(found)
            super()._merge_fits(found)

    shards = Shards(density=0.3, save=2, merge=4, keep=1.0)
    lm = make(kind=Watched, shards=shards, merge=Merge(alpha=5.0), regroup=TOGETHER, loop=NO_LOOP)
    write(lm, STREAM[:4])
    ((one, other),) = fits
    deltas = torch.stack([one[1].delta_DC, other[1].delta_DC])
    weights = loss_weights(torch.stack([f.losses_E.mean() for _, f, _ in (one, other)]), 5.0)
    (found,) = lm.method.memory.pools.dense([0])
    assert (found - ties_merge(deltas, weights, 1.0)).abs().max() < 1e-6


def test_without_weights_it_merges_as_wise_does(make):
    fits = []

    class Watched(REPAIR):
        def _merge_fits(self, found):
            fits.append(found)
            super()._merge_fits(found)

    shards = Shards(density=0.3, save=2, merge=4, keep=0.5)
    lm = make(kind=Watched, shards=shards, merge=Merge(alpha=0.0), regroup=TOGETHER, loop=NO_LOOP)
    write(lm, STREAM[:4])
    ((one, other),) = fits
    deltas = torch.stack([one[1].delta_DC, other[1].delta_DC])
    (found,) = lm.method.memory.pools.dense([0])
    assert (found - ties_merge(deltas, None, 0.5)).abs().max() < 1e-6


def test_distillation_draws_a_batch_together(make):
    def spread(weight):
        lm = make(distillation=Distillation(weight, 1.0, 1.0), loop=NO_LOOP)
        fit = lm.method.fit_shard(STREAM[:4], lm.method.draw_mask(1))
        unit = torch.nn.functional.normalize(fit.signature_ED, dim=1)
        return float((1 - unit @ unit.T).mean())

    assert spread(5.0) < spread(0.0)


# the loop


class Traced(REPAIR):
    """Notes who fails before and after each rebuilding, and whether it was taken."""

    def _rebuild(self, pool, wrong, false):
        accepted = self.accepted
        before = {k: v.clone() for k, v in self.memory.pools.tables.items()}
        found = super()._rebuild(pool, wrong, false)
        taken = self.accepted > accepted
        same = all(
            torch.equal(v, before[k]) for k, v in self.memory.pools.tables.items() if k != "named"
        )
        self.trace = [*getattr(self, "trace", []), (wrong, found[0], false, found[1], taken, same)]
        return found


@pytest.fixture
def traced(make):
    lm = make(kind=Traced, fitting=FEW_STEPS, loop=Loop(prune=0.01, errors=0, retries=4))
    return lm, write(lm, STREAM)


def test_a_rebuilt_pool_is_taken_only_where_it_helps(traced):
    lm, numbers = traced
    trace = lm.method.trace
    assert len(trace) == lm.method.rebuilt == numbers[-1]["rebuilt"] > 1
    told = lm.method.for_summary()["loop"]
    assert told["accepted"] + told["refused"] == told["rebuilt"] == len(trace)
    assert told["right_pool"] + told["wrong_pool"] + told["no_pool"] == pytest.approx(1.0)
    for wrong, after, false, claims, taken, same in trace:
        assert taken != same  # what is not taken is put back bit for bit
        if taken:
            assert len(after) < len(wrong)
            assert set(after) <= set(wrong)
            assert claims <= false


def test_a_pool_that_went_bad_is_rebuilt(make):
    lm = make(kind=Traced, regroup=TOGETHER)
    write(lm, STREAM[:4])
    method, pools = lm.method, lm.method.memory.pools
    merged = pools.members(0)
    assert len(merged) > 1
    method.memory.write(0, -pools.deltas[0].detach())  # claims what it did, and says the opposite
    method.health.answers.clear()
    method._repair(method.edits_seen)
    assert method.accepted > 0
    assert set(method.trace[0][0]) == set(merged)
    assert method.trace[-1][1] == []
    assert is_right(lm, STREAM[:4]) == [True] * 4


def test_what_the_loop_thinks_is_what_the_model_answers(traced):
    lm, numbers = traced
    known = lm.method.made
    right = is_right(lm, list(known.values()))
    wrong = [i for i, ok in zip(known, right, strict=True) if not ok]
    assert lm.method.health.wrong() == wrong
    assert numbers[-1]["failing"] == pytest.approx(len(wrong) / len(known))
    routes = lm.method.health.routes()
    slots = [lm.method.memory.pools.homes.get(w.edit_id, -1) for w in lm.method.routes(
        [e.prompt for e in known.values()]
    )]  # fmt: skip
    assert list(routes.values()) == slots


def test_a_rebuilding_that_diverges_is_refused_and_the_edits_stay(make, monkeypatch):
    lm = make(loop=NO_LOOP, regroup=TOGETHER)
    write(lm, STREAM[:4])
    before, wrong = state(lm), lm.method.health.wrong()

    def diverge(*args, **kwargs):
        lm.method.memory.drop([0])
        raise ValueError("loss is nan: lower lr")

    monkeypatch.setattr(lm.method, "train_window", diverge)
    assert lm.method._rebuild(0, wrong, 0.0) == (wrong, 0.0)
    assert (lm.method.rebuilt, lm.method.refused, lm.method.accepted) == (1, 1, 0)
    assert list(lm.method.tried.values()) == [1]
    assert all(torch.equal(v, before[k]) for k, v in state(lm).items())


def test_the_budget_ends_the_loop(make):
    loop = Loop(prune=0.01, errors=0, retries=9, budget=2.0)
    lm = make(fitting=FEW_STEPS, loop=loop)
    numbers = write(lm, STREAM)
    # a window and the last rebuilding may pass it
    assert numbers[-1]["trained"] <= 2.0 * len(STREAM) + 2 * len(STREAM)
    free = make(fitting=FEW_STEPS, loop=Loop(prune=0.01, errors=0, retries=9, budget=50.0))
    assert write(free, STREAM)[-1]["trained"] > numbers[-1]["trained"]


def test_each_part_can_be_left_out(make):
    plain = {
        "distillation": Distillation(weight=0.0),
        "regroup": Regroup(by_likeness=False),
        "merge": Merge(alpha=0.0),
        "loop": NO_LOOP,
    }
    lm = make(**plain)
    numbers = write(lm, STREAM[:4])
    assert numbers[-1]["rebuilt"] == 0
    assert lm.method.memory.pools.members(0) == [0, 1, 2, 3]  # in the order they came


# state


def test_the_same_seed_gives_the_same_bits(make):
    one, other = make(fitting=FEW_STEPS, seed=4), make(fitting=FEW_STEPS, seed=4)
    write(one, STREAM)
    write(other, STREAM)
    first, second = state(one), state(other)
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_a_window_cut_in_two_by_a_restart_ends_in_the_same_bits(make):
    straight, begun, resumed = make(), make(), make()
    write(straight, STREAM)
    write(begun, STREAM[:6])
    method = resumed.method
    for name, tensor in begun.method.memory.pools.state_dict().items():
        kept = method.memory.pools
        getattr(kept, name).data = tensor.clone()
    method.memory.pools._load_from_state_dict(
        begun.method.memory.pools.state_dict(), "", {}, True, [], [], []
    )
    method.memory.is_written = True
    method.edits_seen = begun.method.edits_seen
    method.load_stream_state(begun.method.stream_state())
    method.start()
    method.generator.set_state(begun.method.generator.get_state())
    write(resumed, STREAM[6:])
    first, second = state(straight), state(resumed)
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_an_edit_that_waits_is_undone_and_a_merged_one_refused(make):
    lm = make(regroup=TOGETHER)
    write(lm, STREAM[:4])
    before = state(lm)
    write(lm, STREAM[4:5])
    lm.undo(4)
    for name, tensor in state(lm).items():
        if name != "pools.named":
            assert torch.equal(tensor, before[name]), name
    shared = next(i for i in range(4) if i not in lm.method.waiting)
    with pytest.raises(UndoError, match=f"cannot undo edit {shared}: it shares its weights"):
        lm.undo(shared)


def test_a_loaded_run_fills_its_window_and_undoes(make, tmp_path):
    lm = make(regroup=TOGETHER)
    write(lm, STREAM[:3])
    lm.save(tmp_path / "run")
    again, other = (editkit.load_edited(tmp_path / "run") for _ in range(2))
    for one in (lm, again):
        one.edit_batch(STREAM[3:4])
    assert state(lm).keys() == state(again).keys()
    assert all(torch.allclose(v.double(), state(again)[k].double()) for k, v in state(lm).items())
    assert again.method.counted() == pytest.approx(lm.method.counted())
    other.undo(0)
    assert sorted(other.method.memory.pools.homes) == sorted(other.method.made) == [1, 2]


def test_an_edit_of_the_same_prompt_takes_the_old_ones_place(make):
    lm = make()
    write(lm, STREAM[:2])
    again = Edit(2, STREAM[0].prompt, "Bern")
    lm.edit_batch([again])
    assert sorted(lm.method.made) == [1, 2]
    assert is_right(lm, [again, STREAM[1]]) == [True, True]
    assert [entry["edit_id"] for entry in lm.edits] == [1, 2]
    with pytest.raises(UndoError, match="has given its place to a later edit"):
        lm.undo(0)


def test_a_pool_that_an_edit_left_is_measured_by_those_that_stay(make):
    lm = make(regroup=TOGETHER, loop=NO_LOOP)
    lm.edit_batch(STREAM[:4])
    pools, health = lm.method.memory.pools, lm.method.health
    lowest = int(health.own_scores(0).argmin())
    lm.edit_batch([Edit(4, STREAM[lowest].prompt, "Bern")])
    own_E = health.own_scores(0)
    assert len(own_E) == 3
    assert torch.equal(pools.floor_P[0], own_E.min())


def test_wise_merge_is_not_for_repair(make):
    with pytest.raises(ValueError, match="retrieve is false"):
        make(shards=Shards(retrieve=False))


def test_an_edit_that_diverges_leaves_all_as_it_was(make):
    lm = make()
    write(lm, STREAM[:2])
    before, made = state(lm), dict(lm.method.made)
    lm.method.fitting = Fitting(steps=30, lr=1e30, clamp=1e38, optimizer="sgd")
    with pytest.raises(ValueError, match="lower"):
        lm.edit_batch([Edit(5, STREAM[0].prompt, "Bern")])
    assert lm.method.made == made
    assert all(torch.equal(v, before[k]) for k, v in state(lm).items())
    assert len(lm.ledger) == 2


def test_what_an_edit_that_failed_was_known_by_is_not_taken_for_the_next(make, monkeypatch):
    lm = make()
    write(lm, STREAM[:1])
    kept, found = dict(lm.method.health.kept), lm.method.health.found
    with monkeypatch.context() as patch:
        patch.setattr(lm.method.health, "place", lambda pool: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lm.edit_batch(STREAM[1:2])
    assert lm.method.health.kept == kept
    assert all(a is b or a == b for a, b in zip(lm.method.health.found, found, strict=True))


def test_a_pool_is_placed_so_that_known_edits_find_their_own(make):
    lm = make(routing=SideRouting(over="last", pick="typical"), regroup=TOGETHER, loop=NO_LOOP)
    write(lm, STREAM[:5])
    pools, health = lm.method.memory.pools, lm.method.health
    assert pools.homes == {0: 0, 1: 0, 2: 0, 3: 0, 4: 1}
    health.routes()
    scores = {0: (20.0, 11.0), 1: (10.0, 1.0), 2: (5.0, 1.0), 3: (5.0, 1.0), 4: (15.0, 10.0)}
    health.score_EP = torch.tensor([scores[i] for i in health.edits])
    pools.floor_P, pools.typical_P = torch.tensor([5.0, 10.0]), torch.tensor([10.0, 10.0])
    assert health.routes()[4] == 0  # 1.5 of what is typical there, 1.0 in its own
    health.place(1)
    assert health.routes() == pools.homes
    low, high = 11 / 2.0, 10 / 1.5  # edit 0 stays in pool 0, edit 4 comes to pool 1
    assert low < float(pools.typical_P[1]) < high
