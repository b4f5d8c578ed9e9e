"""What MEMOIR's inner loop and its matching cost, and what they gain over the plain loop.

One run measures, on a random Llama of 12 blocks (layer 9 edited, fp32, CPU) and fact-world's edits:

- seconds an edit, one at a time and in batches, against the plain loop: all blocks and the head on
  all rows and tokens at every step, gradients of the whole memory, one edit at a time; and how far
  the two memories and their logits are apart;
- matching latency by the number of stored masks;
- what a memory in which nothing matches adds to a forward pass and to decoding;
- whether the packaged fact-world model routes its probes alike when their answers are forced, free,
  in batches and alone;
- the size of the artefact after 1,000 edits.

    python benchmarks/memoir.py                  # about 15 minutes on a quiet core
    python benchmarks/memoir.py --quick          # a smoke test
    python benchmarks/memoir.py --only matching --out memoir.json

Times are wall-clock; CPU seconds and the machine's load stand beside them, for a busy machine makes
wall-clock times worthless.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import torch
from bench import Seconds, console, edits_of, keep, machine, save_model, show, with_and_without
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from editkit.adapters.keys import Routing
from editkit.data.factworld import FactWorld
from editkit.edits import Edit
from editkit.functional.masks import best_match, pack, scattered
from editkit.lm.spec import LMSpec
from editkit.methods.artefact import save_edits
from editkit.methods.memoir import MEMOIR
from editkit.metrics.protocol import EvalProtocol

LAYER = 9
WIDTHS = {"this model": 1408, "Llama-3-8B": 14336}
SIZES = (1_000, 15_000, 100_000, 1_000_000)
BATCH = 10
SECTIONS = ("editing", "matching", "overhead", "routes", "size")


def start(model: str, steps: int) -> MEMOIR:
    """Return a fresh method with the paper's constants, without its early stop."""
    method = MEMOIR(
        lm=LMSpec(id=model), evaluation=EvalProtocol(), layer=LAYER, steps=steps, stop_below=0.0,
        routing=Routing(background=100, held_out=0),
    )  # fmt: skip
    method.start()
    return method


# editing


class PlainLoop:
    """MEMOIR's equations without any of the shortcuts, on the base model of a method.

    Args:
        method: Where the centre, the permutation and the prefixes come from.
        steps: SGD steps an edit.
    """

    def __init__(self, method: MEMOIR, steps: int) -> None:
        self.method = method
        self.model = method.lm.model
        self.site = method.memory.base_layer
        self.steps = steps
        self.memory_DF = torch.zeros(method.memory.shape_oi, requires_grad=True)

    def mask(self, prompt: str) -> Tensor:
        """Return the columns of a prompt, fp32 [F] of zeros and ones."""
        tokens = self.method.lm.encode([prompt])
        seen: list[Tensor] = []
        handle = self.site.register_forward_hook(lambda m, args, out: seen.append(args[0]))
        with torch.no_grad():
            self.model(input_ids=tokens.ids_BT)
        handle.remove()
        centred_F = seen[0][0].mean(0) - self.method.memory.mean_F
        chosen = self.method.memory.permutation_F[
            centred_F.abs().topk(self.method.memory.k).indices
        ]
        return torch.zeros_like(centred_F).index_fill(0, chosen, 1.0)

    def edit(self, edit: Edit) -> None:
        """Write one edit."""
        fronts = ["", *(f"{context} " for context in self.method.contexts or [])]
        prompts = [front + edit.prompt for front in fronts]
        tokens = self.method.lm.encode(prompts, [edit.target] * len(prompts))
        mask_F = self.mask(edit.prompt)
        optimizer = torch.optim.SGD([self.memory_DF], lr=self.method.lr)
        handle = self.site.register_forward_hook(
            lambda m, args, out: out + linear(args[0] * mask_F, self.memory_DF)
        )
        labels_BT = tokens.ids_BT.masked_fill(~tokens.target_BT, -100)[:, 1:]
        count_B = tokens.target_BT.sum(1)
        for _ in range(self.steps):
            logits_BTV = self.model(
                input_ids=tokens.ids_BT, attention_mask=tokens.mask_BT.long(), use_cache=False
            ).logits[:, :-1]
            nll = cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none")
            loss = (nll.view(labels_BT.shape).sum(1) / count_B).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([self.memory_DF], self.method.clip)
            optimizer.step()
        handle.remove()


