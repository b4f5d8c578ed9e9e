"""The two text records of editkit: an edit to make true and a probe to ask afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
