"""The content of summary.json, recomputed from rows by hand."""

import json
import math
import random
from statistics import mean

import pytest
from rich.console import Console

from editkit.metrics.intervals import estimate
from editkit.metrics.protocol import HIT_SCORERS, ROW_KINDS, SCORERS, EvalProtocol
from editkit.metrics.summary import RunFacts, by_age, summarise, write_json
from editkit.metrics.tables import age_table, summary_table

EDITS = 25
FACTS = RunFacts(
    method="MEMIT",
    base="factworld",
    edits_seen=EDITS,
    perplexity_before=7.25,
    perplexity_after=7.5,
    seconds_per_edit=0.31,
    peak_memory_bytes=3 * 2**30,
)


def make_row(edit_id, kind, axis, value, counted=True):
    scores = dict.fromkeys(SCORERS, value) if counted else {}
    return {
        "probe_id": f"{edit_id}-{kind}-{axis}",
        "edit_id": edit_id,
        "kind": kind,
        "axis": axis,
        "prompt": "p",
        "target": "t",
        "scores": scores,
        "answer": "a",
        "reference": None,
        "counted": counted,
    }


@pytest.fixture
def final():
    draw = random.Random(0)
    rows = [make_row(e, "reliability", "", round(draw.random(), 2)) for e in range(EDITS)]
    for axis in ("two_hop", "alias"):
        rows += [make_row(e, "portability", axis, round(draw.random(), 2)) for e in range(EDITS)]
    rows += [make_row(e, "portability", "alias", 0.0, counted=False) for e in (3, 4)]
    rows += [make_row(None, "intrinsic", "", 1.0) for _ in range(5)]
    return rows


@pytest.fixture
def immediate():
    return [make_row(e, "reliability", "", 1.0) for e in range(EDITS)]


def values(rows, kind, axis=None, edits=None):
    return [
        (row["scores"]["nll"], row["edit_id"])
        for row in rows
        if row["kind"] == kind
        and row["counted"]
        and axis in (None, row["axis"])
        and (edits is None or row["edit_id"] in edits)
    ]


def test_final_scores_axes_and_immediate_scores_are_estimates_over_their_rows(final, immediate):
    summary = summarise(final, immediate, FACTS, EvalProtocol())
    assert list(summary["scores"]) == ["reliability", "portability", "intrinsic"]
    for kind, cells in summary["scores"].items():
        pairs = values(final, kind)
        assert list(cells) == list(SCORERS)
        for cell in cells.values():
            assert cell == estimate(*zip(*pairs, strict=True))
            assert cell["value"] == pytest.approx(mean(v for v, _ in pairs))
    assert list(summary["axes"]) == ["portability"]
    for axis in ("two_hop", "alias"):
        cell = summary["axes"]["portability"][axis]["nll"]
        assert cell == estimate(*zip(*values(final, "portability", axis), strict=True))
    assert summary["immediate"]["reliability"]["generation"]["value"] == 1.0
    assert list(summary["immediate"]) == ["reliability"]


def grouped(edit, name, wordings, kind="portability"):
    """Rows of one question in several wordings, each right or wrong."""
    rows = [make_row(edit, kind, "multi_hop", float(hit)) for hit in wordings]
    return [row | {"group": name, "probe_id": f"{edit}{name}{i}"} for i, row in enumerate(rows)]


def test_a_question_in_several_wordings_is_answered_where_one_of_them_is():
    rows = [
        *grouped(0, "a", (0, 1, 0)),
        *grouped(0, "b", (0, 0, 0)),
        *grouped(1, "a", (1, 1, 1)),  # of another edit: another question
        *grouped(2, "a", (0, 0)),
        make_row(2, "portability", "multi_hop", 1.0),
    ]
    summary = summarise(rows, [], FACTS, EvalProtocol())
    cells = summary["scores"]["portability"]
    for scorer in HIT_SCORERS:
        assert cells[scorer] == estimate([1.0, 0.0, 1.0, 0.0, 1.0], [0, 0, 1, 2, 2])
        assert summary["axes"]["portability"]["multi_hop"][scorer] == cells[scorer]
    for scorer in set(SCORERS) - set(HIT_SCORERS):
        assert cells[scorer]["n"] == len(rows)
        assert cells[scorer]["value"] == pytest.approx(5 / 12)


def test_the_score_of_counterfact_is_the_harmonic_mean_of_three():
    draw = random.Random(1)
    kinds = {"reliability": 1, "generalization": 2, "locality": 5, "locality_gold": 5}
    rows = [
        make_row(edit, kind, "", float(draw.random() < 0.7))
        for edit in range(EDITS)
        for kind, count in kinds.items()
        for _ in range(count)
    ]
    for row in rows:
        if row["kind"] == "locality":
            del row["scores"]["pair"]  # judged against the unedited model, not against a target
    summary = summarise(rows, [], FACTS, EvalProtocol())
    means = [
        mean(r["scores"]["pair"] for r in rows if r["kind"] == kind)
        for kind in ("reliability", "generalization", "locality_gold")
    ]
    assert summary["score"]["value"] == pytest.approx(3 / sum(1 / m for m in means))
    assert summary["score"]["low"] < summary["score"]["value"] < summary["score"]["high"]
    assert "CounterFact score 0." in render(summary_table(summary))
    without = [r for r in rows if r["kind"] != "generalization"]
    assert summarise(without, [], FACTS, EvalProtocol())["score"] is None


