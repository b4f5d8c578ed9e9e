"""Causal tracing: which states carry a fact to the answer (ROME, Meng et al. 2022, section 2).

The embeddings of the subject are drowned in noise, so that the model no longer knows the answer.
Then one state of the clean run is put back at one token: what a block, its MLP or its attention
gave. How much of the answer's probability comes back is that state's indirect effect.

Legend: E facts, K kinds of states, L layers, G groups of tokens, N tokens of all subjects,
D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from editkit.edits import Edit
from editkit.lm.editable import EditableLM
from editkit.lm.restoring import KINDS, LAST_SUBJECT, FactRow, Restoring, TraceSettings, rows_of

ANY = -1  # a target that is whatever the model says


@dataclass(frozen=True, slots=True)
class Trace:
    """What tracing found, averaged over facts.

    Args:
        effects_KLG: Average indirect effect: the answer's probability that a state brings back.
        errors_KLG: Standard error of it over facts.
        facts_G: Facts that have tokens of a group.
        clean: Probability of the answer in the clean run.
        corrupted: Probability under noise.
        sigma: Standard deviation of the noise.
        skipped: Facts left out, whose target is not what the model says.
    """

    effects_KLG: Tensor
    errors_KLG: Tensor
    facts_G: Tensor
    clean: float
    corrupted: float
    sigma: float
    skipped: int

    @property
    def causal_layers(self) -> list[int]:
        """Neighbouring layers whose MLPs bring back most at the subject's last token.

        A sixth of the depth, at least three: 4 of GPT-J's 28, 5 of Llama-3-8B's 32, 8 of GPT-2 XL's
        48, where MEMIT's released constants have 6, 5 and 5. Empty where they bring back nothing.
        """
        effects_L = self.effects_KLG[KINDS.index("mlp"), :, LAST_SUBJECT]
        width = min(len(effects_L), max(3, len(effects_L) // 6))
        sums = effects_L.unfold(0, width, 1).sum(1)
        start = int(sums.argmax())
        return list(range(start, start + width)) if float(sums[start]) > 0 else []


@torch.no_grad()
def trace_facts(
    lm: EditableLM,
    facts: Sequence[Edit],
    settings: TraceSettings | None = None,
    progress: bool = True,
) -> Trace:
    """Trace facts that the model knows.

    Args:
        lm: Model.
        facts: What is traced: prompt, subject and target, of which the first token counts. An empty
            target is what the model says; facts with another target than that are left out.
        settings: How; None takes the paper's.
        progress: Show a bar on a terminal.

    Raises:
        ValueError: If a fact has no subject or its prompt does not hold it, or no target is what
            the model says.
    """
    settings = settings or TraceSettings()
    rows = _known(lm, facts, settings.batch_tokens)
    if not rows:
        raise ValueError(
            f"the model says none of the {len(facts)} targets, so there is nothing to trace; leave "
            "`target` out to trace what it says itself"
        )
    subject_ids = [i for row in rows for i in row.ids[row.first : row.last + 1]]
    embedded_ND = lm.model.get_input_embeddings()(torch.tensor(subject_ids, device=lm.device))
    sigma = settings.noise * float(embedded_ND.float().std())
    console = Console(stderr=True)
    silent = not (progress and console.is_terminal)
    parts = list(_parts(rows, settings))
    with Progress(console=console, disable=silent, transient=True) as bar:
        task = bar.add_task("tracing", total=len(parts) * len(KINDS) * len(lm.blocks))
        found = [
            Restoring(lm, part, settings, sigma).trace(lambda: bar.advance(task)) for part in parts
        ]
    effects_EKLG, clean_E, corrupted_E = map(torch.cat, zip(*found, strict=True))
    facts_G = (~effects_EKLG[:, 0, 0].isnan()).sum(0)
    mean_KLG = effects_EKLG.nanmean(0)
    variance_KLG = (effects_EKLG - mean_KLG).square().nansum(0) / (facts_G - 1).clamp_min(1)
    return Trace(
        effects_KLG=mean_KLG,
        errors_KLG=(variance_KLG / facts_G.clamp_min(1)).sqrt(),
        facts_G=facts_G,
        clean=float(clean_E.mean()),
        corrupted=float(corrupted_E.mean()),
        sigma=sigma,
        skipped=len(facts) - len(rows),
    )


def _known(lm: EditableLM, facts: Sequence[Edit], batch_tokens: int) -> list[FactRow]:
    """Encode facts; return those the model knows, with the token that it says."""
    if not facts:
        raise ValueError("no facts to trace; give at least one prompt with its subject")
    for fact in facts:
        if not fact.subject:
            raise ValueError(
                f"prompt {fact.prompt!r} (fact {fact.id}) needs its subject to trace it"
            )
    prompts, subjects = [fact.prompt for fact in facts], [fact.subject or "" for fact in facts]
    last = lm.policy.subject_indices(prompts, subjects)
    texts = [lm.policy.prompt_text(prompt) for prompt in prompts]
    before = [text[: text.rfind(s)].rstrip(" ") for text, s in zip(texts, subjects, strict=True)]
    first = [min(len(ids), end) for ids, end in zip(lm.policy.ids(before), last, strict=True)]
    heads, tails = lm.policy.pieces(prompts, [fact.target or "-" for fact in facts])
    wanted = [tail[0] if fact.target else ANY for fact, tail in zip(facts, tails, strict=True)]
    rows = list(map(FactRow, range(len(facts)), heads, first, last, wanted))
    known = []
    size = max(1, batch_tokens // (max(map(len, heads)) + 1))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        said = lm.target_logits(rows_of(lm, part)).argmax(-1).tolist()
        both = zip(part, said, strict=True)
        known += [replace(row, target=token) for row, token in both if row.target in (ANY, token)]
    return known


def _parts(rows: list[FactRow], settings: TraceSettings) -> Iterator[list[FactRow]]:
    """Part facts, shortest first, so that the rows of each part fit the budget."""
    part: list[FactRow] = []
    size = 0
    for row in sorted(rows, key=lambda row: len(row.ids)):
        count = (len(row.ids) - row.first) * settings.samples
        if part and (size + count) * (len(row.ids) + 1) > settings.batch_tokens:
            yield part
            part, size = [], 0
        part.append(row)
        size += count
    yield part
