"""GRACE: values as a plain loop finds them, batches as single edits, undoing, and what decodes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from editkit.adapters.codebook import Codebook
from editkit.api import EditedLM
from editkit.edits import Edit
from editkit.lm.rows import SiteRows
from editkit.lm.spec import LMSpec
from editkit.methods.base import UndoError
from editkit.methods.grace import GRACE
from editkit.metrics.protocol import EvalProtocol

OTHERS = ["he works for Rome", "Question : where lives Elda ? Answer :", "a small town", "she"]
MODES = ["replace_last", "replace_prompt", "replace_all"]


@pytest.fixture
def make(tiny):
    def build(model="llama", **kwargs):
        settings = {"layer": 1, "eps": 1e-3, "steps": 15, "lr": 0.3, "stop_below": 0.05, **kwargs}
        method = GRACE(lm=LMSpec(id=tiny(model)), evaluation=EvalProtocol(batch_size=3), **settings)
        lm = EditedLM(method)
        method.start()
        return lm

    return build


@torch.no_grad()
def logits(lm, prompts):
    return lm.lm(lm.lm.encode(prompts))


@torch.no_grad()
def gap(lm, one, other):
    """Return the distance of two prompts' keys."""
    found = [lm.method.memory.query(*pair) for pair in lm.method.inputs([one, other])]
    one_F, other_F = torch.cat(found)
    return float((one_F - other_F).norm())


def answered(lm, prompts):
    return [who.edit_id for who in lm.method.routes(prompts)]


def tables(lm):
    return {name: table.clone() for name, table in lm.method.memory.edit_state().items()}


def alike(one, other, rtol=1e-4):
    if one.is_floating_point():
        return one.shape == other.shape and bool((one - other).norm() <= rtol * other.norm())
    return torch.equal(one, other)


# values


def plain_loop(lm, edit, start_D, steps, lr, stop_below):
    """Adam on one value by whole passes of the bare model, the value put in by a hook."""
    method, model = lm.method, lm.lm.model
    site = method.memory.base_layer
    method.memory.enabled = False
    tokens = lm.lm.encode([edit.prompt], [edit.target])
    end = int(tokens.prompt_BT.sum())
    span = {"replace_last": slice(end - 1, end), "replace_prompt": slice(0, end - 1)}
    span = span.get(method.replacement, slice(None))
    leaf = start_D.clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=lr)

    def put(module, args, out):
        out = out.clone()
        out[0, span] = leaf
        return out

    for _ in range(steps):
        handle = site.register_forward_hook(put)
        found = model(input_ids=tokens.ids_BT, attention_mask=tokens.mask_BT.long()).logits
        handle.remove()
        places = tokens.target_BT[0].nonzero()[:, 0]
        loss = cross_entropy(found[0, places - 1], tokens.ids_BT[0, places])
        if float(loss.detach()) <= stop_below:
            break
        adam.zero_grad()
        loss.backward(inputs=[leaf])
        adam.step()
    method.memory.enabled = True
    return leaf.detach()


@pytest.mark.parametrize("replacement", MODES)
@pytest.mark.parametrize(("model", "role"), [("llama", "mlp.down"), ("gpt2", "mlp.up")])
def test_values_are_those_of_a_plain_loop(make, edits, model, role, replacement):
    inner = {"steps": 10, "lr": 0.3, "stop_below": 0.05}
    lm = make(model, role=role, replacement=replacement, val_init="warm", **inner)
    before = logits(lm, OTHERS)
    pairs = [pair for e in edits for pair in lm.method.inputs([e.prompt])]
    with torch.no_grad():
        starts = [lm.method.memory.base_layer(lm.method.memory.query(*pair))[0] for pair in pairs]
    wanted = [plain_loop(lm, e, s, **inner) for e, s in zip(edits, starts, strict=True)]
    numbers = lm.edit_batch(edits)
    assert numbers["keys"] == 4
    values_KD = lm.method.memory.values.detach()
    for value_D, wanted_D, start_D in zip(values_KD, wanted, starts, strict=True):
        assert not torch.allclose(start_D, wanted_D, atol=0.1)
        assert alike(value_D, wanted_D, 1e-3)
    assert torch.equal(logits(lm, OTHERS), before)  # bit for bit where no key is near
    assert answered(lm, [e.prompt for e in edits]) == [0, 1, 2, 3]
    assert answered(lm, OTHERS) == [None] * 4


