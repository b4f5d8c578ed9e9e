from __future__ import annotations

import json

from editkit.report.page import write_report


def estimate(value):
    return {"value": value, "low": None, "high": None, "n": 4, "edits": 4}


def test_the_page_of_a_run_shows_its_retention_runs(make_run):
    run_folder = make_run("one")
    before = write_report([run_folder]).read_text()
    assert "After fine-tuning" not in before
    kept = {n: estimate(0.75) for n in ("ERR", "IRR", "IRR_matched", "gap", "ERR_rephrase")}
    summary = {
        "objective": "maths", "step": 40, "measure": "final_number",
        "rates": {"generation": {**kept, "ERR": estimate(0.125), "neighbours": estimate(None),
                                 "fates": {"erased_true": 3, "stable": 1}}},
        "downstream": {"edited": 0.0, "tuned": 0.5, "control": None},
        "drift": {"kl": None}, "manifest": {"model": {"kind": "lora", "freeze": "prefix"}},
    }  # fmt: skip
    folder = run_folder / "retention" / "maths"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    page = write_report([run_folder]).read_text()
    assert "After fine-tuning" in page
    for text in ("maths", "lora, without prefix", "0.125", "3 say the old answer"):
        assert text in page
    (run_folder / "adapter_config.json").write_text('{"tensors_sha256": "now"}')
    for told, is_shown in (("now", True), ("before", False)):
        summary["manifest"]["tensors_sha256"] = told
        (folder / "summary.json").write_text(json.dumps(summary))
        page = write_report([run_folder]).read_text()
        assert ("3 say the old answer" in page) == is_shown
        assert ("retention/maths is left out" in page) != is_shown
