"""RippleEdits: what else must change, and what must not, when one fact is edited."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from editkit.data.drafts import Draft
from editkit.data.fields import as_list, as_object, is_missing, make_edit, right_answers, text
from editkit.data.records import RecordModule
from editkit.data.rows import BadRowError, Record
from editkit.edits import Probe, ProbeKind

CRITERIA: dict[str, ProbeKind] = {
    "Logical_Generalization": "portability",
    "Compositionality_I": "portability",
    "Compositionality_II": "portability",
    "Subject_Aliasing": "portability",
    "Forgetfulness": "locality",
    "Preservation": "locality",
    "Relation_Specificity": "locality",
}
"""The six criteria; what the paper calls Preservation is Forgetfulness in the files."""
LINKS = {"FOLLOWS": " follows", "FOLLOWED_BY": " is followed by"}
"""How the sentence of a relation leads to its target; all others by " is" or " are"."""
FRAMES = tuple(
    re.compile(frame)
    for frame in (
        r"The name of the [a-z ]+? which (.+)"
        r" (?:is (?:associated with|part of|the capital of|a member of)|plays in) is",
        r"The name of the (?:award (?=.+ won is)|currency in |position held by"
        r" |anthem that is most likely to be performed in )(.+?)(?: won)? is",
        r"The number of children (.+) has is",
        r"The (?:names? of the )?(?:head of (?:government|state)|country of citizenship"
        r"|field of work|(?:place|date) of (?:birth|death|burial)|[a-z ]+?) of (.+) (?:is|are)",
        r"(.+) (?:follows|is followed by)",
    )
)
"""Sentences of the files, up to the target; the group is the subject."""


class RippleEdits(RecordModule):
    """Edits with their ripple effects (Cohen et al. 2024).

    *Source*: edenbiran/RippleEdits, `data/benchmark/{recent,random,popular}.json` (1,948, 1,922 and
    885 edits). *Licence*: MIT. *Row*: `edit` with `prompt` (the whole new sentence), `relation`,
    `target_id` and, but in `recent`, `original_fact`; six criteria, each a list of tests:
    `test_queries` (`prompt`, `answers` with `value` and `aliases`), `condition_queries`, and
    `test_condition`, `OR` or `AND`.

    The sentence is cut into prompt and target where a query's answer of the same `target_id` ends
    it; else behind the words that it shares with the old sentence, up to "is", "are", "follows" or
    "is followed by"; else behind the last of these. The subject is found in the frame of the
    sentence (None where it is of no known frame). A few sentences of `random` end without a target
    and are refused.

    *Probes*: the prompt (reliability); Logical_Generalization, Compositionality_I and _II and
    Subject_Aliasing (portability); Relation_Specificity and Forgetfulness, the paper's
    Preservation (locality); each counts only where the unedited model gives the first answers of
    all condition queries. Queries of an `OR` test are one group. Where a query has several answers
    (siblings), any is right, with any alias; the authors' code wants all.

    *In papers*: MEMOIR takes 10 and 100 of `popular` that have reliability, generalization and
    specificity cases. The authors edit one fact at a time.

    Its arguments are those of `RecordModule`.
    """

    wants: ClassVar[str] = "'edit' and lists of tests by criterion"

    @classmethod
    def reads(cls, record: Record) -> bool:
        """An edit with at least one criterion."""
        return isinstance(record.get("edit"), dict) and any(name in record for name in CRITERIA)

    def parse(self, record: Record) -> Sequence[Draft]:
        """Read one row."""
        fact = as_object(record["edit"], "edit")
        sentence = _sentence(fact, "edit")
        old = fact.get("original_fact")
        before = (
            None
            if old is None
            else _sentence(as_object(old, "edit.original_fact"), "edit.original_fact")
        )
        names = _names(record, fact.get("target_id"))
        prompt, target = cut_sentence(sentence, before, str(fact.get("relation")), names)
        found = next((m[1] for frame in FRAMES if (m := frame.fullmatch(prompt))), None)
        rival = before[len(prompt) :].strip() if before and before.startswith(prompt) else None
        edit = make_edit(prompt, target, found, names=("edit.prompt", "edit.prompt (its end)"))
        probes = [p for name, kind in CRITERIA.items() for p in _criterion(record, name, kind)]
        return [Draft(edit, probes, None, rival or None, tuple(n for n in names if n != target))]


def _sentence(fact: Record, where: str) -> str:
    return text(fact.get("prompt"), f"{where}.prompt").strip().removesuffix(".").strip()


def _tests(record: Record, name: str) -> Iterator[tuple[Record, str]]:
    for i, value in enumerate(as_list(record.get(name), name)):
        yield as_object(value, f"{name}[{i}]"), f"{name}[{i}]"


def _queries(test: Record, name: str, where: str) -> list[tuple[str, tuple[str, ...]]]:
    """(prompt, right answers) of each query; those without an answer or prompt are left out."""
    found = []
    for i, value in enumerate(as_list(test.get(name), f"{where}.{name}")):
        place = f"{where}.{name}[{i}]"
        query = as_object(value, place)
        prompt = query.get("prompt") if is_missing(query.get("phrase")) else query.get("phrase")
        answers = _answers(query, place)
        if answers and not is_missing(prompt):
            found.append((text(prompt, f"{place}.prompt"), answers))
    return found


def _answers(query: Record, place: str) -> tuple[str, ...]:
    """Right answers of a query: every value first, then all aliases."""
    given = [as_object(a, f"{place}.answers") for a in as_list(query.get("answers"), place)]
    values = [a.get("value") for a in given] + [a.get("aliases") for a in given]
    return right_answers(values, f"{place}.answers")


def _names(record: Record, target_id: object) -> tuple[str, ...]:
    """Names of the new target, as queries that ask for it alone give them."""
    for name in CRITERIA:
        for test, where in _tests(record, name):
            for value in as_list(test.get("test_queries"), where):
                query = as_object(value, where)
                is_regular = query.get("query_type") == "regular"
                if is_regular and target_id and query.get("target_ids") == [target_id]:
                    return _answers(query, where)
    return ()


def cut_sentence(
    sentence: str, before: str | None, relation: str, names: Sequence[str]
) -> tuple[str, str]:
    """Cut a sentence into prompt and target."""
    for name in sorted(names, key=len, reverse=True):
        if sentence.endswith(f" {name}"):
            return sentence.removesuffix(name).strip(), name
    links = LINKS.get(relation, r" (?:is|are)")
    ends = [m.end() for m in re.finditer(rf"{links}(?= |$)", sentence)]
    if not ends:
        raise BadRowError("no target", f"sentence {sentence!r} has no '{links.strip()}'")
    shared = [end for end in ends if before is None or before[:end] == sentence[:end]]
    end = (shared or ends)[-1]
    return sentence[:end], sentence[end:].strip()


def _criterion(record: Record, name: str, kind: ProbeKind) -> Iterator[Probe]:
    for i, (test, where) in enumerate(_tests(record, name)):
        conditions = tuple(
            (prompt, answers[0]) for prompt, answers in _queries(test, "condition_queries", where)
        )
        queries = _queries(test, "test_queries", where)
        is_one = len(queries) > 1 and test.get("test_condition") != "AND"
        for prompt, answers in queries:
            yield Probe(
                id="",
                edit_id=None,
                kind=kind,
                prompt=prompt,
                target=answers[0],
                axis=name,
                conditions=conditions,
                aliases=answers[1:],
                group=f"{name}.{i}" if is_one else "",
            )
