"""MEMOIR: what the paper claims, what the release lacks, and what undoing means."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

import editkit
from editkit.adapters.keys import Routing
from editkit.api import EditedLM
from editkit.data.factworld import FactWorld
from editkit.edits import Edit, Probe
from editkit.lm.spec import LMSpec
from editkit.methods.base import UndoError
from editkit.methods.memoir import MEMOIR
from editkit.metrics.protocol import EvalProtocol
from editkit.metrics.routing import routing_rates

SMALL = {"background": 8, "held_out": 40}
OTHERS = ["he works for Rome", "Question : where lives Elda ? Answer :", "a small town", "she"]
PREFIXES = ["I lives in", "the big town and"]


@pytest.fixture
def make(tiny):
    def build(model="llama", routing=None, **kwargs):
        method = MEMOIR(
            lm=LMSpec(id=tiny(model)),
            evaluation=EvalProtocol(batch_size=3),
            routing=Routing(**{**SMALL, **(routing or {})}),
            **{"prefixes": PREFIXES, "k": 16, **kwargs},
        )
        lm = EditedLM(method)
        method.start()
        return lm

    return build


@torch.no_grad()
def logits(lm, prompts):
    return lm.lm(lm.lm.encode(prompts))


def answered(lm, prompts):
    return [who.edit_id for who in lm.method.routes(prompts)]


def memory(lm):
    return lm.method.memory.memory.detach()


# the inner loop


def plain_loop(lm, edits, steps, lr, clip, stop_below):
    """Equations alone: whole passes, the whole memory, each edit's gradient clipped by itself."""
    method, model = lm.method, lm.lm.model
    site = method.memory.base_layer
    method.memory.enabled = False
    memory_DF = memory(lm).clone()
    masks = [method.memory.gates(method._masks([e.prompt]))[0].float() for e in edits]
    fronts = ["", *(p + " " for p in method.contexts)]
    for _ in range(steps):
        change_DF = torch.zeros_like(memory_DF)
        for edit, mask_F in zip(edits, masks, strict=True):
            tokens = lm.lm.encode([f + edit.prompt for f in fronts], [edit.target] * len(fronts))
            leaf = memory_DF.clone().requires_grad_()
            handle = site.register_forward_hook(
                lambda m, args, out, leaf=leaf, mask_F=mask_F: out + linear(args[0] * mask_F, leaf)
            )
            found = model(
                input_ids=tokens.ids_BT,
                attention_mask=tokens.mask_BT.long(),
                position_ids=tokens.positions_BT,
            ).logits
            handle.remove()
            rows = []
            for b in range(len(fronts)):
                places = tokens.target_BT[b].nonzero()[:, 0]
                rows.append(cross_entropy(found[b, places - 1], tokens.ids_BT[b, places]))
            loss = torch.stack(rows).mean()
            if float(loss.detach()) <= stop_below:
                continue
            (grad_DF,) = torch.autograd.grad(loss, leaf)
            change_DF -= lr * grad_DF * min(1.0, clip / (float(grad_DF.norm()) + 1e-6))
        if not change_DF.any():
            break
        memory_DF += change_DF
    method.memory.enabled = True
    return memory_DF


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("size", [1, 3])
def test_writes_what_the_plain_loop_writes(make, edits, model, size):
    settings = {"steps": 12, "lr": 1.0, "clip": 1.0, "stop_below": 0.02}
    lm, other = make(model, layer=1, **settings), make(model, layer=1, **settings)
    for start in (0, size):
        batch = edits[start : start + size]
        wanted_DF = plain_loop(other, batch, **settings)
        with torch.no_grad():
            other.method.memory.memory.copy_(wanted_DF)
        lm.edit_batch(batch)
        assert (memory(lm) - wanted_DF).norm() < 1e-5 * wanted_DF.norm()


def test_edits_with_disjoint_masks_are_written_together_as_one_by_one(make, edits):
    together, apart = make(k=3), make(k=3)
    prompts = [f"{a} {b} is" for a in ("Alba", "big", "he") for b in ("Rome", "lives", "town", "a")]
    columns = together.method.memory.gates(together.method._masks(prompts))
    pairs = [(i, j) for i in range(12) for j in range(i) if not (columns[i] & columns[j]).any()]
    i, j = pairs[0]
    batch = [Edit(0, prompts[i], "Oslo"), Edit(1, prompts[j], "Lima")]
    together.edit_batch(batch)
    for edit in batch:
        apart.edit_batch([edit])
    assert torch.allclose(memory(together), memory(apart), atol=1e-5)


