"""Read records from JSON, each with its line.

JSON is read as it stands, not through Arrow, which would change what differs in type from record to
record (KnowEdit's `ground_truth`: a text, a list, a list of lists).
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import BinaryIO

from editkit.data.rows import BadRowError, Record

Place = tuple[int, Record | BadRowError]

WRAPPER = "records"
"""Field of an object that holds all records, as in `{"dataset": ..., "records": [...]}`."""


def first_line(opened: BinaryIO) -> bytes:
    """First line that is not blank, without the space around it; nothing where all are."""
    return next((_bare(line) for line in opened if _bare(line)), b"")


def read_json(opened: BinaryIO, first: bytes) -> Iterator[Place]:
    """Read JSON lines, a JSON array of objects, or one JSON object, told apart by `first_line`."""
    if not first:
        yield 0, BadRowError("empty file", "the file is empty; give at least one row")
    elif first[:1] == b"[" or _goes_on(first):
        yield from _document(opened.read())
    else:
        yield from _lines(opened)


def _bare(line: bytes) -> bytes:
    return line.removeprefix(BOM_UTF8).strip()


def _goes_on(first: bytes) -> bool:
    """Whether a first line begins an object that ends further down, such as `{"prompts": [`."""
    return first[:1] == b"{" and first[-1:] in b",[{:" and not first.endswith(b"},")


def _lines(opened: BinaryIO) -> Iterator[Place]:
    offset = 0
    for number, line in enumerate(opened, start=1):  # bytes: only "\n" ends a row, not U+2028
        if _bare(line):
            try:
                yield from _unwrapped(number, json.loads(_text(line, offset)))
            except json.JSONDecodeError as error:
                yield number, _malformed(f"{error.msg} at column {error.colno}")
            except BadRowError as bad:
                yield number, bad
        offset += len(line)


def _unwrapped(line: int, value: object) -> Iterator[Place]:
    """Records of a wrapped list that stands in one line, else the record itself."""
    rows = value.get(WRAPPER) if isinstance(value, dict) else None
    rows = rows if isinstance(rows, list) else [value]
    yield from ((line, _checked(row)) for row in rows)


def _document(data: bytes) -> Iterator[Place]:
    """Records of one JSON array, wrapped or not, or the one object, of which a file consists."""
    try:
        cursor = _Cursor(_text(data, 0))
    except BadRowError as bad:
        yield data.count(b"\n", 0, bad.at) + 1, bad
        return
    try:
        line = cursor.line
        if cursor.take("{"):
            yield from _members(cursor, line)
        elif not cursor.take("["):
            yield line, _checked(cursor.value())
        elif not cursor.take("]"):
            yield from _elements(cursor)
        if not cursor.at_end():
            raise _malformed("extra data after the records")
    except BadRowError as bad:
        yield cursor.line, bad


def _members(cursor: _Cursor, line: int) -> Iterator[Place]:
    """Records of the list in `{..., "records": [...]}`, else the object itself."""
    record, wraps, begun = Record(), False, False
    while not cursor.take("}"):
        if begun and not cursor.take(","):
            raise _malformed("no ',' or '}' after a field; the rest of the file was not read")
        begun, name = True, cursor.value()
        if not isinstance(name, str) or not cursor.take(":"):
            raise _malformed("a field needs a name in quotes and a ':'")
        if name == WRAPPER and cursor.take("["):
            wraps = True
            if not cursor.take("]"):
                yield from _elements(cursor)
        else:
            record[name] = cursor.value()
    if not wraps:
        yield line, record


def _elements(cursor: _Cursor) -> Iterator[Place]:
    while True:
        line, value = cursor.line, cursor.value()
        yield line, _checked(value)
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
            self.to(self.at + len(sign))
        return found

    def value(self) -> object:
        """Step over one JSON value and return it."""
        try:
            value, end = self.decoder.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            self.to(error.pos)
            raise _malformed(
                f"{error.msg} at column {error.colno}; the rest of the file was not read"
            ) from error
        self.to(end)
        return value

    def at_end(self) -> bool:
        """Whether nothing but space is left."""
        return self.at >= len(self.text)

    def to(self, at: int) -> None:
        """Step to a place further on, and over the space behind it."""
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


def _checked(value: object) -> Record | BadRowError:
    if isinstance(value, dict):
        return value
    return BadRowError("not an object", f"expected an object {{...}}, found {value!r:.60}")


def _malformed(message: str) -> BadRowError:
    return BadRowError("malformed JSON", f"malformed JSON: {message}")
