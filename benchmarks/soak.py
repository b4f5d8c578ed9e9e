"""Runs that are killed: at random moments, then resumed, they must end as if nothing had been.

    python benchmarks/soak.py                              ft, lora, memit, memoir: 4 kills each
    python benchmarks/soak.py --methods memit --kills 50 --signals KILL,TERM

A run is stopped in turn while it edits, scores, writes a checkpoint and writes its results, at a
random occurrence of each and a random time into it, and goes on by `--ckpt_path last` until it is
done; then tensors, ledger, probes and readings must equal those of a run that was left alone, bit
for bit (times apart). A run that is told to end (TERM) must end with status 143 and a checkpoint
that has every edit made by then. Every stop is a line of `OUT/stops.jsonl`; counts are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from safetensors.torch import load_file

from editkit.adapters.io import CONFIG, TENSORS
from editkit.callbacks.folder import EDITS, PROBES, UNEDITED, last_checkpoint
from editkit.callbacks.rows import read_rows
from editkit.cli import main

ROOT = Path(__file__).parents[1]
NAMES = {"e": "editing", "s": "scoring", "c": "checkpoint", "f": "results"}
PATIENCE = 600  # seconds that a process may take
WIDTH = 8  # digits of the number of edits


class Phases(Callback):
    """Says in a file what a run is at, and how many edits it has made.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT)

    def _say(self, phase: str, module: Any) -> None:
        os.pwrite(self.file, f"{phase}{module.edits_seen:0{WIDTH}d}".encode(), 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Say that an edit is made."""
        self._say("e", pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Say that probes are scored."""
        self._say("s", pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Say that a checkpoint is written."""
        self._say("c", pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that probes are scored."""
        self._say("s", pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that results are written."""
        self._say("f", pl_module)


class Runs:
    """Runs of one method.

    Args:
        method: Name of a file in experiments/method.
        options: The command line's arguments.
    """

    def __init__(self, method: str, options: argparse.Namespace) -> None:
        self.options = options
        self.method = method
        self.out = Path(options.out) / method
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.phase = self.out / "phase"
        self.longest: dict[str, float] = {}

    def arguments(self, folder: Path, resume: bool) -> list[str]:
        """Return the command line of a run."""
        o, callbacks = self.options, "lightning.pytorch.callbacks.ModelCheckpoint"
        kept = {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": 2, "save_last": True}
        kept["enable_version_counter"] = False
        mine = [
            {"class_path": "benchmarks.soak.Phases", "init_args": {"path": str(self.phase)}},
            {"class_path": callbacks, "init_args": kept},
        ]
        data = [f"--data={ROOT}/experiments/data/factworld.yaml"]
        if o.data:
            data = [f"--data={ROOT}/experiments/data/jsonl.yaml", f"--data.path={o.data}"]
        return [
            "fit", f"--model={ROOT}/experiments/method/{self.method}.yaml", f"--model.lm.id={o.lm}",
            *data, f"--data.limit={o.edits}", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}",
            f"--trainer.callbacks={json.dumps(mine)}", f"--milestones.at=[1,{o.edits // 2}]",
            *shlex.split(o.more), *(["--ckpt_path=last"] if resume else []),
        ]  # fmt: skip

    def begin(self, folder: Path, resume: bool) -> int:
        """Start a run in a process of its own; return the process."""
        self.phase.write_bytes(b" " + b"0" * WIDTH)
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            log = os.open(self.out / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = main(self.arguments(folder, resume))
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def at(self) -> tuple[str, int]:
        """Return what the run is at, and the edits it has made."""
        said = self.phase.read_bytes().decode()
        return said[:1], int(said[1 : 1 + WIDTH] or 0)

    def straight(self) -> Path:
        """Make a run that is left alone, and see how long it is at each thing."""
        folder = self.out / "straight"
        child, last, since = self.begin(folder, resume=False), " ", time.monotonic()
        code = None
        while code is None:
            code, phase, now = _ended(child), self.at()[0], time.monotonic()
            if phase != last:
                self.longest[last] = max(self.longest.get(last, 0.0), now - since)
                last, since = phase, now
            time.sleep(0.0005)
        if code:
            raise SystemExit(
                f"{self.method}: a run left alone ended with {code}; see {self.out}/log"
            )
        return folder

    def stop(self, child: int, phase: str, name: str, dice: random.Random) -> dict[str, Any] | None:
        """Stop a run at its n-th time of being at something; None where it is done before."""
        left = 1 if phase == "f" else dice.randint(1, max(1, self.options.edits // 3))
        last, begun = "", time.monotonic()
        while (code := _ended(child)) is None:
            now = self.at()
            left -= now[0] == phase and now != last
            if left == 0:
                delay = dice.uniform(0, self.longest.get(phase, 0.0))
                time.sleep(delay)
                place = self.at()
                os.kill(child, signal.Signals[f"SIG{name}"])
                status = _wait(child)
                return {"method": self.method, "signal": name, "at": NAMES.get(place[0], "start"),
                        "edits": place[1], "delay": round(delay, 4), "status": status}  # fmt: skip
            last = now
            if time.monotonic() - begun > PATIENCE:
                os.kill(child, signal.SIGKILL)
                raise SystemExit(f"{self.method}: a run did not end in {PATIENCE} s")
            time.sleep(0.0005)
        if code:
            raise SystemExit(f"{self.method}: a resumed run ended with {code}; see {self.out}/log")
        return None

    def soak(self, kills: int, signals: list[str], dice: random.Random) -> list[dict[str, Any]]:
        """Stop runs until there are `kills` stops, and compare each that came to its end."""
        straight, stops, chain = self.straight(), [], 0
        phases = dice.sample("escf", 4)
        while len(stops) < kills:
            folder, chain, done = self.out / f"chain{chain}", chain + 1, False
            resume = False
            while not done:
                child = self.begin(folder, resume)
                resume = True
                if len(stops) == kills:  # the last one goes on to its end
                    if code := _wait(child):
                        raise SystemExit(f"{self.method}: ended with {code}; see {self.out}/log")
                    break
                asked = phases[len(stops) % 4]
                found = self.stop(child, asked, signals[len(stops) % len(signals)], dice)
                done = found is None or found["status"] == 0
                if found is not None:
                    stops.append(found)
                    self._check_stop(folder, found)
                    done = done or is_finished(folder)
            differs = differences(straight, folder)
            if differs:
                raise SystemExit(f"{self.method}: {folder} differs from {straight}: {differs}")
            shutil.rmtree(folder)
        return stops

    def _check_stop(self, folder: Path, stop: dict[str, Any]) -> None:
        """Check how a run ended that was told to."""
        with (Path(self.options.out) / "stops.jsonl").open("a") as file:
            file.write(json.dumps(stop) + "\n")
        if stop["signal"] == "KILL" or stop["status"] == 0 or stop["at"] == "start":
            return
        if stop["status"] != 143:
            raise SystemExit(
                f"{self.method}: status {stop['status']} at SIGTERM; see {self.out}/log"
            )
        path = last_checkpoint([folder / "checkpoints"])
        kept = torch.load(path, weights_only=False)["editkit"]["edits_seen"] if path else -1
        if kept < stop["edits"]:
            raise SystemExit(f"{self.method}: {stop} left a checkpoint of {kept} edits")


def is_finished(folder: Path) -> bool:
    """Whether a stop came too late: the run had written its last checkpoint."""
    path = last_checkpoint([folder / "checkpoints"])
    if path is None:
        return False
    return bool(torch.load(path, weights_only=False)["callbacks"]["RunFolder"]["finished"])


def _ended(child: int) -> int | None:
    """Return a process' exit code; None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def differences(straight: Path, other: Path) -> list[str]:
    """Return what differs between two finished runs, times apart."""
    found = []
    one, two = (load_file(folder / TENSORS) for folder in (straight, other))
    if one.keys() != two.keys() or not all(torch.equal(one[k], two[k]) for k in one):
        found.append(TENSORS)
    for name in (EDITS, PROBES, UNEDITED, "ability.jsonl"):
        timeless = [
            [{k: v for k, v in row.items() if k not in ("time", "seconds")} for row in rows]
            for rows in (read_rows(straight / name), read_rows(other / name))
        ]
        if timeless[0] != timeless[1]:
            at = next((i for i, p in enumerate(zip(*timeless, strict=False)) if p[0] != p[1]), -1)
            found.append(f"{name} ({[len(rows) for rows in timeless]} lines, first at {at})")
    if json.loads((straight / CONFIG).read_text()) != json.loads((other / CONFIG).read_text()):
        found.append(CONFIG)
    return found + [path.name for path in other.rglob("*.tmp")]


def soak() -> None:
    """Stop runs of each method, and tell how often."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--methods", default="ft,lora,memit,memoir", help="files in experiments/method"
    )
    parser.add_argument("--kills", type=int, default=4, help="stops per method")
    parser.add_argument("--signals", default="KILL", help="signals, taken in turn")
    parser.add_argument("--edits", type=int, default=8)
    parser.add_argument("--lm", default="factworld", help="model to edit")
    parser.add_argument("--data", default="", help="JSONL of edits; none takes fact-world's")
    parser.add_argument("--out", default="runs/soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", default="", help="further options of editkit fit, in quotes")
    options = parser.parse_args()
    Path(options.out).mkdir(parents=True, exist_ok=True)
    (Path(options.out) / "stops.jsonl").unlink(missing_ok=True)
    sys.path.insert(0, str(ROOT))  # for `benchmarks.soak.Phases`
    sys.argv = ["editkit"]
    torch.set_num_threads(1)  # processes are forked
    console, dice = Console(), random.Random(options.seed)
    for method in options.methods.split(","):
        stops = Runs(method, options).soak(options.kills, options.signals.split(","), dice)
        counts = Counter(f"{stop['signal']} while {stop['at']}" for stop in stops)
        told = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
        console.print(f"{method}: {len(stops)} stops ({told}); every end equal bit for bit")


if __name__ == "__main__":
    soak()
