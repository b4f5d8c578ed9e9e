"""Ask the frozen questions of a model as it stands: one evaluator for every arm and checkpoint.

A row is what `editkit.metrics.evaluate` gives, and for methods with a memory who answered it. Two
scores of the protocol of Wen & Zhang stand beside the evaluator's own: `first_token`, whether the
answer's first token is the likeliest, and `substring`, whether the answer is anywhere in 50 new
tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from editkit.edits import Probe
from editkit.methods.base import EditModule
from editkit.metrics.evaluate import score_probes
from editkit.metrics.perplexity import perplexity
from editkit.metrics.protocol import EvalProtocol
from editkit.metrics.references import References
from editkit.retention.items import Item
from editkit.retention.objectives import Objective

LONG = 50  # new tokens in which a substring is looked for (Wen & Zhang)
NUMBER = re.compile(r"\s*([-+]?)\s*[$€£]?\s*([\d,]*\.?\d+)")
Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What came of one questioning.

    Args:
        rows: One row per item, by item id.
        downstream: Score of the objective's own test rows.
    """

    rows: dict[str, Row]
    downstream: float | None


def ask_items(method: EditModule, items: Sequence[Item], faithful: bool) -> dict[str, Row]:
    """Score all items on the model as it stands.

    Args:
        method: The edited method; its references hold the base model's answers.
        items: The frozen questions.
        faithful: Also look for answers in longer texts.
    """
    rows: dict[str, Row] = {}
    for row in method.score([item.probe for item in items]):
        rows.setdefault(row["probe_id"], {**row, "scores": dict(row["scores"])})
    rows = {name: row for name, row in rows.items() if row["counted"]}
    if faithful:
        _add_substrings(method, [item for item in items if item.id in rows], rows)
    return rows


def _add_substrings(method: EditModule, items: Sequence[Item], rows: dict[str, Row]) -> None:
    """Note whether each answer is a part of the model's text, as written."""
    long = replace(method.evaluation, scorers=("generation",), stop=(), max_new_tokens=LONG)
    probes = [
        Probe(item.id, None, "intrinsic", item.probe.prompt, item.probe.target)
        for item in items
        if item.probe.target is not None
    ]
    for row in score_probes(method.lm, probes, References(), long):
        is_in = (row["target"] or "") in (row["answer"] or "")
        rows[row["probe_id"]]["scores"]["substring"] = float(is_in)


def ask_downstream(
    method: EditModule, objective: Objective, evaluation: EvalProtocol
) -> float | None:
    """Return the score of the objective's test rows: perplexity, or a share that is right."""
    lm, measure = method.lm, objective.measure
    if not objective.tests:
        return None
    if measure == "perplexity":
        return perplexity(lm, [row.target for row in objective.tests], batch_size=16)
    probes = objective.probes()
    if measure == "final_number":
        long = replace(evaluation, scorers=("generation",), stop=(), max_new_tokens=objective.room)
        rows = score_probes(lm, probes, References(), long)
        said = [[final_number(row[name] or "") for name in ("answer", "target")] for row in rows]
        hits = [answer is not None and answer == target for answer, target in said]
        return sum(hits) / len(hits)
    rows = score_probes(lm, probes, References(), replace(evaluation, scorers=(measure,)))
    values = [row["scores"][measure] for row in rows]
    return sum(values) / len(values)


def final_number(text: str) -> Fraction | None:
    r"""Return the number behind the last `####`; None where there is none.

    >>> final_number("2 + 3 = 5\n#### 1,005."), final_number("#### -$3.50"), final_number("five")
    (Fraction(1005, 1), Fraction(-7, 2), None)
    """
    _, mark, rest = text.rpartition("####")
    found = NUMBER.match(rest) if mark else None
    return Fraction(f"{found[1]}{found[2]}".replace(",", "")) if found else None