def test_an_edit_writes_its_own_columns_and_no_others(make, edits):
    lm = make()
    before = memory(lm).clone()
    for edit in edits:
        lm.edit_batch([edit])
        changed = (memory(lm) != before).any(0)
        own = lm.method.memory.gates(lm.method._masks([edit.prompt]))[0]
        assert changed.any()
        assert not (changed & ~own).any()
        before = memory(lm).clone()


def test_only_compat_lets_the_rest_of_the_memory_decay(make, edits):
    for compat in (False, True):
        lm = make(compat=compat, steps=10)
        lm.edit_batch(edits[:1])
        before = memory(lm).clone()
        steps = lm.edit_batch(edits[1:2])["steps"]
        own = lm.method.memory.gates(lm.method._masks([edits[1].prompt]))[0]
        kept = (1 - 1e-5) ** steps if compat else 1.0
        assert torch.allclose(memory(lm)[:, ~own], kept * before[:, ~own], rtol=1e-6, atol=0)


# routing


@pytest.mark.parametrize("size", [1, 4])
def test_what_nothing_matches_is_the_base_bit_for_bit_beside_what_is_edited(make, edits, size):
    lm = make(routing={"tau": 0.9})
    for start in range(0, 4, size):
        lm.edit_batch(edits[start : start + size])
    prompts = [edits[0].prompt, *OTHERS, edits[2].prompt]
    assert answered(lm, prompts) == [0, None, None, None, None, 2]
    found = logits(lm, prompts)
    with lm.unedited():
        base = logits(lm, prompts)
    assert torch.equal(found[1:5], base[1:5])
    assert not torch.equal(found[0], base[0])


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_forced_and_free_answers_are_routed_alike_whatever_the_batch(make, edits, model):
    lm = make(model, routing={"tau": 0.6})
    lm.edit_batch(edits)
    prompts = [e.prompt for e in edits] + OTHERS + [e.rephrases[0] for e in edits]
    slots = []
    route = lm.method.memory.route
    lm.method.memory.route = lambda *given: slots.append(route(*given)) or slots[-1]
    alone = [logits(lm, [p]) is not None and int(slots[-1].slot_B[0]) for p in prompts]
    for padding in ("left", "right"):
        logits_of = lm.lm.encode(prompts, ["Rome", "a big city and St. Louis"] * 6, padding=padding)
        lm.lm(logits_of)
        assert slots[-1].slot_B.tolist() == alone
    count = len(slots)
    texts = lm.generate(prompts, max_new_tokens=6, stop=())
    assert slots[-1].slot_B.tolist() == alone
    assert len(slots) == count + 1
    assert texts == [lm.generate(p, max_new_tokens=6, stop=()) for p in prompts]
    assert {-1, 0, 1, 2, 3} <= set(alone)


def test_the_bare_model_generates_the_same(make, edits):
    lm = make(routing={"tau": 0.9})
    lm.edit_batch(edits[:2])
    for prompt in (edits[0].prompt, OTHERS[1]):
        ids = torch.tensor(lm.lm.policy.ids([prompt]))
        whole = lm.lm.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)
        text = lm.lm.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        assert text.removeprefix(" ") == lm.generate(prompt, max_new_tokens=6, stop=())


def test_the_bare_model_routes_padded_rows_and_first_tokens(make, edits):
    lm = make(routing={"tau": 0.9})
    lm.edit_batch(edits[:2])
    prompts, model = [edits[0].prompt, OTHERS[1], OTHERS[3], edits[1].prompt], lm.lm.model
    rows = lm.lm.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    given = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    whole = model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=2)
    new = whole[:, given["input_ids"].shape[1] :]
    found = lm.lm.tokenizer.batch_decode(new, skip_special_tokens=True)
    assert [text.removeprefix(" ") for text in found] == lm.generate(prompts, 6, stop=())
    with torch.no_grad():
        found = model(input_ids=torch.zeros(4, 1, dtype=torch.long)).logits
        with lm.unedited():
            base = model(input_ids=torch.zeros(4, 1, dtype=torch.long)).logits
    assert torch.equal(found, base)


