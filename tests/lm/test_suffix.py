"""Stored states and prefixes against whole passes, on every architecture."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from editkit.edits import Edit
from editkit.lm.editable import EditableLM
from editkit.lm.passes import split_by_length
from editkit.lm.row_states import RowStates, Shortcuts
from editkit.lm.shortcuts import PLAIN, find_shortcuts
from editkit.lm.sites import find_blocks
from editkit.lm.spec import LMSpec
from editkit.lm.subject_rows import encode_edits, shared_leads
from editkit.lm.suffix import SuffixRows

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "gptj", "gpt_neox"]
PREFIXES = ["the town is. ", "a big city he works for Rome. "]
EDITS = [
    Edit(0, "the capital of Alba is", "Oslo", "Alba"),
    Edit(1, "Bera", "St. Louis", "Bera"),
    Edit(2, "where is Cora born ?", "Lima", "Cora"),
]


def block_path(lm: EditableLM, layer: int) -> str:
    return f"{find_blocks(lm.model)[0]}.{layer}"


def states_of(lm, layer=1, shortcuts=None, path=None, first=None, edits=EDITS):
    rows = encode_edits(lm, edits, PREFIXES, "{} is a")
    path, first = path or block_path(lm, layer), layer + 1 if first is None else first
    shortcuts = shortcuts or Shortcuts()
    return RowStates(lm, rows, shared_leads(rows), lm.site(0), path, first, shortcuts)


def suffix_rows(states):
    owners = [e for e in range(states.n_edits) for _ in range(states.each)]
    return SuffixRows(states, [*owners, *range(states.n_edits)])


def whole_logits(states, rows, change_EH):
    """Run every row alone through the whole model with a hook of the test's own."""
    lm, found = states.lm, []
    for row, owner in zip(rows.rows, rows.owners, strict=True):

        def add(module, args, out, row=row, owner=owner):
            first = out[0] if isinstance(out, tuple) else out
            moved = first.clone()
            moved[0, row.place] += change_EH[owner]
            return (moved, *out[1:]) if isinstance(out, tuple) else moved

        handle = lm.model.get_submodule(states.path).register_forward_hook(add)
        try:
            logits = lm.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        finally:
            handle.remove()
        found.append(logits[list(row.wanted)])
    return torch.cat(found)


def change_like(states, scale=0.5):
    torch.manual_seed(1)
    noise = torch.randn_like(states.init_ED)
    return (scale * states.init_ED.norm() / noise.norm() * noise).requires_grad_()


def off(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("value_at", ["block", "mlp"])
def test_logits_and_gradients_are_those_of_whole_passes(tiny, architecture, value_at):
    lm = EditableLM.load(LMSpec(id=tiny(architecture)))
    path, first = (None, None) if value_at == "block" else (lm.site(1).path, 1)
    states = states_of(lm, 1, path=path, first=first)
    rows, change = suffix_rows(states), change_like(states)
    logits, plain = rows.logits(change), whole_logits(states, rows, change)
    weights = torch.randn_like(plain)
    (fast,), (slow,) = (torch.autograd.grad((x * weights).sum(), change) for x in (logits, plain))
    assert off(logits, plain) < 1e-5
    assert off(fast, slow) < 1e-4
    assert slow.norm() > 0


@pytest.mark.parametrize("layer", [0, 3])
def test_the_lowest_and_the_last_block_can_be_changed(tiny, layer):
    lm = EditableLM.load(LMSpec(id=tiny("llama")))
    states = states_of(lm, layer)
    rows, change = suffix_rows(states), change_like(states)
    assert off(rows.logits(change), whole_logits(states, rows, change)) < 1e-5


def test_a_sliding_window_shorter_than_the_rows_is_kept(tiny):
    base = EditableLM.load(LMSpec(id=tiny("mistral")))
    config = AutoConfig.from_pretrained(tiny("mistral"))
    config.sliding_window = 4
    torch.manual_seed(0)
    lm = EditableLM(AutoModelForCausalLM.from_config(config), base.tokenizer, base.spec)
    states = states_of(lm)
    rows, change = suffix_rows(states), change_like(states, 2.0)
    assert off(rows.logits(change), whole_logits(states, rows, change)) < 1e-5
    config.sliding_window = None
    torch.manual_seed(0)
    wide = EditableLM(AutoModelForCausalLM.from_config(config), base.tokenizer, base.spec)
    assert off(rows.logits(change), whole_logits(states_of(wide), rows, change)) > 1e-4


def test_rows_that_stay_give_the_same_logits_after_others_left(tiny):
    lm = EditableLM.load(LMSpec(id=tiny("llama")))
    states = states_of(lm)
    rows, change = suffix_rows(states), change_like(states)
    before, owner_N = rows.logits(change), rows.owner_N
    rows.keep([2, 0])
    after = rows.logits(change[[2, 0]])
    for new, old in enumerate([2, 0]):
        assert off(after[rows.owner_N == new], before[owner_N == old]) < 1e-5


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Shortcuts)])
def test_each_shortcut_alone_changes_no_logits(tiny, name):
    lm = EditableLM.load(LMSpec(id=tiny("gpt2")))
    states = states_of(lm, shortcuts=dataclasses.replace(PLAIN, **{name: True}))
    rows, change = suffix_rows(states), change_like(states)
    assert off(rows.logits(change), whole_logits(states, rows, change)) < 1e-5


