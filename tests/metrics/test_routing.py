"""Where prompts were routed, counted from rows and kept in the summary."""

from __future__ import annotations

import pytest

from editkit.metrics.protocol import EvalProtocol
from editkit.metrics.routing import routing_rates, routing_table
from editkit.metrics.summary import RunFacts, summarise
from editkit.metrics.tables import summary_table


def row(kind, edit_id, answerer, routed=True):
    told = {"route": {"edit_id": answerer, "match": 0.5}} if routed else {}
    return {
        "kind": kind, "edit_id": edit_id, "axis": "", "group": "", "counted": True,
        "scores": {"generation": 1.0}, **told,
    }  # fmt: skip


ROWS = [
    row("reliability", 0, 0),
    row("reliability", 1, 0),
    row("generalization", 0, None),
    row("generalization", 0, 1),
    row("generalization", 1, 1),
    row("generalization", 1, 0),
    row("locality", 0, None),
    row("locality", 1, 0),
    row("portability", 0, None),
]
WORDINGS = {"right_route": 0.25, "wrong_route": 0.5, "rejected": 0.25}
OWN = {"self_match": 0.5, "self_wrong": 0.5, "self_rejected": 0.0}
RATES = {**OWN, **WORDINGS, "false_activations": 0.5}


def test_rates_count_each_kind_of_error_apart():
    assert routing_rates(ROWS) == RATES
    table = routing_table(ROWS)
    assert {name: cell["value"] for name, cell in table.items()} == RATES
    assert (table["rejected"]["n"], table["rejected"]["edits"]) == (4, 2)
    assert routing_rates(ROWS[2:6]) == WORDINGS


@pytest.mark.parametrize("is_routed", [True, False])
def test_a_summary_tells_where_prompts_were_routed(is_routed):
    rows = [row(r["kind"], r["edit_id"], r["route"]["edit_id"], is_routed) for r in ROWS]
    facts = RunFacts("X", "y", 2, None, None, None, None)
    summary = summarise(rows, rows, facts, EvalProtocol())
    assert {k: v["value"] for k, v in summary["routing"].items()} == (RATES if is_routed else {})
    caption = summary_table(summary).caption
    assert (
        "routing: self match 0.500, self wrong 0.500, self rejected 0.000, right route 0.250"
        in caption
    ) == is_routed
