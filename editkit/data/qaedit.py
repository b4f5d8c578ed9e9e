"""QAEdit: questions of three question-answering benchmarks that models get wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from editkit.data.drafts import Draft
from editkit.data.easyedit import parse_qaedit
from editkit.data.records import RecordModule
from editkit.data.rows import Record


class QAEdit(RecordModule):
    """Real questions with real answers (Yang et al. 2025, "The Mirage of Model Editing").

    *Source*: WanliYoung/Revisit-Editing-Evaluation: 19,249 rows of Natural Questions, TriviaQA and
    SimpleQA, and `QAEdit_inter_1k.json`, 1,000 of them. *Licence*: Apache-2.0. *Row*: `id`,
    `source` (`NQ`, `TQA`, `SQA`), `prompt`, `target`, `subject`, `rephrase`, `locality`: five
    questions `loc` with their answers `loc_ans`.

    *Probes*: the question (reliability), its rephrasing (generalization), the five questions with
    their gold answers (locality). An `id` counts within its `source`; probes are named by both.

    *In papers*: "Mirage" asks questions alone, greedily, for up to 50 tokens until a stop, and lets
    a judge or an exact match decide (the scorers `judge` and `generation`). 1,000 prompts, none
    twice.

    Its arguments are those of `RecordModule`.
    """

    known: ClassVar = {
        "640e1d279759263fdaae543a385680d21a55aa3597ca8b597ffd7937fef07c42": "QAEdit_inter_1k.json",
    }
    wants: ClassVar[str] = "'prompt', 'target', 'rephrase' and 'locality'"

    @classmethod
    def reads(cls, record: Record) -> bool:
        """A question with target, rephrasing and a list of locality questions."""
        known = {"prompt", "target", "rephrase"} <= record.keys()
        return known and isinstance(record.get("locality"), list)

    def parse(self, record: Record) -> Sequence[Draft]:
        """Read one row."""
        draft = parse_qaedit(record)
        source, number = record.get("source"), record.get("id")
        named = source is not None and number is not None
        return [replace(draft, name=f"{source}-{number}") if named else draft]
