"""Intervals of mean scores: a bootstrap that resamples edits, not probes.

The probes of one edit succeed and fail together, so edits are the unit that varies.

Legend: C clusters, R rows (probes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

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
