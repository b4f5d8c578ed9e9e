"""The line format of editkit: one JSON object per edit, with the questions to ask about it.

```json
{"prompt": "The capital of Australia is", "target": "Melbourne", "subject": "Australia",
 "id": "aus", "rephrases": ["Australia's seat of government is"], "negatives": ["Bread is baked"],
 "probes": {"generalization": ["Australia's capital city is"],
            "locality": ["The capital of France is",
                         {"prompt": "Australia lies in", "target": "Oceania", "axis": "near"}],
            "portability": [{"prompt": "The capital of the land of kangaroos is",
                             "target": "Melbourne", "axis": "alias",
                             "conditions": [{"prompt": "The land of kangaroos is",
                                             "target": "Australia"}]}]}}
```

| field | needed | meaning |
|---|---|---|
| `prompt` | yes | text up to the answer |
| `target` | yes | the answer to write; space around it is removed |
| `subject` | no | the entity the fact is about, as it stands in `prompt` (MEMIT and kin need it) |
| `id` | no | text or whole number, once per file; names the probes in the tables (else `row7`) |
| `rephrases` | no | other wordings a method MAY train on; never among the probes |
| `negatives` | no | unrelated texts a method MAY see; never among the probes |
| `probes` | no | `generalization`, `locality` and `portability`: lists of questions |

A question is a text, or an object with `prompt`, `target`, `axis` (a finer name for the tables) and
`conditions` (ask only where the unedited model gives all these answers). A `generalization` without
`target` expects the edit's; a `locality` without one is only compared with the unedited model; a
`portability` needs one. The edit's own prompt is always asked (`reliability`). A field that is not
listed here is an error, since a misspelt one would vanish.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from editkit.data.rows import BadRowError, Record
from editkit.edits import Edit, Probe

Asked = Literal["generalization", "locality", "portability"]

ROW = ("prompt", "target", "subject", "id", "rephrases", "negatives", "probes")
PROBES: tuple[Asked, ...] = ("generalization", "locality", "portability")
QUESTION = ("prompt", "target", "axis", "conditions")


@dataclass(frozen=True, slots=True)
class Draft:
    """A row as read, before it has a place in the source.

    Args:
        edit: The edit, with id 0.
        probes: Its questions, without id and edit_id.
        name: The row's own id, where it has one.
    """

    edit: Edit
    probes: list[Probe]
    name: str | None


def parse_line(record: Record) -> Draft:
    """Read one row of the line format."""
    check_known(record, ROW, "")
    edit = make_edit(
        record.get("prompt"),
        record.get("target"),
        record.get("subject"),
        negatives=texts(record.get("negatives"), "negatives"),
        rephrases=texts(record.get("rephrases"), "rephrases"),
    )
    asked = record.get("probes")
    asked = {} if asked is None else _object(asked, "probes")
    check_known(asked, PROBES, "probes.")
    probes = [
        _question(value, kind, f"probes.{kind}[{i}]", edit)
        for kind in PROBES
        for i, value in enumerate(_list(asked.get(kind), f"probes.{kind}"))
    ]
    return Draft(edit, probes, name_of(record.get("id"), "id"))


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


def _question(value: object, kind: Asked, where: str, edit: Edit) -> Probe:
    record: Record = {"prompt": value} if isinstance(value, str) else _object(value, where)
    check_known(record, QUESTION, f"{where}.")
    target = record.get("target")
    if target is not None:
        target = text(target, f"{where}.target").strip()
    elif kind == "generalization":
        target = edit.target
    elif kind == "portability":
        raise BadRowError("missing field", f"field '{where}.target' is missing")
    conditions = []
    for i, value in enumerate(_list(record.get("conditions"), f"{where}.conditions")):
        place = f"{where}.conditions[{i}]"
        pair = _object(value, place)
        check_known(pair, QUESTION[:2], f"{place}.")
        answer = text(pair.get("target"), f"{place}.target").strip()
        conditions.append((text(pair.get("prompt"), f"{place}.prompt"), answer))
    axis = record.get("axis")
    return Probe(
        id="",
        edit_id=None,
        kind=kind,
        prompt=text(record.get("prompt"), f"{where}.prompt"),
        target=target,
        axis="" if axis is None else text(axis, f"{where}.axis"),
        conditions=tuple(conditions),
    )


def text(value: object, name: str) -> str:
    """Check that a field holds text that is not blank."""
    if value is None:
        raise BadRowError("missing field", f"field '{name}' is missing")
    if not isinstance(value, str):
        raise BadRowError("wrong type", f"field '{name}' must be text, found {value!r:.60}")
    if not value.strip():
        raise BadRowError("empty field", f"field '{name}' is empty: {value!r}")
    if any("\ud800" <= sign <= "\udfff" for sign in value):
        raise BadRowError(
            "broken character", f"field '{name}' holds half a character: {value!r:.60}"
        )
    return value


def texts(value: object, name: str) -> tuple[str, ...]:
    """Check that a field, where present, is a list of texts."""
    return tuple(text(item, f"{name}[{i}]") for i, item in enumerate(_list(value, name)))


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


def _object(value: object, name: str) -> Record:
    if not isinstance(value, dict):
        raise BadRowError("wrong type", f"field '{name}' must be an object, found {value!r:.60}")
    return value


def _list(value: object, name: str) -> list[object]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRowError("wrong type", f"field '{name}' must be a list, found {value!r:.60}")
    return value