def test_thresholds_rise_with_the_keys_and_keep_the_rate(make, edits):
    lm = make(routing={"held_out": 200, "false_positives": 0.05})
    found = [lm.edit_batch([edit]) for edit in edits]
    taus = [numbers["tau"] for numbers in found]
    assert taus == sorted(taus)
    assert all(numbers["false_activations"] < 0.05 + 1e-6 for numbers in found)
    assert all(numbers["self_match"] == 1 for numbers in found)


def test_each_row_says_who_answered_and_rates_count_them(make, edits):
    lm = make(routing={"tau": 0.9})
    lm.edit_batch(edits)
    probes = [Probe(f"r{e.id}", e.id, "reliability", e.prompt, e.target) for e in edits]
    probes += [Probe("g0", 0, "generalization", edits[0].rephrases[0], "Oslo")]
    probes += [Probe("g1", 0, "generalization", edits[1].prompt, "Oslo")]
    probes += [Probe(f"l{i}", 0, "locality", text) for i, text in enumerate(OTHERS)]
    probes += [Probe("l9", 0, "locality", edits[3].prompt)]
    rows = lm.score(probes)
    assert [row["route"]["edit_id"] for row in rows] == [0, 1, 2, 3, None, 1, *[None] * 4, 3]
    assert [row["route"]["match"] for row in rows[:4]] == [1.0] * 4
    rates = routing_rates(rows)
    assert rates == {
        "self_match": 1.0, "self_wrong": 0.0, "self_rejected": 0.0,
        "right_route": 0.0, "wrong_route": 0.5, "rejected": 0.5, "false_activations": 0.2,
    }  # fmt: skip


def test_rephrases_are_keys_where_asked_and_are_told_of_before(make, edits):
    rephrases = [e.rephrases[0] for e in edits]
    bare, keyed = make(routing={"tau": 1.0}), make(routing={"tau": 1.0}, rephrase_keys=True)
    bare.edit_batch(edits)
    numbers = keyed.edit_batch(edits)
    assert answered(bare, rephrases) == [None] * 4
    assert answered(keyed, rephrases) == answered(keyed, [e.prompt for e in edits]) == [0, 1, 2, 3]
    assert (numbers["rephrases_rejected"], numbers["rephrases_wrong"]) == (1.0, 0.0)
    assert torch.equal(memory(bare), memory(keyed))


# edits as a collection


def test_an_edit_undone_leaves_the_base_and_the_other_edits_as_they_are(make, edits):
    lm = make(routing={"tau": 0.9}, rephrase_keys=True)
    for edit in edits:
        lm.edit_batch([edit])
    others = [e.prompt for e in edits if e.id != 1] + OTHERS
    gone = [edits[1].prompt, edits[1].rephrases[0]]
    before = logits(lm, others)
    lm.undo(1)
    assert lm.method.held == [0, 2, 3]
    assert torch.equal(logits(lm, others), before)
    with lm.unedited():
        base = logits(lm, gone)
    assert torch.equal(logits(lm, gone), base)
    for edit_id in (3, 0, 2):
        lm.undo(edit_id)
    prompts = [e.prompt for e in edits]
    with lm.unedited():
        base = logits(lm, prompts)
    assert torch.equal(logits(lm, prompts), base)


def test_the_newest_edit_leaves_no_trace(make, edits):
    lm = make()
    lm.edit_batch(edits[:2])
    before = {k: v.clone() for k, v in lm.method.memory.edit_state().items()}
    again = Edit(2, edits[0].prompt, "Paris")  # replaces the answer of edit 0
    lm.edit_batch([again])
    assert lm.method.held == [1, 2]
    lm.undo(2)
    after = lm.method.memory.edit_state()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert lm.method.held == [0, 1]


