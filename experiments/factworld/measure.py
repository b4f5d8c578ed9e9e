"""What a trained model knows of its world, and at which token and layer it recalls it.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import fmean

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from editkit.data.world import Derived, Fact, World
from editkit.lm import trace


@dataclass
class Measures:
    """Figures of the model card; every share is between 0 and 1.

    Args:
        seen: Relation to the share of facts answered in a trained wording.
        held_out: Relation to the share answered in a wording never seen with that subject.
        two_hop: Chain to the share of trained two-hop prompts answered.
        reversed: Relation to the share of trained reversed prompts answered.
        traced: Number of facts that were traced.
        trace: Site to one (share of the drop restored, share of the clean value) per layer.
    """

    facts: int = 0
    seen: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    two_hop: dict[str, float] = field(default_factory=dict)
    reversed: dict[str, float] = field(default_factory=dict)
    traced: int = 0
    trace: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


@torch.no_grad()
def answered(
    lm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    targets: Sequence[str],
    batch_size: int = 256,
) -> list[bool]:
    """Say for each prompt whether greedy decoding gives exactly the target and then a full stop.

    One forward a batch: every token of the answer is the likeliest after the right ones before it
    exactly where greedy decoding produces that answer.
    """
    correct: list[bool] = []
    for start in range(0, len(prompts), batch_size):
        heads = tokenizer(list(prompts[start : start + batch_size]))["input_ids"]
        answers = [f" {target}." for target in targets[start : start + batch_size]]
        tails = tokenizer(answers, add_special_tokens=False)["input_ids"]
        ids_BT = _pad([head + tail for head, tail in zip(heads, tails, strict=True)])
        best_BT = lm(ids_BT.to(lm.device)).logits.argmax(-1).cpu()
        for head, tail, best_T in zip(heads, tails, best_BT, strict=True):
            predicted = best_T[len(head) - 1 : len(head) + len(tail) - 1]
            correct.append(predicted.tolist() == tail)
    return correct


def measure(
    lm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    seed: int = 5,
    traced: int = 300,
) -> Measures:
    """Ask every fact once in a seen and once in a held-out wording, every derived one once."""
    rng = Random(seed)
    was_training = lm.training
    lm.eval()
    shares = Measures(facts=len(world.facts))
    for name, templates in (("seen", "trained"), ("held_out", "held_out")):
        prompts = [world.prompt(f, rng.choice(getattr(f, templates))) for f in world.facts]
        known = answered(lm, tokenizer, prompts, [fact.object for fact in world.facts])
        setattr(shares, name, _by_name([fact.relation for fact in world.facts], known))
    shares.two_hop = _derived(lm, tokenizer, world.two_hop, rng)
    shares.reversed = _derived(lm, tokenizer, world.reversed, rng)
    sample = rng.sample(world.facts, min(traced, len(world.facts)))
    rows = swapped_rows(tokenizer, world, sample, rng)
    shares.traced, shares.trace = len(rows[0]), causal_trace(lm, *rows)
    lm.train(was_training)
    return shares


def overall(shares: dict[str, float], counts: dict[str, int] | None = None) -> float:
    """Average shares, by the number of facts behind each where `counts` is given."""
    weights = counts or dict.fromkeys(shares, 1)
    total = sum(weights[name] for name in shares)
    return sum(share * weights[name] for name, share in shares.items()) / max(total, 1)


@torch.no_grad()
def causal_trace(
    lm: LlamaForCausalLM,
    clean_BT: Tensor,
    swapped_BT: Tensor,
    subject_B: Tensor,
    last_B: Tensor,
    first_B: Tensor,
) -> dict[str, list[tuple[float, float]]]:
    """Swap the subject for another of equal length and restore one state of the clean run.

    Takes what `swapped_rows` returns.

    Restored, one layer at a time: the block's output at the subject's last token, the block's
    output at the prompt's last token, the feed-forward layer's output at the subject's last token.
    The probability is that of the object's first token, averaged over facts before dividing.

    Returns:
        Site to one pair per layer: (restored - corrupted) / (clean - corrupted), restored / clean.
    """
    layers = range(lm.config.num_hidden_layers)
    blocks = [f"model.layers.{layer}" for layer in layers]
    sites = {
        "hidden state, subject's last token": (blocks, subject_B),
        "hidden state, prompt's last token": (blocks, last_B),
        "MLP output, subject's last token": ([f"{name}.mlp" for name in blocks], subject_B),
    }
    rows = torch.arange(len(clean_BT))

    def probability(ids_BT: Tensor) -> float:
        logits_BV = lm(ids_BT.to(lm.device)).logits.cpu()[rows, last_B].float()
        return logits_BV.softmax(-1)[rows, first_B].mean().item()

    with trace.read(lm, blocks + sites["MLP output, subject's last token"][0]) as states:
        clean = probability(clean_BT)
    states = dict(states)
    corrupted = probability(swapped_BT)
    result: dict[str, list[tuple[float, float]]] = {}
    for site, (names, at_B) in sites.items():
        result[site] = []
        for name in names:
            with trace.replace(lm, name, states[name][rows, at_B], at_B):
                restored = probability(swapped_BT)
            result[site].append(((restored - corrupted) / (clean - corrupted), restored / clean))
    result["clean, corrupted probability"] = [(clean, corrupted)]
    return result


def swapped_rows(
    tokenizer: PreTrainedTokenizerFast, world: World, facts: Sequence[Fact], rng: Random
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Word facts with their subject and with a stranger of as many tokens and another object.

    Facts without such a stranger are left out.

    Returns:
        Clean and swapped rows, the subject's and the prompt's last token, the object's first one.
    """
    by_length: dict[tuple[str, int], list[Fact]] = defaultdict(list)

    def length(subject: str) -> int:
        return len(tokenizer(f" {subject}", add_special_tokens=False)["input_ids"])

    for fact in world.facts:
        by_length[fact.relation, length(fact.subject)].append(fact)
    clean, swapped, subject, last, first = [], [], [], [], []
    for fact in facts:
        template = rng.choice(fact.trained)
        prompt = world.prompt(fact, template)
        pool = by_length[fact.relation, length(fact.subject)]
        strangers = [other for other in pool if other.object != fact.object]
        if not strangers:
            continue
        other = world.prompt(rng.choice(strangers), template)
        end = prompt.index(fact.subject) + len(fact.subject)
        coded = tokenizer(prompt, return_offsets_mapping=True)
        ids, others = coded["input_ids"], tokenizer(other)["input_ids"]
        if len(ids) != len(others):
            continue  # a name is cut differently at the start of a sentence
        clean.append(ids)
        swapped.append(others)
        spans = coded["offset_mapping"]
        subject.append(max(i for i, (left, right) in enumerate(spans) if left < end and right))
        last.append(len(ids) - 1)
        first.append(tokenizer(f" {fact.object}", add_special_tokens=False)["input_ids"][0])
    return _pad(clean), _pad(swapped), *map(torch.tensor, (subject, last, first))


def _derived(
    lm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sentences: Sequence[Derived],
    rng: Random,
) -> dict[str, float]:
    prompts = [rng.choice(sentence.prompts) for sentence in sentences]
    known = answered(lm, tokenizer, prompts, [sentence.object for sentence in sentences])
    return _by_name([" > ".join(sentence.path) for sentence in sentences], known)


def _by_name(names: Sequence[str], values: Sequence[bool]) -> dict[str, float]:
    grouped: dict[str, list[bool]] = defaultdict(list)
    for name, value in zip(names, values, strict=True):
        grouped[name].append(value)
    return {name: fmean(group) for name, group in grouped.items()}


def _pad(rows: Sequence[Sequence[int]], pad: int = 1) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
