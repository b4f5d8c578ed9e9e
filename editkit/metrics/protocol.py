"""How answers are asked for and judged; stamped on every number."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from editkit.metrics.essays import ReferenceTexts
from editkit.metrics.judge import Judge

Scorer = Literal[
    "token_accuracy",
    "sequence_accuracy",
    "generation",
    "nll",
    "pair",
    "pair_diff",
    "choice",
    "choice_norm",
    "perplexity",
    "ood",
    "ood_instance",
    "judge",
    "fluency",
    "consistency",
    "first_token",
]
Quirk = Literal["zsre_retokenised", "zsre_double_space", "zsre_bos_answer"]
SCORERS: tuple[Scorer, ...] = get_args(Scorer)
DEFAULT_SCORERS: tuple[Scorer, ...] = SCORERS[: SCORERS.index("perplexity")]
HIT_SCORERS: tuple[Scorer, ...] = (  # 1 or 0 a row: of several wordings any may be the right one
    "sequence_accuracy",
    "generation",
    "pair",
    "choice",
    "choice_norm",
    "judge",
    "first_token",
)
LOWER_IS_BETTER: tuple[Scorer, ...] = ("nll", "perplexity")
FREE_SCORERS: tuple[Scorer, ...] = ("generation", "judge")
ESSAY_SCORERS: tuple[Scorer, ...] = ("fluency", "consistency")
QUIRKS: tuple[Quirk, ...] = get_args(Quirk)
ROW_KINDS: tuple[str, ...] = (
    "reliability",
    "generalization",
    "portability",
    "locality",
    "locality_gold",
    "intrinsic",
)
BUDGET_SLACK = 8  # tokens that an answer may take beyond its target's own, to be seen to run on


@dataclass(frozen=True)
class EvalProtocol:
    """One way of scoring probes, the same for every method.

    Under teacher forcing: `token_accuracy` and `sequence_accuracy` (share of the target's tokens
    that are the most likely, and whether all are), `first_token` (whether the first one is), `nll`
    (nats per token), `perplexity` (its exponential), `ood` (share of all tokens of prompt and
    target with a probability above 0.8, the figure of WISE's Temporal) and `ood_instance` (whether
    the target's mean is above it).
    Against other answers, where a probe has them: `pair` (target likelier per token than `rival`,
    CounterFact's success), `pair_diff` (difference of those probabilities), `choice` and
    `choice_norm` (target likelier than every one of `choices`: as a whole, and per token).
    Freely: `generation` (greedy answer equals the target or an alias), `judge` (says `judge`).
    On longer texts that the model goes on with from edited prompts: `fluency` (entropy of
    n-grams) and `consistency` (likeness to `reference_texts`).

    Args:
        scorers: What to compute. Those that a probe has no data for leave no score.
        max_new_tokens: Budget of a free answer; a longer target has its own length and 8 more.
        stop: Strings that end a free answer, beside EOS.
        batch_size: Probes per forward pass; does not change any score.
        judge: Who gives verdicts on free answers, for the scorer `judge`.
        reference_texts: What to compare texts with, for the scorer `consistency`.
        essay_tokens: Length of those texts, prompt included (ROME: 100).
        compat: Quirks of released code to reproduce, for comparison with published tables; see
            `editkit.metrics.compat`.

    Raises:
        ValueError: If a name is unknown or twice there, a stop is empty, a size is below 1, or
            a scorer lacks what it needs.
    """

    scorers: tuple[Scorer, ...] = DEFAULT_SCORERS
    max_new_tokens: int = 50
    stop: tuple[str, ...] = ("\n", ".")
    batch_size: int = 64
    judge: Judge | None = None
    reference_texts: ReferenceTexts | None = None
    essay_tokens: int = 100
    compat: tuple[Quirk, ...] = ()

    def __post_init__(self) -> None:
        """Check user input."""
        wrong = [s for s in self.scorers if s not in SCORERS]
        if wrong or not self.scorers or len(set(self.scorers)) < len(self.scorers):
            raise ValueError(f"scorers {self.scorers} must be some of {SCORERS}, each once")
        if not all(self.stop):
            raise ValueError(f"stop {self.stop!r} holds an empty string; it would cut everything")
        for name in ("max_new_tokens", "batch_size", "essay_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if "judge" in self.scorers and self.judge is None:
            raise ValueError(
                "the scorer 'judge' needs a judge, such as "
                "judge: {class_path: editkit.metrics.judge.LocalJudge, init_args: {lm: {id: ...}}}"
            )
        if "consistency" in self.scorers and self.reference_texts is None:
            raise ValueError(
                "the scorer 'consistency' needs texts to compare with: reference_texts: "
                "{path: FILE}, a JSON object of target: [texts]"
            )
        if unknown := [q for q in self.compat if q not in QUIRKS]:
            raise ValueError(f"compat {unknown} is none of {QUIRKS}")

    @property
    def is_free(self) -> bool:
        """Whether free answers are needed."""
        return any(s in self.scorers for s in FREE_SCORERS)

    @property
    def is_forced(self) -> bool:
        """Whether any scorer needs texts forced on the model."""
        return any(s not in FREE_SCORERS + ESSAY_SCORERS for s in self.scorers)

    def asks(self, *scorers: Scorer) -> bool:
        """Whether any of these scorers is asked for."""
        return any(s in self.scorers for s in scorers)

    def budget(self, target_tokens: int) -> int:
        """Return how many tokens a free answer to a target of this length may take."""
        return max(self.max_new_tokens, target_tokens + BUDGET_SLACK)

    def describe(self) -> dict[str, Any]:
        """Return the protocol as JSON has it; a judge and texts by the name of what they are."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        named = {k: v.name for k, v in found.items() if isinstance(v, Judge | ReferenceTexts)}
        lists = {k: list(v) for k, v in found.items() if isinstance(v, tuple)}
        return {**found, **named, **lists}
