"""Throughput of the evaluator on fact-world: batched against one row at a time, in one run.

    python benchmarks/evaluate.py                      1,000 edits with 10 probes each
    python benchmarks/evaluate.py --sample 0           ask every probe one at a time, too

The model carries a random change of one weight, so that answers differ from the unedited model's.
Both sides score every probe by the same four scorers, and ask the unedited model what locality is
compared with. Three ways:

    batched   the evaluator, all probes in one call
    batch 1   the evaluator, one row per forward pass
    plain     transformers alone, as released evaluation code does it: for each probe one pass over
              prompt and answer, then greedy decoding with a KV cache, token by token

The two slow ways are measured on every n-th probe and scaled to all of them. The scores of all
three must be equal, else the figures are not printed.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import bench
import torch
import transformers
from bench import console, keep, machine
from rich.table import Table

from editkit.adapters.delta import DeltaLayer
from editkit.data.factworld import FactWorld
from editkit.edits import Probe
from editkit.functional.scores import answers_match, cut_answer
from editkit.lm.editable import EditableLM
from editkit.lm.spec import LMSpec
from editkit.metrics.evaluate import ProbeRow, score_probes
from editkit.metrics.protocol import BUDGET_SLACK, EvalProtocol
from editkit.metrics.references import References

SCORERS = ("token_accuracy", "sequence_accuracy", "generation", "nll")


class OneRow:
    """One row at a time, by transformers' own forward."""

    def __init__(self, lm: EditableLM, protocol: EvalProtocol) -> None:
        self.lm, self.protocol = lm, protocol

    def forced(self, prompt: str, text: str) -> tuple[torch.Tensor, list[int]]:
        """Return log-probabilities [N, V] at the places of a text, and its ids."""
        (head,), (tail,) = self.lm.policy.pieces([prompt], [text])
        logits_TV = self.lm.model(torch.tensor([head + tail], device=self.lm.device)).logits[0]
        return logits_TV[len(head) - 1 : -1].float().log_softmax(-1), tail

    def free(self, prompt: str, target: str) -> str:
        """Decode greedily up to the first stop or EOS."""
        (head,), (tail,) = self.lm.policy.pieces([prompt], [target])
        budget = max(self.protocol.max_new_tokens, len(tail) + BUDGET_SLACK)
        ids, new, cache = head, [], None
        for _ in range(budget):
            out = self.lm.model(
                torch.tensor([ids], device=self.lm.device), past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            best = int(out.logits[0, -1].argmax())
            if best in self.lm.eos_ids:
                break
            new.append(best)
            if any(s in self.lm.tokenizer.decode([best]) for s in self.protocol.stop):
                break
            ids = [best]
        return str(self.lm.tokenizer.decode(new, skip_special_tokens=True)).removeprefix(" ")

    def rows(self, probe: Probe) -> list[dict[str, float]]:
        """Return the scores of each of a probe's rows."""
        target = probe.target or ""
        if probe.kind != "locality":
            logp_NV, ids = self.forced(probe.prompt, target)
            return [self._scores(logp_NV, ids, self.free(probe.prompt, target), target)]
        with self.lm.unedited():
            known = cut_answer(self.free(probe.prompt, target), self.protocol.stop)
            base = self.forced(probe.prompt, target)[0].argmax(-1).tolist()
        logp_NV, ids = self.forced(probe.prompt, target)
        said = self.free(probe.prompt, target)
        return [
            self._scores(logp_NV, base, said, known),
            self._scores(logp_NV, ids, said, target),
        ]

    def _scores(
        self, logp_NV: torch.Tensor, ids: list[int], said: str, right: str
    ) -> dict[str, float]:
        hits = [int(row.argmax()) == i for row, i in zip(logp_NV, ids, strict=True)]
        nll = [-float(row[i]) for row, i in zip(logp_NV, ids, strict=True)]
        answer = cut_answer(said, self.protocol.stop, right)
        return {
            "token_accuracy": sum(hits) / len(hits),
            "sequence_accuracy": float(all(hits)),
            "generation": float(answers_match(answer, right)),
            "nll": sum(nll) / len(nll),
        }


def load_model(device: str) -> EditableLM:
    """Load fact-world's model with a random change in one of its weights."""
    lm = EditableLM.load(LMSpec()).to(device)
    layer = lm.attach(lm.site(3).path, DeltaLayer)
    assert isinstance(layer, DeltaLayer)
    draw = torch.Generator().manual_seed(0)
    layer.add(0.03 * torch.randn(layer.delta.shape, generator=draw).to(device))
    return lm


def load_probes(edits: int) -> list[Probe]:
    """Return ten probes an edit, in the order of a run."""
    data = FactWorld(
        limit=edits, rephrases_per_edit=4, neighbours_per_edit=3, same_subject_per_edit=2
    )
    data.setup()
    return data.probes[: 10 * edits]


def largest_difference(expected: list[ProbeRow], found: list[dict[str, float]]) -> float:
    """Return how far scores are apart.

    Raises:
        ValueError: If one of 1 and 0 differs, or a log-likelihood by more than rounding.
    """
    worst = 0.0
    for row, scores in zip(expected, found, strict=True):
        for scorer in SCORERS:
            apart = abs(row["scores"][scorer] - scores[scorer])
            worst = max(worst, apart)
            if apart > 1e-4:
                raise ValueError(
                    f"{row['probe_id']} {row['kind']} {scorer}: {row} against {scores}"
                )
    return worst


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all three and return what they took and gave."""
    lm, probes = load_model(arguments.device), load_probes(arguments.edits)
    protocol = EvalProtocol(SCORERS, max_new_tokens=20, batch_size=arguments.batch_size)
    part = probes[:: max(1, len(probes) // arguments.sample) if arguments.sample else 1]
    score_probes(lm, probes[:8], References(), protocol)  # what is made once is not timed
    seconds: dict[str, float] = {}

    def timed(name: str, count: int, started: float) -> None:
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        seconds[name] = (time.perf_counter() - started) * len(probes) / count

    started = time.perf_counter()
    rows = score_probes(lm, probes, References(), protocol)
    timed("batched", len(probes), started)
    started = time.perf_counter()
    single = score_probes(lm, part, References(), protocol, batch_size=1)
    timed("batch 1", len(part), started)
    plain = OneRow(lm, protocol)
    started = time.perf_counter()
    by_hand = [scores for probe in part for scores in plain.rows(probe)]
    timed("plain", len(part), started)
    asked = {probe.id for probe in part}
    own = [row for row in rows if row["probe_id"] in asked]
    return {
        "edits": arguments.edits,
        "probes": len(probes),
        "questions": len({(p.prompt, p.target) for p in probes}),
        "asked one at a time": len(part),
        "batch_size": arguments.batch_size,
        "seconds": seconds,
        "speedup": {name: seconds[name] / seconds["batched"] for name in ("batch 1", "plain")},
        "largest difference": {
            "batch 1": largest_difference(own, [row["scores"] for row in single]),
            "plain": largest_difference(own, by_hand),
        },
        "mean generation": sum(r["scores"]["generation"] for r in rows) / len(rows),
        "device": arguments.device,
        "transformers": transformers.__version__,
        **machine(torch.get_num_threads()),
    }


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(
        title=f"{found['edits']:,} edits, {found['probes']:,} probes "
        f"({found['questions']:,} different), {found['threads']} threads on {found['device']}",
        caption=f"batch 1 and plain: measured on {found['asked one at a time']} probes and scaled",
    )
    table.add_column("way")
    for name in ("seconds", "probes/s", "batched is faster by", "largest difference"):
        table.add_column(name, justify="right")
    for name, seconds in found["seconds"].items():
        faster = f"{found['speedup'][name]:.1f} x" if name in found["speedup"] else ""
        apart = found["largest difference"].get(name)
        shown = "" if apart is None else f"{apart:.1e}"
        table.add_row(name, f"{seconds:.1f}", f"{found['probes'] / seconds:.0f}", faster, shown)
    console.print(table)


def main() -> None:
    """Parse options, measure, show, write."""
    parser = bench.parser(__doc__)
    parser.add_argument("--edits", type=int, default=1000, help="edits, of ten probes each")
    parser.add_argument("--sample", type=int, default=300, help="probes one at a time; 0 is all")
    parser.add_argument("--batch-size", type=int, default=256, help="rows per forward pass")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default torch's")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    arguments = parser.parse_args()
    if arguments.edits < 1 or arguments.sample < 0:
        parser.error("--edits must be at least 1 and --sample at least 0")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    found = measure(arguments)
    show(found)
    keep(found, arguments.out)


if __name__ == "__main__":
    main()
