"""That the cells of grids and studies bind, and what `experiments/grid.py` says of a queue."""

import csv
import sys
from argparse import ArgumentError
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from editkit.functional.queue import START, QueueSettings
from editkit.retention.settings import parser
from editkit.study.reading import read_study
from editkit.trainer_cli import EditCLI, run_trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import grid

ROOT = grid.ROOT
GRIDS = sorted((ROOT / "experiments" / "grids").glob("*.yaml"))
STUDIES = sorted((ROOT / "experiments" / "studies").glob("*.yaml"))


class Made(Exception):
    """Carries a parser out of the command line that made it."""


class Stopped(EditCLI):
    """Makes its parser and stops."""

    def parse_arguments(self, parser, args):
        """Hand the parser over."""
        raise Made(parser)


@pytest.fixture(scope="module")
def parsers():
    """The parsers of `editkit fit` and `editkit retain`, made once."""
    with pytest.raises(Made) as made:
        run_trainer([], Stopped)
    return {"fit": made.value.args[0], "retain": parser()}


def bind(parsers, args):
    """Parse a cell's arguments as its verb does."""
    parsers[args[0]].parse_args([*args] if args[0] == "fit" else [*args[1:]])


@pytest.mark.parametrize("path", GRIDS, ids=[p.stem for p in GRIDS])
def test_every_cell_of_a_grid_binds(path, parsers, monkeypatch):
    monkeypatch.chdir(ROOT)
    told = yaml.safe_load(path.read_text())
    assert told["methods"]
    for method in told["methods"]:
        bind(parsers, grid.cell_of(path.stem, told, method, told["seeds"][0]).args)
    with pytest.raises(ArgumentError, match="nosuch"):
        bind(parsers, [*grid.cell_of(path.stem, told, method, 0).args, "--model.nosuch=1"])


@pytest.mark.parametrize("path", STUDIES, ids=[p.stem for p in STUDIES])
def test_every_cell_of_a_study_binds(path, parsers, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    study = read_study(path)
    first = replace(study, seeds=study.seeds[:1], alone=min(study.alone, 1))
    folders = ("--run=", "--out=", "--trainer.default_root_dir=")
    alike = {}  # fine-tunings of edited models differ in their folders alone
    for cell in first.cells(tmp_path):
        alike.setdefault(tuple(a for a in cell.args if not a.startswith(folders)), cell.args)
    assert {args[0] for args in alike.values()} == {"fit", "retain"}
    for args in alike.values():
        bind(parsers, args)


def test_shared_options_come_before_a_methods_own():
    side = ["--a=1", "--b=2"]
    methods = {"x": ["x.yaml", [side, "--b=3"], "--c=4"]}
    args = grid.cell_of("g", {"options": ["--o=0"], "methods": methods}, "x", 5).args
    assert args[:7] == ("fit", "--model=x.yaml", "--o=0", "--a=1", "--b=2", "--b=3", "--c=4")


def save_run(folder, losses_L, D=2.0):
    """Write the numbers of a run with one queue a layer, as a run logs them."""
    folder.mkdir()
    queues, rows = dict.fromkeys(losses_L, START), []
    for batch in zip(*losses_L.values(), strict=True):
        row = {"edits": len(rows), "edit/loss_after": 0.1}
        for layer, loss in zip(losses_L, batch, strict=True):
            queues[layer] = queues[layer].after(loss, 1, QueueSettings(D=D))
            row |= {f"edit/kappa/{layer}": queues[layer].kappa, f"edit/PL_per_D/{layer}": loss / D}
        rows += [row, {"edits": len(rows), "edit/loss_after": ""}]  # a row of scores has no queue
    with (folder / "metrics.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_the_largest_mean_drift_stands_beside_its_bound(tmp_path):
    one = save_run(tmp_path / "a", {0: [1.0, 1.0, 2.0, 2.0], 3: [2.0, 4.0, 6.0, 4.0]})
    other = save_run(tmp_path / "b", {0: [2.0, 2.0, 2.0, 2.0], 3: [3.0, 3.0, 3.0, 3.0]})
    found = grid.drift([one, other])
    assert found["mean"] == pytest.approx(2.0)  # layer 3 of the first: 16 / 4 batches / 2
    assert found["kappa"] == pytest.approx(1 + 0 + 1 + 2 + 1)
    assert found["bound"] == pytest.approx(1 + (5 - 1) / 4)
    assert (found["holds"], found["sites"]) == (True, 4)
    (line,) = grid.drift_lines({"LyapLock": {"drift": found}, "MEMIT": {"drift": None}})
    assert line == (
        "LyapLock: largest mean PL / D 2.000, its bound 2.000, largest final kappa 5.0; the bound "
        "holds at all 4 layers of all seeds."
    )


def test_a_broken_bound_is_said(tmp_path):
    run = save_run(tmp_path / "a", {0: [2.0, 4.0, 6.0]})
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(text.replace("4.0,3.0", "1.0,3.0"))  # a kappa cut short
    assert "is BROKEN" in grid.drift_lines({"x": {"drift": grid.drift([run])}})[0]


def test_a_run_without_a_queue_has_no_drift(tmp_path):
    (tmp_path / "metrics.csv").write_text("edits,edit/loss_after\n0,0.1\n")
    assert grid.drift([tmp_path]) is None


def test_the_table_has_scores_by_edits_seen_and_where_prompts_went():
    def point(edits, *values):
        return dict(zip(("edits", *grid.MAIN, "perplexity"), (edits, *values), strict=True))

    seeds = [
        [point(1, 1, 1, None, None), point(9, 0.6, 0.5, 1, 3.0)],
        [point(1, 1, 1, None, 2.0), point(9, 1, 1, 1, 5.0)],
    ]
    lines = grid.by_edits_lines({"x": {"by_edits": seeds}})
    assert lines[3:6] == [
        "| edits | 1 | 9 |",
        "|---|---|---|",
        "| x | - | 0.80 / 0.75 / 1.00, 0.84 |",
    ]
    assert lines[9:] == ["| edits | 1 | 9 |", "|---|---|---|", "| x | - | 4.00 |"]
    rates = {name: {"value": 0.25, "low": 0, "high": 1} for name in grid.RATES}
    summaries = [
        {"routing": rates, "loop": {"rebuilt": 2.0, "right_pool": 1.0}},
        {
            "routing": rates | {"rejected": {"value": 0.75}},
            "loop": {"rebuilt": 4.0, "right_pool": 1},
        },
    ]
    method = {part: grid.shared(summaries, part) for part in ("routing", "loop")}
    lines = grid.routing_lines({"x": method, "y": {"routing": None, "loop": None}})
    assert "| x | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 0.500 | 0.250 |" in lines
    assert lines[-1] == "| x | 3 |"
    assert grid.shared([{}, *summaries], "loop") is None
