"""What differs between runs, probe by probe.

Runs of one protocol asked the same probes of the same base after the same edits, so their scores
are paired. The mean difference carries a bootstrap interval that resamples edits, since the probes
of one edit succeed and fail together. Its p-value flips the sign of whole edits (a permutation
test; with one right-or-wrong probe an edit it is McNemar's). McNemar's exact test on single probes
stands beside it for right-or-wrong scores. Where several runs are compared with the reference, the
p-values of one measure are corrected by Holm's step-down procedure (Holm 1979).

Legend: P pairs of scores, C edits (clusters of pairs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from editkit.report.files import Row
from editkit.report.load import Run
from editkit.report.measure import measures, scores_of
from editkit.report.words import LOWER_IS_BETTER

LEVEL = 0.05
FLIPS = 4999
BATCH_ENTRIES = 2_000_000  # flipped signs held at once
FEWEST = 6  # with fewer edits no flip of signs is rarer than 0.05
SAME = "the same on every probe"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """One measure of one run against the reference, on the probes that both were asked.

    Args:
        reference: Name of the reference.
        run: Name of the run.
        moment: `final` or `right after`.
        kind: Kind of row.
        scorer: Score that is compared.
        reference_value: Mean of the reference over the pairs.
        run_value: Mean of the run over the pairs.
        difference: Run minus reference.
        low: Lower end of its 95 % interval; None from one edit.
        high: Upper end.
        pairs: Probes that count in both runs.
        edits: Edits that these belong to.
        only_reference: Probes right in the reference alone; None where a score is no yes or no.
        only_run: Probes right in the run alone.
        mcnemar_p: Exact two-sided p of these two counts.
        p: Two-sided p of the difference, by edits.
        p_holm: The same, corrected for the number of runs against the reference.
        verdict: In words.
    """

    reference: str
    run: str
    moment: str
    kind: str
    scorer: str
    reference_value: float
    run_value: float
    difference: float
    low: float | None
    high: float | None
    pairs: int
    edits: int
    only_reference: int | None
    only_run: int | None
    mcnemar_p: float | None
    p: float
    p_holm: float
    verdict: str


def compare_runs(runs: Sequence[Run]) -> list[Comparison]:
    """Compare every run with the first one, on all kinds and scorers that both have."""
    families: dict[tuple[str, str, str], list[Comparison]] = {}
    reference, *others = runs
    for run in others:
        for moment, first, second in (
            ("final", reference.last, run.last),
            ("right after", reference.immediate, run.immediate),
        ):
            for (kind, scorer), (a_P, b_P, edits) in _pairs(first, second).items():
                one = _compare((reference.name, run.name, moment, kind, scorer), a_P, b_P, edits)
                families.setdefault((moment, kind, scorer), []).append(one)
    found: list[Comparison] = []
    kinds = [*reference.summary["scores"]]
    for name in sorted(families, key=lambda f: (f[0], kinds.index(f[1]) if f[1] in kinds else 99)):
        family = families[name]
        corrected = holm([one.p for one in family])
        with_p = [replace(one, p_holm=p) for one, p in zip(family, corrected, strict=True)]
        found += [replace(one, verdict=verdict(one)) for one in with_p]
    return found


def verdict(one: Comparison) -> str:
    """Say in words what a comparison shows."""
    if one.verdict == SAME:
        return SAME
    if one.edits < FEWEST or one.low is None or one.high is None:
        return f"too few edits to tell ({one.edits})"
    if one.p_holm >= LEVEL or one.low <= 0 <= one.high:
        return "no clear difference"
    better = (one.difference > 0) != (one.scorer in LOWER_IS_BETTER)
    return f"{'better' if better else 'worse'} by {abs(one.difference):.3g}"


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the p-values of one family by Holm's step-down procedure.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(p) for p in corrected]


def mcnemar(only_reference: int, only_run: int) -> float:
    """Return the exact two-sided p of two counts of discordant pairs (McNemar 1947).

    >>> round(mcnemar(0, 5), 6)
    0.0625
    """
    from scipy.stats import binomtest

    total = only_reference + only_run
    return float(binomtest(only_run, total, 0.5).pvalue) if total else 1.0


def sign_flip(difference_C: Floats, seed: int = 0) -> float:
    """Return the two-sided p of a sum if each edit's difference were as likely of either sign.

    Exact for up to 12 edits that differ, else from 4,999 random flips; `permutation_test` of scipy
    finds the same in ten times the time.

    Args:
        difference_C: Sum of each edit's differences.
        seed: Seed of the flips.
    """
    moved_C = difference_C[difference_C != 0]
    size = len(moved_C)
    least = abs(moved_C.sum()) * (1 - 1e-12)  # sums of another order round differently
    if 2**size <= FLIPS:
        flipped = (np.arange(2**size)[:, None] >> np.arange(size)) & 1
        return float(np.mean(abs(moved_C.sum() - 2 * flipped @ moved_C) >= least))
    draw, hits = np.random.default_rng(seed), 0
    for done in range(0, FLIPS, step := max(1, BATCH_ENTRIES // size)):
        shape = min(step, FLIPS - done), -(-size // 8)
        drawn = draw.integers(0, 256, shape, dtype=np.uint8)
        flipped = np.unpackbits(drawn, axis=1, count=size).astype(float)
        hits += int((abs(moved_C.sum() - 2 * flipped @ moved_C) >= least).sum())
    return (hits + 1) / (FLIPS + 1)


def _compare(
    names: tuple[str, str, str, str, str], a_P: Floats, b_P: Floats, edits: list[int | None]
) -> Comparison:
    """Compare paired scores; p is not corrected yet."""
    from editkit.metrics.intervals import estimate

    gap_P = b_P - a_P
    cell = estimate(gap_P.tolist(), edits)
    only_a = only_b = p_mcnemar = None
    if {*a_P.tolist(), *b_P.tolist()} <= {0.0, 1.0}:
        only_a, only_b = int((gap_P < 0).sum()), int((gap_P > 0).sum())
        p_mcnemar = mcnemar(only_a, only_b)
    p = sign_flip(_by_edit(gap_P, edits))
    return Comparison(
        *names, float(a_P.mean()), float(b_P.mean()), float(gap_P.mean()), cell["low"],
        cell["high"], len(gap_P), cell["edits"], only_a, only_b, p_mcnemar, p, p,
        "" if gap_P.any() else SAME,
    )  # fmt: skip


def _pairs(
    first: Sequence[Row], second: Sequence[Row]
) -> dict[tuple[str, str], tuple[Floats, Floats, list[int | None]]]:
    """Match the scores of the same question, by kind and scorer: both runs', and the edits."""
    found = {}
    for kind, scorers in measures(second).items():
        for scorer in scorers:
            known = {score.name: score.value for score in scores_of(first, kind, scorer)}
            pairs = [
                (known[score.name], score.value, score.edit)
                for score in scores_of(second, kind, scorer)
                if np.isfinite([known.get(score.name, np.nan), score.value]).all()
            ]
            if pairs:
                a, b, edits = zip(*pairs, strict=True)
                found[kind, scorer] = np.array(a), np.array(b), [*edits]
    return found


def _by_edit(gap_P: Floats, edits: Sequence[int | None]) -> Floats:
    """Sum differences by edit; a pair without an edit stands alone."""
    sums: dict[object, float] = {}
    for i, (gap, edit) in enumerate(zip(gap_P.tolist(), edits, strict=True)):
        name = ("lone", i) if edit is None else edit
        sums[name] = sums.get(name, 0.0) + gap
    return np.array([*sums.values()])
