"""An EditableLM answers the harness as the harness' own wrapper of the same model does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from editkit.adapters.base import EditLayer
from editkit.api import EditedLM
from editkit.harness.model import Answers, harness_model
from editkit.harness.rows import stops_and_budget, window_rows
from editkit.lm.editable import EditableLM
from editkit.lm.spec import LMSpec
from editkit.methods.ft import FT
from editkit.metrics.protocol import EvalProtocol

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install editkit[eval]")
PAIRS = [
    ("the capital of Alba is", " Rome"),
    ("the capital of Alba is ", "Oslo"),
    ("", "where lives Elda ?"),
    ("Question : where lives a big town ? Answer :", " Bern and Lima"),
    ("he", " works"),
    ("she was born in a small city and he was born in a big town ,", " Paris ."),
]
TEXTS = ["the capital of Alba is Rome", "he works for Rome and she lives in Bern . " * 20, "Rome"]


def ask(*args):
    return SimpleNamespace(args=args)


@pytest.fixture(params=["llama", "gpt2"])
def lm(request, tiny, edits):
    """A tiny model with two edits in it."""
    method = FT(lm=LMSpec(id=tiny(request.param)), evaluation=EvalProtocol(), lr=3e-2, steps=50)
    edited = EditedLM(method)
    edited.edit_batch(edits[:2])
    return edited.lm


@pytest.fixture
def theirs(lm):
    """The harness' own wrapper around the very same edited model."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=3, device="cpu")

    def run(kind, *args):
        return getattr(model, kind)([Instance(kind, {}, a, 0) for a in args])

    return run


def close(one, other):
    return torch.allclose(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_continuations_score_as_in_hflm(lm, theirs, batch_size):
    ours = harness_model(lm, batch_size).loglikelihood([ask(*pair) for pair in PAIRS])
    expected = theirs("loglikelihood", *PAIRS)
    assert close([value for value, _ in ours], [value for value, _ in expected])
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]


def test_a_greedy_continuation_is_told_from_another(lm):
    answers = ["Oslo", "Rome"]  # the first was edited in
    found = harness_model(lm).loglikelihood([ask("the capital of Alba is ", a) for a in answers])
    assert [greedy for _, greedy in found] == [True, False]


def test_white_space_alone_is_no_context(lm):
    found = harness_model(lm).loglikelihood([ask(" \n", "Rome"), ask("", " \nRome")])
    assert found[0] == found[1]


@pytest.mark.parametrize("until", [[], ["."], [" is", "R"], ["a big"]])
def test_answers_are_those_of_hflm(lm, theirs, until):
    wanted = {"until": until, "max_gen_toks": 12, "do_sample": False}
    contexts = [context for context, _ in PAIRS if context.strip()]
    ours = harness_model(lm, 2).generate_until([ask(c, wanted) for c in contexts])
    alone = [theirs("generate_until", (c, wanted))[0] for c in contexts]
    assert ours == alone
    assert not any(stop in answer for stop in until for answer in ours)


def test_texts_score_token_by_token_behind_a_prefix(lm):
    """Every token once, each behind all that fits in front of it."""
    found = harness_model(lm, 2).loglikelihood_rolling([ask(text) for text in TEXTS])
    limit, prefix = lm.max_positions, lm.tokenizer.bos_token_id
    for text, total in zip(TEXTS, found, strict=True):
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        expected, done = 0.0, 0
        while done < len(ids):
            part = ids[done : done + limit - 1]
            start = max(done + len(part) - limit, -1)
            row = [prefix, *ids][start + 1 : done + len(part) + 1]
            with torch.no_grad():
                logits = lm.model(torch.tensor([row])).logits[0].log_softmax(-1)
            places = range(len(row) - len(part) - 1, len(row) - 1)
            expected += sum(float(logits[i, row[i + 1]]) for i in places)
            done += len(part)
        assert total == pytest.approx(expected, rel=1e-5)


