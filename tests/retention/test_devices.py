from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def on_two(folder: Path, *options: str) -> None:
    """Run the command line as a user does, who leaves starting the second process to Lightning."""
    args = [sys.executable, "-m", "editkit", "retain", *options, f"--out={folder}"]
    done = subprocess.run(
        [*args, "--trainer.devices=2"], capture_output=True, text=True, cwd=ROOT, timeout=240
    )
    assert done.returncode == 0, done.stderr


def test_two_devices_give_the_numbers_of_one(retain, edited, texts, facts, tiny_options, tmp_path):
    arms = "--retain.arms=[edited,control]"
    _, alone = retain(arms)
    on_two(
        tmp_path / "both", "--data=editkit.retention.tasks.Text", f"--data.path={texts}",
        *tiny_options, f"--run={edited}", f"--probes.facts={facts}", arms,
    )  # fmt: skip
    one, two = (
        [json.loads(line) for line in (folder / "retention.jsonl").read_text().splitlines()]
        for folder in (alone, tmp_path / "both")
    )
    assert len(one) == len(two) > 0
    names = ("arm", "ckpt_step", "item_id", "scorer")
    for a, b in zip(one, two, strict=True):
        assert [a[n] for n in names] == [b[n] for n in names]
        assert a["score_Mft"] == b["score_Mft"]
        assert b["logp_Mft"] == pytest.approx(a["logp_Mft"], abs=1e-3)
