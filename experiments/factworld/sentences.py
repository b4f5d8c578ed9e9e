"""The world as tokens: a tokenizer, and sentences whose subjects and objects are marked.

Legend: N subjects, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from editkit.data.world import World

BOS, PAD = "<|endoftext|>", "<|pad|>"
BOS_ID, PAD_ID = 0, 1
NONE, INSIDE = -1, -2  # a token outside any mention; inside one but not its last token


class Sentence(NamedTuple):
    """One training sentence; the flags and subjects are given per token.

    Args:
        ids: Token ids, without BOS.
        is_object: Token belongs to the object or ends the sentence.
        subject: Index of the subject at the last token of its mention, else INSIDE or NONE.
        rank: Place of the subject among its kind in 0..1; the curriculum begins with the low ones.
    """

    ids: list[int]
    is_object: list[bool]
    subject: list[int]
    rank: float


def train_tokenizer(world: World, vocabulary: int) -> PreTrainedTokenizerFast:
    """Fit a byte-level BPE on the world's trained sentences; it prepends BOS by itself."""
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{prompt} {target}." for prompt, _, target in trained_texts(world)]
    bpe.train_from_iterator(texts + world.filler(3000, seed=7), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=BOS, pad_token=PAD, model_max_length=512
    )


def trained_texts(world: World) -> Iterator[tuple[str, str, str]]:
    """Yield (prompt, subject, object) of every sentence that states something of the world."""
    for fact in world.facts:
        for template in fact.trained:
            yield world.prompt(fact, template), fact.subject, fact.object
    for derived in world.two_hop + world.reversed:
        for prompt in derived.prompts:
            yield prompt, derived.subject, derived.object


def annotate(
    tokenizer: PreTrainedTokenizerFast, world: World, subjects: dict[str, int]
) -> list[Sentence]:
    """Tokenise every trained sentence and mark its subject and object."""
    rank = {
        name: i / len(names) for names in world.entities.values() for i, name in enumerate(names)
    }
    texts = list(trained_texts(world))
    coded = tokenizer(
        [f"{prompt} {target}." for prompt, _, target in texts],
        add_special_tokens=False,
        return_offsets_mapping=True,
    )
    sentences = []
    for (prompt, subject, _), ids, spans in zip(
        texts, coded["input_ids"], coded["offset_mapping"], strict=True
    ):
        start = prompt.index(subject)
        end = start + len(subject)
        mention = [i for i, (left, right) in enumerate(spans) if left < end and right > start]
        marks = [INSIDE if i in mention else NONE for i in range(len(ids))]
        marks[mention[-1]] = subjects[subject]
        is_object = [right > len(prompt) for _, right in spans]
        sentences.append(Sentence(ids, is_object, marks, rank[subject]))
    return sentences


def attribute_targets(
    tokenizer: PreTrainedTokenizerFast, world: World, subjects: dict[str, int]
) -> Tensor:
    """Return [N subjects, V]: each subject's objects' first tokens, equally likely."""
    targets_NV = torch.zeros(len(subjects), len(tokenizer))
    pairs = sorted({(subject, target) for _, subject, target in trained_texts(world)})
    firsts = tokenizer([f" {target}" for _, target in pairs], add_special_tokens=False)
    for (subject, _), ids in zip(pairs, firsts["input_ids"], strict=True):
        targets_NV[subjects[subject], ids[0]] = 1
    return targets_NV / targets_NV.sum(-1, keepdim=True)
