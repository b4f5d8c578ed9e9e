"""Rows of a source, good and bad, with what must be unique among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from editkit.data.drafts import Draft, Row
from editkit.data.rows import BadRowError, Record, Refused


class Reader:
    """Turns records into drafts, and collects the bad ones.

    Args:
        parse: Reads the edits of one record; raises `BadRowError` where it cannot.
        refuse_updates: Refuse a row that gives the prompt of an earlier one another target.

    Attributes:
        count: Rows seen.
        refused: The bad ones.
        repeats: Edits whose prompt and target an earlier row has too.
        updates: Edits whose prompt has another target in an earlier row.
    """

    def __init__(self, parse: Callable[[Record], Sequence[Draft]], refuse_updates: bool) -> None:
        self.parse, self.refuse_updates = parse, refuse_updates
        self.count = self.repeats = self.updates = 0
        self.refused: list[Refused] = []
        self._names: dict[str, int] = {}
        self._targets: dict[str, tuple[str, int]] = {}

    def read(self, file: str, line: int, row: Record | BadRowError) -> Row | None:
        """Read one row; None where it is bad."""
        self.count += 1
        try:
            if isinstance(row, BadRowError):
                raise row
            drafts = self.parse(row)
            drafts = [self._named(draft, i, len(drafts)) for i, draft in enumerate(drafts)]
            for draft in drafts:
                self._check_unique(draft, line)
        except BadRowError as bad:
            self.refuse(file, line, bad)
            return None
        for draft in drafts:
            self._enter(draft, line)
        return [replace(draft, place=(file, line)) for draft in drafts]

    def refuse(self, file: str, line: int, bad: BadRowError) -> None:
        """Enter a row among the bad ones."""
        self.refused.append(Refused(file, line, bad.reason, bad.detail))

    def _named(self, draft: Draft, i: int, count: int) -> Draft:
        """Name a draft after its row's case, or the row's place, where it has no name."""
        case = draft.case or f"row{self.count}"
        return replace(draft, name=draft.name or (f"{case}.{i}" if count > 1 else case), case=case)

    def _check_unique(self, draft: Draft, line: int) -> None:
        name, edit = draft.name or "", draft.edit
        if name in self._names:
            first = self._names[name]
            raise BadRowError("duplicate id", f"id {name!r} is that of line {first} too")
        target, first = self._targets.get(_words(edit.prompt), (edit.target, line))
        if self.refuse_updates and target != edit.target:
            raise BadRowError(
                "contradiction",
                f"prompt {edit.prompt!r} is to be answered {edit.target!r} here and {target!r} in"
                f" line {first}; the later edit would undo the earlier: keep one",
            )

    def _enter(self, draft: Draft, line: int) -> None:
        prompt, target = _words(draft.edit.prompt), draft.edit.target
        before = self._targets.get(prompt)
        self.repeats += before is not None and before[0] == target
        self.updates += before is not None and before[0] != target
        self._names[draft.name or ""] = line
        self._targets[prompt] = before if before and self.refuse_updates else (target, line)


def _words(prompt: str) -> str:
    return " ".join(prompt.split())
