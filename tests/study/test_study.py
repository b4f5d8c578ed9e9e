from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from editkit.cli import main
from editkit.study.cells import Cell, run_cells, run_one
from editkit.study.numbers import collect
from editkit.study.page import write_study
from editkit.study.plan import Stream
from editkit.study.reading import read_study
from editkit.study.short import shorten

ROOT = Path(__file__).parents[2]


@pytest.fixture
def told(tmp_path, monkeypatch):
    """A study of two methods, two objectives, a remedy of each kind and two seeds."""
    monkeypatch.chdir(tmp_path)
    for name in ("ft.yaml", "memit.yaml", "text.yaml", "maths.yaml"):
        (tmp_path / name).write_text("# options\n")
    return {
        "seeds": [0, 7],
        "fit": ["--data.limit=2"],
        "retain": ["--probes.unknown=1"],
        "methods": {"FT": ["ft.yaml", "--model.lr=1"], "MEMIT +": ["memit.yaml"]},
        "objectives": {"text": ["text.yaml"], "maths": ["maths.yaml", "--data.steps=3"]},
        "remedies": {
            "paraphrases": {"fit": ["--model.paraphrases=3"], "objectives": ["maths"]},
            "random": {"retain": ["--model.freeze.seed={seed}"], "methods": ["FT"]},
        },
    }


def written(told) -> Path:
    path = Path("small.yaml")
    path.write_text(yaml.safe_dump(told, sort_keys=False))
    return path


def test_a_study_edits_once_for_all_that_fine_tunes_alike(told, tmp_path):
    cells = read_study(written(told)).cells(tmp_path)
    edits = [c for c in cells if not c.after]
    tuned = [c for c in cells if c.after]
    assert len(edits) == 2 * 2 * 2  # methods x seeds x (plain, paraphrases)
    assert len(tuned) == 2 * (2 * 2 + 2 + 2)
    assert len({c.folder for c in cells}) == len(cells)
    by_name = {c.name: c for c in cells}
    random = by_name["ft-maths-random-7"]
    assert random.after == (tmp_path / "edited" / "ft-7",)
    assert {"--model.freeze.seed=7", "--data.seed=7", "--data.steps=3"} <= {*random.args}
    assert by_name["memit---maths-paraphrases-0"].after[0].name == "memit---paraphrases-0"
    assert "--model.paraphrases=3" in by_name["edit memit---paraphrases-0"].args
    assert random.args[1] == f"--run={tmp_path / 'edited' / 'ft-7'}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": [0]}, "has a key 'seed'"),
        ({"methods": {"FT": ["nowhere.yaml"]}}, "which is no file here"),
        ({"methods": {"FT": "ft.yaml"}}, "give a list of options"),
        ({"remedies": {"x": {"objectives": ["chess"]}}}, "names 'chess', which is none of"),
        ({"remedies": {"x": {"frozen": []}}}, "has a key 'frozen'"),
        ({"remedies": {"x": {"arm": "rekey"}}}, "has arm 'rekey'; use one of"),
        ({"remedies": {"x": {"arm": "rekeyed"}}}, "add --retain.rekey=true to its 'retain'"),
        ({"alone": "all"}, "give a number of edits"),
        ({"alone": True}, "'alone' of .* is True"),
        ({"seeds": 3}, "'seeds' of .* is 3; give a list"),
        ({"seeds": "012"}, "'seeds' of .* is '012'"),
        ({"seeds": []}, "'seeds' of .* give a list"),
        ({"seeds": [0, "1"]}, "'seeds' of .* give a list"),
        ({"seeds": [0, 1, 0]}, "has 0 twice"),
        ({"methods": ["ft.yaml"]}, "'methods' of .* give a mapping"),
        ({"methods": "ft.yaml"}, "'methods' of .* give a mapping"),
        ({"objectives": {}}, "'objectives' of .* is empty"),
        ({"objectives": None}, "'objectives' of .* is empty"),
        ({"remedies": ["x"]}, "'remedies' of .* give a mapping"),
        ({"remedies": {"x": "frozen"}}, "remedy 'x' is 'frozen'; give a mapping"),
        ({"remedies": {"x": {"fit": "--model.lr=1"}}}, "'fit' of remedy 'x' .* give a list"),
        ({"scorer": "generations"}, "'scorer' of .* is 'generations'; use one of"),
        ({"fit": [{"--model.lr": 1}]}, "'fit' of .* give a list of options"),
        (
            {"methods": {"F T": ["ft.yaml"], "f-t": ["ft.yaml"]}, "remedies": {}},
            "share the folder 'f-t-0'",
        ),
        (
            {
                "methods": {"A": ["ft.yaml"], "A-x": ["ft.yaml"]},
                "remedies": {"x": {"fit": ["--y"]}},
            },
            "share the folder 'a-x-0'",
        ),
    ],
)
def test_a_study_that_is_not_well_formed_is_refused(told, change, words):
    with pytest.raises(ValueError, match=words):
        read_study(written({**told, **change}))


