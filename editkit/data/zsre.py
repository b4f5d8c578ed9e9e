"""ZsRE: questions about relations, with one rephrasing and one unrelated question each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from editkit.data.drafts import Draft
from editkit.data.easyedit import parse_zsre
from editkit.data.fields import right_answers
from editkit.data.records import RecordModule
from editkit.data.rows import BadRowError, Record
from editkit.edits import Probe

NQ = "nq question: "


class ZsRE(RecordModule):
    """Zero-shot relation extraction as questions (Levy et al. 2017; Mitchell et al. 2022, MEND).

    *Source*: `zsre_mend_edit.json` and `zsre_mend_train.json` as published with WISE (Wang et al.
    2024) and EasyEdit; `zsre_mend_eval.json` of MEMIT. *Licence*: MIT. *Row*: `src` the question,
    `alt` the answer to write (a made-up one), `answers` the true ones, `subject`, `rephrase`,
    `loc` and `loc_ans` (a Natural Questions pair), and in some files `portability` (`New Question`,
    `New Answer`).

    *Probes*: `src` (reliability), `rephrase` (generalization), `loc` with its gold answer
    (locality), the new question (portability). The true answer is the rival of the target.

    *In papers*: MEND, WISE, MEMOIR, REPAIR and GRACE write `alt` and ask `loc` as it stands, WISE
    with the first rows of the training file as `negatives`; MEMIT, AlphaEdit and LyapLock write
    `answers[0]` and put a question mark behind `loc`. Two rows of the first 1,000 of the training
    file have a blank `alt`. No prompt of the edit file occurs twice, but 24 of its 1,037 edits are
    contradicted by a later one in another wording, which one of the two has as rephrasing.

    Args:
        path: A file or folder, `owner/name` of a Hub data set, or one file there by its address
            `hf://datasets/owner/name@revision/file.json`; see `RecordModule`.
        reading: Field of the answer that is written: `alt`, as in WISE's code, or `answers`, as in
            MEMIT's, which also asks `loc` with a question mark.
        nq_prefix: Keep the words "nq question: " in front of `loc`, as all of these papers do.
        **kwargs: See `RecordModule`.
    """

    known: ClassVar = {
        "0cf155da229b2eccae19fcfe5f7a09523363d357f5f15508d1521f495ad5ecd9": "zsre_mend_edit.json",
        "09dbb446f4afa1e500e051806430d286ef260fa6dd89e3590a9756f8b060a229": (
            "zsre_mend_train.json, first 1,000"
        ),
    }
    wants: ClassVar[str] = "'src', 'alt', 'rephrase', 'loc' and 'loc_ans'"

    def __init__(
        self,
        path: str,
        reading: Literal["alt", "answers"] = "alt",
        nq_prefix: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, **kwargs)
        if reading not in ("alt", "answers"):
            raise ValueError(f"reading is {reading!r}; use 'alt' or 'answers'")
        self.reading, self.nq_prefix = reading, nq_prefix

    @classmethod
    def reads(cls, record: Record) -> bool:
        """A question `src` with its new answer `alt`."""
        return {"src", "alt"} <= record.keys()

    def parse(self, record: Record) -> Sequence[Draft]:
        """Read one row."""
        aliases: tuple[str, ...] = ()
        if self.reading == "answers":
            true, *more = right_answers(record.get("answers"), "answers") or ("",)
            if not true:
                raise BadRowError("missing field", "field 'answers' holds no answer")
            record, aliases = {**record, "alt": true}, tuple(more)
        draft = parse_zsre(record)
        probes = [self._asked(probe) for probe in draft.probes]
        return [replace(draft, probes=probes, aliases=aliases)]

    def _asked(self, probe: Probe) -> Probe:
        """Write an unrelated question as the paper asks it."""
        if probe.kind != "locality":
            return probe
        prompt = probe.prompt if self.nq_prefix else probe.prompt.removeprefix(NQ)
        return replace(probe, prompt=prompt + "?" * (self.reading == "answers"))
