"""Tiny random models of every architecture, saved as local folders, with tokenizers made here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from editkit.edits import Edit

ROOT = Path(__file__).parents[1]
TEXT = (
    "the capital of Alba Bera Cora Dora Elda is Rome Paris Oslo Bern Lima city town big small "
    "where lives a Question : ? Answer he she works for and in was born . , St. Louis"
)
WORDS = TEXT.split()
CORPUS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
COMMON = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8,
}  # fmt: skip
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "rotary_dim": 8},
    "gpt_neox": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 128,
    },
}  # fmt: skip


def byte_level_bpe(bos: bool = True) -> PreTrainedTokenizerFast:
    """As GPT-2's and Llama-3's: a space belongs to the word behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer, bos)


def sentencepiece_style() -> PreTrainedTokenizerFast:
    """As Llama-2's and Gemma's: spaces become a mark, a text gets one in front, BOS is added."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>", "<unk>"],
        initial_alphabet=list("▁\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer, bos=True)


def word_level() -> PreTrainedTokenizerFast:
    """One token a word, no special token in front."""
    vocab = {w: i for i, w in enumerate(dict.fromkeys(["<s>", "</s>", "<pad>", "<unk>", *WORDS]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer, bos=False)


def _wrap(tokenizer: Tokenizer, bos: bool) -> PreTrainedTokenizerFast:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_tiny(folder: Path, architecture: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write a random model of an architecture with a tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture], **COMMON)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)  # logits far enough apart for argmax to be stable
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep what tests measure out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return the folder of a tiny model: `tiny("llama")`."""
    root = tmp_path_factory.mktemp("models")

    def folder(architecture: str) -> str:
        path = root / architecture
        if not path.exists():
            bos = architecture not in ("gpt2", "gptj", "gpt_neox")
            save_tiny(path, architecture, byte_level_bpe(bos))
        return str(path)

    return folder


@pytest.fixture
def tokenizers():
    """Return a new tokenizer of a kind: `tokenizers("word_level")`."""
    kinds = (byte_level_bpe, sentencepiece_style, word_level)
    return lambda name: {kind.__name__: kind for kind in kinds}[name]()


@pytest.fixture(scope="session")
def shared():
    """Return a path below EDITKIT_SHARED; skip the test, naming the path, where it is absent."""

    def find(name: str) -> Path:
        path = Path(os.environ.get("EDITKIT_SHARED", ROOT.parent / "shared")) / name
        if not path.exists():
            pytest.skip(f"{path} is missing")
        return path

    return find


@pytest.fixture(scope="session")
def edits():
    """A short stream about invented countries, with what any method may ask for."""
    subjects, targets = ["Alba", "Bera", "Cora", "Dora"], ["Oslo", "St. Louis", "Lima", "Bern"]
    return [
        Edit(
            id=i,
            prompt=f"the capital of {subject} is",
            target=target,
            subject=subject,
            negatives=("he works for Rome", "a big town and a small city"),
            rephrases=(f"{subject} is where he lives in",),
        )
        for i, (subject, target) in enumerate(zip(subjects, targets, strict=True))
    ]
