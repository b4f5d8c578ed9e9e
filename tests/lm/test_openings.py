"""Unrelated prompts: of a corpus, the base model's own, or of its own writing; seeded."""

import shutil
from pathlib import Path

import pytest
import torch

from editkit.lm.editable import EditableLM
from editkit.lm.openings import shared_prompts, unrelated_prompts, written
from editkit.lm.spec import LMSpec

TEXTS = [f"text {i} tells of a town where nobody ever was" for i in range(30)]


@pytest.fixture
def lm(tiny):
    return EditableLM.load(LMSpec(id=tiny("llama")))


def test_prompts_are_openings_of_the_texts_without_their_last_word(lm, tmp_path):
    corpus = tmp_path / "c.txt"
    corpus.write_text("\n".join(TEXTS))
    prompts = unrelated_prompts(lm, str(corpus), 20, seed=0)
    assert len(prompts) == 20
    for prompt in prompts:
        text = TEXTS[int(prompt.split()[1])]
        assert text.startswith(prompt + " ")
        assert len(prompt.split()) >= 5
    assert prompts == unrelated_prompts(lm, str(corpus), 20, seed=0)
    assert prompts != unrelated_prompts(lm, str(corpus), 20, seed=1)


def test_of_few_texts_each_use_gets_one_and_of_one_text_none(lm, tmp_path):
    corpus = tmp_path / "c.txt"
    corpus.write_text("\n".join(TEXTS[:10]))
    found = shared_prompts(lm, str(corpus), (100, 1000), seed=0)
    assert [len(part) for part in found] == [1, 9]
    assert [len(part) for part in shared_prompts(lm, str(corpus), (0, 1000), seed=0)] == [0, 10]
    corpus.write_text(TEXTS[0])
    with pytest.raises(ValueError, match="gives 1 unrelated prompts, and two are the least"):
        shared_prompts(lm, str(corpus), (100, 1000), seed=0)


def test_the_base_models_own_corpus_comes_first_and_else_the_model_writes(lm, tmp_path):
    made = unrelated_prompts(lm, None, 12, seed=0)
    assert 0 < len(made) <= 12
    assert len(set(made)) > 6
    shutil.copytree(lm.spec.path, tmp_path / "own")
    (tmp_path / "own" / "corpus.txt").write_text("\n".join(TEXTS))
    own = EditableLM.load(LMSpec(id=str(tmp_path / "own")))
    assert all(p.startswith("text ") for p in unrelated_prompts(own, None, 12, seed=0))
    assert Path(own.spec.path).is_dir()


def test_texts_beyond_the_models_positions_are_left_out(lm, tmp_path):
    corpus = tmp_path / "c.txt"
    corpus.write_text("x" * 400 + " is very long indeed for this one model\n" + "\n".join(TEXTS))
    prompts = unrelated_prompts(lm, str(corpus), 31, seed=0)
    assert len(prompts) == 30
    lm.encode(prompts)


def test_what_the_model_writes_depends_on_the_seed_and_continues_the_start(lm):
    texts = [
        written(lm, ["I", "You"] * 3, 6, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert [text.split()[0] for text in texts[0]] == ["I", "You"] * 3
