"""The torchmetrics shells: which rows they take, and one answer on one device and on two."""

import json
import random
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from editkit.metrics.edit_score import EditScore, EditScores
from editkit.metrics.intervals import estimate
from editkit.metrics.protocol import SCORERS
from editkit.metrics.summary import score_table


def row(edit_id, kind="reliability", counted=True, **scores):
    return {
        "probe_id": f"{kind} {edit_id}",
        "edit_id": edit_id,
        "kind": kind,
        "axis": "",
        "group": "",
        "prompt": "p",
        "target": "t",
        "scores": scores,
        "answer": None,
        "reference": None,
        "counted": counted,
    }


ROWS = [
    row(0, generation=1.0, nll=0.5),
    row(0, generation=0.0, nll=2.0),
    row(1, generation=1.0, nll=0.25),
    row(2, generation=0.0, nll=4.0),
    row(None, generation=1.0, nll=0.125),
    row(1, "locality", generation=0.0, nll=3.0),
    row(3, counted=False),
]


def test_a_metric_averages_the_counted_rows_of_its_kind_with_their_edits():
    metric = EditScore("reliability", "generation")
    for start in range(0, len(ROWS), 2):
        metric.update(ROWS[start : start + 2])
    expected = estimate([1.0, 0.0, 1.0, 0.0, 1.0], [0, 0, 1, 2, None])
    assert metric.compute() == pytest.approx(expected)
    assert expected["value"] == 0.6
    assert expected["low"] < expected["high"]


def test_reset_forgets():
    metric = EditScore("reliability", "generation")
    metric.update(ROWS)
    metric.reset()
    metric.update([row(0, generation=0.0)])
    assert metric.compute()["value"] == 0.0
    assert metric.compute()["n"] == 1


def test_only_surprise_is_better_the_lower():
    lower = [s for s in SCORERS if not EditScore("locality", s).higher_is_better]
    assert lower == ["nll", "perplexity"]


def test_a_group_counts_once_and_is_right_where_any_wording_is():
    draw = random.Random(0)
    rows = []
    for edit in range(40):
        for group in ("", "a", "b"):
            hits = [float(draw.random() < 0.3) for _ in range(3)]
            rows += [row(edit, generation=hit, nll=2 - hit) | {"group": group} for hit in hits]
    expected = [max(r["scores"]["generation"] for r in rows[i : i + 3]) for i in range(0, 360, 3)]
    lone = [r["scores"]["generation"] for r in rows if not r["group"]]
    values = [hit for i, hit in enumerate(expected) if i % 3] + lone
    edits = [e for e in range(40) for _ in range(2)] + [e for e in range(40) for _ in range(3)]
    draw.shuffle(rows)
    hits, surprise = EditScore("reliability", "generation"), EditScore("reliability", "nll")
    for start in range(0, 360, 50):
        hits.update(rows[start : start + 50])
        surprise.update(rows[start : start + 50])
    assert hits.compute() == pytest.approx(estimate(values, edits))
    assert hits.compute() == pytest.approx(score_table(rows)["reliability"]["generation"])
    assert surprise.compute()["n"] == 360


@pytest.mark.parametrize(
    ("kind", "scorer", "says"),
    [("reliabilty", "nll", "kind 'reliabilty'"), ("locality", "f1", "scorer 'f1'")],
)
def test_an_unknown_kind_or_scorer_is_refused(kind, scorer, says):
    with pytest.raises(ValueError, match=says):
        EditScore(kind, scorer)


def test_all_scores_come_by_kind_and_scorer_without_the_kinds_that_had_no_rows():
    scores = EditScores(("generation", "nll"))
    scores.update(ROWS)
    found = scores.compute()
    assert list(found) == ["reliability", "locality"]
    assert found["reliability"]["nll"]["value"] == pytest.approx(6.875 / 5)
    assert found["locality"]["generation"]["n"] == 1
    scores.reset()
    assert scores.compute() == {}


def test_states_move_with_the_module():
    scores = EditScores(("nll",)).to("meta")
    assert {metric.device for metric in scores} == {torch.device("meta")}


def on_one_rank(rank, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    scores = EditScores(("generation",))
    mine = [r for r in ROWS if r["kind"] == "reliability"] if rank == 0 else []
    if rank == 1:
        mine = [r for r in ROWS if r["kind"] == "locality"]
    scores.update(mine)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(scores.compute(), file)
    dist.destroy_process_group()


def test_two_ranks_agree_with_one_although_each_lacks_a_kind(tmp_path):
    mp.spawn(on_one_rank, args=(str(tmp_path),), nprocs=2)
    scores = EditScores(("generation",))
    scores.update(ROWS)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == scores.compute()
