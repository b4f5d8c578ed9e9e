"""Longer texts that a model goes on with from a prompt: how fluent, how like texts on the matter.

ROME and MEMIT let the model write up to 100 tokens, prompt included, each drawn from the five
likeliest. So do we, with random numbers that depend on seed and prompt alone: a text is the same
whatever its batch, and again on the next day.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editkit.functional.essays import ngram_entropy, words
from editkit.lm.decode import Ends
from editkit.lm.editable import EditableLM
from editkit.lm.reading import Reading

TOP_K = 5


@dataclass(frozen=True)
class ReferenceTexts:
    """Texts about things that share an answer, to compare a model's own texts with.

    ROME's `consistency`: cosine of the TF-IDF vectors of the text that an edited model writes and
    of the reference texts, joined, that go with the edit's new target. Frequencies are those of
    all texts in the file (ROME downloads its own). Needs scikit-learn, whose vectors ROME uses.

    Args:
        path: JSON object of target: list of texts.
    """

    path: Path

    @property
    def name(self) -> str:
        """File name and hash."""
        return f"{self.path.name} {hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]}"

    @cached_property
    def texts(self) -> dict[str, list[str]]:
        """The texts by target.

        Raises:
            ValueError: If the file is not such an object.
        """
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"reference_texts {str(self.path)!r}: {error}") from error
        is_mapping = isinstance(found, dict) and found
        if not is_mapping or not all(_is_texts(texts) for texts in found.values()):
            raise ValueError(
                f"reference_texts {str(self.path)!r} is no JSON object of target: [texts, ...]"
            )
        return dict(found)

    @cached_property
    def _vectors(self) -> Any:
        """A vectoriser that knows the frequencies of all texts."""
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise ValueError(
                "the scorer 'consistency' needs scikit-learn: pip install 'editkit[text]'"
            ) from error
        return TfidfVectorizer().fit([text for texts in self.texts.values() for text in texts])

    def consistency(self, text: str, target: str) -> float | None:
        """Return the cosine of a text and the target's texts; None where there are none."""
        if target not in self.texts:
            return None
        first, second = self._vectors.transform([text, " ".join(self.texts[target])])
        return float(first.multiply(second).sum())  # rows have length 1


def fluency(text: str) -> float:
    """Return the n-gram entropy of a text in bits, times 100 as the papers' tables have it."""
    return 100 * ngram_entropy(words(text))


def write_essays(
    lm: EditableLM, prompts: Sequence[str], size: int, batch_size: int, seed: int = 0
) -> list[str]:
    """Let a model go on from prompts, each token drawn from the five likeliest.

    Args:
        lm: Model to ask.
        prompts: One text per row.
        size: Tokens of a text, prompt included; a longer prompt gets one token more.
        batch_size: Rows per forward pass.
        seed: Seed of the draws.

    Returns:
        Prompt and continuation of each row.
    """
    essays = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        tokens = lm.encode([prompts[i] for i in rows], padding="left")
        room_B = (size - tokens.prompt_BT.sum(1)).clamp_min(1)
        draws_BN = torch.stack([_draws(prompts[i], size, seed) for i in rows]).to(lm.device)
        reading = Reading(lm, tokens)
        ids = reading.decode(Ends.of(lm, reading.tokens, room_B, 1, ()), draws_BN, TOP_K)
        heads = [
            row[kept].tolist() for row, kept in zip(tokens.ids_BT, tokens.prompt_BT, strict=True)
        ]
        whole = [head + new for head, new in zip(heads, ids, strict=True)]
        decode = partial(lm.tokenizer.batch_decode, skip_special_tokens=True)
        for i, text, head in zip(rows, decode(whole), decode(heads), strict=True):
            essays[i] = prompts[i].rstrip(" ") + text[len(head) :]
    return essays


def _draws(prompt: str, size: int, seed: int) -> Tensor:
    """Return uniform numbers [N] that belong to a prompt."""
    digest = hashlib.sha256(f"{seed} {prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(size, generator=generator)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(t, str) for t in value)
