"""What REPAIR costs an edit and a prompt, against the plain per-edit loop, at what quality.

One run measures, in fp32 on a CPU and on fact-world's edits:

- editing: seconds an edit of REPAIR, one edit at a time and a window at a time, with its loop and
  without, and of the plain loop, which is WISE as released: one descent an edit, all blocks and the
  head on all rows and tokens at every step; a dense side memory; shards of 5 edits, TIES of 3
  shards. It has none of REPAIR's checks, batches, distillation and second training, which count in
  REPAIR's time. All have the same constants and the same stopping rule; what they made is asked by
  the same probes, on the packaged model, whose answers mean something, and on a random Llama of 12
  blocks (layer 9), on which no edit is ever done before its last step and half of them stay wrong,
  so that the loop trains until its budget is spent;
- routing: what 66 trained pools add to a forward pass that none of them answers (but for the first
  line), with masks of whole columns and of single weights, and what a Python loop over them takes.

    python benchmarks/repair.py                  # about 40 minutes on a quiet core
    python benchmarks/repair.py --quick          # a smoke test
    python benchmarks/repair.py --only routing --out repair.json

Times are wall-clock; CPU seconds and the machine's load stand beside them, for a busy machine makes
wall-clock times worthless. Ratios are of CPU seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import torch
import yaml
from bench import Seconds, console, edits_of, keep, machine, save_model, show, with_and_without
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from editkit.data.factworld import FactWorld
from editkit.edits import Edit
from editkit.functional.losses import activation_margins
from editkit.functional.merge import ties_merge
from editkit.functional.routing import mean_norms
from editkit.lm.spec import LMSpec
from editkit.methods.artefact import build_method
from editkit.methods.repair import REPAIR
from editkit.methods.shards import Mask, Shards
from editkit.methods.side import SideEdit
from editkit.methods.wise import WISE
from editkit.metrics.protocol import EvalProtocol

LAYERS = {"mid-size": 9, "factworld": 4}
POOLS = 66  # of 1,000 edits in windows of 15
PER_POOL, STEPS = 3, 4  # edits of a pool to route among, and steps of training each
MASKS = ["elementwise", "columns"]
KINDS = ("reliability", "generalization", "locality")
SCORERS = ("token_accuracy", "generation")
REPAIR_YAML = Path(__file__).parents[1] / "experiments" / "method" / "repair.yaml"


def start(
    cls: type[SideEdit], model: str, layer: int, mask: str, changes: dict[str, dict] | None = None
) -> Any:
    """Return a fresh method with REPAIR's own constants, but for changes, as far as it has them."""
    config = yaml.safe_load(REPAIR_YAML.read_text())["init_args"]
    config["shards"]["mask"] = mask
    for name, change in (changes or {}).items():
        config[name] |= change
    if cls is WISE:  # REPAIR's way of picking has no meaning without its account of known edits
        config["routing"]["pick"] = "relative"
    own = {"shards", "margins", "routing", "fitting"} if cls is WISE else set(config)
    method = build_method(
        f"{cls.__module__}.{cls.__name__}", lm=LMSpec(id=model),
        evaluation=EvalProtocol(batch_size=64, max_new_tokens=20), layer=layer,
        **{name: value for name, value in config.items() if name in own},
    )  # fmt: skip
    method.start()
    return method


# editing