def test_a_missing_study_is_told_in_a_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "nowhere.yaml"]) == 1
    assert "no study 'nowhere.yaml'" in capsys.readouterr().err


def finish(cell: Cell) -> int:
    cell.folder.mkdir(parents=True)
    (cell.folder / "summary.json").write_text("{}")
    return 0


def test_done_runs_are_not_run_again_and_a_failed_one_stops_its_followers(tmp_path):
    first, second = Cell("a", tmp_path / "a", ()), Cell("b", tmp_path / "b", ())
    behind = [Cell(f"{c.name}+", tmp_path / f"{c.name}+", (), (c.folder,)) for c in (first, second)]
    cells, ran, news = [*behind, first, second], [], []

    def run(cell: Cell) -> int:
        ran.append(cell.name)
        return 1 if cell.name == "a" else finish(cell)

    left = run_cells(cells, 2, news.append, run)
    assert sorted(c.name for c in left) == ["a", "a+"]
    assert sorted(ran) == ["a", "b", "b+"]
    assert any("FAILED  a" in line for line in news)
    ran.clear()
    assert run_cells(cells, 1, news.append, lambda c: ran.append(c.name) or finish(c)) == []
    assert ran == ["a", "a+"]
    with pytest.raises(ValueError, match="jobs is 0"):
        run_cells(cells, 0, news.append, run)


def test_a_run_that_was_done_with_other_options_is_not_taken_for_this_one(tmp_path):
    ran = []

    def run(cell: Cell) -> int:
        ran.append(cell.args)
        return finish(cell)

    one, other = (Cell("a", tmp_path / "a", (f"--lr={lr}", f"--out={lr}")) for lr in (1, 2))
    moved = Cell("a", one.folder, ("--lr=1", "--out=elsewhere"))
    assert run_cells([one], 1, print, run) == run_cells([one], 1, print, run) == []
    with pytest.raises(ValueError, match=r"'.*/a' was run with other options .* choose another"):
        run_cells([other], 1, print, run)
    assert run_cells([moved], 1, print, run) == []
    assert ran == [one.args]
    one.kept.unlink()  # as runs were left before options were kept
    assert run_cells([other], 1, print, run) == []


@pytest.fixture
def light(monkeypatch):
    """Processes that import nothing heavy."""
    monkeypatch.setattr("editkit.study.cells.PRELOADED", ())


def test_a_cell_is_the_command_in_a_process_of_its_own(tmp_path, light):
    good, bad = Cell("a", tmp_path / "a", ("--version",)), Cell("b", tmp_path / "b", ("nonsense",))
    assert run_one(good) == 0
    assert good.log.read_text().startswith("editkit ")
    assert run_one(bad) == 1
    assert "no verb 'nonsense'" in bad.log.read_text()


STUB = """
import os, time
from pathlib import Path
import editkit.cli

def main(args):
    folder = Path(args[0])
    folder.mkdir(exist_ok=True)
    (folder / "pid").write_text(str(os.getpid()))
    while not (folder.parent / "go").exists() and folder.name != "a":
        time.sleep(0.02)
    (folder / "summary.json").write_text("{}")
    return 0

editkit.cli.main = main
"""
GRID = """
import sys
from pathlib import Path
from editkit.study import cells

cells.PRELOADED = ("stub",)
if __name__ == "__main__":
    root = Path(sys.argv[1])
    grid = [cells.Cell(n, root / n, (str(root / n),)) for n in "abc"]
    assert not cells.run_cells(grid, 1, print)
"""


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(claim) -> None:
    end = time.monotonic() + 60
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_grid_takes_its_cell_along_and_goes_on_where_it_was(tmp_path):
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "grid.py").write_text(GRID)
    command = [sys.executable, str(tmp_path / "grid.py"), str(tmp_path)]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    place = {"env": {**os.environ, "PYTHONPATH": paths}, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, **place) as first:
        wait_for(lambda: (tmp_path / "b" / "pid").exists() and (tmp_path / "b" / "pid").read_text())
        first.kill()
    cell = int((tmp_path / "b" / "pid").read_text())
    wait_for(lambda: not is_running(cell))
    assert not (tmp_path / "b" / "summary.json").exists()
    stamp = (tmp_path / "a" / "summary.json").stat().st_mtime_ns
    (tmp_path / "go").touch()
    subprocess.run(command, check=True, **place)
    assert (tmp_path / "a" / "summary.json").stat().st_mtime_ns == stamp
    assert (tmp_path / "c" / "summary.json").exists()


