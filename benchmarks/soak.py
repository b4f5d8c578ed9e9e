"""Runs that are killed: at random moments, then resumed, they must end as if nothing had been.

    python benchmarks/soak.py                              every family, 4 stops each
    python benchmarks/soak.py --kills 50 --signals KILL,TERM --jobs 16
    python benchmarks/soak.py --methods ft,memit --devices 2

A run is stopped in turn while it edits, scores, writes a checkpoint and writes its results, at a
random occurrence of each and a random time into it, and goes on by `--ckpt_path last` until it is
done; then tensors, ledger, probes and readings must equal those of a run that was left alone, bit
for bit (times apart). A run that is told to end (TERM) must end with status 143 and a checkpoint
that has every edit made by then. With several devices one process is stopped or all, in turn: the
others must be gone within seconds, and one sentence must say why.

Every stop is a line of `OUT/stops.jsonl`; a table of counts comes last, and the exit code is 1
where something was not as it must be. What a stop costs, in CPU seconds, stands in the table.
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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from editkit.adapters.io import CONFIG, TENSORS
from editkit.callbacks.folder import EDITS, PROBES, UNEDITED, last_checkpoint
from editkit.callbacks.rows import read_rows
from editkit.cli import main
from editkit.data.factworld import FactWorld
from editkit.edits import Edit, Probe

ROOT = Path(__file__).parents[1]
FAMILIES = "ft,lora,memit,lyaplock,alphaedit,memoir,grace,wise,repair"
NAMES = {"e": "editing", "s": "scoring", "c": "checkpoint", "f": "results"}
PATIENCE = 900  # seconds that a process may take
LEAVE = 30  # seconds in which the processes of other devices must be gone
IN_A_CHAIN = 5  # stops until a run is left to come to its end
IMPORTED = (
    "editkit.trainer_cli", "editkit.report.page", "editkit.report.figures", "editkit.methods.lora",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
WIDTH = 8  # digits of the number of edits
SEARCH = ["--model.search.steps=3"]
SHARDS = ["--model.fitting.steps=3", "--model.shards.save=2", "--model.shards.merge=4"]
SHORT = {
    "ft": ["--model.steps=3"], "lora": ["--model.steps=3"], "grace": ["--model.steps=3"],
    "memit": SEARCH, "lyaplock": SEARCH, "alphaedit": SEARCH,
    "memoir": ["--model.steps=3", "--model.routing.held_out=50"], "wise": SHARDS, "repair": SHARDS,
}  # fmt: skip


class Few(FactWorld):
    """Edits of the fact-world with few texts to read on the way, so that a run is short."""

    def load(self) -> tuple[list[Edit], list[Probe]]:
        """Draw the stream."""
        found = super().load()
        self.texts = self.texts[:8]
        return found


class Phases(Callback):
    """Says in a file what a run is at, and how many edits it has made.

    Args:
        path: The file; the process of each device leaves its number beside it.
    """

    def __init__(self, path: str) -> None:
        self.device = os.environ.get("LOCAL_RANK", "0")
        Path(f"{path}.{self.device}").write_text(str(os.getpid()))
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT)

    def _say(self, phase: str, module: Any) -> None:
        if module.global_rank == 0:
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


@dataclass
class Found:
    """What came of some runs of one method.

    Args:
        method: Its name.
        stops: Every stop.
        ends: Runs that came to their end and were compared.
        wrong: What was not as it must be.
        seconds: CPU seconds.
        longest: Longest time at each thing, of a run that is left alone.
    """

    method: str
    stops: list[dict[str, Any]] = field(default_factory=list)
    ends: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    longest: dict[str, float] = field(default_factory=dict)


class Runs:
    """Runs of one method, one after another.

    Args:
        method: Name of a file in experiments/method.
        options: The command line's arguments.
        name: Folder of these runs below the method's.
        longest: Longest time at each thing.
    """

    def __init__(
        self, method: str, options: argparse.Namespace, name: str, longest: dict[str, float]
    ) -> None:
        self.options = options
        self.found = Found(method, longest=longest)
        self.straight = Path(options.out) / method / "straight" / "run"
        self.out = Path(options.out) / method / name
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.phase = self.out / "phase"
        self.told = 0  # where in the log the run under way begins

    def arguments(self, folder: Path, resume: bool) -> list[str]:
        """Return the command line of a run."""
        o, callbacks = self.options, "lightning.pytorch.callbacks.ModelCheckpoint"
        kept = {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": 2, "save_last": True}
        kept["enable_version_counter"] = False
        mine = [
            {"class_path": "benchmarks.soak.Phases", "init_args": {"path": str(self.phase)}},
            {"class_path": callbacks, "init_args": kept},
        ]
        data = ["--data=benchmarks.soak.Few", "--data.intrinsic=4"]
        if o.data:
            data = [f"--data={ROOT}/experiments/data/jsonl.yaml", f"--data.path={o.data}"]
        if o.devices > 1:
            data += [f"--trainer.devices={o.devices}", "--trainer.strategy=ddp"]
            data += [f"--data.edits_per_step={o.devices}"]
        return [
            "fit", f"--model={ROOT}/experiments/method/{self.found.method}.yaml",
            f"--model.lm.id={o.lm}", *data, f"--data.limit={o.edits}", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}",
            f"--trainer.callbacks={json.dumps(mine)}", f"--milestones.at=[1,{o.edits // 2}]",
            "--model.evaluation.max_new_tokens=4", *SHORT.get(self.found.method, []),
            *shlex.split(o.more), *(["--ckpt_path=last"] if resume else []),
        ]  # fmt: skip

    def begin(self, folder: Path, resume: bool) -> int:
        """Start a run in a process of its own; return the process."""
        for path in self.out.glob("phase.*"):
            path.unlink()
        self.phase.write_bytes(b" " + b"0" * WIDTH)
        log = os.open(self.out / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.told = os.fstat(log).st_size
        child = os.fork()
        if child:
            os.close(log)
            return child
        code = 70
        try:
            os.dup2(log, 1)
            os.dup2(log, 2)
            arguments = self.arguments(folder, resume)
            if self.options.devices > 1:  # Lightning starts the other processes by this line
                os.chdir(ROOT)
                os.execv(sys.executable, [sys.executable, "-m", "editkit", *arguments])
            torch.set_num_threads(1)  # anew in each fork, before threads of it race for the pool
            code = main(arguments)
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

    def ended(self, child: int, options: int = os.WNOHANG) -> int | None:
        """Return a process' exit code; None while it runs."""
        found, status, used = os.wait4(child, options)
        self.found.seconds += used.ru_utime + used.ru_stime
        return os.waitstatus_to_exitcode(status) if found else None

    def wait(self, child: int, patience: float = PATIENCE) -> int:
        """Return a process' exit code, when it has ended."""
        begun = time.monotonic()
        while (code := self.ended(child)) is None:
            if time.monotonic() - begun > patience:
                self.kill_all(child)
                raise TimeoutError(f"a process did not end in {patience} s")
            time.sleep(0.005)
        return code

    def devices(self, child: int) -> list[int]:
        """Return the processes of all devices that are known by now."""
        numbers = [self.out / f"phase.{n}" for n in range(1, self.options.devices)]
        return [child, *(int(path.read_text() or 0) for path in numbers if path.exists())]

    def kill_all(self, child: int) -> None:
        """Kill all processes of a run."""
        for process in self.devices(child)[::-1]:
            if is_there(process):
                os.kill(process, signal.SIGKILL)

    def alone(self) -> Found:
        """Make a run that is left alone, and see how long it is at each thing."""
        child, last, since = self.begin(self.straight, resume=False), " ", time.monotonic()
        code, longest = None, self.found.longest
        while code is None:
            code, phase, now = self.ended(child), self.at()[0], time.monotonic()
            if phase != last:
                longest[last] = max(longest.get(last, 0.0), now - since)
                last, since = phase, now
            time.sleep(0.0005)
        if code:
            self.found.wrong.append(f"a run left alone ended with {code}; see {self.out}/log")
        return self.found

    def stop(self, child: int, phase: str, name: str, dice: random.Random) -> dict[str, Any] | None:
        """Stop a run at its n-th time of being at something; None where it is done before."""
        left = 1 if phase == "f" else dice.randint(1, max(1, self.options.edits // 3))
        last, begun = "", time.monotonic()
        while (code := self.ended(child)) is None:
            now = self.at()
            left -= now[0] == phase and now != last
            if left == 0:
                delay = dice.uniform(0, self.found.longest.get(phase, 0.0))
                time.sleep(delay)
                return self._signal(child, name, delay, dice)
            last = now
            if time.monotonic() - begun > PATIENCE:
                self.kill_all(child)
                raise TimeoutError(f"a run did not end in {PATIENCE} s")
            time.sleep(0.0005)
        if code:
            raise ValueError(f"a resumed run ended with {code}")
        return None

    def _signal(self, child: int, name: str, delay: float, dice: random.Random) -> dict[str, Any]:
        """Send a signal to one process of a run or to all, and see all of them end."""
        known = self.devices(child)
        several = self.options.devices > 1
        who = dice.choice(["first", "other", "all"]) if several else "all"
        meant = {"first": known[:1], "other": known[1:], "all": known}[who]
        place, sent = self.at(), time.monotonic()
        for process in meant:
            if is_there(process):
                os.kill(process, signal.Signals[f"SIG{name}"])
        status = self.wait(child, LEAVE if several else PATIENCE)
        while any(map(is_there, known[1:])):
            if time.monotonic() - sent > LEAVE:
                self.kill_all(child)
                raise TimeoutError(f"{who} process stopped by {name}, another one stayed {LEAVE} s")
            time.sleep(0.005)
        stop = {"method": self.found.method, "signal": name, "at": NAMES.get(place[0], "start"),
                "edits": place[1], "delay": round(delay, 4), "status": status}  # fmt: skip
        if several:
            with (self.out / "log").open("rb") as log:
                log.seek(self.told)
                said = [ln for ln in log.read().decode().split("\n") if ln.startswith("editkit: ")]
            said = [ln for ln in said if " removed " not in ln]
            stop |= {"stopped": who, "gone": round(time.monotonic() - sent, 3), "said": said}
        return stop

    def soak(self, kills: int, seed: int) -> Found:
        """Stop a run until there are `kills` stops, and compare it when it comes to its end."""
        dice, chain = random.Random(seed), 0
        phases, signals = dice.sample("escf", 4), self.options.signals.split(",")
        try:
            while len(self.found.stops) < kills:
                folder = self.out / f"chain{chain}"
                self._chain(folder, kills, dice, phases, signals)
                self.found.ends += 1
                if found := apart(differences, self.straight, folder):
                    self.found.wrong.append(f"{folder} differs from {self.straight}: {found}")
                else:
                    shutil.rmtree(folder)
                chain += 1
        except (ValueError, OSError, RuntimeError) as error:
            self.found.wrong.append(f"{error}; see {self.out}/log")
        return self.found

    def _chain(
        self, folder: Path, kills: int, dice: random.Random, phases: list[str], signals: list[str]
    ) -> None:
        """Stop a run and go on with it, until it is done or there are enough stops."""
        stops, resume, done = self.found.stops, False, False
        while not done:
            child = self.begin(folder, resume)
            resume = True
            if len(stops) == kills:  # the last one goes on to its end
                if code := self.wait(child):
                    raise ValueError(f"a resumed run ended with {code}")
                return
            turn = len(stops)
            stop = self.stop(child, phases[turn % 4], signals[turn % len(signals)], dice)
            done = stop is None or stop["status"] == 0
            if stop is not None:
                stops.append(stop)
                self._check(folder, stop)
                done = done or apart(is_finished, folder)

    def _check(self, folder: Path, stop: dict[str, Any]) -> None:
        """Note a stop, and check how the run ended."""
        line = json.dumps({**stop, "folder": str(folder)}) + "\n"
        with (Path(self.options.out) / "stops.jsonl").open("a") as file:
            file.write(line)
        told = stop["signal"] == "TERM" and stop["at"] != "start" and stop["status"] != 0
        if told and stop["status"] == -signal.SIGTERM and apart(is_finished, folder):
            return  # all was written but the report, and nobody listens any more
        if told and stop["status"] != 143:
            raise ValueError(f"status {stop['status']} at SIGTERM: {stop}")
        is_quiet = stop.get("stopped") == "all" and stop["signal"] == "KILL"
        if "said" in stop and len(stop["said"]) != 1 and stop["status"] != 0 and not is_quiet:
            raise ValueError(f"not one sentence: {stop}")
        if told:
            kept = apart(edits_kept, folder)
            if kept < stop["edits"]:
                raise ValueError(f"{stop} left a checkpoint of {kept} edits")


def is_there(process: int) -> bool:
    """Whether a process runs: there, and no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def apart(work: Callable[..., Any], *given: Any) -> Any:
    """Return what some work on tensors finds: torch may not have worked where runs are forked."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(work, *given).result()


def edits_kept(folder: Path) -> int:
    """Return the number of edits in the newest checkpoint; -1 where there is none."""
    path = last_checkpoint([folder / "checkpoints"])
    return torch.load(path, weights_only=False)["editkit"]["edits_seen"] if path else -1


def is_finished(folder: Path) -> bool:
    """Whether a stop came too late: the run had written its last checkpoint."""
    path = last_checkpoint([folder / "checkpoints"])
    if path is None:
        return False
    return bool(torch.load(path, weights_only=False)["callbacks"]["RunFolder"]["finished"])


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


# the command line


def left_alone(method: str, options: argparse.Namespace) -> Found:
    """Make one method's run that is left alone."""
    return Runs(method, options, "straight", {}).alone()


def stopped(
    method: str, options: argparse.Namespace, longest: dict[str, float], turn: int, kills: int
) -> Found:
    """Stop runs of a method, in a folder of their own."""
    seed = options.seed * 1000 + turn
    return Runs(method, options, f"part{turn}", longest).soak(kills, seed)


def run_all(options: argparse.Namespace) -> dict[str, list[Found]]:
    """Run every method alone, then stop its runs, some at a time."""
    found: dict[str, list[Found]] = {}
    fork = get_context("fork")  # runs are forked from what is imported already
    with ProcessPoolExecutor(options.jobs, mp_context=fork) as pool:
        methods = options.methods.split(",")
        alone = {name: pool.submit(left_alone, name, options) for name in methods}
        parts: list[tuple[str, Any]] = []
        for name, waited in alone.items():
            found[name] = [waited.result()]
            if found[name][0].wrong:
                continue
            longest, starts = found[name][0].longest, range(0, options.kills, IN_A_CHAIN)
            for turn, start in enumerate(starts):
                kills = min(IN_A_CHAIN, options.kills - start)
                parts.append((name, pool.submit(stopped, name, options, longest, turn, kills)))
        for name, waited in parts:
            found[name].append(waited.result())
    return found


def told(found: dict[str, list[Found]]) -> Table:
    """Return the table of counts."""
    table = Table("method", "stops", "by signal", "while", "ends", "wrong", "CPU s a stop")
    for name, parts in found.items():
        stops = [stop for part in parts for stop in part.stops]
        by = [Counter(stop[key] for stop in stops) for key in ("signal", "at")]
        said = [", ".join(f"{n} {what}" for what, n in sorted(count.items())) for count in by]
        seconds = sum(part.seconds for part in parts[1:]) / max(1, len(stops))
        wrong, ends = (sum(map(n, parts)) for n in (lambda p: len(p.wrong), lambda p: p.ends))
        table.add_row(name, str(len(stops)), *said, str(ends), str(wrong), f"{seconds:.1f}")
    return table


def soak() -> int:
    """Stop runs of each method, and tell how often; return 1 where something was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=FAMILIES, help="files in experiments/method")
    parser.add_argument("--kills", type=int, default=4, help="stops per method")
    parser.add_argument("--signals", default="KILL", help="signals, taken in turn")
    parser.add_argument("--edits", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--devices", type=int, default=1, help="processes of each run (gloo)")
    parser.add_argument("--lm", default="factworld", help="model to edit")
    parser.add_argument("--data", default="", help="JSONL of edits; none takes fact-world's")
    parser.add_argument("--out", default="runs/soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", default="", help="further options of editkit fit, in quotes")
    options = parser.parse_args()
    options.out = str(Path(options.out).resolve())
    Path(options.out).mkdir(parents=True, exist_ok=True)
    (Path(options.out) / "stops.jsonl").unlink(missing_ok=True)
    sys.path.insert(0, str(ROOT))  # for `benchmarks.soak.Phases`
    sys.argv = ["editkit"]
    torch.set_num_threads(1)  # processes are forked, with all that is imported here
    for name in IMPORTED:
        import_module(name)
    console, begun = Console(), time.monotonic()
    found = run_all(options)
    console.print(told(found))
    wrong = [f"{name}: {text}" for name, parts in found.items() for p in parts for text in p.wrong]
    console.print(*wrong, sep="\n", highlight=False, soft_wrap=True)
    stops = sum(len(part.stops) for parts in found.values() for part in parts)
    if not wrong:
        console.print(f"{stops} stops; every end equal bit for bit")
    console.print(f"{time.monotonic() - begun:.0f} s with {options.jobs} at a time")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(soak())