def measure_editing(model: str, count: int, steps: int) -> dict[str, Any]:
    """Edit the same stream by the plain loop, one at a time, and in batches."""
    edits = edits_of(count)
    plain = PlainLoop(start(model, steps), steps)
    plain.method.memory.enabled = False
    with Seconds() as slow:
        for edit in edits:
            plain.edit(edit)
    one = start(model, steps)
    with Seconds() as fast:
        for edit in edits:
            one.apply_edits([edit])
    many = start(model, steps)
    with Seconds() as batched:
        for i in range(0, count, BATCH):
            many.apply_edits(edits[i : i + BATCH])
    memory_DF, wanted_DF = one.memory.memory.detach(), plain.memory_DF.detach()
    return {
        "edits": count, "steps": steps,
        "plain": {"wall": slow.wall / count, "cpu": slow.cpu / count},
        "one": {"wall": fast.wall / count, "cpu": fast.cpu / count},
        "batched": {"wall": batched.wall / count, "cpu": batched.cpu / count},
        "speedup, one at a time": {"wall": slow.wall / fast.wall, "cpu": slow.cpu / fast.cpu},
        f"speedup, batches of {BATCH}": {
            "wall": slow.wall / batched.wall, "cpu": slow.cpu / batched.cpu,
        },
        "relative difference of the memory": float(
            (memory_DF - wanted_DF).norm() / wanted_DF.norm()
        ),
        "relative difference of the answers": difference(one, wanted_DF, edits),
    }  # fmt: skip


@torch.no_grad()
def difference(method: MEMOIR, memory_DF: Tensor, edits: list[Edit]) -> float:
    """Return how far the logits of the edited prompts move with another memory in place."""
    tokens = method.lm.encode([edit.prompt for edit in edits])
    found_BTV = method.lm(tokens)
    method.memory.memory.copy_(memory_DF)
    method.memory.changed()
    wanted_BTV = method.lm(tokens)
    return float((found_BTV - wanted_BTV)[tokens.mask_BT].abs().max() / wanted_BTV.abs().max())


# matching


