"""Texts that a method may train on, set apart from those that are asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from editkit.data.drafts import Draft, Row
from editkit.data.source import plain


def set_apart(rows: Sequence[Row], rephrases: int, pool: Sequence[str]) -> tuple[list[Row], int]:
    """Give edits rephrases and negatives to train on, none of which is asked anywhere.

    Args:
        rows: Rows of the source.
        rephrases: Number of an edit's rephrasings to take out of its probes.
        pool: Unrelated texts, of which each edit gets one in turn; none where it is empty.

    Returns:
        The rows, and the number of texts left out since they are asked.

    Raises:
        ValueError: If every text of the pool is asked.
    """
    spared = [[_spare(draft, rephrases) for draft in row] for row in rows]
    asked = {text for row in spared for draft in row for text in _asked(draft)}
    unasked = [text for text in pool if plain(text) not in asked]
    if pool and not unasked:
        raise ValueError(f"all {len(pool)} texts of `negatives` are asked as probes; take others")
    left_out, position = len(pool) - len(unasked), 0
    found: list[Row] = []
    for row in spared:
        drafts = []
        for draft in row:
            edit = draft.edit
            kept = tuple(text for text in edit.rephrases if plain(text) not in asked)
            left_out += len(edit.rephrases) - len(kept)
            more = (unasked[position % len(unasked)],) if unasked else ()
            position += 1
            edit = replace(edit, rephrases=kept, negatives=(*edit.negatives, *more))
            drafts.append(replace(draft, edit=edit))
        found.append(drafts)
    return found, left_out


def _spare(draft: Draft, count: int) -> Draft:
    """Move the first rephrasings of an edit from its probes to its training texts."""
    edit = draft.edit
    mine = [p for p in draft.probes if p.kind == "generalization" and p.target == edit.target]
    taken = mine[:count]
    rephrases = (*edit.rephrases, *(probe.prompt for probe in taken))
    rest = [probe for probe in draft.probes if all(probe is not one for one in taken)]
    return replace(draft, edit=replace(edit, rephrases=rephrases), probes=rest)


def _asked(draft: Draft) -> Iterator[str]:
    """What a draft asks, as `editkit.data.source.leaks` compares it."""
    pairs = [(draft.edit.prompt, draft.edit.target)]
    pairs += [(p.prompt, p.target or "") for p in draft.probes]
    pairs += [(p.prompt, p.target or "") for p, _ in draft.shared]
    for prompt, target in pairs:
        yield plain(prompt)
        yield plain(f"{prompt} {target}")
