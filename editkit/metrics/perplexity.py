"""Perplexity on held-out text: how much of the model's general ability editing has cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from editkit.functional.scores import token_nll
from editkit.lm.editable import EditableLM
from editkit.lm.tokens import TokenPolicy, Tokens
from editkit.parallel import ranks_of


@torch.no_grad()
def perplexity(
    lm: EditableLM, texts: Sequence[str], max_tokens: int = 512, batch_size: int = 4
) -> float | None:
    """Exponential of the mean negative log-likelihood per token over all texts.

    Texts are plain text even for a chat model. With a tokenizer that puts BOS in front, the first
    word is predicted too, else prediction starts at the second token. A routed method routes on
    the whole text, as it would on a prompt.

    Args:
        lm: The model as it stands.
        texts: Held-out texts; blank ones are left out.
        max_tokens: A text's tokens beyond this, or beyond the model's positions, are cut off.
        batch_size: Texts per forward pass.

    Returns:
        The perplexity, at most exp(700); None where no token is predicted.
    """
    positions = getattr(lm.model.config, "max_position_embeddings", None) or max_tokens
    policy = TokenPolicy(lm.tokenizer)
    ordered = sorted((t for t in texts if t.strip()), key=len, reverse=True)
    ranks, found = ranks_of(lm.model), torch.zeros(2, dtype=torch.float64)
    for start in range(ranks.rank * batch_size, len(ordered), ranks.size * batch_size):
        tokens = policy.encode(ordered[start : start + batch_size])
        tokens = _all_but_first(tokens, min(max_tokens, positions)).to(lm.device)
        nll_N = token_nll(lm.target_logits(tokens), tokens.target_ids_N).cpu().double()
        found += torch.tensor([float(nll_N.sum()), len(nll_N)], dtype=torch.float64)
    ranks.add_up([found])
    total, count = found.tolist()
    return math.exp(min(total / count, 700.0)) if count else None


def _all_but_first(tokens: Tokens, width: int) -> Tokens:
    """Cut right-padded rows to a width and make every token but the first a target."""
    ids_BT, mask_BT = tokens.ids_BT[:, :width], tokens.mask_BT[:, :width]
    target_BT = mask_BT.clone()
    target_BT[:, 0] = False
    return replace(tokens, ids_BT=ids_BT, mask_BT=mask_BT, prompt_BT=mask_BT, target_BT=target_BT)
