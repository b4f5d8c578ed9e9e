"""The two text records of editkit: an edit to make true and a probe to ask afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ProbeKind = Literal["reliability", "generalization", "locality", "portability", "intrinsic"]
PROBE_KINDS: tuple[str, ...] = get_args(ProbeKind)


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
    """

    id: int
    prompt: str
    target: str
    subject: str | None = None
    negatives: tuple[str, ...] = ()
    rephrases: tuple[str, ...] = ()


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
    """

    id: str
    edit_id: int | None
    kind: ProbeKind
    prompt: str
    target: str | None = None
    axis: str = ""
    conditions: tuple[tuple[str, str], ...] = ()