def measure_matching(sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """Time the best match of 1 and of 16 queries among random masks."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for name, width in WIDTHS.items():
        words = pack(torch.zeros(1, width, dtype=torch.bool)).shape[1]
        query_BW = pack(scattered(16, width, round(width * 2 / 7), generator))
        for size in sizes:
            key_KW = torch.empty(size, words, dtype=torch.long).random_(generator=generator)
            key_KW[size // 2] = query_BW[0]
            line: dict[str, Any] = {"width": name, "masks": size, "MB": key_KW.numel() * 8 / 1e6}
            for rows in (1, 16):
                line[f"ms, {rows} rows"] = 1e3 * median(
                    lambda part=query_BW[:rows], keys=key_KW: best_match(part, keys), repeats
                )
            assert int(best_match(query_BW[:1], key_KW)[0]) == size // 2
            lines.append(line)
            del key_KW
    return lines


def median(work: Callable[[], Any], repeats: int) -> float:
    """Return the median wall-clock seconds of some runs, after one to warm up."""
    work()
    found = []
    for _ in range(repeats):
        with Seconds() as took:
            work()
        found.append(took.wall)
    return statistics.median(found)


# a memory in which nothing matches


def fill(method: MEMOIR, count: int) -> None:
    """Store random masks and a random memory, as if so many edits had been made."""
    generator = torch.Generator().manual_seed(0)
    memory = method.memory
    masks_KW = pack(scattered(count, memory.shape_oi[1], memory.k, generator))
    memory.keys.add_slots(masks_KW, range(count), range(count))
    columns = torch.arange(memory.shape_oi[1])
    memory.write(columns, torch.randn(memory.shape_oi, generator=generator))
    memory.tau.fill_(1.0)


@torch.no_grad()
def measure_overhead(model: str, masks: int, repeats: int) -> list[dict[str, Any]]:
    """Time forward passes and decoding with and without the memory, in turns."""
    method = start(model, 1)
    fill(method, masks)
    lm, lines = method.lm, []
    texts = [edit.prompt for edit in edits_of(64)]
    for rows, words in ((1, 12), (8, 32), (64, 32)):
        prompts = [" ".join(" ".join(texts).split()[i : i + words]) for i in range(rows)]
        tokens = lm.encode(prompts)
        assert method.routes(prompts)
        assert not any(w.edit_id for w in method.routes(prompts))
        with lm.unedited():
            base_BTV = lm(tokens)
        assert torch.equal(lm(tokens), base_BTV), "a memory without a match changed something"
        lines.append({
            "what": f"pass of {rows} x {tokens.ids_BT.shape[1]} tokens",
            **with_and_without(lm, lambda tokens=tokens: lm(tokens), repeats),
        })  # fmt: skip
    decode = with_and_without(
        lm, lambda: lm.generate(texts[:8], max_new_tokens=16), max(1, repeats // 4)
    )
    lines.append({"what": "decoding 8 rows, 16 tokens", **decode})
    return lines


# routes, forced and free


@torch.no_grad()
def measure_routes(count: int) -> dict[str, Any]:
    """Edit the packaged fact-world; compare routes that are forced, free, in a batch and alone."""
    data = FactWorld(split="dev", limit=count)
    data.setup()
    method = MEMOIR(
        lm=LMSpec(), evaluation=EvalProtocol(), layer=5, prefixes=[],
        routing=Routing(fingerprint="last", false_positives=0.002),
    )  # fmt: skip
    method.start()
    for i in range(0, count, BATCH):
        method.apply_edits(data.edits[i : i + BATCH])
    lm, memory, seen = method.lm, method.memory, []
    route = memory.route
    memory.route = lambda *given: seen.append(route(*given).slot_B.tolist()) or route(*given)
    probes = [p for p in data.probes if p.target is not None and p.edit_id is not None]
    slots: dict[str, list[int]] = {"forced": [], "forced, left": [], "free": [], "alone": []}
    for i in range(0, len(probes), 64):
        part = probes[i : i + 64]
        prompts, targets = [p.prompt for p in part], [p.target or "" for p in part]
        lm(lm.encode(prompts, targets))
        slots["forced"] += seen[-1]
        lm(lm.encode(prompts, targets, padding="left"))
        slots["forced, left"] += seen[-1]
        calls = len(seen)
        lm.generate(prompts, max_new_tokens=8)
        assert len(seen) == calls + 1, "routed again while decoding"
        slots["free"] += seen[-1]
    for probe in probes:
        lm(lm.encode([probe.prompt]))
        slots["alone"] += seen[-1]
    first = slots["forced"]
    return {
        "edits": count, "probes": len(probes), "answered by an edit": sum(s >= 0 for s in first),
        **{
            f"routed as when forced: {name}": sum(map(int.__eq__, first, found)) / len(first)
            for name, found in slots.items() if name != "forced"
        },
    }  # fmt: skip


# size


def measure_size(model: str, masks: int) -> dict[str, Any]:
    """Save memories of two sizes; return the bytes of the whole and of each further edit."""
    sizes = {}
    for count in (1, masks):
        method = start(model, 1)
        fill(method, count)
        with tempfile.TemporaryDirectory() as folder:
            save_edits(Path(folder), method)
            sizes[count] = sum(f.stat().st_size for f in Path(folder).iterdir())
    width = {"D": 4096, "F": 14336}
    return {
        "edits": masks, "bytes": sizes[masks],
        "bytes a further edit": (sizes[masks] - sizes[1]) / (masks - 1),
        "memory alone": method.memory.memory.numel() * 4,
        "Llama-3-8B, bytes": width["D"] * width["F"] * 4 + masks * (width["F"] // 8 + 24),
    }  # fmt: skip


# the command line


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = bench.parser(__doc__)
    parser.add_argument("--edits", type=int, default=20, help="edits of the stream")
    parser.add_argument("--steps", type=int, default=30, help="SGD steps an edit")
    parser.add_argument("--repeats", type=int, default=30, help="runs of which a time is taken")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--only", choices=SECTIONS, nargs="+")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    args = parser.parse_args()
    if args.quick:
        args.edits, args.steps, args.repeats = 2, 3, 2
    return args


def main() -> None:
    """Run the sections asked for."""
    args = parse()
    torch.set_num_threads(args.threads)
    asked = args.only or SECTIONS
    report: dict[str, Any] = {"before": machine(args.threads)}
    masks = 100 if args.quick else 1_000
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder))
        if "editing" in asked:
            report["editing"] = measure_editing(model, args.edits, args.steps)
            console.print(report["editing"])
        if "matching" in asked:
            sizes = [s for s in SIZES if s <= (1_000 if args.quick else SIZES[-1])]
            report["matching"] = measure_matching(sizes, min(args.repeats, 10))
            show("best match among stored masks", report["matching"])
        if "overhead" in asked:
            report["overhead"] = measure_overhead(model, masks, args.repeats)
            show(f"{masks} masks, none of which matches", report["overhead"])
        if "routes" in asked:
            report["routes"] = measure_routes(20 if args.quick else 300)
            console.print(report["routes"])
        if "size" in asked:
            report["size"] = measure_size(model, masks)
            console.print(report["size"])
    report["after"] = machine(args.threads)
    console.print(report["before"], report["after"])
    keep(report, args.out)


if __name__ == "__main__":
    main()
