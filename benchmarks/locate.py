"""What the batched engine of the locate-then-edit methods gains over the released way.

One run measures, over one batch of edits, the values z, the keys of every site and the residuals:

- the engine, and the same engine used the way the methods' released code works: one edit at a time,
  all blocks on whole rows at every pass, the head on every token, and for keys and residuals whole
  passes at every site;
- the share of each shortcut, switched on one after another (values z only);
- peak memory by micro-batch;
- with CUDA, the shape of Llama-3-8B in bf16 with random weights.

    python benchmarks/locate.py                  # about 20 minutes on two quiet cores
    python benchmarks/locate.py --quick          # a smoke test
    python benchmarks/locate.py --only factworld --out locate.json

Times are wall-clock; CPU seconds and the machine's load stand beside them, for a busy machine makes
wall-clock times worthless.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from editkit.adapters.delta import DeltaLayer
from editkit.data.factworld import FactWorld
from editkit.edits import Edit
from editkit.lm.blocks import tap
from editkit.lm.editable import EditableLM
from editkit.lm.prefixes import make_prefixes
from editkit.lm.row_states import Shortcuts
from editkit.lm.shortcuts import PLAIN
from editkit.lm.sites import Site
from editkit.lm.spec import LMSpec
from editkit.methods.targets import SubjectRows
from editkit.methods.value_search import ValueSearch

MID_SIZE = {
    "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LADDER = [  # released way first; each line switches one more thing on
    ("released way", PLAIN, False),
    ("+ batching", replace(PLAIN, leave=False), True),
    ("+ blocks below once", replace(PLAIN, leave=False, below=True), True),
    ("+ left of the subject once", Shortcuts(head=False, last=False, leave=False), True),
    ("+ head where wanted", Shortcuts(last=False, leave=False), True),
    ("+ last MLP where wanted", Shortcuts(leave=False), True),
    ("+ finished rows leave", Shortcuts(), True),
]
ROWS_AT_ONCE = 128  # of the released code's passes for keys
console = Console()


@dataclass
class Case:
    """A model with edits: sites, constants and prefixes included."""

    name: str
    lm: EditableLM
    edits: list[Edit]
    prefixes: tuple[str, ...]
    search: ValueSearch

    @property
    def sites(self) -> list[Site]:
        """Sites of the causal layers, ascending; the value is that of the last one's block."""
        return [self.lm.site(layer) for layer in self.lm.causal_layers]

    def rows(self, edits: list[Edit], shortcuts: Shortcuts | None, micro_batch: int) -> SubjectRows:
        """Run a batch up to its values."""
        return SubjectRows(
            self.lm, edits, self.prefixes, self.sites, self.sites[-1].layer,
            micro_batch=micro_batch, shortcuts=shortcuts,
        )  # fmt: skip


@dataclass
class Seconds:
    """Wall-clock and CPU seconds of a stretch of work."""

    wall: float = 0.0
    cpu: float = 0.0

    def __enter__(self) -> Seconds:
        _wait()
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        _wait()
        self.wall += time.perf_counter() - self._start[0]
        self.cpu += time.process_time() - self._start[1]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def load_texts(count: int) -> tuple[EditableLM, list[Edit], tuple[str, ...]]:
    """Return the fact-world model, edits of its world, and prefixes that it writes."""
    lm = EditableLM.load(LMSpec())
    data = FactWorld(limit=count)
    data.setup()
    return lm, list(data.edits), make_prefixes(lm, generator=torch.Generator().manual_seed(0))


