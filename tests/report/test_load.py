"""What a report reads of a run, and how it says what is wrong with one."""

from __future__ import annotations

import json

import pytest

from editkit.report.load import load_run, load_runs


def test_a_folder_that_holds_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*nowhere.*editkit fit"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*holds no run"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="at least one run"):
        load_runs([])


def test_a_damaged_line_is_named_by_file_and_number(make_run):
    folder = make_run("a")
    lines = (folder / "probes.jsonl").read_text().splitlines()
    lines[4] = lines[4][:-20]
    (folder / "probes.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"line 5 of '.*probes.jsonl' is damaged"):
        load_run(folder)


@pytest.mark.parametrize("name", ["probes.jsonl", "unedited.jsonl", "edits.jsonl"])
def test_a_line_without_a_key_is_named(make_run, name):
    folder = make_run("a")
    rows = make_run.read(folder, name)
    del rows[2]["edit_id"]
    make_run.write(folder, rows, name)
    with pytest.raises(ValueError, match=rf"line 3 of '.*{name}' is damaged \(no 'edit_id'"):
        load_run(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\xff"])
def test_a_damaged_summary_is_named(make_run, text):
    folder = make_run("a")
    (folder / "summary.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"summary.json' is damaged"):
        load_run(folder)


def test_a_torn_last_line_is_forgiven_while_a_run_is_under_way_alone(make_run):
    running, finished = make_run("a", finished=False), make_run("b")
    for folder in (running, finished):
        with (folder / "probes.jsonl").open("a") as file:
            file.write('{"moment": "immed')
    assert "the last line of probes.jsonl was cut off" in load_run(running).remarks
    with pytest.raises(ValueError, match="is damaged"):
        load_run(finished)


def test_a_run_under_way_is_told_of_by_its_last_milestone(make_run):
    folder = make_run("a", edits=15, finished=False)
    run = load_run(folder)
    assert not run.finished
    assert (run.summary["edits_seen"], run.asked_at, run.summary["method"]) == (15, 10, "FT")
    asked = [
        r for r in make_run.read(folder) if (r["moment"], r["edits_seen"]) == ("milestone", 10)
    ]
    mine = [r["scores"]["generation"] for r in asked if r["kind"] == "locality"]
    cell = run.summary["scores"]["locality"]["generation"]
    assert (cell["value"], cell["n"]) == (pytest.approx(sum(mine) / len(mine)), 10)
    assert run.protocol["max_new_tokens"] == 50
    assert "base_hash" not in run.protocol
    assert any("15 edits are made so far" in text for text in run.remarks)


def test_a_summary_older_than_the_rows_is_not_believed(make_run):
    folder = make_run("a")
    rows = make_run.read(folder)
    later = [{**r, "edits_seen": 40, "moment": "milestone"} for r in rows if r["moment"] == "final"]
    make_run.write(folder, rows + later)
    run = load_run(folder)
    assert (run.finished, run.asked_at) == (False, 40)


def test_a_summary_alone_is_a_run(make_run):
    folder = make_run("a")
    (folder / "probes.jsonl").unlink()
    run = load_run(folder)
    assert run.finished
    assert not run.rows
    assert any("no probes.jsonl" in text for text in run.remarks)


def test_runs_are_named_by_what_tells_them_apart(make_run):
    folders = [make_run("one/ft"), make_run("two/ft"), make_run("one/lora")]
    assert [run.name for run in load_runs(folders)] == ["one/ft", "two/ft", "one/lora"]
    assert [run.name for run in load_runs(folders[1:])] == ["ft", "lora"]
    with pytest.raises(ValueError, match="given twice"):
        load_runs([folders[0], folders[0] / ".." / "ft"])


def test_what_limits_the_numbers_is_remarked(make_run, stamp):
    folder = make_run("a", edits=12)
    stamp(folder, commit="c" * 40 + "+dirty", n_edits=30)
    summary = json.loads((folder / "summary.json").read_text())
    summary["uncounted"] = {"portability": 7}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "unedited.jsonl").unlink()
    text = " / ".join(load_run(folder).remarks)
    for part in ("stopped after 12 of 30", "7 portability", "not committed", "artefact is missing"):
        assert part in text
    assert "known for locality only" in text
