"""What fine-tuning leaves of edits, and how far it moved the model (protocol of Wen & Zhang 2025).

A model is asked three times: as it came (base, M0), edited (M_ed), and edited and fine-tuned
(M_ft). `s` is right (True) or wrong. Item by item, nan marks what a rate leaves out, so that the
mean of the rest is the rate and items can be resampled with their edits.

Legend: N places or items, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from editkit.functional.scores import answers_match, normalise_answer

Fate = Literal["stable", "erased_true", "erased_other", "erased_empty", "emergent", "impossible"]
NAN = float("nan")
Hits = Sequence[bool]


def edit_retention(base: Hits, edited: Hits, tuned: Hits) -> list[float]:
    """Items of the Edited Retention Rate: s(M_ft) over {s(M_ed) = 1 and s(M0) = 0}.

    >>> edit_retention([False, False, True], [True, True, True], [True, False, True])
    [1.0, 0.0, nan]
    """
    rows = zip(base, edited, tuned, strict=True)
    return [float(t) if e and not b else NAN for b, e, t in rows]


def fact_retention(base: Hits, edited: Hits, tuned: Hits) -> list[float]:
    """Items of the Intrinsic Retention Rate: s(M_ft) over {s(M0) = 1 and s(M_ed) = 1}.

    >>> fact_retention([True, True, False], [True, False, True], [False, True, True])
    [0.0, nan, nan]
    """
    rows = zip(base, edited, tuned, strict=True)
    return [float(t) if e and b else NAN for b, e, t in rows]


def flips(edited: Hits, tuned: Hits) -> list[float]:
    """Items of the Edit Flip Ratio: s(M_ft) = 0 over {s(M_ed) = 1} (Cheng et al. 2025, eq. 1).

    >>> flips([True, True, False], [False, True, True])
    [1.0, 0.0, nan]
    """
    return [float(not t) if e else NAN for e, t in zip(edited, tuned, strict=True)]


def emergence(edited: Hits, tuned: Hits) -> list[float]:
    """Items of the emergence rate: s(M_ft) = 1 over {s(M_ed) = 0}.

    >>> emergence([True, False, False], [False, True, False])
    [nan, 1.0, 0.0]
    """
    return [NAN if e else float(t) for e, t in zip(edited, tuned, strict=True)]


def relative_decrease(edited: float, tuned: float) -> float:
    """(S(M_ed) - S(M_ft)) / S(M_ed) of two mean scores; nan where there was nothing to lose.

    >>> relative_decrease(0.8, 0.6)
    0.25
    """
    return round((edited - tuned) / edited, 12) if edited else NAN


def log_odds_gap(kept: tuple[int, int], intrinsic: tuple[int, int]) -> float:
    """Log-odds of the intrinsic rate minus those of the edited one, half a count added to each.

    Args:
        kept: Edits that are kept, of how many.
        intrinsic: Intrinsic facts that are kept, of how many.

    >>> round(log_odds_gap((1, 2), (1, 2)), 6)
    0.0
    """

    def odds(hits: int, size: int) -> float:
        return math.log((hits + 0.5) / (size - hits + 0.5))

    return odds(*intrinsic) - odds(*kept)


def fate_of(edited: bool, tuned: bool, answer: str, old: str | None) -> Fate:
    """Say what became of one item; where it is lost, what the model says instead.

    Args:
        edited: Whether the edited model had it right.
        tuned: Whether the fine-tuned model has.
        answer: What the fine-tuned model says.
        old: What the model said before the edit; None where that is not known.

    >>> fate_of(True, False, "Paris.", "paris"), fate_of(False, True, "Rome", None)
    ('erased_true', 'emergent')
    """
    if not edited:
        return "emergent" if tuned else "impossible"
    if tuned:
        return "stable"
    if not normalise_answer(answer):
        return "erased_empty"
    return "erased_true" if old is not None and answers_match(answer, old) else "erased_other"


def nearest(
    wanted: Sequence[tuple[Hashable, float]], pool: Sequence[tuple[Hashable, float]], per: int
) -> list[list[int]]:
    """For each wanted (group, value) choose the `per` nearest of the pool's group, each once.

    One of each in turn, so that the first do not take all; the wanted are served in their order.

    >>> nearest([("a", 0.0), ("a", 1.0)], [("a", 0.9), ("a", 0.1), ("b", 0.0), ("a", 5.0)], 1)
    [[1], [0]]
    """
    free: dict[Hashable, list[int]] = {}
    for i, (group, _) in enumerate(pool):
        free.setdefault(group, []).append(i)
    found: list[list[int]] = [[] for _ in wanted]
    for _ in range(per):
        for mine, (group, value) in zip(found, wanted, strict=True):
            if left := free.get(group):
                best = min(left, key=lambda i: (abs(pool[i][1] - value), i))
                left.remove(best)
                mine.append(best)
    return found


def mean_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> float:
    """Mean of KL(p || q) over places, in nats, from log probabilities."""
    return float((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).mean())


def relative_change(before: Tensor, after: Tensor) -> float:
    """||after - before||_F / ||before||_F; inf where there was nothing before."""
    moved, size = float((after - before).norm()), float(before.norm())
    return moved / size if size else math.inf if moved else 0.0


def cosine(first: Tensor, second: Tensor) -> float | None:
    """Cosine between two changes of a weight, taken as vectors; None where one is zero."""
    sizes = float(first.norm() * second.norm())
    return float((first * second).sum()) / sizes if sizes else None


def dora_change(
    weight: Tensor, delta: Tensor, magnitude: Tensor, is_transposed: bool = False
) -> Tensor:
    """Change of a matrix by a DoRA adapter: m (W + sBA) / ||W + sBA|| - W (Liu et al. 2024, eq. 5).

    Args:
        weight: W, a row for each output.
        delta: sBA, of the same form.
        magnitude: m, one for each output.
        is_transposed: Outputs are columns, as in GPT-2's Conv1D.

    >>> w, up = Tensor([[3.0, 0.0]]), Tensor([[0.0, 4.0]])
    >>> dora_change(w, up, Tensor([10.0])).tolist()
    [[3.0, 8.0]]
    """
    moved = weight + delta
    axis = 0 if is_transposed else 1
    size = torch.linalg.vector_norm(moved, dim=axis, keepdim=True)
    change: Tensor = magnitude.reshape_as(size) / size * moved - weight
    return change