def random_llama(shape: dict[str, Any], tokenizer: Any, device: str, dtype: torch.dtype) -> Any:
    """Return a Llama of a shape with random weights, edited at layers 3-7 (4-8 at 32 blocks)."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**shape))
    finally:
        torch.set_default_dtype(before)
    layers = [3, 4, 5, 6, 7] if shape["num_hidden_layers"] == 12 else [4, 5, 6, 7, 8]
    return EditableLM(model, tokenizer, LMSpec(id="random Llama", causal_layers=layers))


def attach(lm: EditableLM) -> None:
    """Wrap the sites of the causal layers."""
    for layer in lm.causal_layers:
        lm.attach(lm.site(layer).path, DeltaLayer)


def write_something(case: Case, site: Site, undo: bool = False) -> None:
    """Write a small fixed change, so that what lies above a site has to run again."""
    layer = case.lm.layers[site.path]
    assert isinstance(layer, DeltaLayer)
    if undo:
        layer.delta.data.zero_()
        layer.is_written = False
        layer.changed()
    else:
        generator = torch.Generator().manual_seed(site.layer)
        change = torch.randn(layer.shape_oi, generator=generator) * 1e-3
        layer.add(change.to(layer.delta))


def engine(case: Case, micro_batch: int) -> tuple[dict[str, float], list[Tensor]]:
    """Measure the engine on the whole batch; return seconds, and values, keys and residuals."""
    values, keys = Seconds(), Seconds()
    with values:
        rows = case.rows(case.edits, None, micro_batch)
        z_DE = rows.find_values(case.search).z_DE
    found = [z_DE]
    for left, site in zip(range(len(case.sites), 0, -1), case.sites, strict=True):
        with keys:
            found += [rows.keys(site), (z_DE - rows.states()) / left]
        write_something(case, site)
    for site in case.sites:
        write_something(case, site, undo=True)
    return _seconds(case, values, keys), found


def released(case: Case) -> tuple[dict[str, float], list[Tensor]]:
    """Measure the released way on the same batch; the same numbers come out."""
    values, keys = Seconds(), Seconds()
    with values:
        z_DE = torch.cat(
            [
                case.rows([edit], PLAIN, 1).find_values(case.search).z_DE
                for edit in case.edits
            ],
            dim=1,
        )  # fmt: skip
    found = [z_DE]
    for left, site in zip(range(len(case.sites), 0, -1), case.sites, strict=True):
        with keys:
            found += [whole_keys(case, site), (z_DE - whole_states(case)) / left]
        write_something(case, site)
    for site in case.sites:
        write_something(case, site, undo=True)
    return _seconds(case, values, keys), found


def _seconds(case: Case, values: Seconds, keys: Seconds) -> dict[str, float]:
    count = len(case.edits)
    return {
        "values_wall": values.wall / count, "values_cpu": values.cpu / count,
        "keys_wall": keys.wall / count, "keys_cpu": keys.cpu / count,
        "wall": (values.wall + keys.wall) / count, "cpu": (values.cpu + keys.cpu) / count,
    }  # fmt: skip


@torch.no_grad()
def at_subject(case: Case, prefixes: Sequence[str], path: str, inputs: bool) -> Tensor:
    """Return what a module takes or gives at the subjects, [E, contexts, .], by whole passes."""
    texts = [prefix + edit.prompt for edit in case.edits for prefix in prefixes]
    subjects = [str(edit.subject) for edit in case.edits for _ in prefixes]
    found = []
    for start in range(0, len(texts), ROWS_AT_ONCE):
        here = slice(start, start + ROWS_AT_ONCE)
        tokens = case.lm.encode(texts[here], subjects=subjects[here])
        with tap(case.lm.model.get_submodule(path), inputs) as seen:
            case.lm(tokens)
        found.append(seen[0][torch.arange(len(tokens.subject_B)), tokens.subject_B].float())
    return torch.cat(found).unflatten(0, (-1, len(prefixes)))


def whole_keys(case: Case, site: Site) -> Tensor:
    """Return a site's keys [F, E], each weighted 1/2 bare and 1/2 behind prefixes."""
    keys_ECF = at_subject(case, ["", *case.prefixes], site.path, inputs=True)
    return ((keys_ECF[:, 0] + keys_ECF[:, 1:].mean(1)) / 2).T


def whole_states(case: Case) -> Tensor:
    """Return the bare prompts' values [D, E]."""
    path = case.sites[-1].path.split(f".{case.sites[-1].layer}.")[0]
    return at_subject(case, [""], f"{path}.{case.sites[-1].layer}", inputs=False)[:, 0].T


def distance(found: list[Tensor], reference: list[Tensor]) -> float:
    """Return the largest relative difference over edits and kinds."""
    pairs = zip(found, reference, strict=True)
    return max(float(((a - b).norm(dim=0) / b.norm(dim=0)).max()) for a, b in pairs)