def test_windows_are_those_of_the_harness(lm):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = lm.tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]
    assert len(ids) > 2 * lm.max_positions
    prefix = lm.tokenizer.bos_token_id
    expected = get_rolling_token_windows(ids, prefix, lm.max_positions - 1, 1)
    assert [tuple(r) for r in window_rows(lm, TEXTS[1])] == [
        make_disjoint_window(w) for w in expected
    ]


def test_a_context_beyond_the_positions_loses_its_beginning(lm, caplog):
    pair = (TEXTS[1].rstrip(), " Rome")
    found = harness_model(lm).loglikelihood([ask(*pair)])[0][0]
    row = lm.tokenizer("".join(pair))["input_ids"][-lm.max_positions :]
    size = len(lm.tokenizer(" Rome", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logits = lm.model(torch.tensor([row])).logits[0].log_softmax(-1)
    places = range(len(row) - size - 1, len(row) - 1)
    assert found == pytest.approx(sum(float(logits[i, row[i + 1]]) for i in places), rel=1e-4)
    assert "1 of 1 contexts lose" in caplog.text


def test_a_continuation_that_fits_nowhere_is_refused(lm):
    with pytest.raises(ValueError, match="does not fit into the 128 positions"):
        harness_model(lm).loglikelihood([ask("he", " Rome" * 300)])


def test_sampling_is_refused():
    with pytest.raises(ValueError, match="do_sample: false"):
        stops_and_budget({"do_sample": True, "temperature": 0.7})
    assert stops_and_budget({"until": "\n", "do_sample": False, "temperature": 1.0}) == (
        ("\n",), 256,
    )  # fmt: skip
    assert stops_and_budget({"until": ["a", ""], "max_new_tokens": 5}) == (("a",), 5)


class OnWord(EditLayer):
    """Adds to rows whose prompt holds a word: routed once, at prefill, as routed methods are."""

    def __init__(self, base_layer, word):
        super().__init__(base_layer)
        self.word, self.ids_BT, self.rows_B = word, None, None
        self.is_written = True

    def edited(self, x, y):
        if self.scope.prompt_BT is not None:
            hits_BT = (self.ids_BT == self.word) & self.scope.prompt_BT[:, -self.ids_BT.shape[1] :]
            self.rows_B = hits_BT.any(1)
        return torch.where(self.rows_B[:, None, None], y + 3.0 * y.flip(-1), y)


@pytest.fixture
def routed(tiny):
    """A model that is another one for prompts with `Alba`, and its layer."""
    lm = EditableLM.load(LMSpec(id=tiny("gpt2")))
    word = lm.tokenizer(" Alba", add_special_tokens=False)["input_ids"][-1]
    layer = lm.attach(lm.site(1).path, lambda base: OnWord(base, word))

    def see(module, args, kwargs):
        layer.ids_BT = kwargs["input_ids"]

    lm.model.register_forward_pre_hook(see, with_kwargs=True)
    return lm


def test_a_route_is_decided_by_the_context_alone(routed):
    pairs = [("he lives in", " Alba"), ("the capital of Alba is", " Rome")]
    found = harness_model(routed).loglikelihood([ask(*pair) for pair in pairs])
    with routed.unedited():
        base = harness_model(routed).loglikelihood([ask(*pair) for pair in pairs])
    assert found[0] == base[0]
    assert abs(found[1][0] - base[1][0]) > 0.1


def test_a_route_is_held_while_answering(routed):
    prompt, wanted = "the capital of Alba is", {"until": [], "max_gen_toks": 8}
    found = harness_model(routed).generate_until([ask(prompt, wanted), ask("he", wanted)])
    assert found[0].removeprefix(" ") == routed.generate([prompt], max_new_tokens=8)[0]
    with routed.unedited():
        base = harness_model(routed).generate_until([ask(prompt, wanted), ask("he", wanted)])
    assert found[0] != base[0]
    assert found[1] == base[1]


def test_a_conversation_is_rendered_by_the_tokenizers_template(lm):
    lm.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ours = Answers(lm, 1)
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}]) == "<user> hi<assistant>"
    assert ours.chat_template() == lm.tokenizer.chat_template
