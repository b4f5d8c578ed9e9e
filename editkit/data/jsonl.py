"""Edits from a user's own file, or from one made for EasyEdit.

The line format is documented in `editkit.data.lineformat`, EasyEdit's in `editkit.data.easyedit`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from editkit.data.drafts import Draft, Row, number
from editkit.data.easyedit import Form, form_of, parse_qaedit, parse_record, parse_zsre, rows_of
from editkit.data.jsonfile import Place
from editkit.data.lineformat import parse_line
from editkit.data.reader import Reader
from editkit.data.records import RecordModule
from editkit.data.rows import BadRowError, Record
from editkit.data.source import leaks
from editkit.edits import Edit, Probe

log = logging.getLogger(__name__)

PARSERS: dict[Form, Callable[[Record], Draft]] = {
    "line format": parse_line,
    "EasyEdit records": parse_record,
    "ZsRE": parse_zsre,
    "QAEdit": parse_qaedit,
}


class JSONL(RecordModule):
    """A stream of edits from one JSON file: editkit's line format, or EasyEdit's JSON.

    The form is recognised row by row from its fields; the file's name does not matter. All bad rows
    are found, and reported with their lines, before any edit is made. Bad are: malformed JSON;
    missing, empty, misspelt or wrongly typed fields; a subject that is not in its prompt; an id
    used twice; a text given for editing that is also a probe; and a prompt that an earlier row
    gives another target (of the two, the earlier is kept), unless `contradictions` says otherwise.

    Args:
        path: JSON lines, a JSON array, or one JSON object of parallel lists (`editor.edit`); or
            what else `RecordModule` reads.
        text: Plain text, one passage per line, for perplexity before and after; unrelated to the
            edits.
        on_bad_row: Stop at bad rows (`error`), or log them and edit without them (`skip`).
        contradictions: What to do with a row that gives the prompt of an earlier row another
            target: `update` it, `ask` both to the end, or `refuse` the row; see `RecordModule`.
        **kwargs: See `RecordModule`.
    """

    wants: ClassVar[str] = (
        "'prompt' and 'target' (EasyEdit: 'prompt' and 'target_new'; ZsRE: 'src' and 'alt')"
    )
    is_general: ClassVar[bool] = True

    def __init__(
        self,
        path: str,
        text: Path | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        contradictions: Literal["update", "ask", "refuse"] = "refuse",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            path, text=text, on_bad_row=on_bad_row, contradictions=contradictions, **kwargs
        )
        self.forms: Counter[str] = Counter()

    @classmethod
    def reads(cls, record: Record) -> bool:
        """Any record of a form that is told by its fields."""
        return form_of(record) is not None

    def parse(self, record: Record) -> Sequence[Draft]:
        """Read one row of whatever form."""
        form = form_of(record)
        assert form is not None, "rows of no form do not come here"
        draft = PARSERS[form](record)
        self.forms[form] += 1
        return [draft]

    def rows(self, file: str) -> Iterator[Place]:
        """Rows of the file; the columns of an `editor.edit` give many."""
        for line, row in super().rows(file):
            if isinstance(row, dict) and "prompts" in row:
                try:
                    rows = rows_of(row)
                except BadRowError as bad:
                    yield line, bad
                    continue
                log.info("%s: line %d holds %d edits as EasyEdit columns", file, line, len(rows))
                yield from ((line, one) for one in rows)
            else:
                yield line, row

    def load(self) -> tuple[list[Edit], list[Probe]]:
        """Read and check the whole file.

        Raises:
            BadRowsError: If rows are bad and not skipped, or none is left.
        """
        self.forms.clear()
        edits, probes = super().load()
        forms = ", ".join(f"{number} as {form}" for form, number in self.forms.items())
        log.info("%s: %d edits (%s)", self.path, len(edits), forms)
        return edits, probes

    def disjoint(self, rows: list[Row], reader: Reader) -> list[Row]:
        """Refuse rows that give a text for editing that is asked too: it was written by a user."""
        rows = super().disjoint(rows, reader)
        found = number(rows)
        leaking = set()
        for edit, text, probe in leaks(found.edits, found.probes):
            leaking.add(edit.id)
            file, line = rows[edit.id][0].place
            detail = (
                f"{text!r} is given for editing (rephrases, negatives), but is also asked as probe"
                f" {probe.id}; keep it in one place"
            )
            reader.refuse(file, line, BadRowError("probe among training texts", detail))
        return [row for i, row in enumerate(rows) if i not in leaking]
