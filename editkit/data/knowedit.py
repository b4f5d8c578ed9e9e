"""KnowEdit: several editing sets in one schema, with portability and locality by kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from editkit.data.drafts import Draft
from editkit.data.easyedit import parse_record
from editkit.data.fields import as_list, as_object
from editkit.data.jsonfile import Place
from editkit.data.records import RecordModule
from editkit.data.rows import BadRowError, Record

ROLES = (("K_F", "K_R"), ("success", "locality"))
"""Sanitation: what to forget and what to keep, in its training file and in its test file."""
WIKIBIO = {"text": "prompt", "labels": "target_new", "concept": "subject"}


class KnowEdit(RecordModule):
    """The benchmark of Zhang et al. 2024, "A Comprehensive Study of Knowledge Editing".

    *Source*: zjunlp/KnowEdit: WikiData_recent, ZsRE, WikiData_counterfact, WikiBio, Sanitation
    (not ConvSent, whose targets are sentiments). *Licence*: MIT. *Row*: `prompt`, `target_new`,
    `subject`, `ground_truth`, `rephrase_prompt` (ZsRE), `locality` and `portability`: objects of
    axis to questions, or `{}`. WikiBio names its fields `text`, `labels`, `concept`. An answer is a
    text, a list of texts, or a list of lists of aliases, as each file has it. Sanitation is one
    object: what to forget (`K_F`; in the test file `success`) and what to keep (`K_R`;
    `locality`), as `question`, `target_new`, `ground_truth`.

    *Probes*: the prompt (reliability), `rephrase_prompt` (generalization), `portability` by axis
    (`Reasoning`, `Subject_Aliasing`, `Logical_Generalization`), `locality` by axis
    (`Relation_Specificity`, `Forgetfulness`). The first answer that is not blank is the target, all
    others are aliases: any one of them is right. Of Sanitation, what to keep is locality (axis
    `retain`), dealt out to the edits in turn. A locality question without an answer is only
    compared with the unedited model.

    *In papers*: EasyEdit's benchmark takes the first question of each axis; here all are asked.
    `ZsRE-test-all.json` has 3 rows whose subject is not in the prompt (refused), 18 prompts twice,
    10 of them with another target; `wiki_counterfact_train_cf.json` 11 twice, with the same.

    Its arguments are those of `RecordModule`.
    """

    known: ClassVar = {
        "d70ff1f69ddcac101bbe9c6f1d6ee3918bdac96f145d937e90fbbb02fcf85fab": "ZsRE-test-all.json",
        "5856107412ddeeae2ceea2a15ebd125fd7c86ac8d62b933b095514304a77c73a": (
            "wiki_recent_train.json"
        ),
        "acdc01922afab1d4122249a2c22ad8c1e0e86506dd7a28eec698f22d175ebf9d": (
            "wiki_counterfact_train_cf.json"
        ),
    }
    wants: ClassVar[str] = "'prompt', 'target_new', and 'locality' by axis"

    @classmethod
    def reads(cls, record: Record) -> bool:
        """A row with target and an object of locality questions, possibly empty."""
        target = "target_new" in record or {"text", "labels"} <= record.keys()
        return target and isinstance(record.get("locality"), dict)

    def rows(self, file: str) -> Iterator[Place]:
        """Rows of the file; the one object of Sanitation gives many."""
        for line, record in super().rows(file):
            roles = next(
                (r for r in ROLES if isinstance(record, dict) and set(r) <= {*record}), None
            )
            if roles is None or isinstance(record, BadRowError):
                yield line, record
                continue
            try:
                yield from ((line, row) for row in _sanitation(record, *roles))
            except BadRowError as bad:
                yield line, bad

    def parse(self, record: Record) -> Sequence[Draft]:
        """Read one row."""
        return [parse_record({WIKIBIO.get(name, name): value for name, value in record.items()})]


def _sanitation(record: Record, forget: str, keep: str) -> Iterator[Record]:
    """One row for each question to forget, with its share of those to keep."""
    questions = as_list(record[forget], forget)
    kept = [as_object(one, f"{keep}[{i}]") for i, one in enumerate(as_list(record[keep], keep))]
    for i, value in enumerate(questions):
        row = as_object(value, f"{forget}[{i}]")
        share = kept[i :: len(questions)]
        retain = [
            {"prompt": k.get("question"), "ground_truth": k.get("ground_truth")} for k in share
        ]
        yield {**row, "prompt": row.get("question"), "locality": {"retain": retain}}
