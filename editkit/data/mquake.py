"""MQuAKE: cases of several edits, and questions whose answers take several hops."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Literal

from editkit.data.counterfact import filled
from editkit.data.drafts import Draft, Row
from editkit.data.fields import as_list, as_object, make_edit, name_of, right_answers, text, texts
from editkit.data.reader import Reader
from editkit.data.records import RecordModule
from editkit.data.rows import BadRowError, Record
from editkit.data.source import Facts
from editkit.edits import Probe

HEAD = "requested_rewrite"


class MQuAKE(RecordModule):
    """Multi-hop questions over edited facts (Zhong et al. 2023).

    *Source*: `MQuAKE-CF.json`, `MQuAKE-CF-3k(-v2).json`, `MQuAKE-T.json`, MQuAKE-Remastered (Zhong
    et al. 2025) in the same schema, and parts of them. *Licence*: MIT. *Row*, a case: one or more
    `requested_rewrite` (`prompt` with one `{}`, `subject`, `question`, `target_new.str`,
    `target_true.str`), three `questions`, `answer` and `new_answer` with aliases, and
    `new_single_hops` (`question`, `cloze`, `answer`, `answer_alias`), the chain after the edits.

    *Probes*: of each edit its cloze (reliability) and its question (generalization, axis
    `question`). Once all edits of the case are made: its multi-hop questions (portability, axis
    `multi_hop`), one group a case, which is hit where any of them is answered; and the hops that no
    edit of the case changes (intrinsic, axis `single_hop`), cloze and question in one group. Old
    answers are rivals.

    *Contradictions*: an edit of one case can change a hop that another case takes as it is in the
    world (33 to 76 % of cases, says MQuAKE-Remastered; in `MQuAKE-CF-354.json` 61 of 564 hops).
    Such a case has no right answer once both are made: by default its questions are asked until
    then, and never where the other edit comes first. The paper asks them all the same (`ask`).
    `MQuAKE-hard.json` has two facts with two targets each.

    *In papers*: all edits of k = 1, 100, 1,000 or 3,000 cases (`cases`), then the share of edits,
    of chains and of multi-hop questions answered; with and without a chain of thought.

    Args:
        path: A file or folder, `owner/name` of a Hub data set, or one file there by its address
            `hf://datasets/owner/name@revision/file.json`; see `RecordModule`.
        stream: Make an edit that several cases share once, when the first of them needs it
            (`deduplicated`), or once for every case (`case_wise`). A case that needs a fact back
            that another changed makes it again either way.
        cases: Cases to use from the front; the paper's k. None uses all.
        **kwargs: See `RecordModule`.
    """

    known: ClassVar = {
        "1e060dd97d062b61858e91bd0bbc114754ff66e308acb54973cd0a5d4188bf54": (
            "MQuAKE-CF, 354 cases of AKEW"
        ),
        "fc78dc7bec4625d3ce6e2923acae7f1920691b0b23e663182bf799f2856f2a11": "MQuAKE-hard.json",
    }
    wants: ClassVar[str] = "'requested_rewrite', a list, 'questions' and 'new_single_hops'"

    def __init__(
        self,
        path: str,
        stream: Literal["deduplicated", "case_wise"] = "deduplicated",
        cases: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, **kwargs)
        if stream not in ("deduplicated", "case_wise"):
            raise ValueError(f"stream is {stream!r}; use 'deduplicated' or 'case_wise'")
        if cases is not None and cases < 1:
            raise ValueError(f"cases is {cases}; use a number of cases, or null for all of them")
        self.once, self.cases = stream == "deduplicated", cases

    @classmethod
    def reads(cls, record: Record) -> bool:
        """A list of rewrites with multi-hop questions."""
        return isinstance(record.get("requested_rewrite"), list) and "questions" in record

    def parse(self, record: Record) -> Sequence[Draft]:
        """Read one case."""
        hops = [_hop(value, where) for value, where in _objects(record, "new_single_hops")]
        drafts = [_rewrite(value, where, hops) for value, where in _objects(record, HEAD)]
        edited = {draft.edit.prompt for draft in drafts}
        shared = [*_multi_hop(record, hops), *_unchanged(hops, edited)]
        drafts[-1] = replace(drafts[-1], shared=shared)
        case = name_of(record.get("case_id"), "case_id")
        return [replace(draft, case=case) for draft in drafts]

    def _read(self, reader: Reader) -> Iterator[Row]:
        return islice(super()._read(reader), self.cases)


@dataclass(frozen=True)
class Hop:
    """One step of the chain: a fact in two wordings."""

    cloze: str
    question: str
    answer: str
    aliases: tuple[str, ...]


def _objects(record: Record, name: str) -> list[tuple[Record, str]]:
    """Objects of a list that is not empty, each with its place."""
    values = as_list(record.get(name), name)
    if not values:
        raise BadRowError("missing field", f"field '{name}' holds nothing")
    return [(as_object(v, f"{name}[{i}]"), f"{name}[{i}]") for i, v in enumerate(values)]


def _hop(value: Record, where: str) -> Hop:
    cloze, question, answer = (
        text(value.get(name), f"{where}.{name}") for name in ("cloze", "question", "answer")
    )
    return Hop(cloze, question, answer.strip(), right_answers(value.get("answer_alias"), where))


def _rewrite(value: Record, where: str, hops: Sequence[Hop]) -> Draft:
    subject = text(value.get("subject"), f"{where}.subject").strip()
    new, old = (as_object(value.get(n), f"{where}.{n}") for n in ("target_new", "target_true"))
    prompt = filled(text(value.get("prompt"), f"{where}.prompt"), subject)
    edit = make_edit(prompt, new.get("str"), subject, names=("prompt", f"{where}.target_new.str"))
    question = text(value.get("question"), f"{where}.question")
    asked = Probe("", None, "generalization", question, edit.target, axis="question")
    known = [hop for hop in hops if hop.cloze == prompt and hop.answer == edit.target]
    return Draft(
        edit,
        [asked],
        name=None,
        rival=text(old.get("str"), f"{where}.target_true.str").strip(),
        aliases=known[0].aliases if known else (),
    )


def _multi_hop(record: Record, hops: Sequence[Hop]) -> Iterator[tuple[Probe, Facts]]:
    """Wordings of the multi-hop question; they rest on every hop."""
    facts = tuple((hop.cloze, hop.answer) for hop in hops)
    probe = Probe(
        id="",
        edit_id=None,
        kind="portability",
        prompt="",
        target=text(record.get("new_answer"), "new_answer").strip(),
        axis="multi_hop",
        rival=text(record.get("answer"), "answer").strip(),
        aliases=right_answers(record.get("new_answer_alias"), "new_answer_alias"),
        group="multi_hop",
    )
    for question in texts(record.get("questions"), "questions"):
        yield replace(probe, prompt=question), facts


def _unchanged(hops: Sequence[Hop], edited: Collection[str]) -> Iterator[tuple[Probe, Facts]]:
    """Hops that stay as they are in the world, cloze and question."""
    for i, hop in enumerate(hops):
        if hop.cloze not in edited:
            for prompt in (hop.cloze, hop.question):
                probe = Probe("", None, "intrinsic", prompt, hop.answer, axis="single_hop")
                probe = replace(probe, aliases=hop.aliases, group=f"single_hop.{i}")
                yield probe, ((hop.cloze, hop.answer),)
