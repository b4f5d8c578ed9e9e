"""Intervals of mean scores: a bootstrap that resamples edits, not probes.

The probes of one edit succeed and fail together, so edits are the unit that varies.

Legend: C clusters, R rows (probes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95
BATCH_ENTRIES = 2_000_000  # resampled clusters held at once: about 50 MB


class Estimate(TypedDict):
    """A mean with its interval; None where there is nothing, or too little, to estimate from."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    edits: int


def estimate(values: Sequence[float], edit_ids: Sequence[int | None], seed: int = 0) -> Estimate:
    """Mean over rows with a 95 % percentile bootstrap interval clustered by edit.

    A resample draws edits with replacement and takes the ratio of the sums over their rows. Rows
    without an edit are each a cluster of their own. The result does not depend on the order of
    the rows. From one cluster there is no interval; from scores that are all equal it has width
    0, which says that nothing varied in the sample and no more.

    Args:
        values: One score per row; nan is left out.
        edit_ids: Edit of each row; None for rows that belong to no edit.
        seed: Seed of the resampling.

    Returns:
        The mean, its interval, the number of rows and of clusters.
    """
    from scipy.stats import bootstrap

    sum_C, count_C = _clusters(values, edit_ids)
    result = Estimate(value=None, low=None, high=None, n=int(count_C.sum()), edits=len(count_C))
    if len(count_C) > 0:
        result["value"] = float(sum_C.sum() / count_C.sum())
    if len(count_C) > 1:
        found = bootstrap(
            (sum_C, count_C),
            lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
            n_resamples=RESAMPLES,
            batch=max(1, BATCH_ENTRIES // len(count_C)),
            vectorized=True,
            paired=True,
            confidence_level=LEVEL,
            method="percentile",
            random_state=np.random.default_rng(seed),
        ).confidence_interval
        result["low"], result["high"] = float(found.low), float(found.high)
    return result


def estimate_harmonic(
    parts: Sequence[tuple[Sequence[float], Sequence[int | None]]], seed: int = 0
) -> Estimate:
    """Harmonic mean of several means over rows (CounterFact's score), resampled by edit.

    A resample draws edits with replacement and takes all their rows, of every part: what varies
    together among the parts does so in the interval. A mean of 0 makes it 0.

    Args:
        parts: Scores and edits of the rows of each mean; no score is negative.
        seed: Seed of the resampling.

    Returns:
        The harmonic mean, its interval, the number of rows and of clusters; no value where a part
        has no rows.
    """
    sum_PC, count_PC = _table(parts)
    size = sum_PC.shape[1]
    result = Estimate(value=None, low=None, high=None, n=int(count_PC.sum()), edits=size)
    if not parts or not count_PC.sum(1).all():
        return result
    result["value"] = float(_harmonic(sum_PC.sum(1), count_PC.sum(1)))
    if size > 1:
        draw = np.random.default_rng(seed)
        found = []
        for done in range(0, RESAMPLES, step := max(1, BATCH_ENTRIES // size)):
            times_RC = draw.multinomial(size, [1 / size] * size, min(step, RESAMPLES - done))
            found.append(_harmonic(times_RC @ sum_PC.T, times_RC @ count_PC.T))
        tail = (1 - LEVEL) / 2
        low, high = np.nanquantile(np.concatenate(found), [tail, 1 - tail])
        result["low"], result["high"] = float(low), float(high)
    return result


def estimate_contrast(
    first: tuple[Sequence[float], Sequence[int | None]],
    second: tuple[Sequence[float], Sequence[int | None]],
    how: Literal["difference", "ratio"],
    seed: int = 0,
    is_joint: bool = False,
) -> Estimate:
    """Mean of one set of rows minus, or over, the mean of another, each resampled by its edits.

    Args:
        first: Scores and edits of its rows; nan is left out.
        second: The same; the sets share no edit, unless they are resampled together.
        how: `difference` is first - second, `ratio` is first / second.
        seed: Seed of the resampling.
        is_joint: Draw an edit's rows of both sets together, as `estimate_harmonic` does.

    Returns:
        The contrast, its interval, the number of rows and of clusters; no value where a set has no
        rows, or the second mean of a ratio is 0. Resamples that have no ratio are left out.
    """
    if is_joint:
        parts = [*zip(*_table((first, second)), strict=True)]
        size = len(parts[0][0])
    else:
        parts = [_clusters(*part) for part in (first, second)]
        size = sum(len(count_C) for _, count_C in parts)
    count = int(sum(count_C.sum() for _, count_C in parts))
    result = Estimate(value=None, low=None, high=None, n=count, edits=size)
    if not all(count_C.sum() for _, count_C in parts):
        return result

    def contrast(means: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            out = means[0] - means[1] if how == "difference" else means[0] / means[1]
        return np.asarray(np.where(np.isfinite(out), out, np.nan))

    value = float(contrast([sum_C.sum() / count_C.sum() for sum_C, count_C in parts]))
    result["value"] = None if math.isnan(value) else value
    if is_joint and result["edits"] == 1:
        return result  # from one cluster there is no interval
    draw, means = np.random.default_rng(seed), list[NDArray[np.float64]]()
    times_RC = np.zeros((0, 0), dtype=np.int64)
    for sum_C, count_C in parts:
        size = len(count_C)
        if not (is_joint and means):
            times_RC = draw.multinomial(size, [1 / size] * size, RESAMPLES)
        with np.errstate(divide="ignore", invalid="ignore"):
            means.append((times_RC @ sum_C) / (times_RC @ count_C))
    found = contrast(means)
    if result["value"] is not None and not np.isnan(found).all():
        tail = (1 - LEVEL) / 2
        low, high = np.nanquantile(found, [tail, 1 - tail])
        result["low"], result["high"] = float(low), float(high)
    return result


def _table(
    parts: Sequence[tuple[Sequence[float], Sequence[int | None]]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sum and the number of rows of each part and cluster, [P, C]; nan is left out."""
    columns: dict[object, int] = {}
    kept = []
    for p, (values, edit_ids) in enumerate(parts):
        for r, (value, edit_id) in enumerate(zip(values, edit_ids, strict=True)):
            if not math.isnan(value):
                name = (p, r) if edit_id is None else edit_id
                kept.append((p, columns.setdefault(name, len(columns)), value))
    sum_PC, count_PC = np.zeros((2, len(parts), len(columns)))
    for p, column, value in kept:
        sum_PC[p, column] += value
        count_PC[p, column] += 1
    return sum_PC, count_PC


def _harmonic(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the harmonic mean of sums / counts over the last axis; nan where a count is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse: NDArray[np.float64] = (counts / sums).mean(-1)  # of a mean of 0: inf
        whole = np.where(counts.all(-1), inverse, np.nan)
        return np.asarray(1 / whole)


def _clusters(
    values: Sequence[float], edit_ids: Sequence[int | None]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sum and the number of rows of each cluster, named edits first, in their order."""
    pairs = zip(values, edit_ids, strict=True)
    kept = [(float(v), e) for v, e in pairs if not math.isnan(v)]
    lone = sorted(v for v, e in kept if e is None)
    named = [(v, e) for v, e in kept if e is not None]
    _, cluster_R = np.unique([e for _, e in named], return_inverse=True)
    sum_C = np.bincount(cluster_R, weights=[v for v, _ in named])
    count_C = np.bincount(cluster_R).astype(np.float64)
    return np.concatenate([sum_C, lone]), np.concatenate([count_C, np.ones(len(lone))])
