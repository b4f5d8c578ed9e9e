"""What an edited model costs to serve: batches of mixed rows against the plain base model.

Half of a batch's rows are prompts of edits, which go to as many memories as there are, the other
half belongs to no edit. One run times, in turns and for each batch size, the base model's own
`generate` (transformers, no edit layer in sight) and every routed method's on the same rows, with
its edits and without; and changes of weights at the causal layers, in place and exported. Texts go
in and come out; every row decodes the same number of tokens. Then each row is asked alone, and its
answer must be the one it got in the batch: where one is not, the exit code is 1.

    python benchmarks/serve.py                # both models, some minutes on a quiet core
    python benchmarks/serve.py --quick        # a smoke test

Of the repeats the quickest counts, in CPU seconds (wall-clock on one thread of a quiet machine).
`base / this` is the ratio of tokens per second: above 1, serving the edits costs that much more.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import bench
import torch
from bench import keep, save_model, show
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from editkit.adapters.delta import DeltaLayer
from editkit.adapters.keys import Routing
from editkit.api import EditedLM
from editkit.data.factworld import FactWorld
from editkit.edits import Edit
from editkit.lm.openings import unrelated_prompts
from editkit.lm.spec import LMSpec
from editkit.methods.artefact import build_method
from editkit.methods.memory import MemoryEdit
from editkit.methods.shards import Fitting, Shards
from editkit.metrics.protocol import EvalProtocol

CORPUS = str(Path(LMSpec().path) / "corpus.txt")
STEPS = 15  # of an edit: how well it is learned is of no matter here, that it is found is
FITTING = Fitting(steps=STEPS, irrelevant=2)
METHODS: dict[str, dict[str, Any]] = {
    "memoir": {"steps": STEPS, "routing": Routing(background=100, held_out=200), "corpus": CORPUS},
    "wise": {"fitting": FITTING, "shards": Shards(save=2, merge=2), "corpus": CORPUS},
    "repair": {"fitting": FITTING, "shards": Shards(save=2, merge=4), "corpus": CORPUS},
    "grace": {"steps": STEPS, "eps": 1e-3},
}
Answer = Callable[[list[str], int], list[str]]


@dataclass(frozen=True)
class Served:
    """A model that answers.

    Args:
        name: What it is called in the table.
        answer: Continues prompts by so many tokens.
        unedited: Does so with its edits switched off.
        memories: Memory of each prompt that may be asked; None for none.
    """

    name: str
    answer: Answer
    unedited: Answer
    memories: dict[str, int | None]


def endless(model: Any) -> Any:
    """Let no token end a row, so that all rows decode alike."""
    model.generation_config.eos_token_id = [model.config.vocab_size - 1]  # a special token of none
    model.generation_config.pad_token_id = 0
    return model


def plain(folder: str) -> Answer:
    """Return the base model's own `generate`, texts in and texts out."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model: Any = endless(loaded.eval())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")

    @torch.no_grad()
    def answer(prompts: list[str], count: int) -> list[str]:
        given = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        ids_BT = model.generate(**given, max_new_tokens=count, do_sample=False)
        new_BN = ids_BT[:, given["input_ids"].shape[1] :]
        assert new_BN.shape[1] == count, "a row came to its end"
        texts: list[str] = tokenizer.batch_decode(new_BN, skip_special_tokens=True)
        return [text.removeprefix(" ") for text in texts]

    return answer


def edited(model: str, name: str, edits: list[Edit], arguments: dict[str, Any]) -> EditedLM:
    """Make edits, two at a time."""
    kind = name.upper() if name != "delta" else "FT"
    path = f"editkit.methods.{name if name != 'delta' else 'ft'}.{kind}"
    if name in METHODS:
        arguments = {"prefixes": [], **arguments}
    method = build_method(path, lm=LMSpec(id=model), evaluation=EvalProtocol(), **arguments)
    lm = EditedLM(method)
    for start in range(0, len(edits), 2):
        lm.edit_batch(edits[start : start + 2])
    endless(lm.lm.model)
    return lm


def with_deltas(model: str, folder: Path) -> tuple[EditedLM, str]:
    """Return a model with a change at each of its causal layers, and the folder of its export."""
    lm = edited(model, "delta", [], {})
    generator = torch.Generator().manual_seed(0)
    for layer in lm.lm.causal_layers:
        path = lm.lm.site(layer).path
        found = lm.lm.layers.get(path) or lm.lm.attach(path, DeltaLayer)
        found.add(1e-3 * torch.randn(found.shape_oi, generator=generator))
    lm.export(folder)
    return lm, str(folder)


