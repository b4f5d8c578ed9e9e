"""Openings of texts that concern no edit, from a corpus or of the model's own writing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch

from editkit.lm.corpus import PACKAGED, read_corpus
from editkit.lm.decode import Ends
from editkit.lm.editable import EditableLM
from editkit.lm.reading import Reading

STARTS = ("I", "You", "Because", "Yes", "Q:")  # as EasyEdit's WISE begins its contexts
SHORTEST, LONGEST = 6, 32  # words of a text that are read, the last of which is left out
WRITTEN = 16  # tokens that the model writes where there is no corpus
AT_ONCE = 256


def written(
    lm: EditableLM, starts: Sequence[str], length: int, generator: torch.Generator
) -> list[str]:
    """Let a model write on from each start, each token one of its five likeliest.

    Args:
        lm: Model that writes; call it under `lm.unedited()`.
        starts: First words of each text.
        length: Tokens to add; a text also ends at EOS.
        generator: Source of randomness, on the CPU.
    """
    texts: list[str] = []
    for i in range(0, len(starts), AT_ONCE):
        part = list(starts[i : i + AT_ONCE])
        reading = Reading(lm, lm.encode(part))
        shape = len(part), length
        draws_BN = torch.rand(shape, generator=generator, dtype=torch.float32).to(lm.device)
        rows = reading.decode(Ends.of(lm, reading.tokens, length, 1, ()), draws_BN)
        texts += [f"{a} {b}" for a, b in zip(part, lm.texts(rows), strict=True)]
    return texts


def unrelated_prompts(lm: EditableLM, source: str | None, count: int, seed: int) -> list[str]:
    """Return openings of texts, which end as prompts do: in front of a word.

    Args:
        lm: Base model, unedited.
        source: Corpus of the texts, as `read_corpus` takes it; None takes the base model's own
            `corpus.txt`, and where it has none, what the model writes itself.
        count: Prompts at most.
        seed: Seed of the choice of texts, of their order, and of where they are cut.

    Raises:
        ValueError: If the corpus has no text to read.
    """
    rng = Random(seed)
    if source is not None or (Path(lm.spec.path) / PACKAGED).is_file():
        texts = read_corpus(source, count, lm.spec, seed).texts
    else:
        generator = torch.Generator().manual_seed(seed)
        starts = [STARTS[i % len(STARTS)] for i in range(count)]
        texts = written(lm, starts, WRITTEN, generator)
    rng.shuffle(texts)
    opened = [" ".join(text.split()[: rng.randint(SHORTEST, LONGEST)][:-1]) for text in texts]
    return [text for text in opened if text and len(lm.policy.ids([text])[0]) <= lm.max_positions]


def shared_prompts(
    lm: EditableLM, source: str | None, wanted: tuple[int, int], seed: int
) -> tuple[list[str], list[str]]:
    """Return unrelated prompts for two uses; of few texts each gets its share, but one at least.

    Args:
        lm: As `unrelated_prompts` takes it, like `source` and `seed`.
        source: Corpus.
        wanted: Prompts that each use would have; 0 leaves it without.
        seed: Seed.

    Raises:
        ValueError: If there is not one for each use.
    """
    prompts = unrelated_prompts(lm, source, sum(wanted), seed)
    n = len(prompts) * wanted[0] // sum(wanted)
    if all(wanted):
        if len(prompts) < 2:
            raise ValueError(
                f"the corpus {source!r} gives {len(prompts)} unrelated prompts, and two are the "
                "least: name one with more texts, of two words at least, as `corpus`"
            )
        n = min(max(n, 1), len(prompts) - 1)
    return prompts[:n], prompts[n:]
