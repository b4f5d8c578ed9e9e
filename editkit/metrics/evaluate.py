"""The one evaluator: probes and a model in, one row per probe out. It asks no method's name.

Reliability, generalization, portability and intrinsic probes are judged against their target.
A locality probe is judged against the unedited model, and where it has a gold target a second
row, `locality_gold`, judges the same answer against that. A probe whose conditions the unedited
model does not meet yields its rows with `counted: false` and no scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from editkit.edits import Probe
from editkit.functional.scores import (
    all_by_row,
    answers_match,
    cut_answer,
    mean_by_row,
    token_hits,
    token_nll,
)
from editkit.lm.editable import EditableLM
from editkit.metrics.ask import forced_batches, free_answers
from editkit.metrics.protocol import EvalProtocol
from editkit.metrics.references import References

Scores = dict[str, float]


class ProbeRow(TypedDict):
    """One line of `probes.jsonl`; `answer` and `reference` are None where none was generated."""

    probe_id: str
    edit_id: int | None
    kind: str
    axis: str
    prompt: str
    target: str | None
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
    """
    for probe in probes:
        if probe.target is None and probe.kind != "locality":
            raise ValueError(f"probe {probe.id!r} of kind {probe.kind!r} needs a target")
    size = batch_size or protocol.batch_size
    references.fill(lm, probes, protocol, size)
    asked = [probe for probe in probes if references.counts(probe)]
    forced: list[dict[str, Scores]] = [{} for _ in asked]
    free: list[str | None] = [None] * len(asked)
    if protocol.is_forced:
        forced = _forced_scores(lm, asked, references, size)
    if protocol.is_free:
        prompts, targets = [p.prompt for p in asked], [p.target for p in asked]
        free = [*free_answers(lm, prompts, targets, protocol, size)]
    results = iter(zip(forced, free, strict=True))
    rows: list[ProbeRow] = []
    for probe in probes:
        scores, text = next(results) if references.counts(probe) else ({}, None)
        rows += [_row(probe, k, scores, text, references, protocol) for k in row_kinds(probe)]
    return rows


def row_kinds(probe: Probe) -> tuple[str, ...]:
    """Return the kinds of row that a probe yields."""
    if probe.kind == "locality" and probe.target is not None:
        return ("locality", "locality_gold")
    return (probe.kind,)


def _row(
    probe: Probe,
    kind: str,
    forced: dict[str, Scores],
    text: str | None,
    references: References,
    protocol: EvalProtocol,
) -> ProbeRow:
    """Judge the free answer, where there is one, and write the row."""
    counted = references.counts(probe)
    reference = references[probe].answer if kind == "locality" else None
    scores = dict(forced.get(kind, {}))
    answer = None
    if text is not None:
        target = None if kind == "locality" else probe.target
        answer = cut_answer(text, protocol.stop, target)
        expected = reference if target is None else target
        assert expected is not None, "fill() asked for the reference"
        scores["generation"] = float(answers_match(answer, expected))
    return ProbeRow(
        probe_id=probe.id,
        edit_id=probe.edit_id,
        kind=kind,
        axis=probe.axis,
        prompt=probe.prompt,
        target=probe.target,
        scores={name: scores[name] for name in protocol.scorers} if counted else {},
        answer=answer,
        reference=reference,
        counted=counted,
    )


@torch.no_grad()
def _forced_scores(
    lm: EditableLM, asked: Sequence[Probe], references: References, size: int
) -> list[dict[str, Scores]]:
    """Score every probe's forced continuation in one pass, per kind of row."""
    found: list[dict[str, Scores]] = [{} for _ in asked]
    texts = [references.continuation(probe) for probe in asked]
    for rows, tokens in forced_batches(lm, [p.prompt for p in asked], texts, size):
        batch = [asked[i] for i in rows]
        logits_NV = lm.target_logits(tokens)
        row_N = tokens.target_rows_N.cpu()
        gold_N = tokens.target_ids_N
        given = gold_N.split(tokens.target_BT.sum(1).tolist())
        judged = [
            ids.new_tensor(references[p].argmax) if p.kind == "locality" else ids
            for p, ids in zip(batch, given, strict=True)
        ]
        first = _scores_by_row(logits_NV, torch.cat(judged), row_N, len(rows))
        for i, scores in zip(rows, first, strict=True):
            found[i][asked[i].kind] = scores
        if any(len(row_kinds(p)) > 1 for p in batch):
            gold = _scores_by_row(logits_NV, gold_N, row_N, len(rows))
            for i, scores in zip(rows, gold, strict=True):
                found[i]["locality_gold"] = scores
    return found


def _scores_by_row(logits_NV: Tensor, ids_N: Tensor, row_N: Tensor, rows: int) -> list[Scores]:
    """Return the three teacher-forced scores of each row; row sums run on CPU in fp64."""
    hits_N = token_hits(logits_NV, ids_N).cpu()
    nll_N = token_nll(logits_NV, ids_N).cpu().double()
    by_scorer = {
        "token_accuracy": mean_by_row(hits_N.double(), row_N, rows).tolist(),
        "sequence_accuracy": all_by_row(hits_N, row_N, rows).double().tolist(),
        "nll": mean_by_row(nll_N, row_N, rows).tolist(),
    }
    return [{name: values[b] for name, values in by_scorer.items()} for b in range(rows)]
