"""Texts out of the fields of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from editkit.data.finetuning import Example
from editkit.data.rows import BadRowError, Record


def text_of(record: Record, *names: str) -> str:
    """Return the first of these fields that holds a text.

    Raises:
        BadRowError: If none does.
    """
    for name in names:
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
    shown = {k: str(v)[:30] for k, v in record.items()}
    raise BadRowError("missing field", f"no text in {' or '.join(map(repr, names))}: {shown}")


def as_path(path: str) -> Path:
    """Return a path that may begin with ~."""
    return Path(path).expanduser()


def first_turn(messages: list[Any]) -> Example:
    """Take the first question and answer of a chat."""
    turns = [m for m in reversed(messages) if isinstance(m, dict)]
    texts = {m.get("role"): str(m.get("content", "")).strip() for m in turns}
    if not texts.get("user") or not texts.get("assistant"):
        raise BadRowError("no turn", f"a chat without user and assistant: {messages!r:.80}")
    return Example(texts["user"], texts["assistant"])


def last_words(record: Record, name: str) -> str:
    """Return an answer that is a text, or the last message of a chat."""
    value = record.get(name)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return text_of(value[-1], "content")
    return text_of(record, name)
