"""How answers are asked for and judged; stamped on every number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Scorer = Literal["token_accuracy", "sequence_accuracy", "generation", "nll"]
SCORERS: tuple[Scorer, ...] = get_args(Scorer)
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

    Args:
        scorers: What to compute: `token_accuracy`, `sequence_accuracy` and `nll` under teacher
            forcing, `generation` by free greedy decoding.
        max_new_tokens: Budget of a free answer; a longer target has its own length and 8 more.
        stop: Strings that end a free answer, beside EOS.
        batch_size: Probes per forward pass; does not change any score.

    Raises:
        ValueError: If a scorer is unknown or twice there, a stop is empty, or a size is below 1.
    """

    scorers: tuple[Scorer, ...] = SCORERS
    max_new_tokens: int = 50
    stop: tuple[str, ...] = ("\n", ".")
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Check user input."""
        wrong = [s for s in self.scorers if s not in SCORERS]
        if wrong or not self.scorers or len(set(self.scorers)) < len(self.scorers):
            raise ValueError(f"scorers {self.scorers} must be some of {SCORERS}, each once")
        if not all(self.stop):
            raise ValueError(f"stop {self.stop!r} holds an empty string; it would cut everything")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def is_forced(self) -> bool:
        """Whether any scorer needs the teacher-forced pass."""
        return any(s != "generation" for s in self.scorers)

    @property
    def is_free(self) -> bool:
        """Whether free answers are needed."""
        return "generation" in self.scorers

    def budget(self, target_tokens: int) -> int:
        """Return how many tokens a free answer to a target of this length may take."""
        return max(self.max_new_tokens, target_tokens + BUDGET_SLACK)
