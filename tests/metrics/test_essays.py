"""Longer texts: drawn the same whatever the batch, and compared with texts on the matter."""

import json

import pytest
import torch

from editkit.metrics.essays import ReferenceTexts, fluency, write_essays

PROMPTS = ["w1 is in", "w2", "w3 w4 w5 is in St", "w6 is"]


def test_a_text_does_not_depend_on_its_batch(twins):
    together = write_essays(twins.lm, PROMPTS, 30, batch_size=4)
    assert write_essays(twins.lm, PROMPTS[::-1], 30, batch_size=3)[::-1] == together
    for prompt, essay in zip(PROMPTS, together, strict=True):
        assert write_essays(twins.lm, [prompt], 30, batch_size=1) == [essay]
        assert essay.startswith(prompt)
        assert len(twins.tokenizer(essay)["input_ids"]) <= 31


def test_draws_are_of_the_likeliest_tokens_and_follow_the_seed(twins):
    essays = {write_essays(twins.lm, ["w1 is in"], 30, 1, seed)[0] for seed in range(5)}
    assert len(essays) == 5
    ids = twins.tokenizer("w1 is in")["input_ids"]
    with torch.no_grad():
        best = twins.after(torch.tensor([ids])).logits[0, -1].topk(5).indices.tolist()
    for essay in essays:
        behind = twins.tokenizer(essay)["input_ids"][len(ids) :]
        assert not behind or behind[0] in best


def test_a_prompt_of_the_whole_size_gets_one_token(twins):
    prompt = " ".join(["w1"] * 20)
    (essay,) = write_essays(twins.lm, [prompt], 10, 1)
    count = len(twins.tokenizer(prompt)["input_ids"])
    assert len(twins.tokenizer(essay)["input_ids"]) <= count + 1


def test_fluency_is_in_hundredths_of_a_bit_and_low_for_repetition():
    assert fluency("w w w w w w w w") == 0.0
    assert fluency("one two three four five six seven") > 200


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({"Rome": ["Rome is old", "a town in Italy"], "Oslo": ["cold town"]}))
    return ReferenceTexts(path)


def test_consistency_is_highest_for_the_targets_own_texts(texts):
    assert texts.consistency("Rome is old. a town in Italy", "Rome") == pytest.approx(1.0)
    assert texts.consistency("nothing of that", "Rome") == 0.0
    assert 0.0 < texts.consistency("Rome", "Rome") < 1.0
    assert texts.consistency("a cold town", "Oslo") > texts.consistency("a cold town", "Rome")
    assert texts.consistency("Rome", "Lima") is None


def test_reference_texts_are_known_by_their_content(texts):
    before = texts.name
    assert before.startswith("texts.json ")
    texts.path.write_text(json.dumps({"Rome": ["Rome is new"]}))
    assert ReferenceTexts(texts.path).name != before


@pytest.mark.parametrize("content", ["[]", "{}", '{"Rome": "text"}', '{"Rome": []}', "{"])
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "texts.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"texts\.json"):
        ReferenceTexts(path).consistency("a", "b")
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        ReferenceTexts(tmp_path / "nowhere.json").consistency("a", "b")
