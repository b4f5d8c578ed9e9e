"""Quirks of released evaluation code, reproduced for comparison with published tables.

All are off by default and named in `EvalProtocol.compat`. They change `token_accuracy` and
`sequence_accuracy` of answers that are judged against a target, and nothing else.

The zsRE code that ROME, MEMIT, AlphaEdit and LyapLock share asks each token of an answer by a text
of its own: the prompt and what the tokens so far decode to, encoded anew.

- `zsre_retokenised`: that, and no more (the released figures on GPT-2 and GPT-J).
- `zsre_double_space`: besides, a second space stands between prompt and partial answer, from the
  second token on (released figures on Llama; meant for Llama-2's tokenizer, in force for Llama-3).
- `zsre_bos_answer`: besides, BOS is the first token of a locality answer, never said, and is in
  the text of what follows (on Llama; depresses its specificity).

CounterFact's code needs no switch: its success is `pair` and its magnitude `pair_diff`, for the
neighbourhood on rows of `locality_gold`, and its `correct` is `sequence_accuracy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from editkit.functional.scores import Scores
from editkit.lm.editable import EditableLM
from editkit.lm.reading import Reading
from editkit.metrics.protocol import Quirk


class Answered(NamedTuple):
    """A prompt, its answer, and whether it is the gold answer of a locality probe."""

    prompt: str
    target: str
    is_locality: bool


def zsre_scores(
    lm: EditableLM, rows: Sequence[Answered], compat: Sequence[Quirk], batch_size: int
) -> list[Scores]:
    """Score answers token by token, each behind a text of its own.

    Args:
        lm: Model to ask.
        rows: What to score.
        compat: Quirks to reproduce.
        batch_size: Texts per forward pass.

    Returns:
        `token_accuracy` and `sequence_accuracy` of each row.
    """
    texts: list[str] = []
    wanted: list[int] = []
    sizes = []
    for row in rows:
        answer = _answer_ids(lm, row, "zsre_bos_answer" in compat)
        space = " " if "zsre_double_space" in compat and not row.is_locality else ""
        sizes.append(len(answer))
        for i, token in enumerate(answer):
            texts.append(row.prompt + (space + lm.tokenizer.decode(answer[:i]) if i else ""))
            # compared with what its own text encodes to, which broken UTF-8 can make another token
            again = lm.policy.ids([lm.tokenizer.decode([token])])[0][lm.policy.adds_bos :]
            wanted.append(again[0] if again else -1)
    hits = [said == token for said, token in zip(_said(lm, texts, batch_size), wanted, strict=True)]
    found: list[Scores] = []
    for size in sizes:
        part, hits = hits[:size], hits[size:]
        found.append({
            "token_accuracy": sum(part) / size, "sequence_accuracy": float(all(part)),
        })  # fmt: skip
    return found


def _answer_ids(lm: EditableLM, row: Answered, keep_bos: bool) -> list[int]:
    """Return the answer's ids behind a space, with BOS only by the quirk."""
    ids = lm.policy.ids([f" {row.target}"])[0]
    return ids if keep_bos and row.is_locality else ids[lm.policy.adds_bos :]


@torch.no_grad()
def _said(lm: EditableLM, texts: list[str], batch_size: int) -> list[int]:
    """Return the likeliest token behind each text."""
    unique = list(dict.fromkeys(texts))
    heads = dict(zip(unique, lm.policy.ids(unique), strict=True))
    order = sorted(unique, key=lambda text: -len(heads[text]))
    said: dict[str, int] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        nothing: list[list[int]] = [[] for _ in batch]
        tokens = lm.policy.pad([heads[t] for t in batch], nothing, [-1] * len(batch), "left")
        reading = Reading(lm, tokens.to(lm.device))
        best_B = reading.logits(reading.prompt_end_BT).argmax(-1)
        said.update(zip(batch, best_B.tolist(), strict=True))
    return [said[text] for text in texts]
