"""Read a file of JSON records with the line of each, and report all its bad rows together."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SHOWN = 20
"""Bad rows that a report spells out; the rest it only counts."""

Record = dict[str, object]


class BadRowError(ValueError):
    """One row that cannot be used.

    Args:
        reason: Short name under which such rows are counted.
        detail: The offending value and where it stands in the row.
        at: Offset of the offending byte in the file, where that is what is wrong.
    """

    def __init__(self, reason: str, detail: str, at: int = 0) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.at = reason, detail, at


@dataclass(frozen=True, slots=True)
class Refused:
    """A bad row and its place.

    Args:
        file: File it stands in.
        line: Line its record starts at, from 1; 0 where the file as a whole is meant.
        reason: Short name under which such rows are counted.
        detail: The offending value and what to do about it.
    """

    file: Path
    line: int
    reason: str
    detail: str

    def __str__(self) -> str:
        return (
            f"{self.file}:{self.line}: {self.detail}"
            if self.line
            else f"{self.file}: {self.detail}"
        )


class BadRowsError(ValueError):
    """All bad rows of a file, found before any edit is made.

    Args:
        refused: The bad rows in file order.
        count: Rows read, good and bad.
    """

    def __init__(self, refused: Sequence[Refused], count: int) -> None:
        super().__init__(
            f"{report(refused, count)}\n"
            "mend these rows, or set on_bad_row to 'skip' to edit without them"
        )
        self.refused, self.count = list(refused), count


def report(refused: Sequence[Refused], count: int) -> str:
    """Describe bad rows: how many of each kind, then the first `SHOWN` of them."""
    reasons = Counter(row.reason for row in refused).most_common()
    counts = ", ".join(f"{number} {reason}" for reason, number in reasons)
    lines = [f"{len(refused)} of {count} rows cannot be used ({counts})"]
    lines += [f"  {row}" for row in refused[:SHOWN]]
    if len(refused) > SHOWN:
        lines.append(f"  and {len(refused) - SHOWN} more")
    return "\n".join(lines)


def read_records(path: Path) -> Iterator[tuple[int, Record | BadRowError]]:
    """Read records from JSON lines, a JSON array of objects, or one JSON object.

    Told apart by their first line: the file's name does not matter. JSON lines are read one at a
    time; an array is held in memory as text.

    Yields:
        The line a record starts at, and the record or what is wrong with it.
    """
    if not path.is_file():
        yield 0, BadRowError("missing file", "there is no such file")
        return
    with path.open("rb") as file:
        first = next((_bare(line) for line in file if _bare(line)), b"")
    if not first:
        yield 0, BadRowError("empty file", "the file is empty; give at least one row")
    elif first[:1] == b"[" or _goes_on(first):
        yield from _document(path.read_bytes())
    else:
        yield from _lines(path)


def _bare(line: bytes) -> bytes:
    return line.removeprefix(BOM_UTF8).strip()


def _goes_on(first: bytes) -> bool:
    """Whether a first line begins an object that ends further down, such as `{"prompts": [`."""
    return first[:1] == b"{" and first[-1:] in b",[{:" and not first.endswith(b"},")


def _lines(path: Path) -> Iterator[tuple[int, Record | BadRowError]]:
    offset = 0
    with path.open("rb") as file:  # as bytes: only "\n" ends a row, not U+2028 within a text
        for number, line in enumerate(file, start=1):
            if _bare(line):
                try:
                    yield number, _object(json.loads(_text(line, offset)))
                except json.JSONDecodeError as error:
                    yield number, _malformed(f"{error.msg} at column {error.colno}")
                except BadRowError as bad:
                    yield number, bad
            offset += len(line)


def _document(data: bytes) -> Iterator[tuple[int, Record | BadRowError]]:
    """Records of one JSON array, or the one object, of which a file consists."""
    try:
        cursor = _Cursor(_text(data, 0))
    except BadRowError as bad:
        yield data.count(b"\n", 0, bad.at) + 1, bad
        return
    try:
        if not cursor.take("["):
            yield cursor.line, _object(cursor.value())
        elif not cursor.take("]"):
            yield from _elements(cursor)
        if not cursor.at_end():
            raise _malformed("extra data after the records")
    except BadRowError as bad:
        yield cursor.line, bad


def _elements(cursor: _Cursor) -> Iterator[tuple[int, Record | BadRowError]]:
    while True:
        line, value = cursor.line, cursor.value()
        try:
            yield line, _object(value)
        except BadRowError as bad:
            yield line, bad
        if cursor.take("]"):
            return
        if not cursor.take(","):
            raise _malformed("no ',' or ']' after a record; the rest of the file was not read")


class _Cursor:
    """A place in a JSON text that knows its line."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.line = text, 0, 1
        self.decoder = json.JSONDecoder()
        self._skip()

    def take(self, sign: str) -> bool:
        """Step over `sign` where it comes next."""
        found = self.text.startswith(sign, self.at)
        if found:
            self._to(self.at + len(sign))
        return found

    def value(self) -> object:
        """Step over one JSON value and return it."""
        try:
            value, end = self.decoder.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            self._to(error.pos)
            raise _malformed(
                f"{error.msg} at column {error.colno}; the rest of the file was not read"
            ) from error
        self._to(end)
        return value

    def at_end(self) -> bool:
        """Whether nothing but space is left."""
        return self.at >= len(self.text)

    def _to(self, at: int) -> None:
        self.line += self.text.count("\n", self.at, at)
        self.at = at
        self._skip()

    def _skip(self) -> None:
        at = self.at
        while at < len(self.text) and self.text[at] in " \t\r\n":
            at += 1
        self.line += self.text.count("\n", self.at, at)
        self.at = at


def _text(data: bytes, offset: int) -> str:
    body = data.removeprefix(BOM_UTF8)
    offset += len(data) - len(body)
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise BadRowError(
            "not UTF-8",
            f"byte 0x{body[error.start]:02x} at offset {offset + error.start} of the file is not"
            " UTF-8; save the file as UTF-8",
            at=offset + error.start,
        ) from error


def _object(value: object) -> Record:
    if not isinstance(value, dict):
        raise BadRowError("not an object", f"expected an object {{...}}, found {value!r:.60}")
    return value


def _malformed(message: str) -> BadRowError:
    return BadRowError("malformed JSON", f"malformed JSON: {message}")