def ladder(case: Case, count: int, micro_batch: int) -> list[dict[str, Any]]:
    """Switch the shortcuts on one after another and measure the search for values alone."""
    edits, lines = case.edits[:count], []
    reference: Tensor | None = None
    for name, shortcuts, is_batched in LADDER:
        groups = [edits] if is_batched else [[edit] for edit in edits]
        took = Seconds()
        with took:
            parts = [
                case.rows(group, shortcuts, micro_batch).find_values(case.search).z_DE
                for group in groups
            ]
        z_DE = torch.cat(parts, dim=1)
        reference = z_DE if reference is None else reference
        missed = distance([z_DE], [reference])
        lines.append(
            {"name": name, "wall": took.wall / count, "cpu": took.cpu / count, "z": missed}
        )
    return lines


def compare(case: Case, args: argparse.Namespace, mixed: bool) -> dict[str, Any]:
    """Measure engine and released way on one case, and the engine in bf16-mixed if asked for."""
    engine(replace_edits(case, 2), args.micro_batch)  # warm up; finds out the shortcuts
    fast, found = engine(case, args.micro_batch)
    slow, reference = released(case)
    result: dict[str, Any] = {
        "edits": len(case.edits), "layers": case.lm.causal_layers, "engine": fast,
        "released": slow, "speedup": {k: slow[k] / fast[k] for k in slow},
        "distance": distance(found, reference),
    }  # fmt: skip
    if mixed:
        with torch.autocast("cpu", torch.bfloat16):
            half, in_bf16 = engine(case, args.micro_batch)
        cosine = torch.nn.functional.cosine_similarity(in_bf16[0], reference[0], dim=0)
        result["bf16-mixed"] = {
            "engine": half, "speedup": {k: slow[k] / half[k] for k in slow},
            "least cosine of z": float(cosine.min()),
        }  # fmt: skip
    count = min(args.ladder_edits, len(case.edits))
    result["ladder"] = ladder(case, count, args.micro_batch)
    return result


def replace_edits(case: Case, count: int) -> Case:
    """Return the case with its first edits only."""
    return replace(case, edits=case.edits[:count])


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def make_case(name: str, count: int, steps: int = 25) -> Case:
    """Build a case by name: `factworld`, or `mid-size`, the random Llama of 12 blocks."""
    lm, edits, prefixes = load_texts(count)
    if name == "mid-size":
        lm = random_llama(MID_SIZE, lm.tokenizer, "cpu", torch.float32)
    attach(lm)
    return Case(name, lm, edits, prefixes, ValueSearch(steps=steps))


