"""A row as read, before it has a place in the stream, and how rows get their places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from editkit.data.source import Facts
from editkit.edits import Edit, Probe


@dataclass(frozen=True, slots=True)
class Draft:
    """One edit of a row with its questions.

    Args:
        edit: The edit, with id 0.
        probes: Its questions beside its own prompt, without id and edit_id.
        name: The row's own id, where it has one.
        rival: Old answer to the edit's prompt; see `Probe.rival`.
        aliases: Further right answers to the edit's prompt.
        shared: Questions that hold once all edits of the row are made, each with the facts it
            rests on; given to the row's last edit.
        step: Time step of the row, such as a date; empty where the source has none.
        case: Name of a row of several edits, under which shared questions go.
        place: File and line of the row.
    """

    edit: Edit
    probes: list[Probe]
    name: str | None
    rival: str | None = None
    aliases: tuple[str, ...] = ()
    shared: list[tuple[Probe, Facts]] = field(default_factory=list)
    step: str = ""
    case: str | None = None
    place: tuple[str, int] = ("", 0)


Row = Sequence[Draft]
"""The edits of one row; nearly always one."""


@dataclass
class Numbered:
    """Edits and probes in source order, and what is known of them beside.

    Args:
        edits: The edits, numbered from 0.
        probes: Their probes.
        needs: Edits that must all be made before a probe is asked, by probe id.
        rests_on: Facts that a probe rests on, by probe id.
        steps: Time step of each edit.
    """

    edits: list[Edit] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    needs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rests_on: dict[str, Facts] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)


def number(rows: Iterable[Row], once: bool = False) -> Numbered:
    """Give edits their positions, and probes their names and edits.

    Args:
        rows: Rows in source order.
        once: Make an edit that is in force already (same prompt, same target) no second time;
            rows that share it then share its probes too.
    """
    found = Numbered()
    in_force: dict[str, tuple[str, int]] = {}
    for row in rows:
        made = []
        for draft in row:
            target, position = in_force.get(draft.edit.prompt, ("", -1))
            if not once or target != draft.edit.target:
                position = len(found.edits)
                found.edits.append(replace(draft.edit, id=position))
                found.steps.append(draft.step)
                found.probes += _own(draft, position)
                in_force[draft.edit.prompt] = (draft.edit.target, position)
            made.append(position)
        _share(row, tuple(made), found)
    return found


def _own(draft: Draft, position: int) -> list[Probe]:
    """Probes of one edit: its own prompt first."""
    edit, asked = draft.edit, Counter[str]()
    first = Probe("", None, "reliability", edit.prompt, edit.target)
    probes = []
    for probe in (first, *draft.probes):
        kind, rival, aliases = probe.kind, probe.rival, probe.aliases
        if kind == "reliability" or (kind == "generalization" and probe.target == edit.target):
            rival = draft.rival if rival is None else rival
            aliases = aliases or draft.aliases
        number = "" if kind == "reliability" else f".{asked[kind]}"
        asked[kind] += 1
        probes.append(
            replace(
                probe,
                id=f"{draft.name}.{kind}{number}",
                edit_id=position,
                rival=None if rival == probe.target else rival,
                aliases=aliases,
                group=f"{draft.name}.{probe.group}" if probe.group else "",
            )
        )
    return probes


def _share(row: Row, made: tuple[int, ...], found: Numbered) -> None:
    """Enter the questions that rest on all edits of a row."""
    asked: Counter[str] = Counter()
    for draft in row:
        case = draft.case or draft.name
        for probe, facts in draft.shared:
            name = f"{case}.{probe.axis}.{asked[probe.axis]}"
            asked[probe.axis] += 1
            found.probes.append(
                replace(
                    probe,
                    id=name,
                    edit_id=max(made),
                    rival=None if probe.rival == probe.target else probe.rival,
                    group=f"{case}.{probe.group}" if probe.group else "",
                )
            )
            found.needs[name] = made
            found.rests_on[name] = facts
