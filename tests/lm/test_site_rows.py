"""Rows of one site: losses and gradients as the whole model gives them, at a part of its work."""

import pytest
import torch
from torch import nn

from editkit.adapters.delta import DeltaLayer
from editkit.functional.losses import target_nll
from editkit.lm.editable import EditableLM
from editkit.lm.rows import SiteRows, adds_up
from editkit.lm.spec import LMSpec
from editkit.lm.trace import change

PROMPTS = ["the capital of Alba is", "Question : where lives Elda ? Answer :", "a small town"]
TARGETS = ["Rome", "St. Louis and Bern", "big city"]


@pytest.fixture(params=["llama", "gpt2", "gpt_neox", "gptj"])
def lm(request, tiny):
    return EditableLM.load(LMSpec(id=tiny(request.param)))


@pytest.fixture
def normed(tiny):
    """A Llama with a norm behind the down-projection of blocks 1 and 3."""
    lm = EditableLM.load(LMSpec(id=tiny("llama")))
    for layer in (1, 3):
        mlp = lm.blocks[layer].mlp
        mlp.register_forward_hook(lambda m, args, out: nn.functional.rms_norm(out, (32,)))
    return lm


def whole(lm, site, tokens, added_BTD):
    """Return the losses by a pass of the whole model."""
    with change(lm.model, {site.path: lambda y: y + added_BTD}):
        logits_NV = lm.forward(tokens)[tokens.predicts_BT].float()
    ids_N, rows_N = tokens.target_ids_N, tokens.target_rows_N
    return target_nll(logits_NV, ids_N, rows_N, len(tokens.ids_BT))


def check(lm, layer, added_up):
    site = lm.site(layer)
    assert adds_up(lm, site) == added_up
    rows = SiteRows(lm, site, added_up, PROMPTS, TARGETS)
    generator = torch.Generator().manual_seed(0)
    shape = (*rows.tokens.ids_BT.shape, site.out_features)
    added_BTD = (0.3 * torch.randn(shape, generator=generator)).requires_grad_()
    found_B, wanted_B = rows.losses(added_BTD), whole(lm, site, rows.tokens, added_BTD)
    assert torch.allclose(found_B, wanted_B, rtol=1e-4, atol=1e-5)
    found, wanted = (torch.autograd.grad(loss.sum(), added_BTD)[0] for loss in (found_B, wanted_B))
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_losses_and_gradients_are_those_of_the_whole_model(lm, layer):
    check(lm, layer, added_up=True)


@pytest.mark.parametrize("layer", [1, 3])
def test_a_block_that_does_not_add_up_is_run_again(normed, layer):
    check(normed, layer, added_up=False)


def test_only_the_blocks_above_the_site_run_again(lm):
    rows = SiteRows(lm, lm.site(2), True, PROMPTS, TARGETS)
    nothing_BTD = torch.zeros(*rows.tokens.ids_BT.shape, 32)
    rows.losses(nothing_BTD)
    calls = []
    for layer, block in enumerate(lm.blocks):
        norm = next(m for m in block.modules() if "Norm" in type(m).__name__)
        norm.register_forward_hook(lambda *args, layer=layer: calls.append(layer))
    rows.losses(nothing_BTD)
    assert calls == [3]


def test_present_edits_are_out_of_the_way(lm):
    site = lm.site(2)
    bare = SiteRows(lm, site, True, PROMPTS, TARGETS)
    layer = lm.attach(site.path, DeltaLayer)
    layer.add(torch.randn(layer.delta.shape))
    edited = SiteRows(lm, site, True, PROMPTS, TARGETS)
    assert torch.equal(edited.inputs_BTF, bare.inputs_BTF)
    nothing_BTD = torch.zeros(*bare.tokens.ids_BT.shape, 32)
    assert torch.equal(edited.losses(nothing_BTD), bare.losses(nothing_BTD))


def test_hits_are_the_shares_of_likeliest_target_tokens(lm):
    site = lm.site(2)
    rows = SiteRows(lm, site, True, PROMPTS, TARGETS)
    generator = torch.Generator().manual_seed(3)
    with change(lm.model, {}):
        likeliest = lm.forward(rows.tokens).argmax(-1)
    rows = SiteRows(lm, site, True, PROMPTS, TARGETS)
    tokens = rows.tokens
    spoilt = torch.rand(tokens.ids_BT.shape, generator=generator) < 0.5
    right = torch.zeros_like(tokens.ids_BT)
    right[:, 1:] = likeliest[:, :-1]
    # targets that are partly what the model says; ids are read, never run, for the last block
    wanted = tokens.target_BT & ~spoilt
    ids_BT = torch.where(wanted, right, torch.where(tokens.target_BT, 5, tokens.ids_BT))
    rows.own = type(tokens)(ids_BT, *(getattr(tokens, n) for n in tokens.__slots__[1:]))
    nothing_BTD = torch.zeros(*tokens.ids_BT.shape, site.out_features)
    hit_BT = (ids_BT == right) & tokens.target_BT
    assert torch.allclose(rows.hits(nothing_BTD), hit_BT.sum(1) / tokens.target_BT.sum(1))
    assert 0 < hit_BT.sum() < tokens.target_BT.sum()


def test_stored_rows_give_what_fresh_ones_give(lm):
    site = lm.site(2)
    fresh = SiteRows(lm, site, True, PROMPTS, TARGETS)
    states = fresh.inputs_BTF, fresh.hidden_BTH
    stored = SiteRows.stored(lm, site, True, fresh.tokens, *states)
    added_BTD = torch.randn(*fresh.tokens.ids_BT.shape, site.out_features)
    assert torch.equal(stored.losses(added_BTD), fresh.losses(added_BTD))
    assert torch.equal(stored.hits(added_BTD), fresh.hits(added_BTD))
