"""Which figures a report has: (caption, SVG) pairs from its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from editkit.report.figures import curves, glance
from editkit.report.load import Run
from editkit.report.rows import seconds
from editkit.report.tables import Table

Panels = list[tuple[str, str]]
BINS = 60  # points of a curve of seconds


def glance_svg(
    tables: dict[str, Table], names: Sequence[str], kinds: Sequence[str], scorer: str
) -> str:
    """Draw all kinds at all moments."""
    return glance(tables["scores"].frame, names, kinds, scorer) if "scores" in tables else ""


def age_panels(
    tables: dict[str, Table], names: Sequence[str], kinds: Sequence[str], scorer: str
) -> Panels:
    """Draw final scores by age, a kind a figure; none where all edits are of one age."""
    if "by_age" not in tables:
        return []
    frame = tables["by_age"].frame
    frame = frame[frame.scorer == scorer].assign(later_edits=(frame.youngest + frame.oldest) / 2)
    if frame.later_edits.nunique() < 2:
        return []
    return _by_kind(frame, names, kinds, "later_edits", scorer)


def edits_panels(
    tables: dict[str, Table], names: Sequence[str], kinds: Sequence[str], scorer: str
) -> Panels:
    """Draw scores by edits seen, a kind a figure; none where probes were asked once."""
    if "by_edits" not in tables:
        return []
    frame = tables["by_edits"].frame
    if frame.edits_seen.nunique() < 2:
        return []
    return _by_kind(frame, names, kinds, "edits_seen", scorer)


def ability_panels(tables: dict[str, Table], names: Sequence[str]) -> Panels:
    """Draw every measure of general ability by edits seen."""
    if "ability" not in tables:
        return []
    frame = tables["ability"].frame
    found = []
    for measure in dict.fromkeys(frame.measure):
        part = frame[frame.measure == measure]
        words = str(measure).replace("_", " ")
        found.append((words, curves(part, names, "edits_seen", f"{words} by edits seen")))
    return found


def cost_panels(runs: Sequence[Run]) -> Panels:
    """Draw seconds per edit along the stream: medians of up to 60 stretches."""
    import numpy as np
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for run in runs:
        times = seconds(run)
        for part in np.array_split(np.array(times), min(BINS, len(times)) or 1):
            if len(part):
                middle, median = part[:, 0].mean(), float(np.median(part[:, 1]))
                rows.append({"run": run.name, "edits_seen": middle, "value": median})
    if len(rows) < 2:
        return []
    names, title = [run.name for run in runs], "seconds per edit along the stream"
    return [(title, curves(pd.DataFrame(rows), names, "edits_seen", title, markers=False))]


def _by_kind(frame: Any, names: Sequence[str], kinds: Sequence[str], x: str, scorer: str) -> Panels:
    """Draw one figure a kind; gold locality is left to the tables where locality is drawn."""
    drawn = [kind for kind in kinds if kind != "locality_gold" or "locality" not in kinds]
    ticks = _log_ticks(frame[x]) if x == "edits_seen" else []
    found = []
    for kind in drawn:
        part = frame[frame.kind == kind]
        if part[x].nunique() > 1:
            name = kind.replace("_", " ")
            described = f"{name} by {x.replace('_', ' ')}, {scorer}"
            found.append((name, curves(part, names, x, described, ticks)))
    return found


def _log_ticks(values: Any) -> list[float]:
    """Return the values themselves, or powers of ten where they are many; none for a short span."""
    found = sorted(set(values))
    if found[-1] < 20 * found[0]:
        return []
    powers = [10.0**k for k in range(12) if found[0] <= 10**k <= found[-1]]
    return found if len(found) <= 6 else powers
