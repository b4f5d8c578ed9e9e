"""Token positions and policy, on the three kinds of tokenizer and against recorded indices."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from editkit.lm.tokens import TokenPolicy

TEMPLATE = "{% for m in messages %}<user>{{ m['content'] }}</user>\n{% endfor %}"
PROMPTS = ["the capital of Alba is", "where lives Elda ?", "a small town"]
TARGETS = ["Rome", "St. Louis", "big city"]


@pytest.fixture(params=["byte_level_bpe", "sentencepiece_style", "word_level"])
def tokenizer(request, tokenizers):
    return tokenizers(request.param)


def test_bos_is_as_the_tokenizer_has_it(tokenizers):
    for name, expected in [("byte_level_bpe", True), ("word_level", False)]:
        policy = TokenPolicy(tokenizers(name))
        assert policy.adds_bos is expected
        tokens = policy.encode(["the city"])
        assert (tokens.ids_BT[0, 0] == 0) == expected
        assert tokens.prompt_BT[0, 0]


def test_prompt_and_target_make_the_tokens_of_the_joint_text(tokenizer):
    policy = TokenPolicy(tokenizer)
    tokens = policy.encode(PROMPTS, TARGETS)
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        joint = tokenizer(f"{prompt} {target}")["input_ids"]
        assert tokens.ids_BT[row][tokens.mask_BT[row]].tolist() == joint
        alone = tokenizer(prompt)["input_ids"]
        assert tokens.ids_BT[row][tokens.prompt_BT[row]].tolist() == alone
        assert tokens.ids_BT[row][tokens.target_BT[row]].tolist() == joint[len(alone) :]


def test_a_space_at_the_prompts_end_moves_into_the_target(tokenizer):
    policy = TokenPolicy(tokenizer)
    assert torch.equal(
        policy.encode(["the town is "], ["Rome"]).ids_BT,
        policy.encode(["the town is"], ["Rome"]).ids_BT,
    )


def test_byte_level_target_carries_its_space_and_none_after_a_line_break(tokenizers):
    tokenizer = tokenizers("byte_level_bpe")
    policy = TokenPolicy(tokenizer)
    after_word, after_break = policy.target_ids(["the", "the\n"], ["Rome", "Rome"])
    assert tokenizer.decode(after_word) == " Rome"
    assert tokenizer.decode(after_break) == "Rome"


def test_prompt_ids_never_change_where_a_merge_crosses_the_border(tokenizers):
    policy = TokenPolicy(tokenizers("byte_level_bpe"), chat_template=False)
    # no separator after a break; "\n" + "\n" may merge, so the target is encoded apart
    tokens = policy.encode(["Rome\n"], ["\nRome"])
    assert tokens.ids_BT[tokens.prompt_BT].tolist() == policy.ids(["Rome\n"])[0]
    assert tokens.target_BT.any()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_and_predictions_follow_the_padding_side(tokenizer, padding):
    tokens = TokenPolicy(tokenizer).encode(PROMPTS, TARGETS, padding=padding)
    for row in range(3):
        real = tokens.mask_BT[row]
        count = int(real.sum())
        assert tokens.positions_BT[row][real].tolist() == list(range(count))
        edge = real[-1] if padding == "left" else real[0]
        assert bool(edge)
        targets = tokens.target_BT[row].nonzero()[:, 0]
        assert tokens.predicts_BT[row].nonzero()[:, 0].tolist() == (targets - 1).tolist()
    assert tokens.target_ids_N.tolist() == [
        i for row in range(3) for i in tokens.ids_BT[row][tokens.target_BT[row]].tolist()
    ]
    assert tokens.target_rows_N.tolist() == tokens.target_BT.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_chosen_rows_are_what_encoding_them_alone_gives(tokenizer, padding):
    policy = TokenPolicy(tokenizer)
    subjects = ["Alba", "Elda", "town"]
    tokens = policy.encode(PROMPTS, TARGETS, subjects, padding)
    part = tokens.rows(torch.tensor([2, 0]))
    alone = policy.encode(
        [PROMPTS[2], PROMPTS[0]], [TARGETS[2], TARGETS[0]], [subjects[2], subjects[0]], padding
    )
    for name in ("ids_BT", "mask_BT", "prompt_BT", "target_BT", "subject_B"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name


def test_subject_index_names_the_subjects_last_token(tokenizer):
    policy = TokenPolicy(tokenizer)
    tokens = policy.encode(PROMPTS, TARGETS, ["Alba", "Elda", "small town"], padding="left")
    for row, word in enumerate(["Alba", "Elda", "town"]):
        index = int(tokens.subject_B[row])
        head = tokens.ids_BT[row, : index + 1][tokens.mask_BT[row, : index + 1]]
        assert tokenizer.decode(head, skip_special_tokens=True).strip().endswith(word)


def test_subject_that_occurs_twice_counts_at_its_last_place(tokenizer):
    policy = TokenPolicy(tokenizer)
    once = len(policy.ids(["Rome and Rome"])[0]) - 1
    assert policy.subject_index("Rome and Rome is", "Rome") == once


def test_a_text_that_went_through_no_chat_template_has_its_bos(tokenizers):
    tokenizer = tokenizers("byte_level_bpe")
    tokenizer.chat_template = TEMPLATE
    policy, bare = TokenPolicy(tokenizer, chat_template=True), TokenPolicy(tokenizer)
    assert policy.ids(["Rome is a"], plain=True) == bare.ids(["Rome is a"])
    assert policy.ids(["Rome is a"])[0] == bare.ids(["Rome is a"])[0][1:]
    where = [some.template_indices("{} is a", ["Rome"]) for some in (policy, bare)]
    assert where[0] == where[1]


def test_chat_template_wraps_edits_and_probes_alike(tokenizers):
    tokenizer = tokenizers("byte_level_bpe")
    tokenizer.chat_template = TEMPLATE
    policy = TokenPolicy(tokenizer, chat_template=True)
    tokens = policy.encode(["where is Alba"], ["Rome"], ["Alba"])
    assert tokenizer.decode(tokens.ids_BT[tokens.prompt_BT]) == "<user>where is Alba</user>\n"
    assert tokenizer.decode(tokens.target_ids_N) == "Rome"
    head = tokens.ids_BT[0, : int(tokens.subject_B[0]) + 1]
    assert tokenizer.decode(head) == "<user>where is Alba"


def test_eos_closes_targets_on_request(tokenizer):
    tokens = TokenPolicy(tokenizer).encode(PROMPTS, TARGETS, append_eos=True)
    for row in range(3):
        assert tokens.ids_BT[row][tokens.target_BT[row]][-1] == tokenizer.eos_token_id


def test_bad_rows_are_refused_in_words(tokenizers):
    tokenizer = tokenizers("word_level")
    policy = TokenPolicy(tokenizer)
    with pytest.raises(ValueError, match="no prompts"):
        policy.encode([])
    with pytest.raises(ValueError, match="has no tokens"):
        policy.encode([""])
    with pytest.raises(ValueError, match="target '' has no tokens"):
        policy.encode(["the"], [""])
    with pytest.raises(ValueError, match="subject 'Oslo' not found in prompt 'the city'"):
        policy.encode(["the city"], ["Rome"], ["Oslo"])
    with pytest.raises(ValueError, match="has none"):
        TokenPolicy(tokenizer, chat_template=True)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        TokenPolicy(tokenizer).encode(["the"], ["city"], append_eos=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_subject_index_equals_the_recorded_one(shared, name):
    """Of rows whose subject occurs once and has no space at its end; see TokenPolicy."""
    folder = shared("parity/01_subject_index")
    policy = TokenPolicy(AutoTokenizer.from_pretrained(folder.parent / "models" / f"tiny-{name}-p"))
    rows = json.loads((folder / "expected.json").read_text())[name]
    checked = 0
    for row in rows:
        subject, sentence = row["subject"], row["sentence"]
        if sentence.count(subject) == 1 and not subject.endswith(" "):
            assert policy.subject_index(sentence, subject) == row["last"], row
            checked += 1
    assert checked > 250
