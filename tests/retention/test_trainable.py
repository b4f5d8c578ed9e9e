from __future__ import annotations

import pytest
import torch

from editkit.api import load
from editkit.retention.trainable import (
    Adapter,
    Freeze,
    changes,
    choose_trainable,
    edited_blocks,
    frozen_blocks,
    frozen_matrices,
)

SMALL = Adapter(r=2, alpha=4.0)


def edited_model(tiny, architecture, edits, method="ft", **options):
    lm = load(tiny(architecture), method=method, steps=3, lr=0.05, **options)
    lm.edit_batch(edits)
    return lm


def logits(lm):
    with torch.no_grad():
        return lm.lm.forward(lm.lm.encode(["the capital of Alba is", "he lives in Rome and"]))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["ft", "lora"])
@pytest.mark.parametrize("kind", ["full", "lora", "dora"])
def test_nothing_moves_before_the_first_step(tiny, edits, architecture, method, kind):
    options = {"roles": ("mlp.down",)} if method == "lora" else {}
    lm = edited_model(tiny, architecture, edits, method, **options)
    before = logits(lm)
    with lm.unedited():
        base = logits(lm)
    choose_trainable(lm.lm, kind, "backbone", Freeze(), SMALL, seed=0)
    close = {"rtol": 1e-4, "atol": 1e-4} if kind == "dora" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(lm), before, **close)  # DoRA divides by a norm it has found
    with lm.unedited():
        torch.testing.assert_close(logits(lm), base, **close)