def memories_of(lm: EditedLM, prompts: list[str]) -> dict[str, int | None]:
    """Return which memory answers each prompt."""
    method = lm.method
    assert isinstance(method, MemoryEdit)
    slots = [
        s for pair in method.inputs(prompts) for s in method.memory.route(*pair).slot_B.tolist()
    ]
    return {p: None if s < 0 else s for p, s in zip(prompts, slots, strict=True)}


def make(model: str, edits: list[Edit], strange: list[str], folder: Path) -> list[Served]:
    """Return what is served: every method."""
    found, prompts = [], [e.prompt for e in edits] + strange
    for name, arguments in METHODS.items():
        lm = edited(model, name, edits, arguments)
        more = unrelated_prompts(lm.lm, CORPUS, 64, seed=1)
        asked = memories_of(lm, prompts + more)
        found.append(Served(name, lm.lm.generate, unedited(lm), asked))
    lm, exported = with_deltas(model, folder)
    asked = dict.fromkeys(prompts, 0)  # all prompts see the change
    found.append(Served(f"delta, {len(lm.lm.layers)} layers", lm.lm.generate, unedited(lm), asked))
    own = plain(exported)
    return [*found, Served("delta, exported", own, own, asked)]


def unedited(lm: EditedLM) -> Answer:
    """Return how a model answers with its edits switched off."""

    def answer(prompts: list[str], count: int) -> list[str]:
        with lm.unedited():
            texts: list[str] = lm.lm.generate(prompts, count)
        return texts

    return answer


def mixed(served: Served, rows: int) -> list[str]:
    """Return rows of which every second belongs to no memory, and the others go round all."""
    groups: dict[int | None, list[str]] = {}
    for prompt, memory in served.memories.items():
        groups.setdefault(memory, []).append(prompt)
    free = groups.pop(None, [])
    turns = [prompt for part in zip_longest(*groups.values()) for prompt in part if prompt]
    if not turns or (served.name in METHODS and not free):
        raise SystemExit(f"{served.name}: {len(turns)} prompts are answered, {len(free)} go free")
    free = free or turns
    return [(free if i % 2 else turns)[i // 2 % len(free if i % 2 else turns)] for i in range(rows)]


def seconds(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(served: Served, base: Answer, rows: int, count: int, repeats: int) -> dict[str, Any]:
    """Time one batch on the base model and on this one, in turns; compare with rows alone."""
    batch = mixed(served, rows)
    who = {"base": base, "unedited": served.unedited, "edited": served.answer}
    took: dict[tuple[str, int], list[float]] = {(n, c): [] for n in who for c in (1, count)}
    for _ in range(repeats + 1):
        for name, length in took:
            took[name, length].append(seconds(lambda n=name, c=length: who[n](batch, c)))
    best = {key: min(found[1:]) for key, found in took.items()}
    further = {name: (best[name, count] - best[name, 1]) / (count - 1) for name in who}
    together = served.answer(batch, count)
    alone = [served.answer([prompt], count)[0] for prompt in batch]
    slots = [served.memories[prompt] for prompt in batch]
    return {
        "what": served.name, "rows": rows, "memories": len({*slots} - {None}),
        "free rows": slots.count(None),
        "tokens/s, base": rows * count / best["base", count],
        "tokens/s": rows * count / best["edited", count],
        "base / this": best["edited", count] / best["base", count],
        "base / unedited": best["unedited", count] / best["base", count],
        "ms, first token, base": 1e3 * best["base", 1],
        "ms, first token": 1e3 * best["edited", 1],
        "ms, each further, base": 1e3 * further["base"],
        "ms, each further": 1e3 * further["edited"],
        "ms, batch": 1e3 * best["edited", count],
        "as alone": sum(map(str.__eq__, together, alone)),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = bench.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="batch sizes")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of a row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--edits", type=int, default=8)
    parser.add_argument("--models", nargs="+", default=["mid-size", "factworld"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.tokens, args.repeats, args.models = [4], 4, 1, ["factworld"]
    return args


def main() -> int:
    """Measure all models and batch sizes; return 1 where a row's answer is not its own."""
    args = parse()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    data = FactWorld(limit=args.edits)
    data.setup()
    edits = list(data.edits)
    strange = [p.prompt for p in data.probes if p.kind == "locality"]
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            model = save_model(Path(folder) / "mid") if name == "mid-size" else name
            served = make(model, edits, strange, Path(folder) / f"{name}-out")
            base = plain(LMSpec(id=model).path)
            report[name] = []
            for rows in args.rows:
                lines = [measure(one, base, rows, args.tokens, args.repeats) for one in served]
                show(f"{name}: {rows} rows, {args.tokens} new tokens each", lines)
                report[name] += lines
    keep(report, args.out)
    lines = [line for found in report.values() for line in found]
    return int(any(line["as alone"] != line["rows"] for line in lines))


if __name__ == "__main__":
    sys.exit(main())