def test_a_summary_says_what_was_run_and_left_out(final):
    protocol = EvalProtocol(max_new_tokens=9)
    summary = summarise(final, [], FACTS, protocol)
    assert summary["uncounted"] == {"portability": 2}
    assert summary["perplexity"] == {"before": 7.25, "after": 7.5}
    assert summary["protocol"]["max_new_tokens"] == 9
    facts = {k: summary[k] for k in ("method", "base", "edits_seen", "seconds_per_edit")}
    assert facts == {
        "method": "MEMIT",
        "base": "factworld",
        "edits_seen": 25,
        "seconds_per_edit": 0.31,
    }
    assert summary["peak_memory_bytes"] == 3 * 2**30


def test_age_buckets_hold_like_many_edits_newest_first(final):
    curve = by_age(final, EDITS)
    assert len(curve) == 10
    assert {bucket["edits"] for bucket in curve} == {2, 3}
    assert sum(bucket["edits"] for bucket in curve) == EDITS
    assert curve[0]["age"][0] == 0
    assert curve[-1]["age"][1] == EDITS - 1
    for bucket in curve:
        low, high = bucket["age"]
        edits = {EDITS - 1 - age for age in range(low, high + 1)}
        assert len(edits) == bucket["edits"]
        pairs = values(final, "reliability", edits=edits)
        found = bucket["scores"]["reliability"]["nll"]["value"]
        assert found == pytest.approx(mean(v for v, _ in pairs))
        assert "intrinsic" not in bucket["scores"]


def test_few_edits_have_a_bucket_each():
    rows = [make_row(e, "reliability", "", float(e)) for e in (4, 0, 2)]
    curve = by_age(rows, 5)
    assert [bucket["age"] for bucket in curve] == [[0, 0], [2, 2], [4, 4]]
    found = [bucket["scores"]["reliability"]["nll"]["value"] for bucket in curve]
    assert found == [4.0, 2.0, 0.0]


def test_without_aged_rows_there_is_no_curve():
    assert by_age([make_row(None, "intrinsic", "", 1.0)], 5) == []


def test_rows_of_edits_that_were_not_applied_are_refused():
    with pytest.raises(ValueError, match="a row is of edit 7, but only 5 edits were applied"):
        by_age([make_row(7, "reliability", "", 1.0)], 5)


def test_json_is_written_whole_and_leaves_nothing_beside_it(tmp_path, final):
    path = tmp_path / "run" / "summary.json"
    summary = summarise(final, [], FACTS, EvalProtocol())
    write_json(path, {"old": True})
    write_json(path, summary)
    assert json.loads(path.read_text()) == json.loads(json.dumps(summary))
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"old": True})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"value": math.nan})
    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_json(path, {"old": False})
    assert json.loads(path.read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def fail(*args):
    raise OSError("disk is full")


def render(table):
    console = Console(width=100, record=True, color_system=None)
    console.print(table)
    return console.export_text()


def test_the_table_shows_final_beside_immediate_in_100_columns(final, immediate):
    summary = summarise(final, immediate, FACTS, EvalProtocol())
    text = render(summary_table(summary))
    assert "…" not in text
    cell = summary["scores"]["reliability"]["token_accuracy"]
    (line,) = [x for x in text.splitlines() if "reliability" in x]
    for shown in (f"{cell['value']:.3f}", f"{cell['low']:.3f} to {cell['high']:.3f}", "1.000"):
        assert shown in line
    for shown in ("MEMIT on factworld, 25 edits", "perplexity 7.25 to 7.5", "3.00 GiB"):
        assert shown in text
    assert "conditions not met: 2 portability" in " ".join(text.split())


def test_the_age_table_shows_every_bucket_of_the_strictest_score(final):
    summary = summarise(final, [], FACTS, EvalProtocol())
    text = render(age_table(summary))
    assert "generation" in text
    for bucket in summary["by_age"]:
        low, high = bucket["age"]
        (line,) = [x for x in text.splitlines() if f" {low} to {high} " in x]
        assert f"{bucket['scores']['reliability']['generation']['value']:.3f}" in line
    assert "nll" in render(age_table(summary, "nll"))


def test_what_was_not_measured_is_not_in_the_caption(final):
    summary = summarise(final[:5], [], RunFacts("MEMIT", "factworld", 5), EvalProtocol())
    assert summary_table(summary).caption == ""


def test_tables_of_every_kind_fit_100_columns():
    rows = [make_row(e, kind, "", 1e4) for kind in ROW_KINDS for e in range(30)]
    summary = summarise(rows, rows, RunFacts("MEMIT", "m" * 30, 10_000), EvalProtocol())
    for text in (render(summary_table(summary)), render(age_table(summary))):
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 100


def test_tables_of_an_empty_or_tiny_run_can_be_drawn():
    facts = RunFacts("MEMIT", "factworld", 1)
    empty = summarise([], [], facts, EvalProtocol())
    assert empty["scores"] == {}
    assert empty["by_age"] == []
    assert "MEMIT on factworld, 1 edit" in render(summary_table(empty))
    assert render(age_table(empty))
    one = summarise([make_row(0, "reliability", "", 1.0)], [], facts, EvalProtocol())
    assert one["scores"]["reliability"]["nll"]["low"] is None
    assert " - " in render(summary_table(one))
