"""Tiny random models whose edited twin is also built by plain transformers, for comparison."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from editkit.adapters.delta import DeltaLayer
from editkit.edits import Probe
from editkit.lm.editable import EditableLM
from editkit.lm.spec import LMSpec

BUDGET = 12  # new tokens per answer, few for speed
WORDS = [f"w{i}" for i in range(40)] + ["St", "Louis", "is", "in", "."]


def word_tokenizer() -> Any:
    """Words and full stops, with a BOS in front."""
    special = ["<s>", "</s>", "<unk>"]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(special + WORDS)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_tokenizer() -> Any:
    """Byte-level merges as in GPT-2, without BOS."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<|endoftext|>"], show_progress=False
    )
    core.train_from_iterator([" ".join(WORDS)] * 9, trainer)  # most tokens are a word and its space
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")


def build(family: str) -> tuple[Any, Any]:
    """Return (model, tokenizer), random and wide awake: large weights part the logits."""
    if family == "llama":
        tokenizer = word_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=1,
        )
        return _talks_in_sentences(LlamaForCausalLM(config), tokenizer), tokenizer
    tokenizer = byte_tokenizer()
    shape = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=3,
        n_head=2,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    # transformers 4 makes GPT-2's mask for sdpa in fp32 whatever the dtype, too small for fp64
    model = GPT2LMHeadModel._from_config(shape, attn_implementation="eager")
    return _talks_in_sentences(model, tokenizer), tokenizer


def _talks_in_sentences(model: Any, tokenizer: Any) -> Any:
    """Draw weights, the same under every version, and make full stops likely: answers end."""
    draw = torch.Generator().manual_seed(0)
    for _, weight in sorted(model.named_parameters()):
        if weight.ndim > 1:
            weight.data.normal_(std=0.4, generator=draw)
    stop = tokenizer(".", add_special_tokens=False)["input_ids"]
    model.get_output_embeddings().weight.data[stop] *= 2.5
    return model.double().eval()  # so that rounding decides no comparison


@dataclass
class Twins:
    """An edited EditableLM, and what it must equal: two plain models, before and after.

    Args:
        lm: The edited model.
        before: The base as transformers built it.
        after: The same with the change added into its weight.
        tokenizer: Their tokenizer.
    """

    lm: EditableLM
    before: Any
    after: Any
    tokenizer: Any

    def forced(self, model: Any, prompt: str, target: str) -> tuple[torch.Tensor, list[int]]:
        """Return (fp64 log-probabilities at the target, target ids) of one row alone."""
        head = self.tokenizer(prompt)["input_ids"]
        whole = self.tokenizer(f"{prompt} {target}")["input_ids"]
        assert whole[: len(head)] == head
        with torch.no_grad():
            logits_TV = model(torch.tensor([whole])).logits[0]
        places = range(len(head) - 1, len(whole) - 1)
        return torch.log_softmax(logits_TV.float().double(), -1)[list(places)], whole[len(head) :]

    def free(self, model: Any, prompt: str, budget: int) -> str:
        """Return the greedy continuation of one row, token by token and without a cache."""
        ids = self.tokenizer(prompt)["input_ids"]
        start = len(ids)
        for _ in range(budget):
            with torch.no_grad():
                best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if best == self.tokenizer.eos_token_id:
                break
            ids = [*ids, best]
        text: str = self.tokenizer.decode(ids[start:], skip_special_tokens=True)
        return text.strip()


@pytest.fixture(params=["llama", "gpt2"])
def twins(request) -> Twins:
    """Both families, edited by one random change that turns some answers and leaves others."""
    model, tokenizer = build(request.param)
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    lm = EditableLM(model, tokenizer, LMSpec(id=request.param))
    path = lm.site(1).path
    layer = lm.attach(path, DeltaLayer)
    assert isinstance(layer, DeltaLayer)
    draw = torch.Generator().manual_seed(3)
    delta_DF = 0.06 * torch.randn(layer.delta.shape, generator=draw)
    layer.add(delta_DF)
    weight = after.get_submodule(path).weight
    weight.data += delta_DF.T if layer.is_transposed else delta_DF
    return Twins(lm, before, after, tokenizer)


def first_words(text: str, count: int) -> str:
    """Return the first words of an answer, up to a full stop."""
    return " ".join(text.split(".")[0].split()[:count])


@pytest.fixture
def probes(twins) -> list[Probe]:
    """Probes of every kind, some answered right by the edited model and some not."""
    made = []
    for i in range(24):
        prompt = " ".join(WORDS[(i * 7 + j * 3) % 40] for j in range(1 + i % 5)) + " is in"
        wrong = " ".join(WORDS[(i * 5 + j) % 40] for j in range(1 + i % 3))
        said = twins.free(twins.after, prompt, BUDGET)
        right = first_words(said, 99 if i % 16 < 4 else 1 + i % 3)
        kind = ("reliability", "generalization", "locality", "portability")[i % 4]
        target: str | None = right or wrong if i % 8 < 4 else wrong
        if kind == "locality" and i % 3 == 0:
            target = None
        made.append(Probe(f"p{i}", i // 3, kind, prompt, target, axis="x" if i % 2 else ""))
    return made
