"""Checks of a row's fields; what is wrong is said with the field's name and its value."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

from editkit.data.rows import BadRowError, Record
from editkit.edits import Edit


def make_edit(
    prompt: object,
    target: object,
    subject: object,
    negatives: tuple[str, ...] = (),
    rephrases: tuple[str, ...] = (),
    names: tuple[str, str] = ("prompt", "target"),
) -> Edit:
    """Check an edit's texts; `names` are those of its prompt and target in the file."""
    prompt = text(prompt, names[0])
    target = text(target, names[1]).strip()
    if subject is not None:
        subject = text(subject, "subject").strip()
        if subject not in prompt:
            case = " (but is in other case)" if subject.lower() in prompt.lower() else ""
            raise BadRowError(
                "subject not in prompt", f"subject {subject!r} is not in prompt {prompt!r}{case}"
            )
    return Edit(0, prompt, target, subject, negatives, rephrases)


def text(value: object, name: str) -> str:
    """Check that a field holds text that is not blank."""
    if value is None:
        raise BadRowError("missing field", f"field '{name}' is missing")
    if not isinstance(value, str):
        raise BadRowError("wrong type", f"field '{name}' must be text, found {value!r:.60}")
    if not value.strip():
        raise BadRowError("empty field", f"field '{name}' is empty: {value!r}")
    if not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
        raise BadRowError(
            "broken character", f"field '{name}' holds half a character: {value!r:.60}"
        )
    return value


def texts(value: object, name: str) -> tuple[str, ...]:
    """Check that a field, where present, is a list of texts."""
    return tuple(text(item, f"{name}[{i}]") for i, item in enumerate(as_list(value, name)))


def name_of(value: object, field: str) -> str | None:
    """Check a row's own id."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None if value is None else text(value, field)


def check_known(record: Record, known: Collection[str], where: str) -> None:
    """Refuse fields that nothing would read, with the likely intended name."""
    for field in record:
        if field not in known:
            close = get_close_matches(field, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
            raise BadRowError("unknown field", f"unknown field '{where}{field}'; {hint}")


def as_object(value: object, name: str) -> Record:
    """Check that a field holds an object."""
    if not isinstance(value, dict):
        raise BadRowError("wrong type", f"field '{name}' must be an object, found {value!r:.60}")
    return value


def as_list(value: object, name: str) -> list[object]:
    """Check that a field, where present, holds a list."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRowError("wrong type", f"field '{name}' must be a list, found {value!r:.60}")
    return value


def right_answers(value: object, name: str) -> tuple[str, ...]:
    """All answers that are not blank, of one, of aliases, or of lists of aliases, each once."""
    if isinstance(value, list):
        found = [answer for item in value for answer in right_answers(item, name)]
    elif is_missing(value):
        found = []
    else:
        found = [text(value, name).strip()]
    return tuple(dict.fromkeys(found))


def is_missing(value: object) -> bool:
    """Whether a field is absent, blank, or the NaN that pandas writes for an absent one."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())
