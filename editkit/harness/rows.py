"""From the harness' texts to rows of ids, tokenised as the harness' own `HFLM` does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from editkit.lm.editable import EditableLM

log = logging.getLogger(__name__)

LONGEST = 2048  # tokens of a row where the model names no limit, as in the harness
NEW_TOKENS = 256  # budget of an answer where a task names none, as in the harness


class Row(NamedTuple):
    """Ids of a context, and of what is asked about behind it."""

    head: list[int]
    tail: list[int]


def longest_row(lm: EditableLM) -> int:
    """Return how many tokens a row may have."""
    return lm.max_positions if lm.max_positions < 2**31 else LONGEST


def prefix_id(lm: EditableLM) -> int:
    """Return what stands in front of a text that has no context: BOS, else EOS."""
    for found in (lm.tokenizer.bos_token_id, lm.policy.eos_id):
        if found is not None:
            return int(found)
    return lm.policy.pad_id


def pair_rows(lm: EditableLM, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """Encode contexts with their continuations; spaces between them go with the continuation."""
    heads = [context.rstrip() for context, _ in pairs]
    wholes = [context + continuation for context, continuation in pairs]
    head_ids, whole_ids, prefix = lm.policy.ids(heads), lm.policy.ids(wholes), prefix_id(lm)
    rows: list[Row] = []
    for head, whole, ids, all_ids in zip(heads, wholes, head_ids, whole_ids, strict=True):
        if head:
            rows.append(Row(ids, all_ids[len(ids) :]))
            continue
        bare = list(lm.tokenizer(whole, add_special_tokens=False)["input_ids"])
        rows.append(Row([prefix], bare[1:] if bare[:1] == [prefix] else bare))
    return rows


def window_rows(lm: EditableLM, text: str) -> list[Row]:
    """Cut a text into windows; each token is in the tail of one, behind what fits before it."""
    size, prefix = longest_row(lm), prefix_id(lm)
    ids = lm.policy.ids([text])[0]
    ids = [prefix, *(ids[1:] if ids[:1] == [prefix] else ids)]
    rows: list[Row] = []
    start = 1
    while start < len(ids):
        stop = min(start + size - 1, len(ids))
        rows.append(Row(ids[max(stop - size, 0) : start], ids[start:stop]))
        start = stop
    return rows


def cut_left(lm: EditableLM, rows: Sequence[Row]) -> list[Row]:
    """Drop the oldest context of rows beyond the model's positions.

    Raises:
        ValueError: If a continuation alone is too long.
    """
    longest = longest_row(lm)
    cut, dropped = [], 0
    for head, tail in rows:
        over = max(len(head) + len(tail) - longest, 0)
        if over >= len(head):
            raise ValueError(
                f"a continuation of {len(tail)} tokens does not fit into the {longest} positions "
                f"of {lm.spec.id}; leave this task out"
            )
        dropped += over > 0
        cut.append(Row(head[over:], tail))
    if dropped:
        log.warning("%d of %d contexts lose what exceeds %d tokens", dropped, len(cut), longest)
    return cut


def stops_and_budget(wanted: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Read stop strings and the budget of new tokens from a task's `generation_kwargs`.

    Raises:
        ValueError: If the task asks for sampling.
    """
    warm = float(wanted.get("temperature") or 0) > 0
    if wanted.get("do_sample", warm):
        raise ValueError(
            f"a task asks for sampled answers ({wanted}), editkit answers greedily; write "
            "do_sample: false into its generation_kwargs"
        )
    until = wanted.get("until") or []
    stops = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    budgets = [int(wanted[name]) for name in names if wanted.get(name) is not None]
    return stops, (*budgets, NEW_TOKENS)[0]
