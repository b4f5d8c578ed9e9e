"""How many more edits a second two processes make than one: MEMIT in batches, under `ddp` on gloo.

    python benchmarks/throughput.py                      fact-world, 3 batches of 100, minutes
    python benchmarks/throughput.py --model mid-size     a random Llama of 12 blocks, longer
    python benchmarks/throughput.py --quick              a smoke test

Runs of `editkit fit` on one device and on several, in turns, each process on one thread; second
moments are measured before. What counts is the wall-clock time of the batches as the ledger has it
(search for values, keys, solve, write; no start of processes, no probes), the quickest of the
repeats, so the machine must be quiet: load and cores are shown. The edited models of both must
agree, to the rounding of sums in another order.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
from bench import console, keep, machine, save_model
from rich.table import Table
from safetensors.torch import load_file

from editkit.adapters.io import TENSORS, read_lines
from editkit.callbacks.folder import EDITS
from editkit.lm.spec import LMSpec

ROOT = Path(__file__).parents[1]
CLOSE = 1e-3  # largest relative difference of what edits wrote


def command(folder: Path, model: str, devices: int, args: argparse.Namespace) -> list[str]:
    """Return the command line of a run."""
    several = ["--trainer.strategy=ddp"] if devices > 1 else []
    return [
        sys.executable, "-m", "editkit", "fit", f"--model={ROOT}/experiments/method/memit.yaml",
        f"--model.lm.id={model}", f"--model.corpus={LMSpec().path}/corpus.txt",
        f"--data={ROOT}/experiments/data/factworld.yaml", "--data.intrinsic=0",
        f"--data.limit={args.batches * args.batch}", f"--data.edits_per_step={args.batch}",
        f"--model.search.steps={args.steps}", "--model.search.stop_below=0",
        "--trainer.accelerator=cpu", f"--trainer.devices={devices}", *several,
        "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false",
        "--run.immediate=false", "--run.overwrite=true", f"--trainer.default_root_dir={folder}",
    ]  # fmt: skip


def run(folder: Path, model: str, devices: int, args: argparse.Namespace) -> dict[str, float]:
    """Run once; return the seconds of the whole and of its batches."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "EDITKIT_CACHE": str(folder.parent / "cache")}
    begun = time.perf_counter()
    done = subprocess.run(
        command(folder, model, devices, args), env=env, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{devices} devices: status {done.returncode}\n{done.stderr[-2000:]}")
    steps = {entry["step"]: entry["seconds"] for entry in read_lines(folder / EDITS)}
    edits = sum(steps.values()) * args.batch
    return {"whole": time.perf_counter() - begun, "edits": edits}


def difference(one: Path, other: Path) -> float:
    """Return the largest relative difference of what two runs wrote."""
    a, b = (load_file(folder / TENSORS) for folder in (one, other))
    return max(float((a[k].float() - b[k].float()).norm() / b[k].float().norm()) for k in a)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = bench.parser(__doc__)
    parser.add_argument("--model", default="factworld", help="factworld, mid-size or a folder")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--batch", type=int, default=100, help="edits at once")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="steps of the search for a value")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.batches, args.steps, args.repeats = 4, 1, 2, 1
    return args


def main() -> int:
    """Run on one device and on several, in turns; return 1 where the models differ."""
    args, took = parse(), {}  # type: ignore[var-annotated]
    report: dict[str, Any] = {"before": machine(1)}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = save_model(root / "model") if args.model == "mid-size" else args.model
        first = argparse.Namespace(**{**vars(args), "batch": 1, "batches": 1, "steps": 1})
        run(root / "moments", model, 1, first)
        for _ in range(args.repeats):
            for devices in (1, args.devices):
                found = run(root / str(devices), model, devices, args)
                took.setdefault(devices, []).append(found)
        report["relative difference"] = difference(root / "1", root / str(args.devices))
    edits = args.batch * args.batches
    table = Table("processes", "edits/s", "s, batches", "s, whole run", title=f"{edits} edits")
    for devices, runs in took.items():
        best = min(found["edits"] for found in runs)
        report[f"{devices} devices"] = {"edits/s": edits / best, "runs": runs}
        whole = min(found["whole"] for found in runs)
        table.add_row(str(devices), f"{edits / best:.2f}", f"{best:.1f}", f"{whole:.1f}")
    several, one = (report[f"{n} devices"]["edits/s"] for n in (args.devices, 1))
    report["speedup"] = several / one
    report["after"] = machine(1)
    console.print(table)
    console.print({k: v for k, v in report.items() if "devices" not in k})
    keep(report, args.out)
    return int(not report["relative difference"] < CLOSE)


if __name__ == "__main__":
    sys.exit(main())
