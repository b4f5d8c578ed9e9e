"""The one evaluator: probes and a model in, one row per probe out. It asks no method's name.

Reliability, generalization, portability and intrinsic probes are judged against their target.
A locality probe is judged against the unedited model, and where it has a gold target a second
row, `locality_gold`, judges the same answer against that. A probe whose conditions the unedited
model does not meet yields its rows with `counted: false` and no scores.

A row has the scores of `EvalProtocol.scorers` that its probe has data for: `pair` wants a rival,
`choice` wants choices, `fluency` and `consistency` are of reliability rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypedDict

from editkit.edits import Probe
from editkit.functional.scores import Scores, answers_match, cut_answer
from editkit.lm.editable import EditableLM
from editkit.metrics.ask import CONFIDENT, Heard, Question, ask
from editkit.metrics.compat import Answered, zsre_scores
from editkit.metrics.essays import fluency, write_essays
from editkit.metrics.judge import Case
from editkit.metrics.protocol import EvalProtocol
from editkit.metrics.references import References, accepted_answers

WORST_LOG = 700.0  # nats: exp of more is no number


class ProbeRow(TypedDict):
    """One line of `probes.jsonl`; `answer` and `reference` are None where none was generated."""

    probe_id: str
    edit_id: int | None
    kind: str
    axis: str
    group: str
    prompt: str
    target: str | None
    rival: str | None
    scores: Scores
    answer: str | None
    reference: str | None
    counted: bool


def score_probes(
    lm: EditableLM,
    probes: Sequence[Probe],
    references: References,
    protocol: EvalProtocol,
    batch_size: int | None = None,
) -> list[ProbeRow]:
    """Score probes on a model as it stands.

    Args:
        lm: The edited model.
        probes: Questions; ids are unique in a run.
        references: The unedited model's answers; what is missing is asked and kept in it.
        protocol: Scorers and decoding.
        batch_size: Rows per forward pass; None takes the protocol's. Changes no score.

    Returns:
        Rows in the order of the probes; a locality probe with a gold target yields two.

    Raises:
        ValueError: If a probe that needs a target has none, or two probes share an id.
        JudgeError: If the judge fails on a case.
    """
    for probe in probes:
        if probe.target is None and (probe.kind != "locality" or probe.rival or probe.choices):
            raise ValueError(f"probe {probe.id!r} of kind {probe.kind!r} needs a target")
    size = batch_size or protocol.batch_size
    references.fill(lm, probes, protocol, size)
    asked = [probe for probe in probes if references.counts(probe)]
    heard: Iterator[Heard | None] = iter([None] * len(asked))
    if protocol.is_free or protocol.is_forced:
        questions = [_question(probe, references, protocol) for probe in asked]
        is_whole = protocol.asks("ood")
        heard = iter(ask(lm, questions, protocol, size, protocol.is_free, is_whole))
    pairs: list[tuple[Probe, ProbeRow]] = []
    for probe in probes:
        one = next(heard) if references.counts(probe) else None
        pairs += [(probe, _row(probe, k, one, references, protocol)) for k in row_kinds(probe)]
    counted = [(probe, row) for probe, row in pairs if row["counted"]]
    _add_quirks(lm, [row for _, row in counted], protocol, size)
    _add_essays(lm, [row for _, row in counted], protocol, size)
    _add_verdicts(counted, protocol)
    rows = [row for _, row in pairs]
    for row in rows:
        row["scores"] = {s: row["scores"][s] for s in protocol.scorers if s in row["scores"]}
    return rows


def row_kinds(probe: Probe) -> tuple[str, ...]:
    """Return the kinds of row that a probe yields."""
    if probe.kind == "locality" and probe.target is not None:
        return ("locality", "locality_gold")
    return (probe.kind,)


def _question(probe: Probe, references: References, protocol: EvalProtocol) -> Question:
    """Put a probe as a question; a free answer is soonest found where the right one is forced."""
    others: tuple[str, ...] = ()
    if protocol.asks("pair", "pair_diff") and probe.rival is not None:
        others = (probe.rival,)
    if protocol.asks("choice", "choice_norm"):
        others += probe.choices
    is_compared = protocol.is_forced and probe.kind == "locality"
    return Question(
        prompt=probe.prompt,
        draft=references.continuation(probe),
        compared=tuple(references[probe].argmax or ()) if is_compared else None,
        others=others,
        accepted=accepted_answers(probe),
    )


def _row(
    probe: Probe,
    kind: str,
    heard: Heard | None,
    references: References,
    protocol: EvalProtocol,
) -> ProbeRow:
    """Judge what was heard of a probe, as far as that needs no model, and write its row."""
    counted = references.counts(probe)
    reference = references[probe].answer if kind == "locality" else None
    scores: Scores = {}
    answer = None
    if heard is not None:
        if protocol.is_forced:
            scores |= heard.compared if kind == "locality" else heard.scores
            scores |= {} if kind == "locality" else _against_target(probe, heard, protocol)
        if heard.answer is not None and kind == "locality":
            assert reference is not None, "fill() asked for the reference"
            answer = cut_answer(heard.answer, protocol.stop)
            scores["generation"] = float(answers_match(answer, reference))
        elif heard.answer is not None:
            answer, is_right = _match(heard.answer, accepted_answers(probe), protocol.stop)
            scores["generation"] = float(is_right)
    return ProbeRow(
        probe_id=probe.id,
        edit_id=probe.edit_id,
        kind=kind,
        axis=probe.axis,
        group=probe.group,
        prompt=probe.prompt,
        target=probe.target,
        rival=probe.rival,
        scores=scores,
        answer=answer,
        reference=reference,
        counted=counted,
    )


def _match(text: str, expected: tuple[str, ...], stop: tuple[str, ...]) -> tuple[str, bool]:
    """Return a free answer, cut as what it answers allows, and whether it is one expected."""
    cuts = [(cut_answer(text, stop, right), right) for right in expected]
    hits = [cut for cut, right in cuts if answers_match(cut, right)]
    return (hits[0], True) if hits else (cuts[0][0], False)


def _against_target(probe: Probe, heard: Heard, protocol: EvalProtocol) -> Scores:
    """Return the scores that compare a target with a bound or with other answers."""
    nll, total = heard.scores["nll"], heard.scores["nll_sum"]
    scores = {
        "perplexity": math.exp(min(nll, WORST_LOG)),
        "ood": heard.confident,
        "ood_instance": float(nll < CONFIDENT),
    }
    others = list(heard.others)
    if probe.rival is not None and protocol.asks("pair", "pair_diff"):
        rival, _ = others.pop(0)
        scores["pair"] = float(nll < rival)
        scores["pair_diff"] = math.exp(-nll) - math.exp(-rival)
    if others:
        scores["choice"] = float(total < min(other for _, other in others))
        scores["choice_norm"] = float(nll < min(other for other, _ in others))
    return scores


def _add_quirks(
    lm: EditableLM, rows: Sequence[ProbeRow], protocol: EvalProtocol, size: int
) -> None:
    """Replace the scores of tokens by those of released code, where that is asked for."""
    judged = [(row, row["target"]) for row in rows if row["kind"] != "locality"]
    if protocol.compat:
        answered = [
            Answered(row["prompt"], target, row["kind"] == "locality_gold")
            for row, target in judged
            if target is not None
        ]
        found = zsre_scores(lm, answered, protocol.compat, size)
        for (row, _), scores in zip(judged, found, strict=True):
            row["scores"] |= scores


def _add_essays(
    lm: EditableLM, rows: Sequence[ProbeRow], protocol: EvalProtocol, size: int
) -> None:
    """Let the model write on the edited prompts, where that is asked for."""
    if not protocol.asks("fluency", "consistency"):
        return
    edited = [row for row in rows if row["kind"] == "reliability"]
    essays = write_essays(lm, [row["prompt"] for row in edited], protocol.essay_tokens, size)
    for row, essay in zip(edited, essays, strict=True):
        row["scores"]["fluency"] = fluency(essay)
        if protocol.reference_texts is not None:
            likeness = protocol.reference_texts.consistency(essay, row["target"] or "")
            row["scores"] |= {} if likeness is None else {"consistency": likeness}


def _add_verdicts(counted: Sequence[tuple[Probe, ProbeRow]], protocol: EvalProtocol) -> None:
    """Ask the judge about free answers, where there is one."""
    if protocol.judge is None or not protocol.asks("judge"):
        return
    cases = [
        Case(
            probe.prompt,
            (row["reference"] or "",) if row["kind"] == "locality" else accepted_answers(probe),
            row["answer"] or "",
        )
        for probe, row in counted
    ]
    for (_, row), verdict in zip(counted, protocol.judge.verdicts(cases), strict=True):
        row["scores"]["judge"] = float(verdict)