@pytest.mark.filterwarnings("ignore:edit")
def test_a_prompt_edited_again_has_one_answer(make, edits):
    lm = make(rephrase_keys=True, routing={"tau": 0.9})
    lm.edit_batch(edits)
    keys = len(lm.method.memory.keys)
    numbers = lm.edit_batch([Edit(4, edits[0].prompt + " ", "Paris")])
    assert numbers["loss_after"] < numbers["loss_before"] - 1
    assert len(lm.method.memory.keys) == keys
    assert lm.method.held == [1, 2, 3, 4]
    assert answered(lm, [edits[0].prompt, edits[0].rephrases[0]]) == [4, 4]
    assert [entry["edit_id"] for entry in lm.edits] == [1, 2, 3, 4]
    with pytest.raises(UndoError, match="edited again"):
        lm.undo(0)
    lm.undo(2)
    assert [entry["target"] for entry in lm.edits] == [edits[1].target, edits[3].target, "Paris"]


@pytest.mark.filterwarnings("ignore:edit")
def test_of_two_edits_of_a_prompt_in_a_batch_the_later_is_made(make, edits):
    lm = make()
    lm.edit_batch([edits[0], edits[1], Edit(2, edits[0].prompt, "Paris")])
    assert lm.method.held == [1, 2]
    gained = [entry["loss_before"] - entry["loss_after"] for entry in lm.ledger]
    assert gained[2] > 1
    assert gained[2] > gained[0] + 1


def test_a_failed_edit_leaves_nothing_behind(make, edits):
    lm = make()
    lm.edit_batch(edits[:1])
    before = {k: v.clone() for k, v in lm.method.memory.edit_state().items()}
    lm.method.lr = 3e38
    with pytest.raises(ValueError, match=r"lower|finite"):
        lm.edit_batch(edits[1:2])
    after = lm.method.memory.edit_state()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_an_edit_refused_for_its_rephrase_leaves_nothing_behind(make, edits):
    lm = make(rephrase_keys=True)
    lm.edit_batch(edits[:1])
    before = {k: v.clone() for k, v in lm.method.memory.edit_state().items()}
    with pytest.raises(ValueError, match="exceeds"):
        lm.edit_batch([replace(edits[1], rephrases=("town " * 200,))])
    after = lm.method.memory.edit_state()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    lm.undo(0)  # is still the newest
    assert not memory(lm).any()


def test_an_edit_interrupted_while_it_is_written_is_taken_back(make, edits, monkeypatch):
    lm = make()
    lm.edit_batch(edits[:1])
    before = {k: v.clone() for k, v in lm.method.memory.edit_state().items()}

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(lm.method, "_self_match", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lm.edit_batch(edits[1:2])
    after = lm.method.memory.edit_state()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_repeats_are_rows_of_one_mask_and_one_key(make, edits):
    once, twice = make(steps=1), make(steps=1, repeats=1)
    for lm in (once, twice):
        lm.edit_batch(edits[:1])
        assert len(lm.method.memory.keys) == 1
    assert torch.allclose(memory(twice), 2 * memory(once), atol=1e-6)
    twice.undo(0)  # the newest, made alone
    assert not memory(twice).any()


def test_an_edits_own_prompt_is_not_answered_by_anothers_wording(make, edits):
    lm = make(paraphrases=1)
    first = replace(edits[0], rephrases=(edits[1].prompt,))
    lm.edit_batch([first, edits[1]])
    assert answered(lm, [edits[0].prompt, edits[1].prompt]) == [0, 1]


def test_export_is_refused_by_the_layers_name(make, edits, tmp_path):
    lm = make()
    lm.edit_batch(edits[:1])
    with pytest.raises(ValueError, match=r"ResidualMemory at .*down_proj.*load_edited"):
        lm.export(tmp_path / "out")


FRESH = """
import sys, torch, editkit
lm = editkit.load_edited(sys.argv[1])
with torch.no_grad():
    torch.save(lm.lm(lm.lm.encode(sys.argv[3:])), sys.argv[2])
"""


def test_a_fresh_process_gives_the_same_logits_and_goes_on_editing(make, edits, tmp_path):
    lm = make()
    lm.edit_batch(edits[:3])
    lm.save(tmp_path / "run")
    prompts = [e.prompt for e in edits] + OTHERS
    command = [sys.executable, "-c", FRESH, str(tmp_path / "run"), str(tmp_path / "out"), *prompts]
    subprocess.run(command, check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "out"), logits(lm, prompts))
    again = editkit.load_edited(tmp_path / "run")
    for other in (lm, again):
        other.edit_batch(edits[3:])
    assert torch.equal(memory(lm), memory(again))
    assert torch.equal(lm.method.memory.tau, again.method.memory.tau)


