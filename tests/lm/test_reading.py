"""One reading of prompts and drafts, against passes of their own."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from editkit.adapters.delta import DeltaLayer
from editkit.adapters.routed import Route, RoutedLayer
from editkit.lm.decode import Ends, pick
from editkit.lm.editable import EditableLM
from editkit.lm.reading import Reading
from editkit.lm.spec import LMSpec

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "gptj", "gpt_neox"]
PROMPTS = ["the capital of Alba is", "where lives Elda", "a small town in Cora is big", "he"]
ROOM = 9


@pytest.fixture(params=ARCHITECTURES)
def lm(request, tiny):
    if request.param not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {request.param}")
    return load(tiny(request.param))


def load(folder):
    # transformers 4 makes GPT-2's mask for sdpa in fp32 whatever the dtype, too small for fp64
    eager = folder.endswith("gpt2")
    lm = EditableLM.load(LMSpec(id=folder, attn_implementation="eager" if eager else None))
    lm.model.double()
    site = lm.attach(lm.site(1).path, DeltaLayer)
    site.add(0.05 * torch.randn(site.delta.shape, generator=torch.Generator().manual_seed(1)))
    return lm


def greedy(lm, prompt_ids, room=ROOM):
    """One row, token by token, without a cache."""
    ids = list(prompt_ids)
    for _ in range(room):
        with torch.no_grad():
            ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].float().argmax()))
        if ids[-1] in lm.eos_ids:
            return ids[len(prompt_ids) : -1]
    return ids[len(prompt_ids) :]


def plain_logits(lm, prompt_ids, text_ids):
    with torch.no_grad():
        logits_TV = lm.model(torch.tensor([prompt_ids + text_ids])).logits[0].float()
    return logits_TV[len(prompt_ids) - 1 : -1]


def rows_of(lm, drafts, padding="right"):
    heads = lm.policy.pieces(PROMPTS)[0]
    return heads, lm.policy.pad(heads, drafts, [-1] * len(heads), padding)


def decoded(lm, tokens, room=ROOM, stops=1, stop=()):
    reading = Reading(lm, tokens)
    return reading.decode(Ends.of(lm, reading.tokens, room, stops, stop))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_answers_do_not_depend_on_the_drafts(lm, padding):
    heads = lm.policy.pieces(PROMPTS)[0]
    said = [greedy(lm, head) for head in heads]
    drafts = [said[0][:4], [*said[1][:2], 7, 9], [11, 12, 13], said[3]]  # right, half right, wrong
    tokens = rows_of(lm, drafts, padding)[1]
    assert decoded(lm, tokens) == said
    assert decoded(lm, rows_of(lm, [[]] * 4, padding)[1]) == said


def test_the_logits_of_drafts_are_those_of_each_row_alone(lm):
    drafts = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
    heads, tokens = rows_of(lm, drafts)
    reading = Reading(lm, tokens)
    found = reading.logits(reading.tokens.predicts_BT).split([3, 1, 2, 4])
    for head, logits, text in zip(heads, found, drafts, strict=True):
        assert torch.allclose(logits, plain_logits(lm, head, text), atol=1e-5)


def test_other_texts_go_on_from_the_prompt_and_leave_the_answers_alone(lm):
    others = [[21, 22, 23, 24], [], [25], [26, 27]]
    drafts = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
    heads, tokens = rows_of(lm, drafts)
    reading = Reading(lm, tokens)
    ids_BN = torch.tensor([row + [0] * (4 - len(row)) for row in others])
    is_given_BN = torch.arange(4) < torch.tensor([[len(row)] for row in others])
    for _ in range(2):  # a second text goes on from the prompt, too
        found = reading.other_logits(ids_BN, is_given_BN).split([len(row) for row in others])
        for head, logits, text in zip(heads, found, others, strict=True):
            if text:
                assert torch.allclose(logits, plain_logits(lm, head, text), atol=1e-5)
    answers = reading.decode(Ends.of(lm, reading.tokens, ROOM, 1, ()))
    assert answers == [greedy(lm, head) for head in heads]


def test_a_window_of_attention_that_is_too_short_to_hide_drafts_is_respected(tiny):
    lm = load(tiny("mistral"))
    lm.model.config.sliding_window = 8
    heads, tokens = rows_of(lm, [[5, 6, 7], [8], [9, 10], [11]])
    assert decoded(lm, tokens) == [greedy(lm, head) for head in heads]
    others = torch.tensor([[21, 22], [23, 0], [24, 25], [26, 27]])
    found = Reading(lm, tokens).other_logits(others, others > 0).split([2, 1, 2, 2])
    for head, logits, text in zip(heads, found, [[21, 22], [23], [24, 25], [26, 27]], strict=True):
        assert torch.allclose(logits, plain_logits(lm, head, text), atol=1e-5)


def test_a_row_may_take_as_many_stops_as_its_answer_has(tiny):
    lm = load(tiny("llama"))
    heads, tokens = rows_of(lm, [[]] * 4)
    said = [greedy(lm, head, 24) for head in heads]
    mark = lm.tokenizer.decode(said[0][2:3])
    for allowed in (1, 2, 3):
        stops_B = torch.tensor([allowed, 1, allowed, 1])
        found = decoded(lm, tokens, 24, stops_B, (mark,))
        for ids, whole, most in zip(found, said, stops_B.tolist(), strict=True):
            is_stop = [mark in lm.tokenizer.decode([i]) for i in whole]
            places = [n for n, one in enumerate(is_stop) if one]
            assert ids == (whole[: places[most - 1] + 1] if len(places) >= most else whole)


def test_each_row_has_room_of_its_own(tiny):
    lm = load(tiny("gpt2"))
    heads, tokens = rows_of(lm, [[5], [], [6, 7], []])
    room = [0, 1, 3, 7]
    found = decoded(lm, tokens, torch.tensor(room))
    assert found == [greedy(lm, head, n) for head, n in zip(heads, room, strict=True)]


def test_rows_that_are_done_leave_the_cache(tiny, monkeypatch):
    lm = load(tiny("llama"))
    sizes = []
    step = Reading._step

    def watch(reading, ids_B, seen_BT):
        sizes.append(len(ids_B))
        return step(reading, ids_B, seen_BT)

    monkeypatch.setattr(Reading, "_step", watch)
    heads, tokens = rows_of(lm, [[]] * 4)
    found = decoded(lm, tokens, torch.tensor([2, 4, 6, 8]))
    assert found == [greedy(lm, h, n) for h, n in zip(heads, (2, 4, 6, 8), strict=True)]
    assert sizes[0] == 4
    assert sizes[-1] == 1
    assert len(sizes) == 7  # the first token comes from the reading itself


def test_a_right_draft_needs_no_step_beyond_its_end(tiny, monkeypatch):
    lm = load(tiny("llama"))
    heads = lm.policy.pieces(PROMPTS)[0]
    said = [greedy(lm, head, 4) for head in heads]
    tokens = rows_of(lm, said)[1]
    monkeypatch.setattr(Reading, "_step", None)
    assert decoded(lm, tokens, 4) == said


class Gate(RoutedLayer):
    """Answers prompts of an even number of tokens by a shift of the output."""

    def route(self, x_BTF, prompt_BT):
        slot_B = -(prompt_BT.sum(1) % 2)
        return Route.of(slot_B, slot_B.float())

    def recall(self, x_RTF, route):
        shift_D = 3.0 * torch.sin(torch.arange(self.shape_oi[0]))
        return shift_D.expand(*x_RTF.shape[:2], -1)


def test_routes_are_those_of_the_prompts_and_follow_rows_that_stay(tiny):
    lm = load(tiny("llama"))
    gate = lm.attach(lm.site(2).path, Gate)
    gate.is_written = True
    prompts = [*PROMPTS, "the big city", "he works for Rome and"]
    heads = lm.policy.pieces(prompts)[0]
    assert {len(head) % 2 for head in heads} == {0, 1}

    def alone(head, room):
        return decoded(lm, lm.policy.pad([head], [[]], [-1]), room)[0]

    room = [1, 5, 2, 7, 3, 6]
    expected = [alone(head, n) for head, n in zip(heads, room, strict=True)]
    gate.is_written = False
    assert expected != [alone(head, n) for head, n in zip(heads, room, strict=True)]
    gate.is_written = True
    drafts = [[5, 6], expected[1][:2], [7], expected[3][:3], [], [8, 9, 10]]
    tokens = lm.policy.pad(heads, drafts, [-1] * 6)
    others = torch.tensor([[21, 22]] * 6)
    reading = Reading(lm, tokens)
    forced = reading.other_logits(others, others > 0).split([2] * 6)
    assert reading.decode(Ends.of(lm, reading.tokens, torch.tensor(room), 1, ())) == expected
    for head, logits in zip(heads, forced, strict=True):
        row = Reading(lm, lm.policy.pad([head], [[21, 22]], [-1]))
        assert torch.allclose(logits, row.logits(row.tokens.predicts_BT), atol=1e-5)


def test_picks_follow_the_probabilities_of_the_likeliest_tokens():
    logits_BV = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0]]).expand(4000, -1)
    draw_B = (torch.arange(4000) + 0.5) / 4000
    found = pick(logits_BV, draw_B, top_k=3).bincount(minlength=5) / 4000
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0]).exp()
    expected = torch.tensor([0.0, *(weights[1:] / weights[1:].sum()).tolist(), 0.0])
    assert torch.allclose(found, expected, atol=1e-3)
    assert pick(logits_BV[:1], None, 3).tolist() == [3]


def test_a_row_beyond_the_positions_is_refused(tiny):
    lm = load(tiny("llama"))
    tokens = lm.policy.pad([[3] * 100], [[4] * 60], [-1])
    with pytest.raises(ValueError, match="160 tokens exceeds the 128"):
        Reading(lm, tokens)
