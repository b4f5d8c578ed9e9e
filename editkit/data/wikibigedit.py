"""WikiBigEdit: half a million changes of Wikidata, in the order in which they happened."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from editkit.data.drafts import Draft, Row
from editkit.data.fields import is_missing, make_edit, text
from editkit.data.jsonfile import Place
from editkit.data.reader import Reader
from editkit.data.records import RecordModule
from editkit.data.rows import Record
from editkit.edits import Probe, ProbeKind

QUESTIONS: tuple[tuple[str, str, ProbeKind, str], ...] = (
    ("rephrase", "ans", "generalization", "rephrase"),
    ("personas", "ans", "generalization", "personas"),
    ("mhop", "mhop_ans", "portability", "multi_hop"),
    ("loc", "loc_ans", "locality", ""),
)
"""Fields of a question and of its answer, what it shows, and its axis."""


class WikiBigEdit(RecordModule):
    """Real changes of Wikidata over eight time steps (Thede et al. 2025).

    *Source*: lukasthede/WikiBigEdit: 502,382 rows in eight files, one a time step, named by their
    dates: `wiki_big_edit_20240201_20240220.json` to `…_20240620_20240701.json` (26,922, 29,835,
    54,504, 43,443, 121,116, 101,728, 69,403 and 55,431 rows). *Licence*: Apache-2.0. *Row*: `tag`
    (`new` or `update`), `subject`, `update` the question, `ans` its answer, `rephrase`, `personas`,
    `loc` and `loc_ans`, `mhop` and `mhop_ans`. What a row lacks is null or NaN, often `mhop`.

    *Increments*: a folder or the Hub data set gives one for each file, in the order of the dates in
    the names; a single file with a time in each row gives one for each time. A later answer to the
    same question is an update of the world: what the earlier edit is asked is asked until then.

    *Probes*: the question (reliability), its rephrasing and the one of a persona (generalization,
    axes `rephrase` and `personas`), the multi-hop question (portability, axis `multi_hop`), the
    locality question with its gold answer (locality).

    *In papers*: after each time step the edits of this step are asked, and 1,000 of each earlier
    one (`asked_per_step: 1000`). WISE and GRACE take ZsRE's training file as `negatives`.

    Args:
        path: A file or folder, `owner/name` of a Hub data set, or one file there by its address
            `hf://datasets/owner/name@revision/file.json`; see `RecordModule`.
        asked_per_step: Edits of each increment whose probes are asked, drawn by `seed`; None asks
            all. All edits are made either way.
        time_field: Field of a row that says when it became true, where a file holds several time
            steps; times are put in the order of their text (ISO dates).
        **kwargs: See `RecordModule`.
    """

    wants: ClassVar[str] = "'update' and 'ans'"

    def __init__(
        self,
        path: str,
        asked_per_step: int | None = None,
        time_field: str = "date",
        **kwargs: Any,
    ) -> None:
        super().__init__(path, **kwargs)
        if asked_per_step is not None and asked_per_step < 1:
            raise ValueError(f"asked_per_step is {asked_per_step}; use 1 or more, or null for all")
        self.asked_per_step, self.time_field = asked_per_step, time_field

    @classmethod
    def reads(cls, record: Record) -> bool:
        """A question `update` with its answer `ans`."""
        return {"update", "ans"} <= record.keys()

    def rows(self, file: str) -> Iterator[Place]:
        """Rows of the file, each with the time that it, or else the file's name, says."""
        dates = re.search(r"\d{8}(?:[_-]\d{8})?", Path(file).name)
        for line, record in super().rows(file):
            if dates and isinstance(record, dict) and is_missing(record.get(self.time_field)):
                record = {**record, self.time_field: dates[0]}
            yield line, record

    def parse(self, record: Record) -> Sequence[Draft]:
        """Read one row."""
        subject, time = record.get("subject"), record.get(self.time_field)
        edit = make_edit(
            record.get("update"),
            record.get("ans"),
            None if is_missing(subject) else subject,
            names=("update", "ans"),
        )
        probes = []
        for question, answer, kind, axis in QUESTIONS:
            prompt, target = record.get(question), record.get(answer)
            if is_missing(prompt):
                continue
            if is_missing(target) and kind != "locality":
                self.notes["questions without an answer left out"] += 1
                continue
            right = None if is_missing(target) else text(target, answer).strip()
            probes.append(Probe("", None, kind, text(prompt, question), right, axis))
        return [Draft(edit, probes, None, step="" if is_missing(time) else str(time))]

    def setup(self, stage: str | None = None) -> None:
        """Read the stream, then draw the edits that are asked."""
        first = not hasattr(self, "edits")
        super().setup(stage)
        if first and self.asked_per_step is not None:
            draw, asked = random.Random(self.seed), set[int]()
            keys = [draw.random() for _ in self.edits]  # `sample` differs between Pythons
            for begin, end in zip([0, *self.boundaries], self.boundaries, strict=False):
                asked |= {*sorted(range(begin, end), key=keys.__getitem__)[: self.asked_per_step]}
            self.probes = [p for p in self.probes if p.edit_id is None or p.edit_id in asked]

    def _read(self, reader: Reader) -> Iterator[Row]:
        yield from sorted(super()._read(reader), key=lambda row: row[0].step)
