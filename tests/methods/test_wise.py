"""WISE: what the paper claims of side memories, masks, routing and merging."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

import editkit
from editkit.adapters.io import CONFIG
from editkit.adapters.side import FEW, SideRouting
from editkit.api import EditedLM
from editkit.edits import Edit, Probe
from editkit.functional.merge import ties_merge
from editkit.lm.spec import LMSpec
from editkit.methods import side
from editkit.methods.base import UndoError
from editkit.methods.memory import routing_rates
from editkit.methods.shards import Fitting, Margins, Shards
from editkit.methods.wise import WISE
from editkit.metrics.protocol import EvalProtocol

OTHERS = ["he works for Rome", "Question : where lives Elda ? Answer :", "a small town", "she"]
PREFIXES = ["I lives in", "the big town and"]


@pytest.fixture(autouse=True)
def few_unrelated(monkeypatch):
    monkeypatch.setattr(side, "HELD_OUT", 8)
    monkeypatch.setattr(side, "UNRELATED", 8)


@pytest.fixture
def make(tiny):
    def build(model="llama", **kwargs):
        settings = {
            "shards": Shards(density=0.3, save=2, merge=4),
            "margins": Margins(0.1, 1.0, 0.5, relative=True),
            "fitting": Fitting(steps=8, lr=0.5),
            "prefixes": PREFIXES,
        }
        method = WISE(
            lm=LMSpec(id=tiny(model)),
            evaluation=EvalProtocol(batch_size=3),
            **{**settings, **kwargs},
        )
        lm = EditedLM(method)
        method.start()
        return lm

    return build


@torch.no_grad()
def logits(lm, prompts, targets=None):
    return lm.lm(lm.lm.encode(prompts, targets))


def pools(lm):
    return lm.method.memory.pools


# masks and the inner loop


@pytest.mark.parametrize("mask", ["elementwise", "columns"])
@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_what_the_mask_closes_stays_untouched(make, edits, mask, decay):
    shards = Shards(density=0.3, mask=mask, save=9, merge=9)
    lm = make(shards=shards, fitting=Fitting(steps=8, lr=0.5, weight_decay=decay))
    for edit in edits[:2]:
        lm.edit_batch([edit])
    drawn = lm.method.draw_mask(lm.method.mask_seed)
    is_open = torch.zeros(lm.method.memory.shape_oi, dtype=torch.bool)
    is_open[:, drawn.columns_C] = True
    if drawn.gate_DC is not None:
        is_open &= drawn.gate_DC
    (delta_DF,) = pools(lm).dense([0])
    assert not delta_DF[~is_open].any()
    assert (delta_DF[is_open] != 0).float().mean() > 0.9
    assert 0.2 < is_open.float().mean() < 0.4


def plain_loop(lm, edit, others, steps, lr):
    """The published objective alone: whole passes, one edit, no caches."""
    method, model = lm.method, lm.lm.model
    site, margins = method.memory.base_layer, method.margins
    method.memory.enabled = False
    gate_DF = method.draw_mask(method.mask_seed).gate_DC
    delta_DF = torch.zeros(gate_DF.shape)
    prompts = [edit.prompt, *(f"{p} {edit.prompt}" for p in method.contexts)]
    tokens = lm.lm.encode(prompts, [edit.target] * len(prompts))
    other = lm.lm.encode(others)

    def run(rows, leaf):
        norms = []

        def hook(module, args, out):
            change = linear(args[0], leaf)
            norms.append(change.norm(dim=-1))
            return out + change

        handle = site.register_forward_hook(hook)
        found = model(
            input_ids=rows.ids_BT,
            attention_mask=rows.mask_BT.long(),
            position_ids=rows.positions_BT,
        ).logits
        handle.remove()
        score = (norms[0] * rows.prompt_BT).sum(1) / rows.prompt_BT.sum(1)
        return found, score / method.unit

    for _ in range(steps):
        leaf = delta_DF.clone().requires_grad_()
        found, inside = run(tokens, leaf)
        _, outside = run(other, leaf)
        total = 0
        for b in range(len(prompts)):
            places = tokens.target_BT[b].nonzero()[:, 0]
            total = total + cross_entropy(found[b, places - 1], tokens.ids_BT[b, places])
        total = total / len(prompts)
        gaps = [margins.apart + o - i for o in outside for i in inside]
        for hinges in (outside - margins.outside, margins.inside - inside, torch.stack(gaps)):
            active = hinges[hinges > 0]
            total = total + (active.mean() if len(active) else 0)
        (grad,) = torch.autograd.grad(total, leaf)
        delta_DF -= lr * grad * gate_DF
    method.memory.enabled = True
    return delta_DF


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_cached_rows_give_the_descent_of_whole_passes(make, edits, model):
    lm = make(model, layer=1, fitting=Fitting(steps=5, lr=0.5, irrelevant=2))
    lm.edit_batch(edits[:1])
    wanted = plain_loop(lm, edits[0], list(edits[0].negatives), 5, 0.5)
    (found,) = pools(lm).dense([0])
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_margins_draw_edits_and_unrelated_texts_apart(make, edits):
    def gap(weight):
        lm = make(margins=Margins(0.1, 1.0, 0.5, weight, relative=True))
        numbers = lm.edit_batch(edits[:1])
        return numbers["inside"] - numbers["outside"]

    assert gap(1.0) > gap(0.0)


# shards and merging


@pytest.mark.parametrize("mask", ["elementwise", "columns"])
def test_shards_are_saved_and_merged_by_ties(make, edits, mask):
    lm = make(shards=Shards(density=0.3, mask=mask, save=1, merge=2, keep=1.0))
    lm.edit_batch(edits[:1])
    assert pools(lm).open_P.tolist() == [False]
    first = pools(lm).dense([0])[0]
    other = make(shards=Shards(density=0.3, mask=mask, save=1, merge=1, keep=1.0))
    for edit in edits[:2]:
        other.edit_batch([edit])
    shards = pools(other).dense([0, 1])
    assert torch.equal(shards[0], first)
    lm.edit_batch(edits[1:2])
    (merged,) = pools(lm).dense([0])
    assert (merged - ties_merge(shards, density=1.0)).abs().max() < 1e-6
    assert pools(lm).members(0) == [0, 1]
    assert len(pools(lm)) == 1


def test_wise_merge_keeps_one_memory(make, edits):
    lm = make(shards=Shards(density=0.3, save=1, merge=2, retrieve=False, keep=1.0))
    for edit in edits[:2]:
        lm.edit_batch([edit])
    (old,) = pools(lm).dense([0])
    for edit in edits[2:3]:
        lm.edit_batch([edit])
    shard = pools(lm).dense([1])[0]
    lm.method.finish()
    (merged,) = pools(lm).dense([0])
    wanted = ties_merge(torch.stack([shard, old]), torch.tensor([0.4, 0.6]), 1.0)
    assert (merged - wanted).abs().max() < 1e-6
    assert pools(lm).members(0) == [0, 1, 2]


def test_thresholds_are_found_again_after_merging(make, edits):
    lm = make()
    for edit in edits:
        lm.edit_batch([edit])
    assert len(pools(lm)) == 1
    scores = [
        lm.method.memory.scores(*pair) for pair in lm.method.inputs([e.prompt for e in edits])
    ]
    assert float(pools(lm).floor_P) == pytest.approx(float(torch.cat(scores).min()), rel=1e-5)


# routing


def test_a_shard_is_closed_after_so_many_edits_whatever_their_wordings(make, edits):
    lm = make(paraphrases=1)
    lm.edit_batch(edits[:1])
    assert lm.method.in_shard == 1
    assert torch.equal(pools(lm).floor_P, lm.method.own_scores(edits[:1], 0))
    lm.edit_batch(edits[1:2])
    assert (lm.method.in_shard, lm.method.unmerged) == (0, 1)


def test_the_released_floors_are_scores_in_any_units(make, edits):
    lm = make(compat=True)
    lm.method.unit *= 10
    lm.edit_batch(edits[:1])
    ratio = float(pools(lm).floor_P / lm.method.own_scores(edits[:1], 0))
    assert 1 / 3 < ratio < 3  # of rows behind prefixes too, before the last step


def test_a_memory_without_change_is_the_base_bit_for_bit(make, edits):
    lm = make()
    before = logits(lm, OTHERS)
    lm.edit_batch(edits[:1])
    pools(lm).deltas.data.zero_()
    assert lm.lm.layers
    assert torch.equal(logits(lm, OTHERS), before)


def test_a_pool_that_was_just_opened_never_fires(make, edits):
    lm = make()
    memory = lm.method.memory
    memory.write(None, torch.randn(memory.shape_oi))
    before = logits(lm, OTHERS)
    assert [who.edit_id for who in lm.method.routes(OTHERS)] == [None] * 4
    with lm.unedited():
        assert torch.equal(logits(lm, OTHERS), before)


@pytest.mark.parametrize("mask", ["elementwise", "columns"])
def test_many_pools_route_rows_as_one_by_one(make, mask):
    lm = make(
        shards=Shards(density=0.3, mask=mask, save=1, merge=1), routing=SideRouting(act_ratio=0.9)
    )
    names = ["Alba", "Bera", "Cora", "Dora", "Elda"]
    for i, name in enumerate(names):
        lm.edit_batch([Edit(i, f"{name} lives in the town", "Oslo")])
    prompts = [f"{name} lives in the town" for name in names] + OTHERS
    together = lm.method.routes(prompts)
    alone = [lm.method.routes([p])[0] for p in prompts]
    assert [w.edit_id for w in together] == [w.edit_id for w in alone]
    rows = logits(lm, prompts)
    tokens = lm.lm.encode(prompts)
    for b, prompt in enumerate(prompts):
        one = logits(lm, [prompt])[0]
        assert (rows[b][tokens.mask_BT[b]] - one).abs().max() < 1e-4 * one.abs().max()


def test_bounds_of_many_pools_pick_what_scores_of_all_pick(make):
    shards = Shards(density=0.3, save=1, merge=1)
    whole = make(routing=SideRouting(sketch=0), shards=shards)
    bounded = make(routing=SideRouting(sketch=16), shards=shards)
    names = ["Alba", "Bera", "Cora", "Dora", "Elda", "Fina", "Gila", "Hera", "Iona", "Jana"]
    for i, name in enumerate(names):
        for lm in (whole, bounded):
            lm.edit_batch([Edit(i, f"{name} lives in the town", "Oslo")])
    assert len(bounded.method.memory.pools) > FEW
    prompts = [f"{a} {b} in" for a in ("Alba", "big", "Dora", "he") for b in ("lives", "town")]
    found = [[w.edit_id for w in lm.method.routes(prompts)] for lm in (whole, bounded)]
    assert found[0] == found[1]


def test_route_reports_the_edit_that_lives_in_the_pool(make, edits):
    lm = make()
    lm.edit_batch(edits[:2])
    probes = [Probe(f"{e.id}", e.id, "reliability", e.prompt, e.target) for e in edits[:2]]
    rows = lm.method.score(probes)
    assert [r["route"]["edit_id"] for r in rows] == [0, 1]
    assert routing_rates(rows)["self_match"] == 1.0


# undo, state, bad input


def test_an_edit_with_a_pool_to_itself_is_undone_bit_for_bit(make, edits):
    lm = make(shards=Shards(density=0.3, save=1, merge=4))
    lm.edit_batch(edits[:1])
    before = logits(lm, [*OTHERS, edits[0].prompt])
    lm.edit_batch(edits[1:2])
    lm.undo(1)
    assert torch.equal(logits(lm, [*OTHERS, edits[0].prompt]), before)
    lm.undo(0)
    with lm.unedited():
        base = logits(lm, OTHERS)
    assert torch.equal(logits(lm, OTHERS), base)
    for edit in edits[2:]:
        lm.edit_batch([edit])
    assert sorted(pools(lm).edit_M.tolist()) == [2, 3]


def test_an_edit_that_shares_its_weights_is_not_undone(make, edits):
    lm = make()
    for edit in edits[:2]:
        lm.edit_batch([edit])
    with pytest.raises(UndoError, match="cannot undo edit 1: it shares its weights with 1 others"):
        lm.undo(1)


def test_merged_pools_survive_saving(make, edits, tmp_path):
    lm = make(shards=Shards(density=0.3, mask="columns", save=1, merge=2))
    for edit in edits[:3]:
        lm.edit_batch([edit])
    lm.save(tmp_path / "run")
    again = editkit.load_edited(tmp_path / "run", trust=True)
    prompts = [e.prompt for e in edits]
    assert torch.equal(logits(again, prompts), logits(lm, prompts))


def test_a_loaded_run_closes_and_merges_shards_as_the_one_that_was_saved(make, edits, tmp_path):
    lm = make(shards=Shards(density=0.3, save=1, merge=3))
    for edit in edits[:2]:
        lm.edit_batch([edit])
    lm.save(tmp_path / "run")
    again = editkit.load_edited(tmp_path / "run")
    for one in (lm, again):
        one.edit_batch(edits[2:3])
    assert len(pools(again)) == 1
    assert torch.allclose(pools(again).deltas, pools(lm).deltas, atol=1e-5)  # read in other batches
    assert again.method.made == lm.method.made


def test_pools_without_their_edits_are_left_alone(make, edits, tmp_path):
    lm = make(shards=Shards(density=0.3, save=1, merge=4))
    lm.edit_batch(edits[:1])
    lm.save(tmp_path / "run")
    config = json.loads((tmp_path / "run" / CONFIG).read_text())
    for name in ("stream", "generator"):
        del config[name]  # as runs were saved before
    (tmp_path / "run" / CONFIG).write_text(json.dumps(config))
    again = editkit.load_edited(tmp_path / "run")
    for change in (lambda: again.undo(0), lambda: again.edit_batch(edits[1:2])):
        with pytest.raises(ValueError, match="saved without them: go on from its checkpoint"):
            change()
    assert torch.equal(pools(again).deltas, pools(lm).deltas)
    assert not again.ledger[0]["undone"]


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (lambda: Shards(density=0), "density is 0"),
        (lambda: Shards(save=3, merge=4), "multiple of save"),
        (lambda: Shards(mask="rows"), "'rows'"),
        (lambda: SideRouting(score="cosine"), "'cosine'"),
        (lambda: SideRouting(act_ratio=0), "act_ratio is 0"),
        (lambda: Fitting(steps=0), "steps is 0"),
        (lambda: Fitting(optimizer="lion"), "'lion'"),
    ],
)
def test_bad_settings_are_refused_by_name(bad, named):
    with pytest.raises(ValueError, match=named):
        bad()
