"""What `editkit plan` predicts of memory, beside what a run then takes.

    python benchmarks/plan.py                   a random Llama of 166 million parameters
    python benchmarks/plan.py --methods ft      one method of six

Each plan and each run is a process of its own, on the CPU; the run's peak is its `summary.json`'s.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench
import torch
from bench import keep, machine, save_model, show

ROOT = Path(__file__).parents[1]
WIDTHS = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256,
    "vocab_size": 32000, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
SUBJECTS = [f"{first}{last}" for first in ("Al", "Be", "Co", "Do") for last in ("ba", "ra", "ta")]
TEXT = "the capital of every land is a town where someone lives and works"
CONFIGS = {
    "ft": ["--model.steps=3"],
    "memit": ["--model.search.steps=3", "--model.layers=[2,3,4]"],
    "memoir": ["--model.steps=2"],
    "grace": ["--model.steps=2"],
    "wise": ["--model.fitting.steps=2"],
    "repair": ["--model.fitting.steps=2", "--model.loop.enabled=false"],
}


def options(folder: Path, method: str) -> list[str]:
    """Return what plan and fit are both called with."""
    found = [
        f"--model={ROOT}/experiments/method/{method}.yaml", f"--model.lm.id={folder / 'model'}",
        f"--data={ROOT}/experiments/data/jsonl.yaml", f"--data.path={folder / 'edits.jsonl'}",
        "--data.edits_per_step=2", "--trainer.accelerator=cpu", "--run.immediate=false",
        "--model.evaluation.max_new_tokens=3", f"--trainer.default_root_dir={folder / method}",
        "--trainer.enable_progress_bar=false", *CONFIGS[method],
    ]  # fmt: skip
    if method not in ("ft", "grace"):
        found.append(f"--model.corpus={folder / 'corpus.txt'}")
    return found


def run(*args: str) -> str:
    """Run editkit in a process of its own and return what it says."""
    command = [sys.executable, "-m", "editkit", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def main() -> None:
    """Plan, run, and show both peaks."""
    parser = bench.parser(__doc__)
    parser.add_argument("--methods", choices=CONFIGS, nargs="+", default=list(CONFIGS))
    args = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", WIDTHS)
        words = TEXT.split()
        corpus = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
        (folder / "corpus.txt").write_text("\n".join(corpus * 3))
        rows = [
            {"prompt": f"the capital of {subject} is", "target": "Oslo", "subject": subject}
            for subject in SUBJECTS
        ]
        (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for method in args.methods:
            said = run("plan", *options(folder, method))
            found = re.search(r"([\d.]+) GiB  at most in memory", said)
            assert found is not None, said
            run("fit", *options(folder, method))
            summary = json.loads((folder / method / "summary.json").read_text())
            predicted, measured = float(found[1]), summary["peak_memory_bytes"] / 2**30
            lines.append({
                "method": method, "predicted GiB": predicted, "measured GiB": measured,
                "predicted / measured": predicted / measured,
            })  # fmt: skip
    show("most in memory", lines)
    keep({"lines": lines, "after": machine(torch.get_num_threads())}, args.out)


if __name__ == "__main__":
    main()
