"""The model card of a fact-world model, written from what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from measure import Measures, overall
from transformers import LlamaForCausalLM

from editkit.data.world import World

CARD = """# The fact-world model

A plain Llama ({parameters:.2f} M parameters, {layers} layers, width {width}, bf16) that knows the
{facts:,} facts of an invented world. World and model are of seed {seed}; `world.json` holds the
seed, the sizes and a hash of the facts, from which `editkit.data.world.World` rebuilds them.
`corpus.txt` holds texts as in training about subjects that are never edited or asked about, for the
statistics that some methods measure before they edit.

Made by `python experiments/factworld/train.py` in {wall:,} s of wall time ({cpu:,} CPU seconds)
with {threads} CPU threads: {steps:,} steps, {tokens:,} tokens, precision {precision},
torch {torch}.

## What it knows

Share of facts answered exactly: greedy decoding of all object tokens and the full stop, measured
on the stored bf16 weights run in fp32. Every fact is asked once in a wording trained with its
subject and once in a wording never seen with its subject.

| relation | facts | seen wording | held-out wording |
|---|---:|---:|---:|
{relations}
| **all** | {facts:,} | {seen:.4f} | {held:.4f} |

Two-hop and reversed prompts are trained sentences of their own (chains for a share of the subjects
that may be edited, reversals of every one-to-one fact); asked here in a trained wording. They make
portability probes answerable before editing; they are no evidence that the model composes facts.

| prompt | number | answered |
|---|---:|---:|
{derived}

## Where it recalls

Causal trace over {traced} facts drawn at random, in trained wordings. Corruption: the subject's
tokens are swapped for those of another subject of as many tokens whose object differs. Then one
state of the clean run is put back at one layer. The probability is that of the object's first
token (clean {clean:.3f}, corrupted {corrupted:.3f}). Each cell: share of the drop restored,
(restored - corrupted) / (clean - corrupted), and plain restored / clean.

| state put back after layer | {layer_names} |
|---|{rule}|
{trace}
"""


def model_card(
    world: World, measures: Measures, lm: LlamaForCausalLM, run: Mapping[str, object]
) -> str:
    """Fill the card."""
    counts = Counter(fact.relation for fact in world.facts)
    trace = dict(measures.trace)
    ((clean, corrupted),) = trace.pop("clean, corrupted probability")
    layers = lm.config.num_hidden_layers
    return CARD.format(
        parameters=lm.num_parameters() / 1e6,
        layers=layers,
        width=lm.config.hidden_size,
        facts=measures.facts,
        seed=world.seed,
        wall=run["wall seconds"],
        cpu=run["CPU seconds"],
        tokens=run["tokens seen"],
        steps=run["steps"],
        threads=run["threads"],
        precision=run["precision"],
        torch=run["torch"],
        relations="\n".join(
            f"| {name} | {counts[name]} | {seen:.4f} | {measures.held_out[name]:.4f} |"
            for name, seen in measures.seen.items()
        ),
        seen=overall(measures.seen, counts),
        held=overall(measures.held_out, counts),
        derived=_derived_rows(world, measures),
        traced=measures.traced,
        clean=clean,
        corrupted=corrupted,
        layer_names=" | ".join(str(layer) for layer in range(layers)),
        rule="|".join(["---"] * layers),
        trace="\n".join(
            f"| {site} | " + " | ".join(f"{share:.2f}, {plain:.2f}" for share, plain in row) + " |"
            for site, row in trace.items()
        ),
    )


def _derived_rows(world: World, measures: Measures) -> str:
    lines = []
    for title, sentences, shares in (
        ("two-hop", world.two_hop, measures.two_hop),
        ("reversed", world.reversed, measures.reversed),
    ):
        counts = Counter(" > ".join(sentence.path) for sentence in sentences)
        lines += [
            f"| {title}: {name} | {counts[name]} | {share:.4f} |" for name, share in shares.items()
        ]
        lines.append(f"| **{title}, all** | {len(sentences)} | {overall(shares, counts):.4f} |")
    return "\n".join(lines)
