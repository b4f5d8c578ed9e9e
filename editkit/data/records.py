"""A stream read record by record from a published data set: here, or on the Hugging Face Hub."""

from __future__ import annotations

import logging
import pkgutil
import sys
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import editkit.data
from editkit.data.base import EditDataModule
from editkit.data.drafts import Draft, Row, number
from editkit.data.files import files_of, is_remote, passages, read_records, version_of
from editkit.data.intake import Intake
from editkit.data.jsonfile import Place
from editkit.data.reader import Reader
from editkit.data.rows import BadRowError, BadRowsError, Record, Refused, report
from editkit.data.training import set_apart
from editkit.edits import Edit, Probe

log = logging.getLogger(__name__)


class RecordModule(EditDataModule):
    """A stream of edits from the records of a file or of a Hub data set.

    All bad rows are found, and reported together with their lines, before any edit is made. Bad
    are: malformed JSON; missing, empty or wrongly typed fields; a subject that is not in its
    prompt; an id used twice. A subclass implements `reads` and `parse`.

    Args:
        path: A file of JSON, JSON lines or Parquet, whatever its name; a folder of such files;
            `owner/name` or `owner/name@revision` of a Hub data set, of which no more is fetched
            than `limit` needs; or one file there, `hf://datasets/owner/name@revision/file.json`.
        text: Plain text, one passage per line, for perplexity before and after; unrelated to the
            edits.
        on_bad_row: Stop at bad rows (`error`), or log them and edit without them (`skip`).
        split: Split of a folder or a Hub data set to take.
        contradictions: What to do with a row that answers otherwise what an earlier row answers.
            `update`: it is an update; what the earlier edit is asked is asked only until then.
            `ask`: the same edits, all asked to the end, as the papers' tables are made. `refuse`:
            where the prompts are the same, the later row is bad; other wordings as in `update`.
        train_rephrases: Number of an edit's rephrasings, the first ones, that a method may train on
            (`Edit.rephrases`); they are then not asked.
        negatives: A file of a data set, as `path`; of each of its rows one locality question with
            its answer becomes a text that a method may see (`Edit.negatives`), one for each edit in
            turn, as WISE's training takes them. Never a text that is asked.
        **kwargs: Order and slices of the stream, see `EditDataModule`.

    Attributes:
        refused: Bad rows left out by `skip`.
        report: Rows in, used and refused, and probes by kind, to print or to log.
    """

    known: ClassVar[Mapping[str, str]] = {}
    """Published versions by the SHA-256 of their file."""
    wants: ClassVar[str] = ""
    """Fields that a row needs, in words."""
    is_general: ClassVar[bool] = False
    """Whether other modules know more of a record that this one reads too."""

    def __init__(
        self,
        path: str,
        text: Path | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        split: str = "train",
        contradictions: Literal["update", "ask", "refuse"] = "update",
        train_rephrases: int = 0,
        negatives: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row is {on_bad_row!r}; use 'error' or 'skip'")
        if contradictions not in ("update", "ask", "refuse"):
            raise ValueError(
                f"contradictions is {contradictions!r}; use 'update', 'ask' or 'refuse'"
            )
        if train_rephrases < 0:
            raise ValueError(f"train_rephrases is {train_rephrases}; it must be 0 or more")
        self.path, self.text = str(path), None if text is None else Path(text)
        self.on_bad_row, self.split, self.contradictions = on_bad_row, split, contradictions
        self.train_rephrases = train_rephrases
        self.negatives = None if negatives is None else str(negatives)
        self.ask_overwritten, self.once = contradictions == "ask", False
        self.refused: list[Refused] = []
        self.notes: Counter[str] = Counter()
        self._intake = Intake(type(self).__name__)

    @classmethod
    @abstractmethod
    def reads(cls, record: Record) -> bool:
        """Whether a record is of this data set, by its fields."""

    @abstractmethod
    def parse(self, record: Record) -> Sequence[Draft]:
        """Read the edits of a record; raise `BadRowError` where it is bad."""

    def rows(self, file: str) -> Iterator[Place]:
        """Rows of a file, each with its line."""
        return read_records(file)

    def load(self) -> tuple[list[Edit], list[Probe]]:
        """Read and check the whole source.

        Raises:
            BadRowsError: If rows are bad and not skipped, or none is left.
            ValueError: If the source is of another data set, or cannot be had.
        """
        if self.text is not None:
            self.texts = passages(self.text)
        self.notes.clear()
        reader = Reader(self.parse, self.contradictions == "refuse")
        rows = self.disjoint([*self._read(reader)], reader)
        self.refused = sorted(reader.refused, key=lambda row: (row.file, row.line))
        if self.refused and (self.on_bad_row == "error" or not rows):
            raise BadRowsError(self.refused, reader.count)
        if self.refused:
            log.warning("skipped: %s", report(self.refused, reader.count))
        if reader.repeats and not self.once:
            log.warning("%s: %d rows repeat an earlier edit", self.path, reader.repeats)
        self.notes["edits that repeat an earlier one"] = reader.repeats
        self.notes["edits that update an earlier one"] = reader.updates
        found = number(rows, self.once)
        self.needs, self.rests_on, self.steps = found.needs, found.rests_on, found.steps
        self._intake = Intake(
            type(self).__name__,
            self.sources,
            version=" + ".join(self.known[d] for d in self.sources.values() if d in self.known),
            rows=reader.count,
            used=len(rows),
            refused=self.refused,
        )
        return found.edits, found.probes

    def setup(self, stage: str | None = None) -> None:
        """Read the stream, once, and log what came of it."""
        first = not hasattr(self, "edits")
        super().setup(stage)
        if first:
            log.info("%s: %s", self.path, self.report)

    @property
    def report(self) -> Intake:
        """Account of what was read; of the stream after `setup`."""
        if not hasattr(self, "edits"):
            return self._intake
        notes = Counter(self.notes)
        ends = [probe for probe in self.probes if probe.until is not None]
        never = [p for p in ends if p.edit_id is not None and (p.until or 0) <= p.edit_id]
        notes["probes asked until an edit overwrites them"] = len(ends) - len(never)
        notes["probes never asked, overwritten before"] = len(never)
        kinds = Counter((str(probe.kind), probe.axis) for probe in self.probes)
        return replace(self._intake, notes=notes, edits=len(self.edits), probes=kinds)

    def disjoint(self, rows: list[Row], reader: Reader) -> list[Row]:
        """Set texts for training apart from those that are asked."""
        if not self.train_rephrases and self.negatives is None:
            return rows
        pool = [] if self.negatives is None else pool_of(self.negatives)
        rows, left_out = set_apart(rows, self.train_rephrases, pool)
        self.notes["texts for training left out, since asked"] = left_out
        return rows

    def _read(self, reader: Reader) -> Iterator[Row]:
        """Good rows of all files; of one that is fetched, as many as the stream needs."""
        sizes = [sum(self.increments or []), self.limit]
        needed = self.start + min((size for size in sizes if size), default=sys.maxsize)
        is_short = self.order == "file" and not self.once  # else all rows decide what is taken
        count = 0
        for file in files_of(self.path, self.split):
            self.sources |= version_of(file)
            for line, record in self.rows(file):
                if isinstance(record, dict) and not self.reads(record):
                    record = self._foreign(file, record, is_first=reader.count == 0)
                row = reader.read(file, line, record)
                if row is not None:
                    count += len(row)
                    yield row
                if is_remote(file) and is_short and count >= needed:
                    return

    def _foreign(self, file: str, record: Record, is_first: bool) -> BadRowError:
        """Refuse a record of another form; a file that begins so, where another module reads it.

        Raises:
            ValueError: If another data module reads such records.
        """
        name = type(self).__name__
        other = next((m for m in modules() if m.reads(record)), None) if is_first else None
        if other is not None:
            raise ValueError(
                f"{file} holds records with the fields {list(record)}, which are not {name}'s: use "
                f"--data={other.__module__}.{other.__name__}, which reads them"
            )
        return BadRowError(
            "unknown form",
            f"fields {list(record)} are those of no form that {name} reads; a row needs"
            f" {self.wants}",
        )


def modules() -> list[type[RecordModule]]:
    """All data modules that read records, of this package and imported from elsewhere."""
    for info in pkgutil.iter_modules(editkit.data.__path__):
        import_module(f"editkit.data.{info.name}")
    found = [*RecordModule.__subclasses__()]
    for module in found:  # grows: subclasses of subclasses
        found += module.__subclasses__()
    return sorted(found, key=lambda module: module.is_general)


def pool_of(path: str) -> list[str]:
    """One locality question with its answer of each row of a source, whichever module's it is.

    Raises:
        ValueError: If no module reads it, or it holds no such question.
    """
    texts, module = [], None
    for file in files_of(path, "train"):
        for _, record in read_records(file):
            if isinstance(record, BadRowError):
                continue
            if module is None or not module.reads(record):
                found = next((m for m in modules() if m.reads(record)), None)
                module = found(path) if found else None
            if module is not None:
                texts += _locality(module, record)
    if not texts:
        raise ValueError(f"negatives {path!r}: no row holds a locality question with an answer")
    return texts


def _locality(module: RecordModule, record: Record) -> list[str]:
    try:
        probes = [probe for draft in module.parse(record) for probe in draft.probes]
    except BadRowError:
        return []
    return [f"{p.prompt} {p.target}" for p in probes if p.kind == "locality" and p.target][:1]
