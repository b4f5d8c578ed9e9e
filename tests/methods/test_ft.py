"""FT: what its two orders claim, and that skipping frozen blocks changes nothing."""

import pytest
import torch

from editkit.api import load
from editkit.edits import Edit
from editkit.lm.rows import TargetRows

WORDS = ["Oslo", "Lima", "Bern", "Rome", "Paris", "big", "small", "town"]


@pytest.fixture
def stream():
    subjects = ["Alba", "Bera", "Cora", "Dora", "Elda", "Rome", "Paris", "Oslo"]
    return [
        Edit(i, f"the capital of {s} is", w)
        for i, (s, w) in enumerate(zip(subjects, WORDS, strict=True))
    ]


def test_writes_one_matrix_by_adam_on_the_target_loss(tiny, stream):
    """Equal to plain torch: Adam on the weight of an untouched transformers model."""
    from transformers import AutoModelForCausalLM

    folder = tiny("llama")
    lm = load(folder, "ft", layer=2, steps=5, lr=1e-2, stop_below=0.0)
    lm.edit_batch(stream[:2])
    base = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()
    weight = base.model.layers[2].mlp.down_proj.weight
    before = weight.clone()
    weight.requires_grad_()
    adam = torch.optim.Adam([weight], lr=1e-2)
    for _ in range(5):
        losses = []
        for edit in stream[:2]:
            tokens = lm.lm.encode([edit.prompt], [edit.target])
            logits = base(tokens.ids_BT).logits[0].log_softmax(-1)
            places = tokens.target_BT[0].nonzero()[:, 0].tolist()
            nll = [-logits[p - 1, tokens.ids_BT[0, p]] for p in places]
            losses.append(torch.stack(nll).mean())
        adam.zero_grad()
        torch.stack(losses).mean().backward()
        adam.step()
    (site,) = lm.lm.layers.values()
    assert torch.allclose(site.delta, weight.detach() - before, atol=2e-4)


def test_depth_first_forgets_what_breadth_first_keeps(tiny, stream):
    options = {"layer": 2, "steps": 80, "lr": 1e-2}
    losses = {}
    for order in ("depth_first", "breadth_first"):
        lm = load(tiny("llama"), "ft", order=order, **options)
        for edit in stream:
            lm.edit_batch([edit])
        losses[order] = lm.method.edit_losses(stream[:4]).mean().item()
    assert losses["breadth_first"] < 0.1
    assert losses["depth_first"] > 10 * losses["breadth_first"]


def test_breadth_first_minibatches_follow_the_seed(tiny, stream):
    def run(seed):
        lm = load(
            tiny("llama"), "ft", order="breadth_first", minibatch=3, steps=4, lr=1e-2, seed=seed
        )
        lm.edit_batch(stream)
        (site,) = lm.lm.layers.values()
        return site.delta

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_frozen_rows_lose_nothing(tiny, stream):
    lm = load(tiny("gpt2"), "ft", layer=2).lm
    prompts, targets = [e.prompt for e in stream], [e.target for e in stream]
    cached, whole = TargetRows(lm, 2), TargetRows(lm, 0)
    for rows in (cached, whole):
        rows.add(prompts[:3], targets[:3])
        rows.add(prompts[3:], targets[3:])
    assert len(cached) == len(stream)
    assert torch.allclose(cached.losses(), whole.losses(), atol=1e-5)
    assert torch.allclose(cached.losses([5, 0]), whole.losses()[[5, 0]], atol=1e-5)


def test_appended_eos_ends_the_answer(tiny, stream):
    lm = load(tiny("llama"), "ft", layer=2, steps=60, lr=1e-2, append_eos=True)
    lm.edit_batch(stream[:1])
    assert lm.generate(stream[0].prompt, 10) == stream[0].target
