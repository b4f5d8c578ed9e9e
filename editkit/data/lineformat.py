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
| `aliases` | no | further right answers |
| `rival` | no | the answer that the target is compared with by `pair`, such as the old one |
| `probes` | no | `generalization`, `locality` and `portability`: lists of questions |

A question is a text, or an object with `prompt`, `target`, `axis` (a finer name for the tables),
`conditions` (ask only where the unedited model gives all these answers), `aliases`, `rival`,
`choices` (wrong answers that the target is chosen among: `choice`), and `group` (wordings of one
question: right where one of them is). A question under negation is one like any other, its target
what is right then and its rival what the edit says: give it an axis. A `generalization` without
`target` expects the edit's; a `locality` without one is only compared with the unedited model; a
`portability` needs one. The edit's own prompt is always asked (`reliability`). A field that is not
listed here is an error, since a misspelt one would vanish.
"""

from __future__ import annotations

from typing import Literal

from editkit.data.drafts import Draft
from editkit.data.fields import as_list, as_object, check_known, make_edit, name_of, text, texts
from editkit.data.rows import BadRowError, Record
from editkit.edits import Edit, Probe

Asked = Literal["generalization", "locality", "portability"]

ROW = (
    "prompt", "target", "subject", "id", "rephrases", "negatives", "aliases", "rival", "probes",
)  # fmt: skip
PROBES: tuple[Asked, ...] = ("generalization", "locality", "portability")
QUESTION = ("prompt", "target", "axis", "conditions", "aliases", "rival", "choices", "group")


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
    asked = {} if asked is None else as_object(asked, "probes")
    check_known(asked, PROBES, "probes.")
    probes = [
        _question(value, kind, f"probes.{kind}[{i}]", edit)
        for kind in PROBES
        for i, value in enumerate(as_list(asked.get(kind), f"probes.{kind}"))
    ]
    return Draft(
        edit,
        probes,
        name_of(record.get("id"), "id"),
        rival=_optional(record.get("rival"), "rival"),
        aliases=texts(record.get("aliases"), "aliases"),
    )


def _question(value: object, kind: Asked, where: str, edit: Edit) -> Probe:
    record: Record = {"prompt": value} if isinstance(value, str) else as_object(value, where)
    check_known(record, QUESTION, f"{where}.")
    target = record.get("target")
    if target is not None:
        target = text(target, f"{where}.target").strip()
    elif kind == "generalization":
        target = edit.target
    elif kind == "portability":
        raise BadRowError("missing field", f"field '{where}.target' is missing")
    conditions = []
    for i, value in enumerate(as_list(record.get("conditions"), f"{where}.conditions")):
        place = f"{where}.conditions[{i}]"
        pair = as_object(value, place)
        check_known(pair, QUESTION[:2], f"{place}.")
        answer = text(pair.get("target"), f"{place}.target").strip()
        conditions.append((text(pair.get("prompt"), f"{place}.prompt"), answer))
    return Probe(
        id="",
        edit_id=None,
        kind=kind,
        prompt=text(record.get("prompt"), f"{where}.prompt"),
        target=target,
        axis=_optional(record.get("axis"), f"{where}.axis") or "",
        conditions=tuple(conditions),
        rival=_optional(record.get("rival"), f"{where}.rival"),
        aliases=texts(record.get("aliases"), f"{where}.aliases"),
        group=_optional(record.get("group"), f"{where}.group") or "",
        choices=texts(record.get("choices"), f"{where}.choices"),
    )


def _optional(value: object, name: str) -> str | None:
    return None if value is None else text(value, name).strip()
