"""Perplexity, against one plain forward per text."""

import math

import pytest
import torch

from editkit.lm.spec import LMSpec
from editkit.metrics.perplexity import perplexity

TEXTS = ["w1 is in w2.", "w3", "St. Louis is in w7. w8 is in St. Louis.", "", "w9 w9 w9 w9 w9"]


def plain(model, tokenizer, texts, width=10_000):
    total, count = 0.0, 0
    for text in filter(None, texts):
        ids = tokenizer(text)["input_ids"][:width]
        if len(ids) > 1:
            with torch.no_grad():
                logits_TV = model(torch.tensor([ids])).logits[0].float().double()
            logp_TV = torch.log_softmax(logits_TV, -1)
            total -= sum(float(logp_TV[t - 1, ids[t]]) for t in range(1, len(ids)))
            count += len(ids) - 1
    return math.exp(total / count)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity_is_token_weighted_over_texts(twins, batch_size):
    found = perplexity(twins.lm, TEXTS, batch_size=batch_size)
    assert found == pytest.approx(plain(twins.after, twins.tokenizer, TEXTS), rel=1e-5)
    with twins.lm.unedited():
        found = perplexity(twins.lm, TEXTS, batch_size=batch_size)
    assert found == pytest.approx(plain(twins.before, twins.tokenizer, TEXTS), rel=1e-5)


def test_the_first_word_is_predicted_from_bos_alone(twins):
    found = perplexity(twins.lm, ["w3"])
    if twins.lm.policy.adds_bos:
        assert found == pytest.approx(plain(twins.after, twins.tokenizer, ["w3"]), rel=1e-5)
    else:
        tokens = len(twins.tokenizer("w3")["input_ids"])
        assert (found is None) == (tokens == 1)


def test_long_texts_are_cut(twins):
    expected = plain(twins.after, twins.tokenizer, TEXTS, width=4)
    assert perplexity(twins.lm, TEXTS, max_tokens=4) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(plain(twins.after, twins.tokenizer, TEXTS), rel=1e-2)


def test_a_text_longer_than_the_model_is_cut_to_its_positions(twins):
    text = " ".join(["w1 w2"] * 200)
    expected = plain(twins.after, twins.tokenizer, [text], width=128)
    assert perplexity(twins.lm, [text]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_without_text_there_is_no_perplexity(twins, texts):
    assert perplexity(twins.lm, texts) is None


def test_text_is_plain_text_even_where_probes_are_chats(twins):
    plain_value = perplexity(twins.lm, TEXTS)
    twins.lm.tokenizer.chat_template = "{% for m in messages %}w5 {{ m['content'] }} w6{% endfor %}"
    chat = type(twins.lm)(twins.lm.model, twins.lm.tokenizer, LMSpec(chat_template=True))
    assert perplexity(chat, TEXTS) == plain_value


def test_a_diverged_model_has_a_finite_perplexity(twins):
    layer = next(iter(twins.lm.layers.values()))
    layer.delta.data.fill_(float("nan"))
    layer.changed()
    assert perplexity(twins.lm, TEXTS) == math.exp(700)