@pytest.mark.parametrize("val_init", ["cold", "warm"])
def test_a_batch_comes_out_as_one_edit_after_another(make, val_init):
    prompts = [f"the capital of {name} is" for name in ("Alba", "Bera", "Cora", "Dora", "Elda")]
    near = gap(make(), prompts[0], prompts[1])
    stream = [
        *((prompts[0], "Oslo"), (prompts[1], "Oslo"), (prompts[2], "Lima"), (prompts[1], "Oslo")),
        *(
            (prompts[3], "St. Louis"),
            (prompts[0], "Bern"),
            (OTHERS[0], "Lima"),
            (prompts[4], "Rome"),
        ),
    ]
    batch = [Edit(i, prompt, target) for i, (prompt, target) in enumerate(stream)]
    together, apart = (make(eps=0.6 * near, val_init=val_init, steps=6) for _ in range(2))
    together.edit_batch(batch)
    for edit in batch:
        apart.edit_batch([edit])
    assert 0 < len(apart.method.memory.values) < len(batch)  # keys were shared or taken away
    assert bool(apart.method.memory.is_shaped_K.any())
    one, other = tables(together), tables(apart)
    assert one.keys() == other.keys()
    assert all(alike(one[name], other[name]) for name in one)


def test_edits_of_one_answer_share_a_key_and_its_value_is_trained_for_each(make):
    first, second = "the capital of Alba is", "the capital of Bera is"
    lm = make()
    lm.method.eps = gap(lm, first, second)
    lm.edit_batch([Edit(0, first, "Oslo")])
    (start_D,) = lm.method.memory.values.detach().clone()
    lm.edit_batch([Edit(1, second, "Oslo")])
    assert answered(lm, [first, second]) == [0, 0]
    assert float(lm.method.memory.radius_K) == pytest.approx(lm.method.eps, rel=1e-4)
    (value_D,) = lm.method.memory.values.detach()
    wanted_D = plain_loop(lm, Edit(1, second, "Oslo"), start_D, 15, 0.3, 0.05)
    assert alike(value_D, wanted_D, 1e-3)


def test_an_edit_is_trained_behind_its_prefixes_too(make, edits):
    lm = make(prefixes=["he lives in", "big town ."], steps=60)
    lm.edit_batch(edits[:2])
    longer = [Edit(9, f"he lives in {edits[0].prompt}", edits[0].target)]
    with torch.no_grad():
        before = lm.method.edit_losses(longer)
        lm.method.memory.key_KF.copy_(
            torch.cat(
                [lm.method.memory.query(*p) for p in lm.method.inputs([longer[0].prompt] * 2)]
            )
        )
        assert lm.method.edit_losses(longer) < 0.5 * before


def test_the_released_labels_agree_by_the_length_of_a_prompt(make):
    ours, released = make(eps=1e9), make(eps=1e9, compat=True)
    same_length = [Edit(0, "Alba is", "Rome"), Edit(1, "Bera lives in", "Rome")]
    for lm in (ours, released):
        for edit in same_length:
            lm.edit_batch([edit])
    assert len(ours.method.memory.values) == 1
    assert len(released.method.memory.values) == 2


# decoding


@pytest.mark.parametrize("replacement", MODES)
def test_what_decodes_keeps_to_the_route_of_its_prompt(make, edits, replacement):
    lm = make(replacement=replacement, steps=40)
    lm.edit_batch(edits)
    prompts = [e.prompt for e in edits] + OTHERS
    batched = lm.lm.generate(prompts, max_new_tokens=6)
    assert batched == [lm.lm.generate([p], max_new_tokens=6)[0] for p in prompts]
    assert batched == [without_cache(lm, p, 6) for p in prompts]
    with lm.unedited():
        plain = lm.lm.generate(prompts, max_new_tokens=6)
    assert batched[4:] == plain[4:]
    assert batched[:4] != plain[:4]


@torch.no_grad()
def without_cache(lm, prompt, budget):
    ids = lm.lm.encode([prompt]).ids_BT[0].tolist()
    start = len(ids)
    for _ in range(budget):
        ids.append(int(lm.lm(lm.lm.policy.pad([ids[:start]], [ids[start:]], [-1]))[0, -1].argmax()))
        if ids[-1] in lm.lm.eos_ids:
            ids.pop()
            break
    return lm.lm.tokenizer.decode(ids[start:], skip_special_tokens=True).removeprefix(" ")


