"""What a run will take, told before a weight is loaded: memory, disk, and time per edit.

The model is built without numbers (on torch's meta device) from its config, and the method wraps
its sites there, so that shapes are those of the run. The rest is arithmetic on them: what an edit
holds, what scoring holds, and what a process takes that has imported all this. Times come from one
matrix product on the device and are rough; memory is meant to be right within a quarter.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from editkit.data.base import EditDataModule
from editkit.lm.editable import EditableLM
from editkit.lm.load import load_blank, resolve_dtype
from editkit.methods.base import EditModule
from editkit.methods.memory import LENGTHS
from editkit.metrics.ask import LOGITS_HELD
from editkit.workload import Widths, widths_of, work_of

GIB = 2**30
SAMPLE = 64  # edits whose texts are encoded
ROW = 700  # bytes of a line of probes.jsonl
CONTEXT = 500 * 2**20  # what CUDA takes for itself
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Args:
        parts: Peak memory in bytes, by what it is for.
        room: Bytes that there are.
        disk: Bytes on disk, by what they are for.
        seconds: Of one edit, roughly.
        advice: Setting to change, by part.
    """

    parts: dict[str, int]
    room: int
    disk: dict[str, int]
    seconds: float
    advice: dict[str, str]

    @property
    def peak(self) -> int:
        """Peak memory in bytes."""
        return sum(self.parts.values())

    @property
    def verdict(self) -> str:
        """Whether it fits, and if not what to change."""
        if self.peak <= self.room:
            return f"fits: {self.peak / GIB:.2f} of {self.room / GIB:.2f} GiB"
        part = max(self.advice, key=lambda name: self.parts.get(name, 0))
        return (
            f"will not fit: {self.peak / GIB:.2f} GiB are needed and there are "
            f"{self.room / GIB:.2f}; most goes to {part}, so {self.advice[part]}"
        )


def forecast(method: EditModule, data: EditDataModule, trainer: Trainer) -> Forecast:
    """Predict a run from its parts, before anything is loaded.

    Args:
        method: A method as the command line builds it, without weights.
        data: Its stream; rows are read.
        trainer: Its Trainer, for device and precision.

    Raises:
        ValueError: If rows, model or method are wrong, as the run itself would say.
    """
    data.setup("fit")
    device, base = trainer.strategy.root_device, DTYPES.get(str(trainer.precision), torch.float32)
    dtype = resolve_dtype(method.spec.dtype, base)
    model, tokenizer = load_blank(method.spec, dtype)
    method.lm = EditableLM(model, tokenizer, method.spec)
    weights = sum(w.numel() * w.element_size() for w in model.parameters())
    method.attach()
    lm, together = method.lm, min(data.edits_per_step, len(data.edits))
    work = work_of(method, together, len(data.edits))
    wide = widths_of(lm, dtype)
    rows = data.edits[:SAMPLE]
    heads, tails = lm.policy.pieces([e.prompt for e in rows], [e.target for e in rows])
    target = sum(map(len, tails)) / len(tails)
    length = sum(map(len, heads)) / len(heads) + target
    if work.rows > together:  # behind prefixes
        length += sum(LENGTHS) / 2
    adapter = sum(
        t.numel() * t.element_size() for la in lm.layers.values() for t in la.edit_state().values()
    )
    editing = work.step + int(
        work.rows * (length * wide.held_above(work.above) + target * wide.logits)
    )
    asked = min(method.evaluation.batch_size, max(1, len(data.probes)))
    places = min(LOGITS_HELD // wide.vocabulary + 1, asked * (target + 1))
    scoring = int(
        asked * (length + method.evaluation.max_new_tokens) * wide.asked + places * wide.logits
    )
    process = CONTEXT if device.type == "cuda" else _resident()
    parts = {"the process itself": process, "the base model": weights, "the edits": adapter}
    parts |= work.held
    busy = "making edits" if editing >= scoring else "scoring"
    parts[busy] = max(editing, scoring)
    flops = work.passes * 6 * work.rows * length * wide.parameters_above(work.above) + work.solves
    checkpoints = 2 * (adapter + work.saved + (sum(work.held.values()) - work.saved) // 2)
    disk = {"adapter": adapter + work.saved, "checkpoints": checkpoints}
    disk["kept in the cache"] = work.kept
    disk["probes"] = ROW * len(data.probes) * (2 + len(str(len(data.edits))))
    advice = {
        "the base model": "set --model.lm.dtype bfloat16, or take a smaller model",
        "making edits": work.setting if " " in work.setting else f"lower {work.setting}",
        "scoring": "lower --model.evaluation.batch_size",
    }
    advice |= dict.fromkeys(work.held, work.setting)
    seconds = flops / _speed(wide, dtype, device) / together
    return Forecast(parts, _room(device), disk, seconds, advice)


def _resident() -> int:
    """Return what this process, which has imported what a run imports, takes by now."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _room(device: torch.device) -> int:
    """Return the memory that there is for a run."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 + _resident()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _speed(wide: Widths, dtype: torch.dtype, device: torch.device) -> float:
    """Return floating-point operations a second, by one product of a model's shape."""
    left = torch.ones(256, wide.hidden, dtype=dtype, device=device)
    right = torch.ones(wide.hidden, min(wide.inner, 4096), dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        out: Any = left @ right
        float(out[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * left.shape[0] * right.numel() / best


def told(found: Forecast) -> str:
    """Return a forecast as text."""
    lines = [f"{size / GIB:8.2f} GiB  {name}" for name, size in found.parts.items()]
    lines += [f"{found.peak / GIB:8.2f} GiB  at most in memory"]
    lines += [
        f"{size / GIB:8.2f} GiB  on disk: {name}" for name, size in found.disk.items() if size
    ]
    lines += [f"about {found.seconds:.3g} s per edit, without scoring", found.verdict]
    return "\n".join(lines)