def line(arm, item, base, edited, tuned, kind="rewrite", letter="E", step=4):
    fate = None if arm == "control" else "stable" if tuned else "erased_true"
    return {
        "run": "r", "arm": arm, "ckpt_step": step, "set": letter, "item_id": item,
        "edit_id": int(item[0]) if letter == "E" else None, "prompt_kind": kind, "relation": "",
        "matched": letter == "K", "scorer": "generation", "score_M0": base, "score_Med": edited,
        "score_Mft": tuned, "fate": fate,
    }  # fmt: skip


def put(folder: Path, kept: list[int]) -> None:
    """Write a finished run: three edits, of which `kept` are left, and two facts, one left."""
    folder.mkdir(parents=True)
    rows = [line("edited", f"{i}.rel", 0, 1, int(i in kept)) for i in range(3)]
    rows += [line("edited", "K0", 1, 1, 1, "intrinsic", "K")]
    rows += [line("edited", "K1", 1, 1, 0, "intrinsic", "K")]
    rows += [line("control", f"K{i}", 1, None, 1, "intrinsic", "K") for i in range(2)]
    rows += [line("edited", "0.rel", 0, 1, 1, step=2)]  # on the way: does not count
    (folder / "retention.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    summary = {
        "step": 4, "measure": "choice", "drift": {"kl": 0.5, "keys": {"site": 0.25}},
        "downstream": {"base": 0.1, "edited": 0.2, "tuned": 0.8, "control": 0.9},
        "manifest": {"trained_parameters": 10},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


def test_the_table_pools_seeds_and_pairs_remedies(told, tmp_path):
    told["remedies"] = {"frozen": {"retain": ["--x"], "methods": ["FT"], "objectives": ["text"]}}
    study = read_study(written(told))
    for seed in told["seeds"]:
        put(study.tuned_folder(tmp_path, "FT", "text", "none", Stream(seed)), kept=[0])
        put(study.tuned_folder(tmp_path, "FT", "text", "frozen", Stream(seed)), kept=[0, 1, 2])
    points = {(p.method, p.objective, p.remedy): p for p in collect(study, tmp_path)}
    plain, frozen = points["FT", "text", "none"], points["FT", "text", "frozen"]
    assert plain.ERR["value"] == pytest.approx(1 / 3)
    assert plain.ERR["n"] == plain.ERR["edits"] == 6  # an edit of another seed is another edit
    assert (plain.IRR["value"], plain.IRR_matched["value"]) == (0.5, 0.5)
    assert plain.control["value"] == 1.0
    assert plain.diff_in_diff["value"] == pytest.approx(1 - 1 / 3)
    assert plain.gap["value"] == pytest.approx(0.5 - 1 / 3)
    assert (plain.kl, plain.keys) == (0.5, 0.25)
    assert plain.fates == {"stable": 2, "erased_true": 4}
    assert (frozen.only_here, frozen.only_there) == (4, 0)
    assert frozen.mcnemar_p == pytest.approx(2 * 0.5**4)
    assert points["MEMIT +", "text", "none"].missing == [Stream(0), Stream(7)]
    short = {(s.remedy, s.objective): s for s in shorten([*points.values()])}
    assert short["none", "text"].ERR["value"] == pytest.approx(1 / 3)
    assert short["none", "text"].more_edits is None
    better = short["frozen", "text"]
    assert (better.ERR["value"], better.more_edits["value"]) == (1.0, pytest.approx(2 / 3))
    assert (better.more_facts["value"], better.gap_change["value"]) == (0, pytest.approx(-2 / 3))
    assert better.more_edits["n"] == 6
    assert better.task == (0.8, 0.8)
    table, page = write_study(study, [*points.values()], tmp_path / "out")
    text = table.read_text()
    assert "| FT | text | none | 0.33 [" in text
    assert "| frozen | text | 1 | 1.00 [1.00, 1.00] | 0.50 [" in text
    assert "+4 -0, p 0.125" in text
    assert "| MEMIT + | text | none | not run |" in text
    assert "choice 0.200, 0.800, 0.900" in text
    html = page.read_text()
    assert html.count("<svg") == 2
    assert "http://" not in html.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")


def test_a_remedy_is_paired_over_the_edits_that_held_in_both(told, tmp_path):
    told["remedies"] = {"frozen": {"retain": ["--x"], "methods": ["FT"], "objectives": ["text"]}}
    study = read_study(written(told))
    for remedy, kept in (("none", []), ("frozen", [0, 1, 2])):
        folder = study.tuned_folder(tmp_path, "FT", "text", remedy, Stream(0))
        put(folder, kept)
        rows = [json.loads(row) for row in (folder / "retention.jsonl").open()]
        for row in rows:
            if row["item_id"] == "1.rel" and remedy == "none":
                row["score_Med"] = 0  # never took there
            if row["item_id"] == "2.rel" and remedy == "frozen":
                row["score_Med"] = 0  # it is right by chance
        (folder / "retention.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    points = {p.remedy: p for p in collect(study, tmp_path) if p.done}
    assert (points["frozen"].only_here, points["frozen"].only_there) == (1, 0)
    assert shorten([*points.values()])[1].more_edits["n"] == 1


def test_edits_and_facts_of_a_model_are_resampled_together(told, tmp_path):
    told |= {"alone": 6, "remedies": {}, "methods": {"FT": ["ft.yaml"]}, "seeds": [0]}
    study = read_study(written(told))
    for n in range(6):  # a model keeps all of its edits and facts, or none
        folder = study.tuned_folder(tmp_path, "FT", "text", "none", Stream(0, n))
        put(folder, kept=[])
        rows = [json.loads(row) for row in (folder / "retention.jsonl").open()]
        for row in rows:
            row["score_Mft"] = n % 2
        (folder / "retention.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (point,) = [p for p in collect(study, tmp_path) if p.done]
    (short,) = shorten([point], is_alone=True)
    for gap in (point.gap, point.diff_in_diff, short.gap):
        assert (gap["value"], gap["low"], gap["high"], gap["edits"]) == (0, 0, 0, 6)


def test_a_remedy_may_count_what_was_done_afterwards(told, tmp_path):
    told["remedies"] = {
        "keys": {"arm": "rekeyed", "retain": ["--retain.rekey=true"], "methods": ["FT"]}
    }
    study = read_study(written(told))
    folder = study.tuned_folder(tmp_path, "FT", "text", "keys", Stream(0))
    put(folder, kept=[0])
    again = [line("rekeyed", f"{i}.rel", 0, 1, 1) for i in range(3)]
    with (folder / "retention.jsonl").open("a") as file:
        file.writelines(json.dumps(r) + "\n" for r in again)
    summary = json.loads((folder / "summary.json").read_text())
    summary["downstream"]["rekeyed"] = 0.7
    (folder / "summary.json").write_text(json.dumps(summary))
    points = {(p.objective, p.remedy): p for p in collect(study, tmp_path) if p.done}
    assert points["text", "keys"].ERR["value"] == 1.0
    assert points["text", "keys"].downstream["tuned"] == 0.7
    assert (points["text", "keys"].kl, points["text", "keys"].keys) == (None, None)


def test_edits_made_alone_have_a_model_each_and_count_as_one(told, tmp_path):
    told |= {"alone": 3, "remedies": {}, "methods": {"FT": ["ft.yaml"]}}
    study = read_study(written(told))
    cells = study.cells(tmp_path)
    edits = [c for c in cells if not c.after]
    assert [c.folder.name for c in edits] == [
        "ft-0-0",
        "ft-0-1",
        "ft-0-2",
        "ft-7-0",
        "ft-7-1",
        "ft-7-2",
    ]
    at = edits[1].args.index("--data.start=1")
    assert edits[1].args[at + 1 : at + 3] == ("--data.limit=1", "--data.edits_per_step=1")
    assert at > edits[1].args.index("--data.limit=2")  # the last one counts
    assert len(cells) == 6 + 6 * 2
    for n in range(3):
        put(study.tuned_folder(tmp_path, "FT", "text", "none", Stream(7, n)), kept=[0])
    found = next(p for p in collect(study, tmp_path) if p.objective == "text")
    assert (found.ERR["n"], found.IRR["n"], found.IRR["edits"]) == (9, 6, 3)
    short = shorten([found], is_alone=True)[0]
    assert (short.ERR["edits"], short.IRR["n"], short.IRR["edits"]) == (3, 6, 3)
    assert found.missing == [Stream(0, n) for n in range(3)]
    assert "3 edits of each alone" in write_study(study, [found], tmp_path)[0].read_text()


def test_the_studies_that_ship_are_well_formed(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    paths = sorted((ROOT / "experiments" / "studies").glob("*.yaml"))
    assert paths
    for path in paths:
        cells = read_study(path).cells(tmp_path)
        assert len({c.folder for c in cells}) == len(cells)