@pytest.mark.parametrize(
    ("replacement", "taken"),
    [("replace_last", [2]), ("replace_prompt", [0, 1]), ("replace_all", [0, 1, 2, 3, 4])],
)
def test_the_value_stands_at_the_published_tokens(replacement, taken):
    layer = Codebook(torch.nn.Linear(4, 3), replacement)
    layer.key_KF = torch.ones(1, 4)
    layer.radius_K, layer.edit_K = torch.tensor([0.5]), torch.tensor([0])
    layer.values.data = torch.tensor([[7.0, 8.0, 9.0]])
    layer.is_written = True
    x_BTF = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    x_BTF[0, 2] = 1.2  # at a distance of 0.4
    layer.scope.prompt_BT = torch.tensor([[True, True, True, False, False]]).repeat(2, 1)
    with torch.no_grad():
        out_BTD, plain_BTD = layer(x_BTF), layer.base_layer(x_BTF)
    assert torch.equal(out_BTD[1], plain_BTD[1])
    for token in range(5):
        wanted_D = layer.values[0] if token in taken else plain_BTD[0, token]
        assert torch.equal(out_BTD[0, token], wanted_D)


# undoing


def test_an_older_edit_that_met_no_other_is_undone_as_if_never_made(make, edits):
    lm, without = make(val_init="warm"), make(val_init="warm")
    for edit in edits:
        lm.edit_batch([edit])
        if edit.id != 1:
            without.edit_batch([edit])
    lm.undo(1)
    one, other = tables(lm), tables(without)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert answered(lm, [e.prompt for e in edits]) == [0, None, 2, 3]
    with pytest.raises(UndoError, match="undone already"):
        lm.undo(1)


def test_edits_that_shaped_one_another_are_undone_newest_first_or_refused(make, edits):
    lm = make(eps=1e9)  # all meet
    kept = []
    for edit in edits[:3]:
        kept.append(tables(lm))
        lm.edit_batch([edit])
    with pytest.raises(UndoError, match="cannot undo edit 0: its key and those of other edits"):
        lm.undo(0)
    lm.undo(2)
    assert all(
        torch.equal(a, b) for a, b in zip(tables(lm).values(), kept[2].values(), strict=True)
    )
    with pytest.raises(UndoError, match="cannot undo edit 1: "):  # what it was before is not known
        lm.undo(1)


def test_an_edit_without_a_key_says_so(make):
    lm = make(eps=1e9)
    for i, name in enumerate(("Alba", "Bera", "Cora")):
        lm.edit_batch([Edit(i, f"the capital of {name} is", "Oslo")])
    with pytest.raises(UndoError, match="cannot undo edit 1: it has no key: another edit's covers"):
        lm.undo(1)


def test_a_prompt_edited_again_is_as_if_only_the_later_edit_had_been_made(make, edits):
    lm, fresh = make(val_init="warm"), make(val_init="warm")
    again = Edit(7, edits[1].prompt, "Rome")
    lm.edit_batch(edits)
    lm.edit_batch([again])
    fresh.edit_batch([again])
    assert answered(lm, [e.prompt for e in edits]) == [0, 7, 2, 3]
    assert [entry["edit_id"] for entry in lm.edits] == [0, 2, 3, 7]
    assert len(lm.method.memory.values) == 4
    assert alike(lm.method.memory.values.detach()[3], fresh.method.memory.values.detach()[0])
    assert lm.ledger[4]["loss_after"] == pytest.approx(fresh.ledger[0]["loss_after"], rel=1e-4)
    lm.undo(7)
    assert answered(lm, [edits[1].prompt]) == [1]
    assert [entry["edit_id"] for entry in lm.edits] == [0, 1, 2, 3]


# mistakes


def test_an_edit_that_diverges_leaves_nothing_behind(make, edits, monkeypatch):
    lm = make()
    lm.edit_batch(edits[:1])
    before, plain, calls = tables(lm), SiteRows.losses, []

    def losses(self, added_BTD):
        calls.append(1)
        return plain(self, added_BTD) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(SiteRows, "losses", losses)
    with pytest.raises(ValueError, match=r"the loss of edit 1 became nan at step 2 .* lower the"):
        lm.edit_batch(edits[1:3])
    assert all(torch.equal(table, before[name]) for name, table in tables(lm).items())
    assert len(lm.ledger) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"eps": 0.0}, "eps is 0.0"),
        ({"steps": 0}, "steps 0"),
        ({"val_init": "lukewarm"}, "val_init is 'lukewarm'"),
        ({"replacement": "last"}, "replacement is 'last'"),
        (
            {"replacement": "replace_prompt", "layer": 3},
            "replace_prompt changes no answer in block 3",
        ),
        ({"role": "mlp.middle"}, "mlp.middle"),
    ],
)
def test_wrong_options_are_named(make, wrong, said):
    with pytest.raises(ValueError, match=said):
        make(**wrong)