def memory_of(name: str, count: int, micro_batch: int) -> float:
    """Return the MiB by which a search raises the peak memory of a fresh process."""
    command = [sys.executable, __file__, "--peak", name, str(count), str(micro_batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def print_peak(name: str, count: int, micro_batch: int) -> None:
    """Search for two steps and print the MiB that it took beyond model and texts."""
    case = make_case(name, count)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of loading
    before = peak_memory()
    case.rows(case.edits, Shortcuts(), micro_batch).find_values(ValueSearch(steps=2))
    sys.stdout.write(f"{peak_memory() - before}\n")


def peak_memory() -> float:
    """Return the most MiB that this process has held since the peak was last cleared."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure_cuda(count: int, micro_batch: int) -> dict[str, Any]:
    """Measure the shape of Llama-3-8B in bf16 on the GPU, and its share of what matmuls reach."""
    from torch.utils.flop_counter import FlopCounterMode

    small, edits, prefixes = load_texts(count)
    lm = random_llama(LLAMA_3_8B, small.tokenizer, "cuda", torch.bfloat16)
    attach(lm)
    case = Case("Llama-3-8B shape", lm, edits, prefixes, ValueSearch(lr=0.1))
    engine(replace_edits(case, 2), micro_batch)
    torch.cuda.reset_peak_memory_stats()
    seconds, _ = engine(case, micro_batch)
    with FlopCounterMode(display=False) as counter:
        engine(case, micro_batch)
    peak, rate = matmul_rate(), counter.get_total_flops() / (seconds["wall"] * count)
    return {
        "device": torch.cuda.get_device_name(), "edits": count, "seconds": seconds,
        "FLOP/s": rate, "FLOP/s of matmuls": peak, "share": rate / peak,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
    }  # fmt: skip


def matmul_rate(size: int = 8192, repeats: int = 20) -> float:
    """Return the FLOP/s of large bf16 matrix products on the GPU, which stands for its peak."""
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    left @ left
    took = Seconds()
    with took:
        for _ in range(repeats):
            left @ left
    return 2 * size**3 * repeats / took.wall


def show(name: str, result: dict[str, Any]) -> None:
    """Print one case as tables."""
    table = Table(title=f"{name}: {result['edits']} edits, layers {result['layers']}, ms an edit")
    for column in ("", "values", "keys, residuals", "both", "CPU", "times faster", "(CPU)"):
        table.add_column(column, justify="left" if not column else "right")
    ways = [("released way", result["released"], None), ("engine", result["engine"], result)]
    if "bf16-mixed" in result:
        half = result["bf16-mixed"]
        ways.append((f"bf16-mixed, cosine {half['least cosine of z']:.4f}", half["engine"], half))
    for label, seconds, gain in ways:
        cells = [f"{1e3 * seconds[k]:.1f}" for k in ("values_wall", "keys_wall", "wall", "cpu")]
        gains = [f"{gain['speedup'][k]:.1f}" if gain else "1" for k in ("wall", "cpu")]
        table.add_row(label, *cells, *gains)
    console.print(
        table, f"largest relative difference of z, keys, residuals: {result['distance']:.1e}"
    )
    steps = Table(title=f"{name}: shortcuts one after another, values only, ms an edit")
    for column in ("", "wall", "CPU", "times faster", "CPU saved of the released way", "z differs"):
        steps.add_column(column, justify="left" if not column else "right")
    lines = result["ladder"]
    for before, line in zip([lines[0], *lines], lines, strict=False):
        saved = (before["cpu"] - line["cpu"]) / lines[0]["cpu"]
        steps.add_row(
            line["name"], f"{1e3 * line['wall']:.1f}", f"{1e3 * line['cpu']:.1f}",
            f"{lines[0]['wall'] / line['wall']:.1f}", f"{saved:.0%}", f"{line['z']:.0e}",
        )  # fmt: skip
    console.print(steps)


def machine(threads: int) -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "threads": threads, "load": os.getloadavg(),
        "bf16 on the CPU": has_bf16(),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edits", type=int, default=100, help="edits of the batch")
    parser.add_argument("--steps", type=int, default=25, help="most forward passes an edit")
    parser.add_argument("--micro-batch", type=int, default=50, help="edits that run together")
    parser.add_argument(
        "--ladder-edits", type=int, default=20, help="edits for the shortcuts' shares"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--only", choices=["factworld", "mid-size", "memory", "cuda"], nargs="+")
    parser.add_argument("--quick", action="store_true", help="a smoke test on 3 edits")
    parser.add_argument("--out", type=Path, help="write all figures here as JSON")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.edits, args.ladder_edits, args.steps = 3, 2, 4
    return args


def main() -> None:
    """Run the sections asked for."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.peak:
        print_peak(args.peak[0], int(args.peak[1]), int(args.peak[2]))
        return
    asked = args.only or ["factworld", "mid-size", "memory", "cuda"]
    report: dict[str, Any] = {"before": machine(args.threads)}
    for name in ("factworld", "mid-size"):
        if name in asked:
            mixed = name == "mid-size" and has_bf16()
            report[name] = compare(make_case(name, args.edits, args.steps), args, mixed)
            show(name, report[name])
    if "memory" in asked and Path("/proc/self/clear_refs").exists():
        sizes = [1, 2] if args.quick else [10, 25, 50]
        count = max(args.edits, sizes[-1])
        report["peak MiB"] = {n: memory_of("mid-size", count, n) for n in sizes}
        console.print(
            f"peak memory of a search over {count} edits by micro-batch, MiB:", report["peak MiB"]
        )
    if "cuda" in asked and torch.cuda.is_available():
        report["cuda"] = measure_cuda(args.edits, args.micro_batch)
        console.print(report["cuda"])
    elif "cuda" in asked:
        console.print("no CUDA device: the Llama-3-8B shape is left out")
    report["after"] = machine(args.threads)
    console.print(report["before"], report["after"])
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