class PlainLoop:
    """WISE's equations without any of the shortcuts, on the base model of a method.

    Args:
        method: Where prefixes, unrelated texts and the unit of scores come from.
    """

    def __init__(self, method: WISE) -> None:
        self.method = method
        method.memory.enabled = False
        self.fitting, self.margins, self.shards = method.fitting, method.margins, method.shards
        self.model, self.site = method.lm.model, method.memory.base_layer
        self.shard_DF = torch.zeros(method.memory.shape_oi)
        self.gate_DF = self._draw()
        self.closed: list[Tensor] = []
        self.pools: list[tuple[Tensor, float, list[Edit]]] = []
        self.members: list[Edit] = []

    def edit(self, edit: Edit) -> None:
        """Train the open shard on one edit; close and merge when it is time."""
        method = self.method
        fronts = ["", *(f"{context} " for context in method.contexts or [])]
        others = [text.rpartition(" ") for text in edit.negatives[: self.fitting.irrelevant]]
        tokens = method.lm.encode(
            [*(front + edit.prompt for front in fronts), *(head for head, _, _ in others)],
            [edit.target] * len(fronts) + [tail for _, _, tail in others],
        )
        n = len(fronts)
        labels_BT = tokens.ids_BT.masked_fill(~tokens.target_BT, -100)[:, 1:]
        leaf_DF = self.shard_DF.clone().requires_grad_()
        optimizer = torch.optim.SGD([leaf_DF], lr=self.fitting.lr)
        for _ in range(self.fitting.steps):
            logits_BTV, change_BTD = self._run(tokens, leaf_DF)
            nll = cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1), labels_BT.flatten(), reduction="none"
            )
            rows = nll.view(labels_BT.shape).sum(1) / tokens.target_BT.sum(1)
            score_B = mean_norms(change_BTD, self._counted(tokens)) / method.unit
            margins = activation_margins(
                score_B[None, :n], score_B[None, n:],
                self.margins.outside, self.margins.inside, self.margins.apart,
            )  # fmt: skip
            loss = rows[:n].mean() + self.margins.weight * margins[0]
            if float(loss.detach()) <= self.fitting.stop_below:
                break
            optimizer.zero_grad()
            loss.backward()
            leaf_DF.grad *= self.gate_DF
            optimizer.step()
            with torch.no_grad():
                leaf_DF.clamp_(-self.fitting.clamp, self.fitting.clamp)
        self.shard_DF = leaf_DF.detach()
        self.members.append(edit)
        if len(self.members) % self.shards.save == 0:
            self._close()

    def finish(self) -> None:
        """Merge what is left."""
        if self.members and len(self.members) % self.shards.save:
            self._close()
        if self.closed:
            self._merge()

    @torch.no_grad()
    def route(self, prompt: str) -> int:
        """Return the pool that a prompt finds, asking one after another; -1 for none."""
        best, found = 1.0, -1
        for p, (delta_DF, floor, _) in enumerate(self.pools):
            ratio = self._score(prompt, delta_DF) / (self.method.routing.act_ratio * floor)
            if ratio > best:
                best, found = ratio, p
        return found

    @torch.no_grad()
    def hand_over(self, method: WISE) -> WISE:
        """Put the pools into a method, so that they are asked as its own would be."""
        for delta_DF, floor, members in self.pools:
            pool = method.memory.write(None, delta_DF)
            method.memory.pools.floor_P[pool] = floor
            method.memory.pools.open_P[pool] = False
            method.enrol(members, pool)
        method.edits_seen = len(method.made)
        return method

    def _run(self, tokens: Any, leaf_DF: Tensor) -> tuple[Tensor, Tensor]:
        """Run the whole model; return all logits, and what the shard adds to the output."""
        seen: list[Tensor] = []

        def put(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            seen.append(linear(args[0], leaf_DF))
            return out + seen[0]

        handle = self.site.register_forward_hook(put)
        logits_BTV = self.model(
            input_ids=tokens.ids_BT, attention_mask=tokens.mask_BT.long(), use_cache=False
        ).logits
        handle.remove()
        return logits_BTV, seen[0]

    @torch.no_grad()
    def _score(self, prompt: str, delta_DF: Tensor) -> float:
        tokens = self.method.lm.encode([prompt])
        return float(mean_norms(self._run(tokens, delta_DF)[1], self._counted(tokens)))

    def _counted(self, tokens: Any) -> Tensor:
        """Return the tokens that a score looks at."""
        prompt_BT: Tensor = tokens.prompt_BT
        if self.method.routing.over == "prompt":
            return prompt_BT
        place_T = torch.arange(prompt_BT.shape[1])
        return place_T == (prompt_BT * place_T).amax(1, keepdim=True)

    def _draw(self) -> Tensor:
        shards = Shards(self.shards.density)
        shape, seed = self.method.memory.shape_oi, self.method.draw_seed()
        gate_DF = Mask.draw(shape, shards, seed, torch.device("cpu")).gate_DC
        assert gate_DF is not None
        return gate_DF

    def _close(self) -> None:
        self.closed.append(self.shard_DF)
        self.shard_DF, self.gate_DF = torch.zeros_like(self.shard_DF), self._draw()
        if len(self.closed) * self.shards.save >= self.shards.merge:
            self._merge()

    def _merge(self) -> None:
        delta_DF = ties_merge(torch.stack(self.closed), density=self.shards.keep)
        floor = min(self._score(edit.prompt, delta_DF) for edit in self.members)
        self.pools.append((delta_DF, floor, self.members))
        self.closed, self.members = [], []


def measure_editing(name: str, model: str, count: int, mask: str) -> dict[str, Any]:
    """Edit the same stream by the plain loop, one at a time, and by windows; score all three."""
    data = FactWorld(limit=count)
    data.setup()
    edits, layer = list(data.edits), LAYERS[name]
    lines: list[dict[str, Any]] = []

    def note(label: str, took: Seconds, method: WISE) -> None:
        line = {"what": label, "s/edit": took.wall / count, "CPU s/edit": took.cpu / count}
        method.score_unedited(data.probes)
        line |= {"pools": len(method.memory.pools), **quality(method.score(data.probes))}
        line["speedup"] = lines[0]["CPU s/edit"] / line["CPU s/edit"] if lines else 1.0
        lines.append(line)
        console.print(line)

    plain = PlainLoop(start(WISE, model, layer, "elementwise"))
    with Seconds() as took:
        for edit in edits:
            plain.edit(edit)
        plain.finish()
    handed = plain.hand_over(start(WISE, model, layer, "elementwise"))
    note("plain loop", took, handed)
    prompts = [e.prompt for e in edits]
    slots = [handed.memory.route(*pair).slot_B for pair in handed.inputs(prompts)]
    looped = [plain.route(prompt) for prompt in prompts]
    assert torch.cat(slots).tolist() == looped, "loop and product over pools route differently"
    window = handed.shards.merge
    for label, size, changes in (
        ("REPAIR, one at a time", 1, {}),
        ("REPAIR, by windows", window, {}),
        ("REPAIR, by windows, no loop", window, {"loop": {"enabled": False}}),
    ):
        method = start(REPAIR, model, layer, mask, changes)
        with Seconds() as took:
            for i in range(0, count, size):
                method.apply_edits(edits[i : i + size])
            method.finish()
        note(label, took, method)
    return {"model": name, "edits": count, "lines": lines}


def quality(rows: list[Any]) -> dict[str, float]:
    """Return the mean scores by kind and scorer."""
    found = {}
    for kind in KINDS:
        mine = [row["scores"] for row in rows if row["kind"] == kind]
        for scorer in SCORERS:
            found[f"{kind[:3]} {scorer[:3]}"] = sum(s[scorer] for s in mine) / len(mine)
    return found


# routing


def trained(model: str, pools: int, mask: str) -> tuple[REPAIR, list[Edit]]:
    """Return REPAIR with pools of three shards of an edit each, a few steps each, and its edits."""
    changes = {
        "shards": {"save": 1, "merge": PER_POOL}, "fitting": {"steps": STEPS},
        "regroup": {"by_likeness": False}, "loop": {"enabled": False},
    }  # fmt: skip
    method = start(REPAIR, model, LAYERS["mid-size"], mask, changes)
    edits = edits_of(pools * PER_POOL)
    method.apply_edits(edits)
    method.finish()
    assert len(method.memory.pools) == pools
    return method, edits


@torch.no_grad()
def measure_routing(method: REPAIR, edits: list[Edit], repeats: int) -> dict[str, Any]:
    """Time forward passes with and without the pools in turns, and the loop over pools."""
    memory, lm, pools = method.memory, method.lm, len(method.memory.pools)
    pairs = [pair for e in edits for pair in method.inputs([e.prompt])]
    delta_PDF = memory.pools.dense(list(range(pools)))

    def loop() -> int:
        x_BTF, prompt_BT = pairs[0]
        scores = [float(mean_norms(linear(x_BTF, d_DF), prompt_BT)) for d_DF in delta_PDF]
        return scores.index(max(scores))

    own = lm.encode([edits[0].prompt])
    line = with_and_without(lm, lambda: lm(own), repeats)
    lines = [{"what": f"prompt of an edit, 1 x {own.ids_BT.shape[1]} tokens", **line}]
    memory.pools.floor_P *= 1e6  # nothing matches
    texts = " ".join(e.prompt for e in edits).split()
    for rows, words in ((1, 12), (8, 32), (64, 32)):
        tokens = lm.encode([" ".join(texts[i : i + words]) for i in range(rows)])
        with lm.unedited():
            base_BTV = lm(tokens)
        assert torch.equal(lm(tokens), base_BTV), "pools without a match changed something"
        line = with_and_without(lm, lambda tokens=tokens: lm(tokens), repeats)
        lines.append({"what": f"pass of {rows} x {tokens.ids_BT.shape[1]} tokens", **line})
    prompts = [e.prompt for e in edits[:8]]
    line = with_and_without(
        lm, lambda: lm.generate(prompts, max_new_tokens=16), max(1, repeats // 4)
    )
    lines.append({"what": "decoding 8 rows, 16 tokens", **line})
    looped, routed = least(loop, repeats), least(lambda: memory.route(*pairs[0]), repeats)
    return {
        "pools": pools, "lines": lines,
        "ms a prompt, loop over pools": 1e3 * looped, "ms a prompt, here": 1e3 * routed,
    }  # fmt: skip


def least(work: Callable[[], Any], repeats: int) -> float:
    """Return the least CPU seconds of some runs."""
    found = []
    for _ in range(repeats + 1):
        with Seconds() as took:
            work()
        found.append(took.cpu)
    return min(found)


# the command line


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = bench.parser(__doc__)
    parser.add_argument("--edits", type=int, default=30, help="edits of the stream")
    parser.add_argument("--pools", type=int, default=POOLS, help="pools to route among")
    parser.add_argument("--repeats", type=int, default=30, help="runs of which a time is taken")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--models", choices=list(LAYERS), nargs="+", default=list(LAYERS))
    parser.add_argument(
        "--mask", choices=MASKS, nargs="+", default=MASKS,
        help="masks of pools to route among; the first is edited with",
    )  # fmt: skip
    parser.add_argument("--only", choices=["editing", "routing"], nargs="+")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    args = parser.parse_args()
    if args.quick:
        args.edits, args.pools, args.repeats = 2, 4, 1
    return args


def main() -> None:
    """Run the sections asked for."""
    args = parse()
    torch.set_num_threads(args.threads)
    asked = args.only or ["editing", "routing"]
    report: dict[str, Any] = {"before": machine(args.threads)}
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder), corpus=True)
        if "editing" in asked:
            report["editing"] = []
            for name in args.models:
                path = model if name == "mid-size" else name
                found = measure_editing(name, path, args.edits, args.mask[0])
                report["editing"].append(found)
                show(f"{name}, {args.edits} edits", found["lines"])
        if "routing" in asked:
            for mask in args.mask:
                method, edits = trained(model, args.pools, mask)
                found = measure_routing(method, edits, args.repeats)
                report[f"routing, {mask}"] = found
                show(f"{args.pools} pools, masks: {mask}", found["lines"])
                console.print({k: v for k, v in found.items() if k != "lines"})
    report["after"] = machine(args.threads)
    console.print(report["before"], report["after"])
    keep(report, args.out)


if __name__ == "__main__":
    main()
