"""The tables hold what the rows say."""

from __future__ import annotations

import csv
import io

import pytest

from editkit.report.compare import compare_runs
from editkit.report.export import markdown
from editkit.report.load import load_runs
from editkit.report.page import write_report
from editkit.report.tables import all_tables, strictest


@pytest.fixture
def tables(make_run):
    """Return the rows of a run, and its tables beside another run's, as lists of records."""
    folders = [make_run("a"), make_run("b", right=0.5, seed=1)]
    runs = load_runs(folders)
    made = all_tables(runs, compare_runs(runs))
    return make_run.read(folders[0]), {n: t.frame.to_dict("records") for n, t in made.items()}


def mean(rows, scorer="generation"):
    values = [row["scores"][scorer] for row in rows]
    return pytest.approx(sum(values) / len(values))


def test_scores_are_told_before_right_after_and_at_the_end(tables, make_run):
    rows, made = tables
    cells = {(r["run"], r["moment"], r["kind"], r["axis"], r["scorer"]): r for r in made["scores"]}
    for moment, name in (("immediate", "right after"), ("final", "final")):
        mine = [r for r in rows if r["moment"] == moment and r["kind"] == "generalization"]
        cell = cells["a", name, "generalization", "", "generation"]
        assert (cell["value"], cell["probes"], cell["edits"]) == (mean(mine), 40, 20)
    before = make_run.read(make_run.root / "a", "unedited.jsonl")
    mine = [r for r in before if r["kind"] == "locality"]
    assert cells["a", "before", "locality", "", "nll"]["value"] == mean(mine, "nll")
    axis = [
        r for r in rows if (r["moment"], r["kind"], r["axis"]) == ("final", "locality", "axis1")
    ]
    assert cells["a", "final", "locality", "axis1", "nll"]["value"] == mean(axis, "nll")


def test_curves_by_edits_seen_are_the_means_of_each_milestone(tables):
    rows, made = tables
    curve = [r for r in made["by_edits"] if (r["run"], r["kind"]) == ("a", "locality")]
    assert [r["edits_seen"] for r in curve] == [1, 10, 20]
    for cell in curve:
        asked = [r for r in rows if r["moment"] != "immediate" and r["kind"] == "locality"]
        assert cell["value"] == mean([r for r in asked if r["edits_seen"] == cell["edits_seen"]])


def test_the_retention_matrix_follows_each_group_of_edits(tables):
    rows, made = tables
    cells = {(r["first"], r["last"], r["asked_after"]): r for r in made["retention"]
             if r["run"] == "a"}  # fmt: skip
    assert [*cells] == [(0, 0, 1), (0, 0, 10), (0, 0, 20), (1, 9, 10), (1, 9, 20), (10, 19, 20)]
    asked = [r for r in rows if r["moment"] == "final" and r["kind"] == "reliability"]
    assert cells[1, 9, 20]["value"] == mean([r for r in asked if 1 <= r["edit_id"] <= 9])


def test_scores_by_relation_are_means_over_its_rows(tables):
    rows, made = tables
    final = [r for r in rows if r["moment"] == "final" and r["kind"] == "portability"]
    for cell in made["relations"]:
        if (cell["run"], cell["kind"]) == ("a", "portability"):
            assert cell["value"] == mean([r for r in final if r["relation"] == cell["relation"]])


def test_failed_probes_say_what_was_said_before_and_after(tables, make_run):
    rows, made = tables
    final = {(r["probe_id"], r["kind"]): r for r in rows if r["moment"] == "final"}
    early = {(r["probe_id"], r["kind"]): r for r in rows if r["moment"] == "immediate"}
    before = make_run.read(make_run.root / "a", "unedited.jsonl")
    said = {(r["probe_id"], r["kind"]): r["answer"] for r in before}
    wrong = {k: r for k, r in final.items() if r["scores"]["generation"] < 1}
    mine = [r for r in made["failed"] if r["run"] == "a"]
    assert len(mine) == len(wrong) > 5
    for told, (key, row) in zip(mine, wrong.items(), strict=True):
        was_right = early[key]["scores"]["generation"] == 1
        is_local = row["kind"] == "locality"
        fates = ("changed later", "changed at once") if is_local else ("forgotten", "never right")
        assert told["prompt"] == row["prompt"]
        assert told["expected"] == (row["reference"] if is_local else row["target"])
        assert (told["before"], told["after"]) == (said[key], row["answer"])
        assert told["fate"] == fates[0 if was_right else 1]


