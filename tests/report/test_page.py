"""The page: whole in one file, safe against what models say, and quickly made."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from editkit.report import view
from editkit.report.page import write_report

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


class Elements(HTMLParser):
    """Notes every element's name and attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def two(tmp_path_factory, run_maker):
    """The page of two runs whose prompts try to break out of it."""
    make_run = run_maker(tmp_path_factory.mktemp("runs"))
    folders = [make_run("first"), make_run("second", right=0.4, seed=1)]
    for folder in folders:
        rows = make_run.read(folder)
        for row in rows:
            row["prompt"] += ATTACK
        make_run.write(folder, rows)
    path = write_report(folders)
    return path, path.read_text()


def test_the_page_lies_in_the_first_runs_folder(two):
    assert two[0].parts[-2:] == ("first", "report.html")


def test_the_page_needs_nothing_from_elsewhere(two):
    text = two[1]
    assert "default-src 'none'" in text
    assert not re.findall(r"https?:|@import|url\((?!#)", text)
    for tag, attributes in Elements(text).found:
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            link = attributes.get(name) or ""
            assert link.startswith(("#", "data:")) or not link, f"{tag} {name}={link}"


def test_what_a_model_says_is_text_and_nothing_else(two):
    names = [tag for tag, _ in Elements(two[1]).found]
    assert "img" not in names
    assert names.count("script") == 2  # the rows and the code of the table
    data = re.search(r'id="failed-data">(.*?)</script>', two[1], re.DOTALL)[1]
    table = json.loads(data)
    assert all(row[table["columns"].index("prompt")].endswith(ATTACK) for row in table["rows"])


def test_every_number_of_the_table_stands_on_the_page(two):
    summary = json.loads((two[0].parent / "summary.json").read_text())
    for cells in summary["scores"].values():
        assert f"{cells['generation']['value']:.3f}" in two[1]
        assert f"{cells['generation']['low']:.3f} to {cells['generation']['high']:.3f}" in two[1]


def test_identifiers_are_not_used_twice(two):
    ids = [attributes["id"] for _, attributes in Elements(two[1]).found if "id" in attributes]
    twice = {name for name in ids if ids.count(name) > 1}
    assert not twice


def test_figures_are_described_and_take_the_pages_colours(two):
    figures = [a for tag, a in Elements(two[1]).found if tag == "svg"]
    assert len(figures) > 8
    assert all(a["role"] == "img" and a["aria-label"] for a in figures)
    assert not re.search(r"#00[cf]0", two[1])  # the stand-ins of figures.py


def test_mixed_runs_are_refused_or_told_of_on_the_page(make_run, stamp, tmp_path):
    folders = [make_run("a"), make_run("b", seed=1)]
    stamp(folders[1], max_new_tokens=7)
    with pytest.raises(ValueError, match="max_new_tokens is 50 and 7"):
        write_report(folders, tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()
    text = write_report(folders, tmp_path / "out.html", allow_mixed=True).read_text()
    assert "not measured alike" in text
    assert "differs, so scores do not compare" in text


def test_runs_without_a_common_probe_are_not_paired(make_run, stamp, tmp_path):
    folders = [make_run("a"), make_run("b", seed=1)]
    rows = make_run.read(folders[1])
    for row in rows:
        row["prompt"] = "another stream: " + row["prompt"]
    make_run.write(folders[1], rows)
    text = write_report(folders, tmp_path / "out.html", allow_mixed=True).read_text()
    assert "No probe is common to the runs" in text


def test_unfinished_runs_summaries_alone_and_empty_tables_have_pages(make_run, tmp_path):
    running = make_run("running", edits=12, finished=False)
    assert "unfinished" in write_report([running], tmp_path / "a.html").read_text()
    alone = make_run("alone")
    for name in ("probes.jsonl", "unedited.jsonl", "edits.jsonl"):
        (alone / name).unlink()
    assert "no rows of single probes" in write_report([alone], tmp_path / "b.html").read_text()
    right = make_run("right", right=1.1)
    assert "No probe failed." in write_report([right], tmp_path / "c.html").read_text()
    one = make_run("one", edits=1, milestones=())
    assert "At a glance" in write_report([one], tmp_path / "d.html").read_text()


def test_conflicts_and_harness_scores_are_shown_where_they_are(make_run, tmp_path):
    folder = make_run("a")
    make_run.write(folder, [{"kind": "contradiction", "edit_id": 7, "earlier_id": 2}],
                   "conflicts.jsonl")  # fmt: skip
    cell = {"before": 0.5, "after": 0.25, "difference": -0.25, "difference_stderr": 0.125}
    tasks = {"arithmetic": {"n": 16, "scores": {"acc,none": cell}}}
    (folder / "lm_eval.json").write_text(json.dumps({"about": {}, "tasks": tasks}))
    text = write_report([folder], tmp_path / "out.html").read_text()
    assert "contradiction" in text
    assert "arithmetic" in text
    assert "0.125" in text


def test_routing_is_shown_where_rows_were_routed(make_run, tmp_path):
    folder = make_run("a")
    assert 'id="routing"' not in write_report([folder], tmp_path / "out.html").read_text()
    rows = make_run.read(folder)
    for row in rows:  # every other edit is answered by the edit before it
        row["route"] = {"edit_id": row["edit_id"] - row["edit_id"] % 2, "match": 1.0}
    make_run.write(folder, rows)
    text = write_report([folder], tmp_path / "out.html", tables=tmp_path).read_text()
    assert 'id="routing"' in text
    table = (tmp_path / "routing.csv").read_text().splitlines()
    told = [line.split(",")[:4] for line in table]
    assert ["a", "20", "self_match", "0.5"] in told
    assert ["a", "20", "wrong_route", "0.5"] in told
    assert ["a", "1", "self_match", "1.0"] in told


def test_too_many_failed_probes_are_thinned_and_counted(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(view, "MOST_FAILED", 20)
    folder = make_run("a", right=0.0)
    text = write_report([folder], tmp_path / "out.html").read_text()
    rows = json.loads(re.search(r'id="failed-data">(.*?)</script>', text, re.DOTALL)[1])["rows"]
    assert len(rows) == 20
    assert "80 are left out" in text


def test_a_folder_cannot_be_the_file(make_run, tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        write_report([make_run("a")], tmp_path)


def test_two_runs_of_300_edits_take_seconds_and_little_space(make_run, tmp_path):
    folders = [make_run("a", edits=300, milestones=(1, 10, 100)),
               make_run("b", edits=300, right=0.5, seed=1, milestones=(1, 10, 100))]  # fmt: skip
    code = (
        "import sys; from pathlib import Path; from editkit.report.page import write_report; "
        "write_report([Path(a) for a in sys.argv[1:3]], Path(sys.argv[3])); "
        "assert 'torch' not in sys.modules, 'torch takes seconds'"
    )
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-c", code, *map(str, folders), str(tmp_path / "out.html")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 10
    assert (tmp_path / "out.html").stat().st_size < 3_000_000
