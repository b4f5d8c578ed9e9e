"""A small sample of benchmarks/soak.py: a run killed and one told to end, both gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_run_that_is_killed_or_told_to_end_goes_on_to_the_same_end(tiny, edits, tmp_path):
    rows = [{"prompt": e.prompt, "target": e.target} for e in edits]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        sys.executable, "benchmarks/soak.py", "--methods=ft", "--kills=2", "--signals=KILL,TERM",
        f"--lm={tiny('llama')}", f"--data={tmp_path / 'edits.jsonl'}", "--edits=4",
        f"--out={tmp_path / 'soak'}", "--more=--model.evaluation.max_new_tokens=4",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    log = tmp_path / "soak" / "ft" / "log"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
    assert "every end equal bit for bit" in " ".join(done.stdout.split())
    stops = [json.loads(line) for line in (tmp_path / "soak" / "stops.jsonl").open()]
    assert [stop["signal"] for stop in stops] == ["KILL", "TERM"]
    assert stops[0]["status"] == -9
