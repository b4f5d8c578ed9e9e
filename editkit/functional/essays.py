"""How a longer text reads: n-gram entropy of its words (ROME, MEMIT: fluency)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

# Numbers with their separators, words up to a contraction, what a contraction leaves, signs of
# scripts without spaces one by one, then any other mark by itself.
_WORDS = re.compile(
    r"\d+(?:[.,]\d+)*"
    r"|[\u3040-\u30ff\u3400-\u9fff]"
    r"|\w+?(?=n['\u2019]t\b)|n['\u2019]t\b|['\u2019](?:s|re|ve|ll|d|m)\b"
    r"|\w+(?:-\w+)*"
    r"|[^\w\s]",
    re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """Split a text into words and marks much as the Penn Treebank does; needs no download.

    ROME uses nltk's `word_tokenize`, which needs a downloaded sentence model. It differs from this
    in rare signs: it tells opening from closing quotes and keeps an ellipsis as one.

    >>> words("Don't stop: it's 3.50, well-known.")
    ['Do', "n't", 'stop', ':', 'it', "'s", '3.50', ',', 'well-known', '.']
    """
    return _WORDS.findall(text)


def ngram_entropy(tokens: Sequence[str]) -> float:
    """Entropy in bits of 2-grams and 3-grams, weighted 1/3 and 2/3 (ROME's fluency, unscaled).

    >>> round(ngram_entropy("a b a b".split()), 4)
    0.9728
    """
    return _entropy(tokens, 2) / 3 + _entropy(tokens, 3) * 2 / 3


def _entropy(tokens: Sequence[str], n: int) -> float:
    """Entropy in bits of the frequencies of n-grams; 0 where there is none."""
    counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return sum((c / total * math.log2(total / c) for c in counts.values()), 0.0)