class Forgetful(nn.Module):
    """A block whose attention never gets the cache."""

    def __init__(self, block):
        super().__init__()
        self.inner = block

    def forward(self, *args, past_key_values=None, past_key_value=None, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_model_that_ignores_the_cache_gets_the_slower_path_and_right_logits(tiny):
    lm = EditableLM.load(LMSpec(id=tiny("llama")))
    blocks = find_blocks(lm.model)[1]
    rows = encode_edits(lm, EDITS, PREFIXES[::-1], "{} is a")
    assert find_shortcuts(lm, rows[0], lm.site(0), block_path(lm, 1), 2) == Shortcuts()
    lm.shortcuts = None
    for i, block in enumerate(blocks):
        blocks[i] = Forgetful(block)
    lm.blocks = list(blocks)
    lm.sites = [
        dataclasses.replace(s, path=s.path.replace(f".{s.layer}.", f".{s.layer}.inner."))
        for s in lm.sites
    ]
    found = find_shortcuts(lm, rows[0], lm.site(0), block_path(lm, 1), 2)
    assert not found.left
    assert found.below
    states = states_of(lm, shortcuts=found)
    suffixes, change = suffix_rows(states), change_like(states)
    plain = whole_logits(states, suffixes, change)
    assert off(suffixes.logits(change), plain) < 1e-5


def test_autocast_hides_no_shortcut_and_lets_no_wrong_one_in(tiny, monkeypatch):
    lm = EditableLM.load(LMSpec(id=tiny("llama")))
    rows = encode_edits(lm, EDITS, PREFIXES, "{} is a")
    tried, plain = [], SuffixRows.logits

    def logits(self, delta):
        found = plain(self, delta)
        tried.append(found)
        return found * 1.01 if self.shortcuts.last else found  # wrong by less than bf16 rounds

    with torch.autocast("cpu", torch.bfloat16):
        assert find_shortcuts(lm, rows[0], lm.site(0), block_path(lm, 1), 2) == Shortcuts()
        lm.shortcuts = None
        monkeypatch.setattr(SuffixRows, "logits", logits)
        found = find_shortcuts(lm, rows[0], lm.site(0), block_path(lm, 1), 2)
    assert found == Shortcuts(last=False)
    assert off(tried[1], tried[0]) < 1e-4


def test_parts_cost_no_more_than_any_other_cut():
    lengths = [1, 1, 2, 2, 2, 7, 8, 8, 30]

    def price(parts, cost):
        return sum((p.stop - p.start) * lengths[p.stop - 1] + cost for p in parts)

    for cost in (1, 6, 40, 1000):
        best = min(
            price([slice(a, b) for a, b in zip([0, *cuts], [*cuts, 9], strict=True)], cost)
            for mask in range(256)
            for cuts in [[i + 1 for i in range(8) if mask >> i & 1]]
        )
        parts = split_by_length(lengths, cost)
        assert price(parts, cost) == best
        assert [b for part in parts for b in range(part.start, part.stop)] == list(range(9))
