"""EasyEdit's files and request JSON, as they are found in the wild.

| form | told by | edit | generalization | locality |
|---|---|---|---|---|
| records | `target_new` | `prompt`, `target_new` | `rephrase_prompt` | `locality[_prompt]` |
| columns | `prompts` | `prompts`, `target_new` | `rephrase_prompts` | `locality_inputs` |
| ZsRE | `src`, `alt` | `src`, `alt` | `rephrase` | `loc`, `loc_ans` |
| QAEdit | `locality` by `target` | `prompt`, `target` | `rephrase` | `locality` |

Records are those of KnowEdit, of flat CounterFact and of WISE's sets; columns are the keyword
arguments of `editor.edit`. All have `subject`, and `portability` (columns: `portability_inputs`) in
the shapes of `locality`; the names inside both become `Probe.axis`. Of several accepted answers the
first that is not blank is the target, the others its aliases; a locality question without an answer
is only compared with the unedited model. The edit's old answer (`ground_truth`; ZsRE: `answers`) is
the rival of its target. `loc_prompt` becomes a text that a method may see (`Edit.negatives`).
Prompts keep what the file says, "nq question: " of ZsRE included. Other fields are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from editkit.data.drafts import Draft
from editkit.data.fields import make_edit, name_of, right_answers, text
from editkit.data.rows import BadRowError, Record
from editkit.edits import Probe

Form = Literal["line format", "EasyEdit records", "ZsRE", "QAEdit"]

QUESTIONS = (("prompt", "ground_truth"), ("loc", "loc_ans"), ("New Question", "New Answer"))
"""Names that a question and its answer go by."""

NO_ANSWER = "<|endoftext|>"
"""What EasyEdit writes for an old answer that nobody gave."""

COLUMNS = {
    "prompts": "prompt",
    "target_new": "target_new",
    "subject": "subject",
    "rephrase_prompts": "rephrase_prompt",
    "loc_prompts": "loc_prompt",
}
"""Keyword arguments of `editor.edit` that hold one value per edit, and their names in records."""


def form_of(record: Record) -> Form | None:
    """Recognise a record by its fields; columns are taken apart before, by `rows_of`."""
    fields = record.keys()
    if "target_new" in fields:
        return "EasyEdit records"
    if {"src", "alt"} <= fields:
        return "ZsRE"
    if {"target", "rephrase", "locality"} <= fields:
        return "QAEdit"
    if fields & {"prompt", "target"}:
        return "line format"
    return None


def parse_record(record: Record) -> Draft:
    """Read one record, as in KnowEdit, flat CounterFact or an EasyEdit request."""
    name = record.get("case_id", record.get("id"))
    draft = _draft(record, ("prompt", "target_new"), "rephrase_prompt", "ground_truth", name)
    flat = {
        "prompt": record.get("locality_prompt"),
        "ground_truth": record.get("locality_ground_truth"),
    }
    draft.probes.extend(_questions(flat, "locality", "", "locality_prompt"))
    return draft


def parse_zsre(record: Record) -> Draft:
    """Read one record of the ZsRE files that came with MEND."""
    draft = _draft(record, ("src", "alt"), "rephrase", "answers", None)
    flat = {"loc": record.get("loc"), "loc_ans": record.get("loc_ans")}
    draft.probes.extend(_questions(flat, "locality", "", "loc"))
    return draft


def parse_qaedit(record: Record) -> Draft:
    """Read one record of QAEdit."""
    # its ids count within each `source` and so repeat
    return _draft(record, ("prompt", "target"), "rephrase", "", None)


def rows_of(columns: Record) -> list[Record]:
    """Turn the keyword arguments of `editor.edit` into one record per edit."""
    prompts = columns["prompts"]
    if isinstance(prompts, str):
        columns = {name: _wrapped(value) for name, value in columns.items()}
        prompts = [prompts]
    if not isinstance(prompts, list) or not prompts:
        raise BadRowError(
            "wrong type", f"field 'prompts' must be a list of texts, found {prompts!r:.60}"
        )
    count = len(prompts)
    rows: list[Record] = [{} for _ in prompts]
    for column, name in COLUMNS.items():
        for row, value in zip(rows, _column(columns.get(column), column, count), strict=True):
            row[name] = value
    for kind in ("locality", "portability"):
        for axis, pair in _axes(columns.get(f"{kind}_inputs"), f"{kind}_inputs"):
            where = f"{kind}_inputs.{axis}"
            questions = _column(pair.get("prompt"), f"{where}.prompt", count)
            answers = _column(pair.get("ground_truth"), f"{where}.ground_truth", count)
            for row, question, answer in zip(rows, questions, answers, strict=True):
                asked = row.setdefault(kind, {})
                assert isinstance(asked, dict)
                asked[axis] = {"prompt": question, "ground_truth": answer}
    return rows


def _wrapped(value: object) -> object:
    """Columns of one edit given without their lists."""
    if isinstance(value, dict):
        return {name: _wrapped(inner) for name, inner in value.items()}
    return [value]


def _column(value: object, name: str, count: int) -> list[object]:
    if value is None:
        return [None] * count
    if not isinstance(value, list) or len(value) != count:
        found = f"{len(value)} values" if isinstance(value, list) else f"{value!r:.60}"
        raise BadRowError(
            "wrong length",
            f"column '{name}' must hold {count} values, as 'prompts' does; found {found}",
        )
    return value


def _axes(value: object, name: str) -> Iterator[tuple[str, Record]]:
    if value is None:
        return
    if not isinstance(value, dict):
        raise BadRowError("wrong type", f"field '{name}' must be an object, found {value!r:.60}")
    for axis, pair in value.items():
        if not isinstance(pair, dict):
            raise BadRowError(
                "wrong type", f"field '{name}.{axis}' must be an object, found {pair!r:.60}"
            )
        yield axis, pair


def _draft(record: Record, names: tuple[str, str], rephrase: str, old: str, name: object) -> Draft:
    """Read what all forms share: the edit, its rephrases, `locality` and `portability`."""
    negative, target = record.get("loc_prompt"), record.get(names[1])
    right = right_answers(target, names[1]) if isinstance(target, list) else ()
    edit = make_edit(
        record.get(names[0]),
        next(iter(right), None) if isinstance(target, list) else target,
        record.get("subject"),
        negatives=() if negative is None else (text(negative, "loc_prompt"),),
        names=names,
    )
    given = record.get(rephrase)
    probes = [
        Probe("", None, "generalization", text(wording, rephrase), edit.target)
        for wording in (given if isinstance(given, list) else [given])
        if wording is not None
    ]
    for kind in ("locality", "portability"):
        value = record.get(kind)
        if isinstance(value, dict) and not any(question in value for question, _ in QUESTIONS):
            for axis, group in value.items():
                probes.extend(_questions(group, kind, axis, f"{kind}.{axis}"))
        else:
            probes.extend(_questions(value, kind, "", kind))
    rival = _old_answer(record.get(old))
    return Draft(edit, probes, name_of(name, "case_id"), rival, right[1:])


def _old_answer(value: object) -> str | None:
    """First text in the field of the old answer, which no edit depends on."""
    if isinstance(value, list):
        return next((old for item in value if (old := _old_answer(item))), None)
    known = isinstance(value, str) and value.strip() not in ("", NO_ANSWER)
    return str(value).strip() if known else None


def _questions(
    value: object, kind: Literal["locality", "portability"], axis: str, where: str
) -> Iterator[Probe]:
    """Find the questions of one axis: an object, a list of objects, or an object of lists."""
    if value is None:
        return
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _questions(item, kind, axis, f"{where}[{i}]")
        return
    names = next((n for n in QUESTIONS if n[0] in value), None) if isinstance(value, dict) else None
    if names is None:
        raise BadRowError(
            "wrong type", f"'{where}' must hold 'prompt' and 'ground_truth', found {value!r:.60}"
        )
    assert isinstance(value, dict)
    prompts, answers = value[names[0]], value.get(names[1])
    if not isinstance(prompts, list):
        prompts, answers = [prompts], [answers]
    if answers is None:
        answers = [None] * len(prompts)
    if not isinstance(answers, list) or len(answers) != len(prompts):
        raise BadRowError(
            "wrong length", f"'{where}' has {len(prompts)} prompts, but answers {answers!r:.60}"
        )
    for prompt, answer in zip(prompts, answers, strict=True):
        if prompt is not None:
            yield _probe(prompt, answer, kind, axis, where)


def _probe(
    prompt: object, answer: object, kind: Literal["locality", "portability"], axis: str, where: str
) -> Probe:
    right = right_answers(answer, where)
    if not right and kind == "portability":
        raise BadRowError("missing field", f"'{where}' has no answer to {prompt!r:.60}")
    target = right[0] if right else None
    return Probe("", None, kind, text(prompt, where), target, axis, aliases=right[1:])
