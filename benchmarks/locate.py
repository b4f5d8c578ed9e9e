"""What the batched engine of the locate-then-edit methods gains over the released way.

One run measures, over one batch of edits, the values z, the keys of every site and the residuals:

- the engine, and the same engine used the way the methods' released code works: one edit at a time,
  all blocks on whole rows at every pass, the head on every token, and for keys and residuals whole
  passes at every site (without the one more that is only printed);
- the released loop itself, written out (`compute_z`): besides, the head and the log probabilities
  are computed for every token a second time, as there;
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
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bench
import torch
from bench import MID_SIZE, Seconds, console, edits_of, keep, machine
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from editkit.adapters.delta import DeltaLayer
from editkit.edits import Edit
from editkit.lm.blocks import tap
from editkit.lm.editable import EditableLM
from editkit.lm.prefixes import make_prefixes, strip_braces
from editkit.lm.row_states import Shortcuts
from editkit.lm.shortcuts import PLAIN
from editkit.lm.sites import Site
from editkit.lm.spec import LMSpec
from editkit.lm.subject_rows import encode_edits
from editkit.methods.targets import SubjectRows
from editkit.methods.value_search import ValueSearch

LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LADDER = [  # each line switches one more thing on: batched, done edits leave
    ("one edit at a time", PLAIN, False, True),
    ("+ batching, edits that are done stay", PLAIN, True, False),
    ("+ they leave", PLAIN, True, True),
    ("+ blocks below once", replace(PLAIN, below=True), True, True),
    ("+ left of the subject once", Shortcuts(head=False, last=False), True, True),
    ("+ head where wanted", Shortcuts(last=False), True, True),
    ("+ last MLP where wanted", Shortcuts(), True, True),
]
ROWS_AT_ONCE = 128  # of the released code's passes for keys
FEW = 10  # edits whose FLOPs are counted


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


def load_texts(count: int) -> tuple[EditableLM, list[Edit], tuple[str, ...]]:
    """Return the fact-world model, edits of its world, and prefixes that it writes."""
    lm = EditableLM.load(LMSpec())
    return lm, edits_of(count), make_prefixes(lm, generator=torch.Generator().manual_seed(0))


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


def released(
    case: Case, values_of: Callable[[Edit], Tensor]
) -> tuple[dict[str, float], list[Tensor]]:
    """Measure the released way on the same batch; the same numbers come out.

    Args:
        case: Model and edits.
        values_of: How an edit's z [D, 1] is found.
    """
    values, keys = Seconds(), Seconds()
    with values:
        z_DE = torch.cat([values_of(edit) for edit in case.edits], dim=1)
    found = [z_DE]
    for left, site in zip(range(len(case.sites), 0, -1), case.sites, strict=True):
        with keys:
            found += [whole_keys(case, site), (z_DE - whole_states(case)) / left]
        write_something(case, site)
    for site in case.sites:
        write_something(case, site, undo=True)
    return _seconds(case, values, keys), found


def compute_z(case: Case, edit: Edit) -> Tensor:
    """Return an edit's z [D, 1] by the released loop (`compute_z.py` of MEMIT and its successors).

    Whole rows run through all blocks; the head sees every token in the model, and every token of
    the rows with a target again, under a log softmax of its own.
    """
    lm, search = case.lm, case.search
    model, block = lm.model, lm.blocks[case.sites[-1].layer]
    rows = encode_edits(lm, [edit], strip_braces(case.prefixes), "{} is a")[0].all
    ids_BT = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    mask_BT = pad_sequence([torch.ones(len(row.ids)) for row in rows], batch_first=True).long()
    targets_BT = torch.full_like(ids_BT[:-1], -100)
    for row, target_T in zip(rows, targets_BT, strict=False):
        target_T[torch.tensor(list(row.wanted))] = torch.tensor(row.targets)
    is_target_BT, at_B = targets_BT != -100, torch.tensor([row.place for row in rows])
    row_B, seen = torch.arange(len(rows)), {}
    delta_D = torch.zeros(lm.blocks[0].hidden_size, requires_grad=True)
    adam = torch.optim.Adam([delta_D], lr=search.lr)

    def shift(module: nn.Module, args: object, output_BTD: Tensor) -> Tensor:
        seen.setdefault("start", output_BTD[0, at_B[0]].detach().clone())
        return output_BTD.index_put((row_B, at_B), delta_D.expand(len(rows), -1), accumulate=True)

    def last(module: nn.Module, args: object, output_BTD: Tensor) -> None:
        seen["last"] = output_BTD

    hooks = [block.register_forward_hook(shift), lm.blocks[-1].register_forward_hook(last)]
    for step in range(search.steps):
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        now_V = logits_BTV[-1, at_B[-1]].log_softmax(-1)
        start_V = seen.setdefault("kl", now_V.detach())
        log_BTV = model.lm_head(model.model.norm(seen["last"][:-1])).log_softmax(-1)
        chosen_BT = log_BTV.gather(2, targets_BT.clamp_min(0)[..., None])[..., 0]
        nll = -((chosen_BT * is_target_BT).sum(1) / is_target_BT.sum(1)).mean()
        kl = search.kl * (now_V.exp() * (now_V - start_V)).sum()
        norm = seen["start"].norm()
        loss = nll + kl + search.weight_decay * delta_D.norm() / norm**2
        if float(loss.detach()) < search.stop_below or step == search.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta_D.mul_((search.clamp * norm / delta_D.norm()).clamp_max(1.0))
    for hook in hooks:
        hook.remove()
    return (seen["start"] + delta_D.detach())[:, None]


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
    """Return the largest relative difference over the reference's edits and kinds."""
    pairs = [(a[:, : b.shape[1]], b) for a, b in zip(found, reference, strict=True)]
    return max(float(((a - b).norm(dim=0) / b.norm(dim=0)).max()) for a, b in pairs)