def test_a_wording_fails_only_where_no_other_wording_is_right(make_run):
    folder = make_run("a")
    rows = make_run.read(folder)
    for row in rows:
        row["group"] = "q" if row["kind"] == "generalization" else ""
    make_run.write(folder, rows)
    runs = load_runs([folder])
    failed = all_tables(runs, [])["failed"].frame
    final = [r for r in rows if r["moment"] == "final" and r["kind"] == "generalization"]
    right = {r["edit_id"] for r in final if r["scores"]["generation"] == 1}
    mine = failed[failed.kind == "generalization"]
    assert set(mine.edit) == {r["edit_id"] for r in final} - right


def test_cost_is_of_the_ledger_and_the_files(tables):
    _, made = tables
    cost = made["cost"][0]
    assert cost["seconds_per_edit"] == 0.25  # the summary's own
    assert cost["median_seconds"] == pytest.approx(0.2)
    assert (cost["artefact_bytes"], cost["bytes_per_edit"]) == (1000, 50)
    assert cost["peak_memory_bytes"] == 2**20


def test_a_run_under_way_is_timed_by_its_curves(make_run):
    folder = make_run("a", finished=False)
    (folder / "metrics.part1.csv").write_text("edits,edits/s,step\n1,4.0,0\n,,0\n")
    (folder / "metrics.csv").write_text("edits,edits/s,step\n2,2.0,1\n")
    runs = load_runs([folder])
    cost = all_tables(runs, [])["cost"].frame.to_dict("records")[0]
    assert cost["seconds_per_edit"] == pytest.approx((0.25 + 0.5) / 2)


def test_ability_is_a_curve_with_the_summarys_ends(make_run):
    folder = make_run("a")
    readings = [
        {"edits_seen": 0, "perplexity": 4.0, "facts": 0.9, "seconds": 1.0},
        {"edits_seen": 10, "perplexity": None, "facts": 0.8, "seconds": 1.0},
    ]
    make_run.write(folder, readings, "ability.jsonl")
    frame = all_tables(load_runs([folder]), [])["ability"].frame
    curves = {m: [*zip(p.edits_seen, p.value, strict=True)] for m, p in frame.groupby("measure")}
    assert curves == {"perplexity": [(0, 4.0), (20, 6.0)], "facts": [(0, 0.9), (10, 0.8)]}


def test_csv_and_markdown_hold_the_same_tables(make_run, tmp_path):
    folders = [make_run("a"), make_run("b", seed=1)]
    write_report(folders, tmp_path / "out.html", tables=tmp_path / "tables")
    runs = load_runs(folders)
    made = all_tables(runs, compare_runs(runs))
    files = {path.name for path in (tmp_path / "tables").iterdir()}
    assert files == {f"{name}.{ending}" for name in made for ending in ("csv", "md")}
    for name, table in made.items():
        text = (tmp_path / "tables" / f"{name}.csv").read_text()
        lines = [*csv.reader(io.StringIO(text))]
        assert lines[0] == [*table.frame.columns]
        assert len(lines) == len(table.frame) + 1
        document = (tmp_path / "tables" / f"{name}.md").read_text().splitlines()
        assert document[0] == f"# {table.title}"
        assert len([line for line in document if line.startswith("|")]) == len(table.frame) + 2


def test_a_markdown_cell_keeps_its_bars_and_breaks_to_itself():
    import pandas as pd

    frame = pd.DataFrame([{"a": "x | y\nz", "b": None, "c": 0.123456}])
    assert markdown(frame).splitlines()[2] == "| x \\| y z |  | 0.1235 |"


def test_the_strictest_common_score_comes_first(make_run):
    folders = [make_run("a"), make_run("b")]
    assert strictest(load_runs(folders)) == "generation"
    rows = make_run.read(folders[1])
    for row in rows:
        del row["scores"]["generation"]
    make_run.write(folders[1], rows)
    (folders[1] / "summary.json").unlink()
    assert strictest(load_runs(folders)) == "nll"
