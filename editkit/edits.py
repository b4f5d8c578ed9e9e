"""The two text records of editkit: an edit to make true and a probe to ask afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

ProbeKind = Literal["reliability", "generalization", "locality", "portability", "intrinsic"]


@dataclass(frozen=True, slots=True)
class Edit:
    """One sentence to make true.

    Args:
        id: Position in the stream, which is the clock of the run.
        prompt: Text up to the answer.
        target: Answer to write, without a leading space (`editkit.lm.tokens` decides on spaces).
        subject: Entity the fact is about, a substring of `prompt`; None where the data has none.
        negatives: Unrelated texts that a method may see while editing.
        rephrases: Other wordings of `prompt` that a method may train on; never among the probes.
        relation: What the fact says of its subject, such as `capital` or Wikidata's `P36`, to break
            scores down by; empty where the data has none.
    """

    id: int
    prompt: str
    target: str
    subject: str | None = None
    negatives: tuple[str, ...] = ()
    rephrases: tuple[str, ...] = ()
    relation: str = ""


def next_id(ledger: Sequence[dict[str, Any]], edits_seen: int) -> int:
    """Return the lowest id above those of all edits made; edits taken back leave theirs free."""
    made: list[int] = [e["edit_id"] for e in ledger if not e.get("rolled_back")]
    return max(edits_seen, 1 + max(made, default=-1))


def check_ids(edits: Sequence[Edit], ledger: Sequence[dict[str, Any]], edits_seen: int) -> None:
    """Refuse an id that two edits would have: undo, probes and memories tell edits apart by it.

    Raises:
        ValueError: If an id is used before or twice; names the next free one.
    """
    taken = {e["edit_id"]: e["prompt"] for e in ledger if not e.get("rolled_back")}
    for edit in edits:
        if edit.id in taken:
            free = max(next_id(ledger, edits_seen), *(e.id + 1 for e in edits))
            raise ValueError(
                f"id {edit.id} of edit {edit.prompt!r} is that of {taken[edit.id]!r} already; every"
                f" edit needs an id of its own, and the next free one is {free}"
            )
        taken[edit.id] = edit.prompt


@dataclass(frozen=True, slots=True)
class Probe:
    """One question asked after editing; never shown to a method's `edit`.

    Args:
        id: Unique name of the probe in its run.
        edit_id: `Edit.id` it belongs to; None where it belongs to no edit (asked always).
        kind: What a good answer shows.
        prompt: Text up to the answer.
        target: Expected answer without a leading space. A locality probe is always compared with
            the unedited model; its target, where there is one, is the gold answer scored apart.
        axis: Finer name within the kind, such as `same_subject` or `two_hop`.
        conditions: (prompt, answer) pairs; the probe counts only where the unedited model gives
            every one of these answers (RippleEdits' condition queries).
        rival: The answer that `target` is compared with (`pair`): the old answer where the target
            is the new one; for CounterFact's neighbours, whose target is true, the edit's new one.
        aliases: Further right answers beside `target`.
        group: Name shared by several wordings of one question: it counts as answered where any of
            them is (MQuAKE's three multi-hop questions a case). Empty where the probe stands alone.
        choices: Wrong answers that `target` is chosen among (`choice`); as many as the data has.
    """

    id: str
    edit_id: int | None
    kind: ProbeKind
    prompt: str
    target: str | None = None
    axis: str = ""
    conditions: tuple[tuple[str, str], ...] = ()
    rival: str | None = None
    aliases: tuple[str, ...] = ()
    group: str = ""
    until: int | None = None

    def is_due(self, edits_seen: int) -> bool:
        """Whether to ask this after `edits_seen` edits: its own is made, none overwrote it."""
        begun = self.edit_id is None or self.edit_id < edits_seen
        return begun and (self.until is None or edits_seen <= self.until)

    choices: tuple[str, ...] = ()