def ladder(case: Case, count: int, micro_batch: int) -> list[dict[str, Any]]:
    """Switch the shortcuts on one after another and measure the search for values alone.

    Where edits that are done stay, all take the passes of the slowest, and values go on moving.
    """
    edits, lines, longest = case.edits[:count], [], case.search.steps
    reference: Tensor | None = None
    for name, shortcuts, is_batched, may_leave in LADDER:
        groups, search = [edits] if is_batched else [[edit] for edit in edits], case.search
        if not may_leave:
            search = replace(search, stop_below=-math.inf, steps=longest)
        took = Seconds()
        with took:
            found = [case.rows(g, shortcuts, micro_batch).find_values(search) for g in groups]
        z_DE = torch.cat([values.z_DE for values in found], dim=1)
        if reference is None:
            reference, longest = z_DE, max(int(values.passes_E.max()) for values in found)
        missed = distance([z_DE], [reference]) if may_leave else None
        lines.append(
            {"name": name, "wall": took.wall / count, "cpu": took.cpu / count, "z": missed}
        )
    return lines


def compare(case: Case, args: argparse.Namespace, few: int, mixed: bool) -> dict[str, Any]:
    """Measure the engine on all edits, the released ways on a few, and shortcut by shortcut.

    Args:
        case: Model and edits.
        args: Sizes.
        few: Edits for the released ways, which take them one at a time.
        mixed: Measure the engine in bf16-mixed, too.
    """
    engine(first(case, 2), args.micro_batch)  # warm up; finds out the shortcuts
    fast, found = engine(case, args.micro_batch)
    part = first(case, few)

    def one(edit: Edit) -> Tensor:
        return part.rows([edit], PLAIN, 1).find_values(part.search).z_DE

    slow, reference = released(part, one)
    loop, by_loop = released(part, lambda edit: compute_z(part, edit))
    result: dict[str, Any] = {
        "edits": len(case.edits), "released edits": few, "layers": case.lm.causal_layers,
        "engine": fast, "one at a time": slow, "released loop": loop,
        "speedup": {k: slow[k] / fast[k] for k in slow},
        "speedup over the loop": {k: loop[k] / fast[k] for k in loop},
        "distance": max(distance(found, reference), distance(found, by_loop)),
    }  # fmt: skip
    if mixed:
        with torch.autocast("cpu", torch.bfloat16):
            half, in_bf16 = engine(case, args.micro_batch)
        cosine = torch.nn.functional.cosine_similarity(in_bf16[0], found[0], dim=0)
        result["bf16-mixed"] = {
            "engine": half, "speedup": {k: slow[k] / half[k] for k in slow},
            "speedup over the loop": {k: loop[k] / half[k] for k in loop},
            "least cosine of z": float(cosine.min()),
            "FLOP/s of matmuls": [
                matmul_rate("cpu", dtype, 1024) for dtype in (torch.float32, torch.bfloat16)
            ],
        }  # fmt: skip
    result["ladder"] = ladder(case, min(args.ladder_edits, few), args.micro_batch)
    return result


