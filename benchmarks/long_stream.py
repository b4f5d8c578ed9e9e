"""Whether a long stream takes time linear in its length, and memory that stays flat.

Edits a CounterFact file in its order, in batches of 100, through `editkit.load` and `edit_batch`,
with LyapLock and with MEMIT, one after the other on a fresh model. Prints along the stream the
seconds, the passes of the search for values, the memory of the process and the size of the state
that a method declares (edit layers, stream state, ledger); then how the cost of the search and of
all the rest moves from the first to the last part of the stream.

    EDITKIT_SHARED=../shared python benchmarks/long_stream.py       # 10,000 edits
    python benchmarks/long_stream.py --edits 400 --methods lyaplock # a smoke test

Needs `data/counterfact/counterfact-edit.json`, `data/text/wiki_demo.txt` and the model in
`data/models/stories260K/hf` below EDITKIT_SHARED, or the paths given; where one is missing it says
so and measures nothing. What is measured is the cost of a stream: a model of 260,000 weights knows
no facts. Seconds are of the CPU (user and system), for a busy machine makes wall-clock times
worthless; those stand beside them in the file written by `--out`.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import bench
import torch
from bench import console, keep
from rich.progress import track
from rich.table import Table

import editkit
from editkit.api import EditedLM
from editkit.data.counterfact import CounterFact
from editkit.methods.value_search import ValueSearch

SHARED = Path(os.environ.get("EDITKIT_SHARED", Path(__file__).parents[2] / "shared"))
LAYERS = [1, 2]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "memit": {"ridge": 15000.0},
    "memit_seq": {"ridge": 15000.0},
}


@dataclass
class Stretch:
    """What a stretch of the stream took.

    Args:
        edits: Edits made by its end.
        cpu: CPU seconds.
        wall: Wall-clock seconds.
        passes: Forward passes of the search, mean over its edits.
        rss: Memory of the process at its end, MiB.
        state: Declared state at its end, MiB.
        loss_after: Target NLL right after an edit, nats per token, mean over its edits.
    """

    edits: int
    cpu: float
    wall: float
    passes: float
    rss: float
    state: float
    loss_after: float


def tensors_of(value: object) -> Iterator[torch.Tensor]:
    """Walk through records, dicts and sequences down to the tensors."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors_of(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_of(entry)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


def declared(edited: EditedLM) -> float:
    """Return the MiB of what a method says it keeps: its layers, stream state and ledger."""
    layers = [layer.edit_state() for layer in edited.lm.layers.values()]
    tensors = tensors_of([layers, edited.method.stream_state()])
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    ledger = sum(sys.getsizeof(e) + sum(map(sys.getsizeof, e.values())) for e in edited.ledger)
    return (sum(held.values()) + ledger) / 2**20


