"""Runs that were not measured alike are refused, each field by name."""

from __future__ import annotations

import pytest

from editkit.report.load import load_runs
from editkit.report.protocol import check_protocol, fields, mixed_fields, why_it_may_differ


@pytest.fixture
def pair(make_run):
    return [make_run("a"), make_run("b", seed=1)]


def test_arguments_of_the_method_and_seeds_may_differ(pair):
    runs = load_runs(pair)
    assert fields(runs)["method_arguments.lr"] == [0.1, 1.1]
    assert fields(runs)["seed"] == [0, 1]
    check_protocol(runs)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_hash", "e" * 64), ("data_sha256", "e" * 64), ("probes_sha256", "e" * 64),
        ("scorers", ["nll"]), ("stop", ["."]),
        ("template", "chat"), ("max_new_tokens", 7), ("edits_per_step", 2), ("dtype", "bfloat16"),
        ("a_field_of_tomorrow", 1),
    ],
)  # fmt: skip
def test_every_other_field_must_be_the_same(pair, stamp, field, value):
    stamp(pair[1], **{field: value})
    with pytest.raises(ValueError, match="not measured alike") as caught:
        check_protocol(load_runs(pair))
    assert [*mixed_fields(load_runs(pair))] == [field]
    assert f": {field} is " in str(caught.value)
    assert "--allow_mixed true" in str(caught.value)


@pytest.mark.parametrize("field", ["commit", "torch", "python", "batch_size", "devices", "base_id"])
def test_what_changes_no_score_may_differ(pair, stamp, field):
    stamp(pair[1], **{field: "other"})
    check_protocol(load_runs(pair))
    assert why_it_may_differ(field)


def test_a_run_under_way_does_not_compare_with_a_finished_one(make_run):
    runs = load_runs([make_run("a"), make_run("b", edits=12, finished=False)])
    with pytest.raises(ValueError, match=r"edits_seen is 20 and 10.*base_hash.*not recorded"):
        check_protocol(runs)
