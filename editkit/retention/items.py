"""The questions of a retention run, frozen before anything is trained.

Five sets, told apart by a letter:

    E  edited facts: the edited prompt (`rewrite`), other wordings (`rephrase`), and the answer that
       the edit replaced (`old`), for margins
    K  intrinsic facts: known to the base model and touched by no edit
    U  statements that the base model never knew; they should stay wrong
    N  neighbours of the edits, which these should have left alone
    P  what follows from the edits
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from editkit.adapters.io import write_lines
from editkit.callbacks.rows import read_rows
from editkit.data.decontaminate import Fact
from editkit.edits import Edit, Probe
from editkit.retention.source import EditedRun

SetName = Literal["E", "K", "U", "N", "P"]
PROMPT_KINDS: dict[str, tuple[SetName, str]] = {
    "reliability": ("E", "rewrite"),
    "generalization": ("E", "rephrase"),
    "locality": ("N", "neighbour"),
    "portability": ("P", "portability"),
}


@dataclass(frozen=True)
class ProbeSets:
    """How many questions of which kind.

    Args:
        facts: File of true facts to draw the intrinsic ones from, JSON lines with `prompt`,
            `subject`, `target`; none takes facts of the run's own source that were not edited.
        intrinsic_per_edit: Intrinsic facts asked, for each edit.
        matched_per_edit: Of these, matched to each edit by relation and by confidence.
        unknown: Statements that the base model never knew.
        rephrases: Rephrases of an edit at most; none asks all.
        neighbours: Neighbours of an edit at most; none asks all.
        seed: Seed of what is drawn.
    """

    facts: Path | None = None
    intrinsic_per_edit: int = 4
    matched_per_edit: int = 2
    unknown: int = 50
    rephrases: int | None = None
    neighbours: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check user input."""
        if self.intrinsic_per_edit < 1 or self.matched_per_edit < 0 or self.unknown < 0:
            raise ValueError(
                f"intrinsic_per_edit is {self.intrinsic_per_edit}, matched_per_edit is "
                f"{self.matched_per_edit}, unknown is {self.unknown}; use 1 or more, and 0 or more"
            )
        for name in ("rephrases", "neighbours"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"probes.{name} is {value}; use 0 or more, or leave it out")


@dataclass(frozen=True, slots=True)
class Item:
    """One question and what is known of it beforehand.

    Args:
        set: Letter of its set.
        prompt_kind: What kind of question.
        probe: As the evaluator asks it.
        relation: Relation of the fact; empty where the data has none.
        subject: What the fact is about; empty where not known.
        old: What was true before the edit; None where the data does not say, or nothing was edited.
    """

    set: SetName
    prompt_kind: str
    probe: Probe
    relation: str = ""
    subject: str = ""
    old: str | None = None

    @property
    def id(self) -> str:
        """Name, unique in the run."""
        return self.probe.id


def make_items(run: EditedRun, sets: ProbeSets) -> list[Item]:
    """Gather the questions of a run; the same run and settings give the same ones."""
    items = [*_asked(run, sets)]
    count = sets.intrinsic_per_edit * len(run.standing)
    for n, fact in enumerate(run.untouched(sets.facts, count, sets.seed)):
        items.append(_plain("K", "intrinsic", f"K{n}", fact))
    for n, fact in enumerate(run.unknown(sets.unknown, sets.seed)):
        items.append(_plain("U", "unknown", f"U{n}", fact))
    return items


def _asked(run: EditedRun, sets: ProbeSets) -> list[Item]:
    """Return what the run itself asks of the edits that stand."""
    found, counts = [], {}
    most = {"rephrase": sets.rephrases, "neighbour": sets.neighbours}
    end = max(edit.id for edit in run.data.edits) + 1
    for probe in run.data.probes:
        edit = run.standing.get(-1 if probe.edit_id is None else probe.edit_id)
        if edit is None or not probe.is_due(end) or probe.kind not in PROMPT_KINDS:
            continue
        letter, kind = PROMPT_KINDS[probe.kind]
        key = (edit.id, kind)
        counts[key] = counts.get(key, 0) + 1
        limit = most.get(kind)
        if limit is not None and counts[key] > limit:
            continue
        old = run.old_answers.get(edit.id) if letter == "E" else None
        if old is not None and probe.rival is None:
            probe = replace(probe, rival=old)
        found.append(Item(letter, kind, probe, edit.relation, edit.subject or "", old))
        if kind == "rewrite" and old is not None:
            before = Probe(f"{probe.id}.old", edit.id, "intrinsic", probe.prompt, old)
            found.append(Item("E", "old", before, edit.relation, edit.subject or "", old))
    return found


def _plain(letter: SetName, kind: str, name: str, fact: Edit) -> Item:
    probe = Probe(name, None, "intrinsic", fact.prompt, fact.target)
    return Item(letter, kind, probe, fact.relation, fact.subject or "")


def facts_of(run: EditedRun, items: list[Item]) -> list[Fact]:
    """Return the facts that fine-tuning texts must not touch: all edits, all intrinsic facts."""
    facts = [
        Fact(e.prompt, (e.subject,) if e.subject else (),
             tuple(dict.fromkeys(a for a in (e.target, run.old_answers.get(e.id)) if a)))
        for e in run.standing.values()
    ]  # fmt: skip
    for item in items:
        if item.set == "K":
            probe = item.probe
            names = (item.subject,) if item.subject else ()
            facts.append(Fact(probe.prompt, names, (probe.target or "", *probe.aliases)))
    return facts


def fingerprint(items: list[Item]) -> str:
    """Hash of all that is asked."""
    text = json.dumps([asdict(item) for item in items], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def freeze(path: Path, items: list[Item]) -> str:
    """Write the questions once, or check that those on disk are the same.

    Returns:
        Their hash.

    Raises:
        ValueError: If other questions were frozen there.
    """
    sha = fingerprint(items)
    if path.exists():
        if fingerprint(thaw(path)) != sha:
            raise ValueError(
                f"{str(path)!r} holds other questions than this run and these --probes options "
                "give; choose another --out, or pass --overwrite true"
            )
        return sha
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, [asdict(item) for item in items])
    return sha


def thaw(path: Path) -> list[Item]:
    """Read frozen questions."""
    return [_item(row) for row in read_rows(path)]


def _item(row: dict[str, Any]) -> Item:
    told = dict(row["probe"])
    told["conditions"] = tuple(tuple(pair) for pair in told["conditions"])
    told["aliases"], told["choices"] = tuple(told["aliases"]), tuple(told["choices"])
    return Item(**{**row, "probe": Probe(**told)})