def resident() -> float:
    """Return the MiB of memory that the process holds."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def stream(method: str, args: argparse.Namespace, cache: str) -> list[Stretch]:
    """Edit the whole stream with a method and measure stretch by stretch."""
    data = CounterFact(
        path=str(args.data), limit=args.edits, on_bad_row="skip", contradictions="ask"
    )
    data.setup()
    edits = list(data.edits)
    edited = editkit.load(
        str(args.model), method, layers=LAYERS, corpus=str(args.corpus), corpus_texts=2000,
        cache=cache, search=ValueSearch(steps=args.steps), **ARGUMENTS.get(method, {}),
    )  # fmt: skip
    edited.method.start()
    found, size = [], max(args.edits // 20, args.batch)
    passes = loss = 0.0
    began = time.process_time(), time.perf_counter()
    for start in track(range(0, len(edits), args.batch), f"{method}, {len(edits)} edits"):
        batch = edits[start : start + args.batch]
        numbers = edited.edit_batch(batch)
        passes += numbers["value_passes"] * len(batch)
        loss += numbers["loss_after"] * len(batch)
        seen = start + len(batch)
        last = found[-1].edits if found else 0
        if seen - last >= size or seen == len(edits):
            cpu, wall = time.process_time() - began[0], time.perf_counter() - began[1]
            count = seen - last
            means = passes / count, loss / count
            found.append(Stretch(seen, cpu, wall, means[0], resident(), declared(edited), means[1]))
            passes = loss = 0.0
            began = time.process_time(), time.perf_counter()
    return found


def fit(found: list[Stretch]) -> dict[str, float]:
    """Return how seconds an edit move along the stream, by least squares.

    `slope` is their relative change from the first edit to the last of a straight line through
    them. Edits differ in the passes that their search takes, so `slope at equal passes` comes from
    a plane through passes and position. `power` is the exponent of cumulative seconds in the
    number of edits; a linear stream has 1.
    """
    counts = [b.edits - a for a, b in zip([0, *[s.edits for s in found]], found, strict=False)]
    cost_S = torch.tensor([s.cpu / n for s, n in zip(found, counts, strict=True)]).double()
    at_S = torch.tensor([s.edits for s in found]).double() / found[-1].edits
    passes_S = torch.tensor([s.passes for s in found]).double()
    ones_S = torch.ones_like(at_S)
    total_S = torch.tensor([s.cpu for s in found]).double().cumsum(0)

    def solve(columns: list[torch.Tensor], target_S: torch.Tensor) -> torch.Tensor:
        return torch.linalg.lstsq(torch.stack(columns, 1), target_S[:, None]).solution[:, 0]

    mean = float(cost_S.mean())
    return {
        "ms an edit": 1e3 * mean,
        "slope": float(solve([at_S, ones_S], cost_S)[0]) / mean,
        "slope at equal passes": float(solve([at_S, ones_S, passes_S], cost_S)[0]) / mean,
        "power": float(solve([at_S.log(), ones_S], total_S.log())[0]),
    }


def show(method: str, found: list[Stretch]) -> None:
    """Print one stream."""
    table = Table(title=f"{method}: {found[-1].edits} edits")
    heads = ("edits", "CPU s per 1,000", "passes", "NLL after", "RSS MiB", "declared state MiB")
    for head in heads:
        table.add_column(head, justify="right")
    before = 0
    for s in found:
        per = 1000 * s.cpu / (s.edits - before)
        table.add_row(
            f"{s.edits}", f"{per:.1f}", f"{s.passes:.1f}", f"{s.loss_after:.2f}",
            f"{s.rss:.0f}", f"{s.state:.1f}",
        )  # fmt: skip
        before = s.edits
    console.print(table, {name: round(value, 3) for name, value in fit(found).items()})
    grown, kept = found[-1].rss - found[0].rss, found[-1].state - found[0].state
    console.print(f"memory grew by {grown:.0f} MiB, of which {kept:.1f} MiB declared state")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = bench.parser(__doc__)
    parser.add_argument("--edits", type=int, default=10_000, help="edits of the stream")
    parser.add_argument("--batch", type=int, default=100, help="edits of a batch")
    parser.add_argument("--steps", type=int, default=25, help="most passes of the search an edit")
    parser.add_argument("--methods", nargs="+", default=["lyaplock", "memit"])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    data = SHARED / "data"
    for name, path in {
        "data": data / "counterfact" / "counterfact-edit.json",
        "corpus": data / "text" / "wiki_demo.txt",
        "model": data / "models" / "stories260K" / "hf",
    }.items():
        parser.add_argument(f"--{name}", type=Path, default=path, help=f"default {path}")
    return parser.parse_args()


def main() -> None:
    """Edit the streams, or say what is missing."""
    args = parse()
    missing = [str(p) for p in (args.data, args.corpus, args.model) if not p.exists()]
    if missing:
        console.print("nothing measured, missing:", *missing, "(set EDITKIT_SHARED)")
        return
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # the file contradicts itself, as its card says
    logging.getLogger("editkit").setLevel(logging.ERROR)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        for method in args.methods:
            found = stream(method, args, cache)
            show(method, found)
            report[method] = {"stretches": [asdict(s) for s in found], "fit": fit(found)}
            keep(report, args.out)


if __name__ == "__main__":
    main()
