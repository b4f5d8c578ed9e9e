"""Sentences of the world packed into rows, in the order of the curriculum.

Legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

import lightning as L
import torch
from sentences import (
    BOS_ID,
    NONE,
    PAD_ID,
    Sentence,
    annotate,
    attribute_targets,
    train_tokenizer,
)
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from editkit.data.world import World, WorldSize

LOOKAHEAD = 32  # sentences among which one is sought that still fits into a row


class Rows(NamedTuple):
    """A batch of packed rows of sentences, each sentence ended by BOS."""

    ids_BT: Tensor
    object_BT: Tensor
    subject_BT: Tensor


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
