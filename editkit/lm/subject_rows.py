"""The rows that locate-then-edit methods read: every prompt behind every prefix, at the subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from editkit.edits import Edit
from editkit.lm.editable import EditableLM

CHECKED = 1000  # edits whose rows are checked together


@dataclass(frozen=True, slots=True)
class Row:
    """One row of ids.

    Args:
        ids: Tokens without padding.
        place: Index of the subject's last token, whose state changes.
        lead: Which of the leads that rows share it begins with; 0 is the bare prompts'.
        wanted: Indices of the tokens whose logits are wanted, none left of the place.
        targets: Id that each of them should predict; empty where nothing is to be predicted.
    """

    ids: list[int]
    place: int
    lead: int
    wanted: Sequence[int] = ()
    targets: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class EditRows:
    """The rows of one edit.

    Args:
        contexts: Prompt and target behind each prefix, the bare prompt first; what is wanted are
            the tokens that predict the target.
        anchor: The text whose meaning must not change, up to its subject's last token, which is
            what is wanted.
    """

    contexts: list[Row]
    anchor: Row

    @property
    def all(self) -> list[Row]:
        """All rows, in the order of their leads."""
        return [*self.contexts, self.anchor]


def encode_edits(
    lm: EditableLM, edits: Sequence[Edit], prefixes: Sequence[str], anchor: str
) -> list[EditRows]:
    """Encode a batch of edits.

    Args:
        lm: Whose tokens.
        edits: Edits with subjects.
        prefixes: Texts that end where a prompt begins.
        anchor: Text with {} for the subject.

    Raises:
        ValueError: If an edit has no subject, its subject is not in its prompt, or a row is too
            long for the model.
    """
    check_subjects(edits)
    before = ["", *prefixes]
    subjects = [str(edit.subject) for edit in edits]
    texts = [prefix + edit.prompt for edit in edits for prefix in before]
    heads, tails = lm.policy.pieces(texts, [edit.target for edit in edits for _ in before])
    places = lm.policy.subject_indices(texts, [s for s in subjects for _ in before])
    contexts = [
        _context(head, tail, place, i % len(before))
        for i, (head, tail, place) in enumerate(zip(heads, tails, places, strict=True))
    ]
    longest = max(range(len(contexts)), key=lambda i: len(contexts[i].ids))
    try:
        lm.check_length(lm.policy.pad([contexts[longest].ids], [[]], [-1]))
    except ValueError as error:
        raise ValueError(f"edit {edits[longest // len(before)].id}: {error}") from error
    anchored = lm.policy.ids([anchor.replace("{}", subject) for subject in subjects], plain=True)
    ends = lm.policy.template_indices(anchor, subjects)
    return [
        EditRows(contexts[i * len(before) : (i + 1) * len(before)], _anchor(ids, end, len(before)))
        for i, (ids, end) in enumerate(zip(anchored, ends, strict=True))
    ]


def check_edits(lm: EditableLM, edits: Sequence[Edit], prefixes: Sequence[str]) -> None:
    """Refuse edits that `encode_edits` refuses, without keeping their rows."""
    for start in range(0, len(edits), CHECKED):
        encode_edits(lm, edits[start : start + CHECKED], prefixes, "{}")


def check_subjects(edits: Sequence[Edit]) -> None:
    """Refuse edits whose subject is missing.

    Raises:
        ValueError: If an edit has no subject, or its prompt does not hold it.
    """
    for edit in edits:
        if not edit.subject:
            raise ValueError(
                f"edit {edit.id} ({edit.prompt!r}) has no subject, and locate-then-edit methods "
                "write at its last token: give `subject`, a part of the prompt, or take another "
                "method (FT)"
            )
        if edit.subject not in edit.prompt:
            raise ValueError(
                f"subject {edit.subject!r} not found in prompt {edit.prompt!r} (edit {edit.id})"
            )


def _context(head: list[int], tail: list[int], place: int, lead: int) -> Row:
    """Lay out a prompt's ids and its target's; the last target token is predicted, never read."""
    wanted = range(len(head) - 1, len(head) + len(tail) - 1)
    # where a merge crosses the subject's end there are fewer tokens than were counted up to it
    return Row(head + tail[:-1], min(place, len(head) - 1), lead, wanted, tail)


def _anchor(ids: list[int], end: int, lead: int) -> Row:
    """Cut an anchor behind its place, where its distribution is wanted."""
    end = min(end, len(ids) - 1)
    return Row(ids[: end + 1], end, lead, [end])


def shared_leads(rows: Sequence[EditRows]) -> list[list[int]]:
    """Return the ids that all rows of a lead begin with, none of them as far as a place."""
    leads = []
    for same in zip(*(edit.all for edit in rows), strict=True):
        length = min(row.place for row in same)
        columns = zip(*(row.ids[:length] for row in same), strict=True)
        shared = next((t for t, ids in enumerate(columns) if len(set(ids)) > 1), length)
        leads.append(same[0].ids[:shared])
    return leads
