"""The world as training rows: a tokenizer, sentences with their spans, and packed rows.

Legend: B rows, T tokens, N sentences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

import lightning as L
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from editkit.data.world import World, WorldSize

BOS, PAD = "<|endoftext|>", "<|pad|>"
BOS_ID, PAD_ID = 0, 1
LOOKAHEAD = 32  # sentences among which one is sought that still fits into a row
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


class Rows(NamedTuple):
    """A batch of packed rows of sentences, each sentence ended by BOS."""

    ids_BT: Tensor
    object_BT: Tensor
    subject_BT: Tensor


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


class PackedRows(IterableDataset):
    """Shuffled sentences packed into rows, first of a part of the world and then of all of it.

    Args:
        facts: Sentences to learn, each seen once an epoch.
        filler: Sentences without facts, drawn at random.
        count: Number of rows to yield.
        length: Tokens a row.
        filler_share: Share of filler among the sentences.
        curriculum: (share of the rows, share of the entities) to begin with.
        seed: Seed of the order.
    """

    def __init__(
        self,
        facts: Sequence[Sentence],
        filler: Sequence[Sentence],
        count: int,
        length: int,
        filler_share: float,
        curriculum: tuple[float, float],
        seed: int,
    ) -> None:
        self.facts, self.filler = facts, filler
        self.count, self.length = count, length
        self.filler_share, self.curriculum, self.seed = filler_share, curriculum, seed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sentence]:
        rng = Random(self.seed)
        waiting: list[Sentence] = []
        done, row = 0, _fresh_row()
        while done < self.count:
            if len(waiting) < LOOKAHEAD:
                waiting += self._epoch(rng, done / self.count)
            room = self.length - len(row.ids) - 1
            fit = next((i for i in range(LOOKAHEAD) if len(waiting[i].ids) <= room), None)
            if fit is None:
                yield _padded(row, self.length)
                done, row = done + 1, _fresh_row()
                continue
            sentence = waiting.pop(fit)
            row.ids.extend([*sentence.ids, BOS_ID])
            row.is_object.extend([*sentence.is_object, False])
            row.subject.extend([*sentence.subject, NONE])

    def _epoch(self, rng: Random, progress: float) -> list[Sentence]:
        until, share = self.curriculum
        facts = [s for s in self.facts if progress >= until or s.rank < share]
        count = round(len(facts) * self.filler_share / (1 - self.filler_share))
        mixed = facts + rng.choices(self.filler, k=count)
        rng.shuffle(mixed)
        return mixed


def _fresh_row() -> Sentence:
    return Sentence([BOS_ID], [False], [NONE], 0.0)


def _padded(row: Sentence, length: int) -> Sentence:
    gap = length - len(row.ids)
    ids = row.ids + [PAD_ID] * gap
    return Sentence(ids, row.is_object + [False] * gap, row.subject + [NONE] * gap, 0.0)


def collate(rows: Sequence[Sentence]) -> Rows:
    """Stack rows of equal length."""
    ids, is_object, subject, _ = zip(*rows, strict=True)
    return Rows(torch.tensor(ids), torch.tensor(is_object), torch.tensor(subject))


class WorldText(L.LightningDataModule):
    """The world's sentences as batches of packed rows.

    Args:
        size: Numbers of entities of the world.
        seed: Seed of the world and of the order of its sentences.
        steps: Number of training batches.
        rows: Rows a batch.
        length: Tokens a row.
        vocabulary: Tokens of the BPE.
        filler_share: Share of sentences without facts.
        curriculum: Share of the rows for which only a share of the entities is taught.
    """

    def __init__(
        self,
        size: WorldSize,
        seed: int = 0,
        steps: int = 2600,
        rows: int = 32,
        length: int = 64,
        vocabulary: int = 2048,
        filler_share: float = 0.1,
        curriculum: tuple[float, float] = (0.15, 0.2),
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.world = World(seed, size)
        self.tokenizer = train_tokenizer(self.world, vocabulary)
        named = [
            name
            for kind in ("person", "country", "city", "company")
            for name in self.world.entities[kind]
        ]
        self.subjects = {name: i for i, name in enumerate(named)}

    def attributes(self) -> Tensor:
        """Return the targets of the auxiliary loss, one row a subject."""
        return attribute_targets(self.tokenizer, self.world, self.subjects)

    def train_dataloader(self) -> DataLoader[Rows]:
        """Return batches of packed rows."""
        config = self.hparams
        texts = self.world.filler(20_000, seed=config.seed + 1)
        filler = [
            Sentence(ids, [False] * len(ids), [NONE] * len(ids), 0.0)
            for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]
        rows = PackedRows(
            annotate(self.tokenizer, self.world, self.subjects),
            filler,
            config.steps * config.rows,
            config.length,
            config.filler_share,
            tuple(config.curriculum),
            config.seed,
        )
        return DataLoader(rows, batch_size=config.rows, collate_fn=collate)
