"""Prefixes: seeded, of the right length, free of special tokens and braces."""

import pytest
import torch

from editkit.lm.editable import EditableLM
from editkit.lm.prefixes import SEEDS, make_prefixes, strip_braces
from editkit.lm.spec import LMSpec


@pytest.fixture(scope="module")
def lm():
    return EditableLM.load(LMSpec())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_the_seed_decides(lm):
    first = make_prefixes(lm, generator=seeded(3))
    torch.manual_seed(99)  # the global generator has no say
    assert make_prefixes(lm, generator=seeded(3)) == first
    assert make_prefixes(lm, generator=seeded(4)) != first


def test_each_begins_with_its_word_and_has_the_length_asked_for(lm):
    prefixes = make_prefixes(lm, 7, max_tokens=12, generator=seeded(0))
    assert len(prefixes) == 7
    for i, prefix in enumerate(prefixes):
        assert prefix.startswith(SEEDS[i % 5])
        assert prefix.endswith(". ")
        assert "  " not in prefix[-3:]
        assert len(lm.policy.ids([prefix.removesuffix(". ")])[0]) <= 13


def test_only_the_likeliest_tokens_are_drawn(lm):
    (prefix,) = make_prefixes(lm, 1, max_tokens=8, top_k=1, generator=seeded(0))
    ids = lm.policy.ids(["The"])[0]
    special = lm.tokenizer.all_special_ids
    while len(ids) < 8:
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([ids])).logits[0, -1]
        logits[special] = float("-inf")
        ids.append(int(logits.argmax()))
    assert prefix == lm.tokenizer.decode(ids, skip_special_tokens=True).strip() + ". "


def test_no_special_token_and_no_brace_is_left(tiny, monkeypatch):
    lm = EditableLM.load(LMSpec(id=tiny("llama")))
    decode = lm.tokenizer.batch_decode
    braced = lambda rows, **kwargs: [text + " {x}" for text in decode(rows, **kwargs)]  # noqa: E731
    monkeypatch.setattr(lm.tokenizer, "batch_decode", braced)
    prefixes = make_prefixes(lm, 10, generator=seeded(0))
    for prefix, ids in zip(prefixes, lm.policy.ids(list(prefixes)), strict=True):
        assert not set("{}") & set(prefix)
        assert "<s>" not in prefix
        assert ids.count(lm.tokenizer.bos_token_id) == 1


def test_templates_are_cut_and_the_bare_one_is_left_out():
    assert strip_braces(["{}", "", "So it is. {}", "And. "]) == ["So it is. ", "And. "]
    with pytest.raises(ValueError, match="a prompt stands behind its prefix"):
        strip_braces(["{} is what"])


def test_counts_below_one_are_refused(lm):
    with pytest.raises(ValueError, match="top_k is 0"):
        make_prefixes(lm, top_k=0, generator=seeded(0))
