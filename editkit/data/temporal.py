"""Temporal: paragraphs about what emerged after training, asked in text of another kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from editkit.data.drafts import Draft
from editkit.data.easyedit import parse_record
from editkit.data.fields import text
from editkit.data.records import RecordModule
from editkit.data.rows import BadRowError, Record
from editkit.edits import Probe


class Temporal(RecordModule):
    """Emerging entities with out-of-distribution text about them (as in WISE, Wang et al. 2024).

    *Source*: `temporal-edit.json` and `temporal-train.json` (75 rows each) of WISE. *Licence*: MIT;
    locality texts are of a web crawl. *Row*: `prompt` the first words of a paragraph, `target_new`
    the rest (128 tokens in the median), `subject`, `ood_rephrase` another text about the entity,
    `locality_prompt`, `locality_ground_truth`.

    *Probes*: the paragraph (reliability), the other text (generalization, axis `ood`), a web text
    with its continuation (locality). The score of the other text is the share of its tokens that
    the model holds more likely than 0.8 (WISE), or of its texts whose mean is (MEMOIR). Where it
    begins with the edit's prompt (44 of 75), it is asked from behind the word in which that ends,
    else from behind its first word.

    *In papers*: WISE and MEMOIR (GPT-J only), with the training file as `negatives`. One prompt of
    the training file occurs twice with two targets.

    Args:
        path: A file or folder, `owner/name` of a Hub data set, or one file there by its address
            `hf://datasets/owner/name@revision/file.json`; see `RecordModule`.
        whole_text: Ask all of the other text but its first word, even where it begins with the
            edit's prompt: nearest to WISE's code, which scores every token.
        **kwargs: See `RecordModule`.
    """

    known: ClassVar = {
        "3c27956224d56111762e7b56ca0595dc638cc005faaf322a01c48ecd5283aef8": "temporal-edit.json",
        "0ba8c40de49bd0d0ffc1da69ac17fcfce6db8c32bf36a7df5c88730b48e1172a": "temporal-train.json",
    }
    wants: ClassVar[str] = "'prompt', 'target_new', 'ood_rephrase' and 'locality_prompt'"

    def __init__(self, path: str, whole_text: bool = False, **kwargs: Any) -> None:
        super().__init__(path, **kwargs)
        self.whole_text = whole_text

    @classmethod
    def reads(cls, record: Record) -> bool:
        """A prompt with target and an out-of-distribution text."""
        return {"target_new", "ood_rephrase"} <= record.keys()

    def parse(self, record: Record) -> Sequence[Draft]:
        """Read one row."""
        draft = parse_record(record)
        other = text(record.get("ood_rephrase"), "ood_rephrase").strip()
        prompt = draft.edit.prompt.strip()
        shared = 0 if self.whole_text or not other.startswith(prompt) else len(prompt)
        head = other[:shared] + other[shared:].partition(" ")[0]  # to the end of a word
        rest = other[len(head) :].strip()
        if not rest:
            raise BadRowError(
                "empty field", f"field 'ood_rephrase' says nothing behind the prompt: {other!r}"
            )
        draft.probes.insert(0, Probe("", None, "generalization", head, rest, axis="ood"))
        return [draft]