@pytest.mark.parametrize(("k", "columns"), [(0.25, 16), (20, 20), (1, 1)])
def test_k_is_a_share_or_a_number_of_columns(make, k, columns):
    assert make(k=k).method.memory.k == columns


@pytest.mark.parametrize("wrong", [{"k": 1.5}, {"k": 0}, {"steps": 0}, {"shield": -1.0}])
def test_wrong_constants_are_told(make, wrong):
    with pytest.raises(ValueError, match=r"k is .* steps is"):
        make(**wrong)


# what the paper lacks: earlier edits are shielded


@pytest.mark.filterwarnings("ignore:edit")
def test_a_shielded_prompt_is_edited_again_as_if_it_were_not(make, edits, tmp_path):
    lm = make(shield=100.0)
    lm.edit_batch(edits)
    state = {k: v.clone() for k, v in lm.method.memory.edit_state().items()}
    again = [Edit(4, edits[0].prompt, "Paris")]
    lm.save(tmp_path / "run")
    loaded = editkit.load_edited(tmp_path / "run")
    numbers = [each.edit_batch(again) for each in (lm, loaded)]
    assert numbers[0]["loss_after"] < numbers[0]["loss_before"] - 1
    assert torch.equal(memory(lm), memory(loaded))
    loaded.method.shield = 0.0
    lm.undo(4)
    assert all(torch.equal(lm.method.memory.edit_state()[k], v) for k, v in state.items())
    lm.method.shield = 0.0
    lm.edit_batch([Edit(5, edits[0].prompt, "Paris")])
    assert torch.equal(memory(lm), memory(loaded))


# ablations, on a model that knows something


@pytest.fixture(scope="module")
def world():
    data = FactWorld(split="dev", limit=12, seed=3)
    data.setup()
    return data


@pytest.mark.parametrize(
    ("routing", "rel", "gen", "loc"),
    [
        ({}, 1.0, 0.9, 1.0),
        ({"columns": "drawn"}, 1.0, 0.9, 1.0),
        ({"columns": "same"}, 1.0, 0.9, 1.0),
        ({"mask": "hash", "tau": 0.6}, 1.0, 0.0, 1.0),
        ({"mask": "random", "tau": 0.6}, 0.0, 0.0, 1.0),
        ({"own_mask": True}, 1.0, 0.9, None),
    ],
)
def test_ablations_lose_what_the_paper_says_they_lose(world, routing, rel, gen, loc):
    method = MEMOIR(
        lm=LMSpec(),
        evaluation=EvalProtocol(scorers=("sequence_accuracy",)),
        prefixes=[],
        routing=Routing(**{"fingerprint": "last", "held_out": 200, **routing}),
    )
    method.apply_edits(world.edits)
    rows = method.score([p for p in world.probes if p.kind != "portability"])

    def share(kind):
        hits = [r["scores"]["sequence_accuracy"] for r in rows if r["kind"] == kind]
        return sum(hits) / len(hits)

    assert abs(share("reliability") - rel) < 0.1
    assert abs(share("generalization") - gen) <= 0.11
    rates = routing_rates(rows)
    if loc is None:
        assert rates["false_activations"] == 1.0
    else:
        assert share("locality") > loc - 0.1
        assert (rates["self_match"] == 1) == (rel == 1)


def test_later_edits_move_shielded_ones_less_and_are_taken_as_well(world):
    moved = []
    for shield in (0.0, 10.0):
        method = MEMOIR(
            lm=LMSpec(),
            evaluation=EvalProtocol(),
            prefixes=[],
            shield=shield,
            routing=Routing(fingerprint="last", background=20, held_out=0),
        )
        lm = EditedLM(method)
        lm.edit_batch(world.edits[:6])
        before = method.edit_losses(world.edits[:6])
        lm.edit_batch(world.edits[6:])
        assert method.edit_losses(world.edits[6:]).max() < 0.1
        moved.append(float((method.edit_losses(world.edits[:6]) - before).abs().sum()))
    assert moved[1] < 0.5 * moved[0]
