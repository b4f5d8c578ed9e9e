"""More rows of one edit: other wordings of it, or itself again, whatever the method.

A fact that was taught in several wordings survives later fine-tuning better (Wen & Zhang 2025); the
same number of repeats costs as much and is the control. The probes of an edit are never among them:
`rephrases` are texts to train on, and the data module refuses those that are asked.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from editkit.edits import Edit


def check_counts(paraphrases: int, repeats: int) -> tuple[int, int]:
    """Return both numbers.

    Raises:
        ValueError: If one is negative.
    """
    if paraphrases < 0 or repeats < 0:
        raise ValueError(f"paraphrases is {paraphrases}, repeats is {repeats}; use 0 or more")
    return paraphrases, repeats


def expanded(edits: list[Edit], paraphrases: int, repeats: int) -> list[Edit]:
    """Return each edit with the rephrases, or the repeats of itself, that are written with it.

    All rows of one wording stand together and the next wordings behind them, so that an edit's own
    are as far apart as a batch allows.

    Raises:
        ValueError: If an edit has too few rephrases.
    """
    for edit in edits:
        if len(edit.rephrases) < paraphrases:
            raise ValueError(
                f"edit {edit.id} ({edit.prompt!r}) has {len(edit.rephrases)} rephrases and "
                f"paraphrases is {paraphrases}; give it more `rephrases`, or set fewer paraphrases"
            )
    again = [edit for _ in range(repeats) for edit in edits]
    others = [replace(e, prompt=e.rephrases[i]) for i in range(paraphrases) for e in edits]
    return [*edits, *again, *others]


def as_asked(edits: list[Edit]) -> dict[int, Edit]:
    """Return each edit by its id in its own wording, which `expanded` puts first."""
    found: dict[int, Edit] = {}
    for edit in edits:
        found.setdefault(edit.id, edit)
    return found


def undisputed(edits: list[Edit], texts: Sequence[Hashable]) -> list[int]:
    """Return the `expanded` rows, as indices, whose prompts no other edit of the batch answers.

    A prompt belongs to the edit whose own it is before those that have it for a wording, and to a
    later edit before an earlier one. An edit that loses its own prompt is not made at all.

    Args:
        edits: Rows.
        texts: What their prompts are known by.
    """
    own: dict[int, Hashable] = {}
    for edit, text in zip(edits, texts, strict=True):
        own.setdefault(edit.id, text)
    owner = {text: edit.id for edit, text in zip(edits, texts, strict=True)}
    owner |= {text: edit_id for edit_id, text in own.items()}
    return [
        i
        for i, (edit, text) in enumerate(zip(edits, texts, strict=True))
        if owner[text] == owner[own[edit.id]] == edit.id
    ]