@pytest.mark.parametrize("method", ["ft", "lora"])
def test_an_adapter_on_top_trains_beside_the_edit_and_shows_in_the_output(tiny, edits, method):
    options = {"roles": ("mlp.down",)} if method == "lora" else {}
    lm = edited_model(tiny, "llama", edits, method, **options)
    before = logits(lm)
    trained = choose_trainable(lm.lm, "lora", "backbone", Freeze(), SMALL, seed=0)
    edits_before = {k: v.clone() for p in lm.lm.layers.values() for k, v in p.edit_state().items()}
    out = lm.lm.forward(lm.lm.encode(["the capital of Alba is"]))
    out.square().mean().backward()
    moved = [n for n, p in trained.items() if p.grad is not None and bool(p.grad.any())]
    assert any("down_proj" in name for name in moved)  # also at sites that carry an edit
    assert all(".finetune." in name for name in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    assert not torch.equal(logits(lm), before)
    found = changes(lm.lm, {n: p.detach() for n, p in trained.items()})
    assert any("down_proj" in name for name in found)
    for p in lm.lm.layers.values():
        assert all(
            torch.equal(v, edits_before[k]) for k, v in p.edit_state().items() if k == "delta"
        )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_change_of_an_adapter_is_that_of_the_weight_it_acts_as(tiny, edits, architecture, kind):
    lm = edited_model(tiny, architecture, edits).lm
    trained = choose_trainable(lm, kind, "backbone", Freeze(), SMALL, seed=0)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    found = changes(lm, {})
    assert found
    for name, change in found.items():
        module = lm.model.get_submodule(name.removesuffix(".base_layer.weight"))
        base = module.base_layer.weight.detach()
        is_transposed = hasattr(module.base_layer, "nf")
        with torch.no_grad():
            size = base.shape[0] if is_transposed else base.shape[1]
            acts_FD = module(torch.eye(size)) - module(torch.zeros(1, size))
        acts = acts_FD if is_transposed else acts_FD.T
        torch.testing.assert_close(change, acts - base, rtol=1e-4, atol=1e-5)


def test_policies_freeze_the_blocks_they_name(tiny, edits):
    lm = edited_model(tiny, "llama", edits, layer=1).lm
    assert edited_blocks(lm) == [1]
    assert frozen_blocks(lm, Freeze("blocks")) == [1]
    assert frozen_blocks(lm, Freeze("prefix")) == [0, 1]
    assert frozen_blocks(lm, Freeze("others")) == [0, 2, 3]
    drawn = [frozen_blocks(lm, Freeze("random", seed=s)) for s in range(20)]
    assert all(len(one) == 1 and one != [1] for one in drawn)
    assert len({tuple(one) for one in drawn}) == 3


def test_random_freezing_is_the_control_of_a_policy(tiny, edits):
    lm = edited_model(tiny, "llama", edits, layer=1).lm
    size = {n: p.numel() for n, p in lm.model.named_parameters()}
    draws = set()
    for seed in range(20):
        (site,) = frozen_matrices(lm, Freeze("random", seed=seed, like="modules"))
        assert site.path not in lm.layers
        assert size[f"{site.path}.weight"] == size["model.layers.1.mlp.down_proj.base_layer.weight"]
        draws.add(site.path)
    assert len(draws) > 5
    for seed in range(5):
        assert frozen_blocks(lm, Freeze("random", seed=seed, like="prefix")) == [2, 3]
    control = Freeze("random", seed=3, like="modules")
    trained = choose_trainable(lm, "full", "backbone", control, SMALL, seed=0)
    assert "model.layers.1.mlp.down_proj.base_layer.weight" in trained
    assert f"{frozen_matrices(lm, control)[0].path}.weight" not in trained


def test_a_control_that_cannot_be_drawn_says_so(tiny, edits):
    lm = edited_model(tiny, "llama", edits, layer=3).lm
    with pytest.raises(ValueError, match=r"freeze\.like is 'prefix'.* all 4 blocks"):
        choose_trainable(lm, "full", "backbone", Freeze("random", like="prefix"), SMALL, seed=0)


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        (Freeze("modules"), ["model.layers.1.mlp.down_proj.base_layer.weight"]),
        (Freeze("blocks"), ["model.layers.1."]),
        (Freeze("prefix"), ["model.layers.0.", "model.layers.1."]),
        (Freeze("prefix", embeddings=True), ["model.layers.0.", "model.layers.1.", "embed_tokens"]),
        (Freeze("others"), ["model.layers.0.", "model.layers.2.", "model.layers.3."]),
    ],
)
def test_what_is_frozen_takes_no_gradient_and_all_else_does(tiny, edits, freeze, frozen):
    lm = edited_model(tiny, "llama", edits, layer=1).lm
    trained = choose_trainable(lm, "full", "backbone", freeze, SMALL, seed=0)
    for name, parameter in lm.model.named_parameters():
        is_frozen = any(part in name for part in frozen) or name.endswith(".delta")
        assert parameter.requires_grad is not is_frozen, name
        assert (name in trained) is not is_frozen
    # an adapter is put on nothing that is frozen
    lm = edited_model(tiny, "llama", edits, layer=1).lm
    trained = choose_trainable(lm, "lora", "backbone", freeze, SMALL, seed=0)
    assert trained
    assert not [n for n in trained if any(n.startswith(f) for f in frozen if f.endswith("."))]


@pytest.mark.parametrize("method", ["ft", "memoir"])
def test_the_memory_trains_where_that_is_asked_for(tiny, edits, method):
    options = {"k": 8, "routing": {"background": 0, "held_out": 0}} if method == "memoir" else {}
    if method == "memoir":
        from editkit.adapters.keys import Routing

        options["routing"] = Routing(background=0, held_out=0)
        options["prefixes"] = []
    lm = edited_model(tiny, "llama", edits, method, **options).lm
    names = {n for layer in lm.layers.values() for n in layer.edit_parameters()}
    for scope, is_trained in (("backbone", False), ("backbone+memory", True)):
        trained = choose_trainable(lm, "full", scope, Freeze(), SMALL, seed=0)
        lm.zero_grad()
        lm.forward(lm.encode([edits[0].prompt])).float().square().mean().backward()
        own = [p for n, p in lm.model.named_parameters() if n.rpartition(".")[2] in names]
        assert own
        assert all((p.grad is not None and bool(p.grad.any())) is is_trained for p in own)
        assert sum(n.rpartition(".")[2] in names for n in trained) == len(own) * is_trained


def test_an_empty_choice_is_refused(tiny, edits):
    lm = edited_model(tiny, "llama", edits, layer=3).lm
    with pytest.raises(ValueError, match="leaves nothing to train"):
        choose_trainable(lm, "lora", "backbone", Freeze("prefix"), SMALL, seed=0)
