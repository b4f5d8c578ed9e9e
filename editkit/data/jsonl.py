"""Edits from a user's own file, or from one made for EasyEdit.

The line format is documented in `editkit.data.lineformat`, EasyEdit's in `editkit.data.easyedit`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from editkit.data.base import EditDataModule
from editkit.data.easyedit import Form, form_of, parse_qaedit, parse_record, parse_zsre, rows_of
from editkit.data.lineformat import Draft, parse_line
from editkit.data.rows import BadRowError, BadRowsError, Record, Refused, read_records, report
from editkit.data.source import leaks
from editkit.edits import Edit, Probe

log = logging.getLogger(__name__)

PARSERS: dict[Form, Callable[[Record], Draft]] = {
    "line format": parse_line,
    "EasyEdit records": parse_record,
    "ZsRE": parse_zsre,
    "QAEdit": parse_qaedit,
}


class JSONL(EditDataModule):
    """A stream of edits from one JSON file: editkit's line format, or EasyEdit's JSON.

    The form is recognised row by row from its fields; the file's name does not matter. All bad rows
    are found, and reported with their lines, before any edit is made. Bad are: malformed JSON;
    missing, empty, misspelt or wrongly typed fields; a subject that is not in its prompt; an id
    used twice; a text given for editing that is also a probe; and a prompt that an earlier row
    gives another target (of the two, the earlier is kept).

    Args:
        path: JSON lines, a JSON array, or one JSON object of parallel lists (`editor.edit`).
        text: Plain text, one passage per line, for perplexity before and after; unrelated to the
            edits.
        on_bad_row: Stop at bad rows (`error`), or log them and edit without them (`skip`).
        **kwargs: Order and slices of the stream, see `EditDataModule`.

    Attributes:
        refused: Bad rows left out by `skip`.
    """

    def __init__(
        self,
        path: Path,
        text: Path | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row is {on_bad_row!r}; use 'error' or 'skip'")
        self.path, self.text = Path(path), None if text is None else Path(text)
        self.on_bad_row = on_bad_row
        self.refused: list[Refused] = []

    def load(self) -> tuple[list[Edit], list[Probe]]:
        """Read and check the whole file.

        Raises:
            BadRowsError: If rows are bad and not skipped, or none is left.
        """
        if self.text is not None:
            self.texts = _passages(self.text)
        reader = _Reader(self.path)
        drafts = reader.drafts()
        self.refused = sorted(reader.refused, key=lambda row: row.line)
        if self.refused and (self.on_bad_row == "error" or not drafts):
            raise BadRowsError(self.refused, reader.count)
        if self.refused:
            log.warning("skipped: %s", report(self.refused, reader.count))
        if reader.repeats:
            log.warning("%s: %d rows repeat an earlier edit", self.path, reader.repeats)
        forms = ", ".join(f"{number} as {form}" for form, number in reader.forms.items())
        log.info("%s: %d edits (%s)", self.path, len(drafts), forms)
        return _numbered(drafts)


class _Reader:
    """Rows of one file, good and bad, with what must be unique among them."""

    def __init__(self, path: Path) -> None:
        self.path, self.count, self.repeats = path, 0, 0
        self.forms: Counter[str] = Counter()
        self.refused: list[Refused] = []
        self.lines: list[int] = []
        self.names: dict[str, int] = {}
        self.targets: dict[str, tuple[str, int]] = {}

    def drafts(self) -> list[Draft]:
        """Read the good rows, named, in file order; the others go to `refused`."""
        drafts = [draft for line, row in self._rows() if (draft := self._draft(line, row))]
        edits, probes = _numbered(drafts)
        leaking: set[int] = set()
        for edit, text, probe in leaks(edits, probes):
            leaking.add(edit.id)
            self._refuse(
                self.lines[edit.id],
                BadRowError(
                    "probe among training texts",
                    f"{text!r} is given for editing (rephrases, negatives), but is also asked as"
                    f" probe {probe.id}; keep it in one place",
                ),
            )
        return [draft for i, draft in enumerate(drafts) if i not in leaking]

    def _rows(self) -> Iterator[tuple[int, Record | BadRowError]]:
        """Rows of the file; the columns of an `editor.edit` give many."""
        for line, row in read_records(self.path):
            if isinstance(row, dict) and "prompts" in row:
                try:
                    rows = rows_of(row)
                except BadRowError as bad:
                    yield line, bad
                    continue
                log.info(
                    "%s: line %d holds %d edits as EasyEdit columns", self.path, line, len(rows)
                )
                yield from ((line, one) for one in rows)
            else:
                yield line, row

    def _draft(self, line: int, row: Record | BadRowError) -> Draft | None:
        self.count += 1
        try:
            if isinstance(row, BadRowError):
                raise row
            form = form_of(row)
            draft = PARSERS[form](row)
            draft = replace(draft, name=draft.name or f"row{self.count}")
            self._check_unique(draft, line)
        except BadRowError as bad:
            self._refuse(line, bad)
            return None
        self.forms[form] += 1
        self.lines.append(line)
        return draft

    def _check_unique(self, draft: Draft, line: int) -> None:
        name, edit = draft.name or "", draft.edit
        if name in self.names:
            raise BadRowError("duplicate id", f"id {name!r} is that of line {self.names[name]} too")
        prompt = " ".join(edit.prompt.split())
        target, first = self.targets.get(prompt, (edit.target, line))
        if target != edit.target:
            raise BadRowError(
                "contradiction",
                f"prompt {edit.prompt!r} is to be answered {edit.target!r} here and {target!r} in"
                f" line {first}; the later edit would undo the earlier: keep one",
            )
        self.repeats += prompt in self.targets
        self.names[name] = line
        self.targets.setdefault(prompt, (target, line))

    def _refuse(self, line: int, bad: BadRowError) -> None:
        self.refused.append(Refused(self.path, line, bad.reason, bad.detail))


def _numbered(drafts: list[Draft]) -> tuple[list[Edit], list[Probe]]:
    """Give edits their positions, and probes their names and edits."""
    edits = [replace(draft.edit, id=i) for i, draft in enumerate(drafts)]
    probes = []
    for edit, draft in zip(edits, drafts, strict=True):
        own = Probe(f"{draft.name}.reliability", edit.id, "reliability", edit.prompt, edit.target)
        probes.append(own)
        asked: Counter[str] = Counter()
        for probe in draft.probes:
            name = f"{draft.name}.{probe.kind}.{asked[probe.kind]}"
            probes.append(replace(probe, id=name, edit_id=edit.id))
            asked[probe.kind] += 1
    return edits, probes


def _passages(path: Path) -> list[str]:
    """Read the lines of a text file that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"text {path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text {path}: not UTF-8 at byte {error.start}; save it as UTF-8"
        ) from error
    passages = [line.strip() for line in lines if line.strip()]
    if not passages:
        raise ValueError(f"text {path}: the file is empty; leave `text` out to do without")
    return passages
