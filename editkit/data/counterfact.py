"""CounterFact: true facts overwritten by false ones, in the nested and the flat schema."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from editkit.data.drafts import Draft
from editkit.data.easyedit import parse_record
from editkit.data.fields import as_object, make_edit, name_of, text, texts
from editkit.data.records import RecordModule
from editkit.data.rows import BadRowError, Record
from editkit.edits import Probe


class CounterFact(RecordModule):
    """Counterfactual statements with their neighbours (Meng et al. 2022, ROME).

    *Source*: `counterfact.json` (21,919 rows) and `multi_counterfact.json` (20,877, contradicting
    facts removed) of ROME and MEMIT; `counterfact-edit.json` and `-train.json` of EasyEdit (10,000
    each). *Licence*: MIT. *Row*, nested: `requested_rewrite` with a `prompt` that holds one
    `{}`, `subject`, `target_new.str`, `target_true.str`; `paraphrase_prompts`,
    `neighborhood_prompts`. Flat: `prompt`, `target_new`, `ground_truth`, and `rephrase_prompt`,
    `locality_prompt`, `locality_ground_truth`, or lists of `rephrase_prompt` and `locality`.

    *Probes*: the prompt (reliability), paraphrases (generalization), neighbours (locality). The
    rival of a new answer is the true one; neighbours share the edit's true answer, so theirs is the
    target and the new one its rival (`pair` compares the two, as ROME's ES, PS and NS). Not asked:
    `generation_prompts` and `attribute_prompts`.

    *In papers*: ROME, MEMIT, AlphaEdit (the first 2,000, 100 at a time), LyapLock (10,000).

    *Contradictions*: of the 10,000 edits of `counterfact-edit.json`, 83 repeat the prompt of an
    earlier one, 80 with another target than it has by then (mostly twin cities); 214 neighbours are
    prompts of edits. By default what these say is asked until it is overwritten; papers ask all to
    the end (`contradictions: ask`).

    Its arguments are those of `RecordModule`.
    """

    known: ClassVar = {
        "20c225e6299b3c5b2c569bd9103aa212806e0d1e6e0c307de5c379773979b967": "counterfact-edit.json",
        "bb40e12c7b740d6859e521674cf438f063c7c3e444bc1b449e74cdd0900772d0": (
            "counterfact-train.json"
        ),
        "76432107caa413f068e4f883e3cd8a5e00fbb090a6edee4e6da8b8ec6c618dec": "counterfact_500.json",
        "5ee7951c470f71295d7ace07f541a05307938f46b92c58a630c44a9742fdeb4b": (
            "multi_counterfact.json, 100 rows"
        ),
    }
    wants: ClassVar[str] = (
        "'requested_rewrite' and 'neighborhood_prompts', or 'prompt', 'target_new',"
        " 'rephrase_prompt' and 'locality_prompt'"
    )

    @classmethod
    def reads(cls, record: Record) -> bool:
        """A nested rewrite with neighbours, or a flat row with paraphrase and neighbours."""
        if isinstance(record.get("requested_rewrite"), dict):
            return True
        neighbours = record.get("locality_prompt") or isinstance(record.get("locality"), list)
        return bool({"target_new", "rephrase_prompt"} <= record.keys() and neighbours)

    def parse(self, record: Record) -> Sequence[Draft]:
        """Read one row of either schema."""
        nested = record.get("requested_rewrite") is not None
        draft = _nested(record) if nested else parse_record(record)
        return [replace(draft, probes=[_compared(p, draft) for p in draft.probes])]


def _nested(record: Record) -> Draft:
    rewrite = as_object(record["requested_rewrite"], "requested_rewrite")
    template = text(rewrite.get("prompt"), "requested_rewrite.prompt")
    subject = text(rewrite.get("subject"), "requested_rewrite.subject").strip()
    new = as_object(rewrite.get("target_new"), "requested_rewrite.target_new").get("str")
    edit = make_edit(
        filled(template, subject), new, subject, names=("prompt", "requested_rewrite.target_new")
    )
    old = as_object(rewrite.get("target_true"), "requested_rewrite.target_true").get("str")
    true = text(old, "requested_rewrite.target_true.str").strip()
    return Draft(
        edit,
        [*_asked(record, edit.target)],
        name_of(record.get("case_id"), "case_id"),
        rival=true,
    )


def _asked(record: Record, new: str) -> Iterator[Probe]:
    for prompt in texts(record.get("paraphrase_prompts"), "paraphrase_prompts"):
        yield Probe("", None, "generalization", prompt, new)
    for prompt in texts(record.get("neighborhood_prompts"), "neighborhood_prompts"):
        yield Probe("", None, "locality", prompt)


def _compared(probe: Probe, draft: Draft) -> Probe:
    """Let a neighbour's true answer stand against the new one of the edit."""
    if probe.kind != "locality":
        return probe
    return replace(probe, target=probe.target or draft.rival, rival=draft.edit.target)


def filled(template: str, subject: str) -> str:
    """Put a subject in the place of the one `{}`; braces elsewhere stay as they are."""
    if template.count("{}") != 1:
        raise BadRowError(
            "no place for the subject",
            f"prompt {template!r} must hold '{{}}' once, it does {template.count('{}')} times",
        )
    return template.replace("{}", subject)