def first(case: Case, count: int) -> Case:
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
    engine(first(case, 2), micro_batch)
    torch.cuda.reset_peak_memory_stats()
    seconds, _ = engine(case, micro_batch)
    found = {
        "device": torch.cuda.get_device_name(), "edits": count, "seconds": seconds,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
    }  # fmt: skip
    console.print(found)  # counting takes a while
    few = first(case, min(count, FEW))  # random weights: all edits take all passes
    # plain products: the counter does not know fused attention over shared heads
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        engine(few, micro_batch)
    flops = counter.get_total_flops() / len(few.edits)
    peak = matmul_rate("cuda", torch.bfloat16, 8192)
    rate = flops / seconds["wall"]
    return found | {"FLOP/s": rate, "FLOP/s of matmuls": peak, "share": rate / peak}


def matmul_rate(device: str, dtype: torch.dtype, size: int, repeats: int = 20) -> float:
    """Return the FLOP/s of large matrix products, which stands for a device's peak."""
    left = torch.randn(size, size, device=device, dtype=dtype)
    left @ left
    took = Seconds()
    with took:
        for _ in range(repeats):
            left @ left
    return 2 * size**3 * repeats / took.wall


def show(name: str, result: dict[str, Any]) -> None:
    """Print one case as tables."""
    title = f"{name}: {result['edits']} edits, layers {result['layers']}, ms an edit"
    few = result["released edits"]
    table = Table(title=title if few == result["edits"] else f"{title} (released: {few} edits)")
    heads = (
        "", "values", "keys, residuals", "both", "CPU", "against one at a time", "(CPU)",
        "against the loop", "(CPU)",
    )  # fmt: skip
    for column in heads:
        table.add_column(column, justify="left" if not column else "right")
    ways = [
        ("released loop", result["released loop"], None),
        ("engine, one edit at a time, nothing kept", result["one at a time"], None),
        ("engine", result["engine"], result),
    ]
    if "bf16-mixed" in result:
        half = result["bf16-mixed"]
        ways.append((f"bf16-mixed, cosine {half['least cosine of z']:.4f}", half["engine"], half))
    for label, seconds, gain in ways:
        cells = [f"{1e3 * seconds[k]:.1f}" for k in ("values_wall", "keys_wall", "wall", "cpu")]
        gains = [
            f"{gain[over][k]:.1f}" if gain else ""
            for over in ("speedup", "speedup over the loop")
            for k in ("wall", "cpu")
        ]
        table.add_row(label, *cells, *gains)
    console.print(
        table, f"largest relative difference of z, keys, residuals: {result['distance']:.1e}"
    )
    if "bf16-mixed" in result:
        fp32, bf16 = (rate / 1e9 for rate in result["bf16-mixed"]["FLOP/s of matmuls"])
        console.print(f"matrix products here: {fp32:.0f} GFLOP/s in fp32, {bf16:.0f} in bf16")
    steps = Table(title=f"{name}: shortcuts one after another, values only, ms an edit")
    for column in ("", "wall", "CPU", "times faster", "CPU saved of one at a time", "z differs"):
        steps.add_column(column, justify="left" if not column else "right")
    lines = result["ladder"]
    for before, line in zip([lines[0], *lines], lines, strict=False):
        saved = (before["cpu"] - line["cpu"]) / lines[0]["cpu"]
        steps.add_row(
            line["name"], f"{1e3 * line['wall']:.1f}", f"{1e3 * line['cpu']:.1f}",
            f"{lines[0]['wall'] / line['wall']:.1f}", f"{saved:.0%}",
            "-" if line["z"] is None else f"{line['z']:.0e}",
        )  # fmt: skip
    console.print(steps)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = bench.parser(__doc__)
    parser.add_argument("--edits", type=int, default=100, help="edits of the batch")
    parser.add_argument("--steps", type=int, default=25, help="most forward passes an edit")
    parser.add_argument("--micro-batch", type=int, default=50, help="edits that run together")
    parser.add_argument(
        "--ladder-edits", type=int, default=20, help="edits for the shortcuts' shares"
    )
    parser.add_argument(
        "--released-edits", type=int, default=16,
        help="edits for the released ways on the mid-size model, where all take the same passes",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--only", choices=["factworld", "mid-size", "memory", "cuda"], nargs="+")
    parser.add_argument("--quick", action="store_true", help="a smoke test on 3 edits")
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
    report: dict[str, Any] = {"bf16 on the CPU": has_bf16(), "before": machine(args.threads)}
    for name in ("factworld", "mid-size"):
        if name in asked:
            mixed = name == "mid-size" and has_bf16()
            few = args.edits if name == "factworld" else min(args.released_edits, args.edits)
            report[name] = compare(make_case(name, args.edits, args.steps), args, few, mixed)
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
    keep(report, args.out)


if __name__ == "__main__":
    main()
