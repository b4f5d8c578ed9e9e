"""States of a clean run put back into a run under noise, one after another.

All tokens and noise samples of some facts are rows of one pass; the blocks below the restored one
do not run again. Tokens left of the subject are left out: the noise does not reach them.

Legend: E facts, K kinds of states, L layers, T tokens, S noise samples, P pairs of a fact and a
token, G groups of tokens, C cells (fact, group), R rows (pair, sample), B rows of one pass,
D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from editkit.lm import trace
from editkit.lm.blocks import tap
from editkit.lm.editable import EditableLM
from editkit.lm.sites import find_blocks
from editkit.lm.tokens import Tokens

Kind = Literal["block", "mlp", "attn"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GROUPS = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first token after",
    "further tokens",
    "last token",
)
LAST_SUBJECT = GROUPS.index("last subject token")
SHALLOW = 12  # layers of a model in which each of them carries enough alone
SEEDS = 1 << 20  # facts of one seed, before they meet those of the next


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """How to trace.

    Args:
        noise: Standard deviation of the noise, in those of the subjects' embeddings.
        samples: Noise samples of each fact.
        window: Layers around each whose MLP or attention outputs are put back together; None takes
            1 up to 12 layers and 10 in deeper models, as the paper does.
        seed: Seed of the noise, which differs from fact to fact.
        batch_tokens: Tokens of a forward pass, padding included.
    """

    noise: float = 3.0
    samples: int = 10
    window: int | None = None
    seed: int = 0
    batch_tokens: int = 16384

    def __post_init__(self) -> None:
        for name in ("samples", "window", "batch_tokens"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}; give at least 1")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise is {self.noise}; give a number of standard deviations from 0")

    def width(self, depth: int) -> int:
        """Return the window of a model of `depth` layers."""
        return self.window or (1 if depth <= SHALLOW else 10)

    def layers(self, kind: Kind, layer: int, depth: int) -> range:
        """Return the layers whose states are put back together."""
        window = 1 if kind == "block" else self.width(depth)
        return range(max(0, layer - window // 2), min(depth, layer + (window + 1) // 2))


@dataclass(frozen=True, slots=True)
class FactRow:
    """A fact as tokens: the prompt, its subject's first and last, the answer's first."""

    number: int
    ids: list[int]
    first: int
    last: int
    target: int


def rows_of(lm: EditableLM, rows: Sequence[FactRow]) -> Tokens:
    """Lay prompts out with one token behind each, so that its place is asked for."""
    ids = [row.ids for row in rows]
    tokens = lm.policy.pad(ids, [[0] for _ in rows], [row.last for row in rows])
    lm.check_length(tokens)
    return tokens.to(lm.device)


class Restoring:
    """Some facts, run clean and under noise, whose states are put back one after another.

    Args:
        lm: Model.
        rows: The facts.
        settings: How to trace.
        sigma: Standard deviation of the noise.
    """

    def __init__(
        self, lm: EditableLM, rows: list[FactRow], settings: TraceSettings, sigma: float
    ) -> None:
        self.lm, self.settings = lm, settings
        self.tokens = rows_of(lm, rows)
        self.target_E = torch.tensor([row.target for row in rows], device=lm.device)
        self.noise_BTD = _noise(lm, rows, settings, sigma, self.tokens.ids_BT.shape[1])
        depth = len(lm.blocks)
        self.names: dict[Kind, list[str]] = {
            "block": [f"{find_blocks(lm.model)[0]}.{layer}" for layer in range(depth)],
            "mlp": [lm.site(layer, "mlp.down").path for layer in range(depth)],
            "attn": [lm.site(layer, "attn.out").path for layer in range(depth)],
        }
        fact_E = torch.arange(len(rows), device=lm.device)
        with trace.read(lm.model, [n for names in self.names.values() for n in names]) as states:
            self.clean_E = self._probability(fact_E)
        self.states = dict(states)
        fact_B = fact_E.repeat_interleave(settings.samples)
        with ExitStack() as stack:
            taps = [stack.enter_context(tap(block, inputs=True)) for block in lm.blocks]
            corrupted_B = self._probability(fact_B, torch.arange(len(fact_B), device=lm.device))
        self.entering = [found[0] for found in taps]
        self.corrupted_E = corrupted_B.view(len(rows), -1).mean(1)
        self._pair(rows)

    def _pair(self, rows: list[FactRow]) -> None:
        """List the tokens to restore, each with its fact, its group and a row a noise sample."""
        first_E, last_E, end_E = torch.tensor(
            [(row.first, row.last, len(row.ids) - 1) for row in rows], device=self.lm.device
        ).T
        span_T = torch.arange(self.tokens.ids_BT.shape[1], device=self.lm.device)
        is_traced_ET = (span_T >= first_E[:, None]) & (span_T <= end_E[:, None])
        fact_P, token_P = is_traced_ET.nonzero().T
        first_P, last_P, end_P = first_E[fact_P], last_E[fact_P], end_E[fact_P]
        group_P = torch.full_like(token_P, GROUPS.index("further tokens"))
        group_P[token_P == last_P + 1] = GROUPS.index("first token after")
        group_P[token_P == end_P] = GROUPS.index("last token")
        group_P[token_P < last_P] = GROUPS.index("middle subject tokens")
        group_P[(token_P == first_P) & (token_P < last_P)] = GROUPS.index("first subject token")
        group_P[token_P == last_P] = LAST_SUBJECT
        self.fact_P, self.token_P, self.cell_P = fact_P, token_P, fact_P * len(GROUPS) + group_P

    def trace(self, advance: Callable[[], None]) -> tuple[Tensor, Tensor, Tensor]:
        """Return effects [E, K, L, G], and the answers' probability [E] clean and under noise.

        Args:
            advance: Called after each kind and layer.
        """
        depth = len(self.lm.blocks)
        effects_EKLG = self.clean_E.new_empty(len(self.clean_E), len(KINDS), depth, len(GROUPS))
        for k, kind in enumerate(KINDS):
            for layer in range(depth):
                effects_EKLG[:, k, layer] = self._effects(kind, layer)
                advance()
        return effects_EKLG.cpu(), self.clean_E.cpu(), self.corrupted_E.cpu()

    def _effects(self, kind: Kind, layer: int) -> Tensor:
        """Restore the states around a layer at each token; return effects [E, G]."""
        span = self.settings.layers(kind, layer, len(self.lm.blocks))
        names = self.names[kind][span.start : span.stop]
        samples = self.settings.samples
        sample_R = torch.arange(samples, device=self.lm.device).repeat(len(self.fact_P))
        fact_R, token_R = (x.repeat_interleave(samples) for x in (self.fact_P, self.token_P))
        size = max(1, self.settings.batch_tokens // self.tokens.ids_BT.shape[1])
        found = []
        for fact_B, token_B, sample_B in zip(
            *(x.split(size) for x in (fact_R, token_R, sample_R)), strict=True
        ):
            with ExitStack() as stack:
                for name in names:
                    value_BD = self.states[name][fact_B, token_B]
                    stack.enter_context(trace.replace(self.lm.model, name, value_BD, token_B))
                row_B = fact_B * samples + sample_B
                found.append(self._probability(fact_B, row_B, span.start))
        gain_P = torch.cat(found).view(-1, samples).mean(1) - self.corrupted_E[self.fact_P]
        zero_C = gain_P.new_zeros(len(self.target_E) * len(GROUPS))
        count_C = zero_C.index_add(0, self.cell_P, torch.ones_like(gain_P))
        return (zero_C.index_add(0, self.cell_P, gain_P) / count_C).view(-1, len(GROUPS))

    def _probability(self, fact_B: Tensor, row_B: Tensor | None = None, start: int = 0) -> Tensor:
        """Return the answers' probability for rows of facts, from a block on.

        Args:
            fact_B: Fact of each row.
            row_B: Row of the noise; None runs without noise.
            start: First block to run; what enters it is known.
        """
        parts = {name: getattr(self.tokens, name)[fact_B] for name in self.tokens.__slots__}
        hidden_BTD = None if row_B is None or start == 0 else self.entering[start][row_B]
        changes = {}
        if row_B is not None and start == 0:
            embed = self.lm.model.get_input_embeddings()
            name = next(name for name, module in self.lm.model.named_modules() if module is embed)
            noise_BTD = self.noise_BTD[row_B]
            changes[name] = lambda x_BTD: (x_BTD.float() + noise_BTD).to(x_BTD.dtype)
        with trace.change(self.lm.model, changes):
            logits_BV = self.lm.target_logits(Tokens(**parts), start, hidden_BTD)
        return logits_BV.softmax(-1).gather(1, self.target_E[fact_B][:, None])[:, 0]


def _noise(
    lm: EditableLM, rows: list[FactRow], settings: TraceSettings, sigma: float, width: int
) -> Tensor:
    """Draw noise [B, T, D] for the subject's tokens, each fact from a seed of its own."""
    size = lm.model.get_input_embeddings().weight.shape[1]
    noise_ESTD = torch.zeros(len(rows), settings.samples, width, size)
    for i, row in enumerate(rows):
        generator = torch.Generator().manual_seed(settings.seed * SEEDS + row.number)
        length = row.last + 1 - row.first
        drawn_STD = torch.randn(settings.samples, length, size, generator=generator)
        noise_ESTD[i, :, row.first : row.last + 1] = sigma * drawn_STD
    return noise_ESTD.flatten(0, 1).to(lm.device)
