"""Hallucination: sentences that a model made up about people, to be put right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from editkit.data.drafts import Draft
from editkit.data.easyedit import parse_record
from editkit.data.records import RecordModule
from editkit.data.rows import Record


class Hallucination(RecordModule):
    """Passages of SelfCheckGPT (Manakul et al. 2023), each with its corrected next sentence.

    *Source*: `hallucination-edit.json` (600 rows) and `-train.json` (306) of WISE. *Licence*:
    wiki_bio_gpt3 CC BY-SA 3.0, split MIT; locality texts are of a web crawl. *Row*: `prompt` the
    passage so far, `target_new` the sentence to write (25 tokens in the median, 80 at most),
    `subject`, `locality_prompt`, `locality_ground_truth`.

    *Probes*: the passage with its sentence (reliability; papers report its perplexity), a web text
    with its true continuation (locality; 7 continuations are blank, then only agreement with the
    unedited model counts). There are no rephrasings. Texts are cut within words, and prompt and
    continuation are joined by a space all the same, as in WISE's code.

    *In papers*: GRACE (Hartvigsen et al. 2023), WISE, MEMOIR and REPAIR; WISE with the training
    file as `negatives`, of which 306 serve 600 edits in turn. Subjects repeat (three edits a
    passage on average), prompts do not.

    Its arguments are those of `RecordModule`.
    """

    known: ClassVar = {
        "523ce88b5299047bf58ea3ad8b7e9d12635592543df54b58c8eaf16d5e68aaaf": (
            "hallucination-edit.json"
        ),
        "ef280a0ce9aa194c545e7a1c7983df181b8e48dbfb1945ffe40e1903cca0d297": (
            "hallucination-train.json"
        ),
    }
    wants: ClassVar[str] = "'prompt', 'target_new', 'locality_prompt' and no rephrasing"

    @classmethod
    def reads(cls, record: Record) -> bool:
        """A prompt with target and one locality text, without rephrasing of any kind."""
        others = ("rephrase_prompt", "ood_rephrase", "locality", "portability")
        asked = all(record.get(name) for name in ("target_new", "locality_prompt"))
        return asked and not any(record.get(name) for name in others)

    def parse(self, record: Record) -> Sequence[Draft]:
        """Read one row."""
        return [parse_record(record)]
