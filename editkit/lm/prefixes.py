"""Prefixes that a model writes itself, so that an edit holds wherever its prompt stands.

Source: ROME and MEMIT (Meng et al. 2022, 2023), which sample them the same way.
Legend: B rows, T tokens, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from editkit.lm.editable import EditableLM

SEEDS = ("The", "Therefore", "Because", "I", "You")


@torch.no_grad()
def make_prefixes(
    lm: EditableLM,
    count: int = 5,
    max_tokens: int = 10,
    top_k: int = 5,
    *,
    generator: torch.Generator,
) -> tuple[str, ...]:
    """Let the model write prefixes, each ending in ". "; call it under `lm.unedited()`.

    The bare prompt is not among them. Braces become spaces and special tokens are left out, so
    that a prefix can be encoded again without a second BOS.

    Args:
        lm: Model that writes.
        count: Number of prefixes; the opening words take turns.
        max_tokens: Length of each, opening word and BOS included.
        top_k: Likeliest tokens that each token is drawn from.
        generator: Source of randomness, on the CPU.

    Raises:
        ValueError: If the counts are below 1.
    """
    if min(max_tokens, top_k) < 1 or count < 0:
        raise ValueError(
            f"count is {count}, max_tokens is {max_tokens}, top_k is {top_k}; the last two must be "
            "at least 1"
        )
    rows = lm.policy.ids([SEEDS[i % len(SEEDS)] for i in range(count)], plain=True)
    unwanted = [i for i in lm.tokenizer.all_special_ids if i is not None]
    while short := [row for row in rows if len(row) < max_tokens]:
        tokens = lm.policy.pad(short, [[] for _ in short], [-1] * len(short)).to(lm.device)
        last_B = torch.tensor([len(row) - 1 for row in short], device=lm.device)
        logits_BV = lm(tokens)[torch.arange(len(short), device=lm.device), last_B].float().cpu()
        logits_BV[:, unwanted] = float("-inf")
        likeliest_BK, ids_BK = logits_BV.topk(min(top_k, logits_BV.shape[1] - len(unwanted)))
        drawn_B1 = torch.multinomial(likeliest_BK.softmax(-1), 1, generator=generator)
        for row, token in zip(short, ids_BK.gather(1, drawn_B1)[:, 0].tolist(), strict=True):
            row.append(token)
    texts: list[str] = lm.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return tuple(text.replace("{", " ").replace("}", " ").strip() + ". " for text in texts)


def planned_prefixes(lm: EditableLM, plan: Sequence[tuple[int, int]], seed: int) -> tuple[str, ...]:
    """Let the model write prefixes by a plan of numbers and lengths, from one seed."""
    dice = torch.Generator().manual_seed(seed)
    return tuple(chain(*(make_prefixes(lm, n, w, generator=dice) for n, w in plan)))


def strip_braces(prefixes: Sequence[str]) -> list[str]:
    """Return prefixes without the {} of a template, and without the bare prompt's empty one.

    Raises:
        ValueError: If text follows the {}.
    """
    cut = [prefix.removesuffix("{}") for prefix in prefixes]
    for prefix in cut:
        if "{}" in prefix:
            raise ValueError(f"prefix {prefix!r}: a prompt stands behind its prefix; end with {{}}")
    return [prefix for prefix in cut if prefix]
