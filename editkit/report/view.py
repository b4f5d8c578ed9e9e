"""What the page shows of runs and tables, in the shape that its template walks through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from editkit.report import protocol, words
from editkit.report.figures import SERIES, letter
from editkit.report.load import Run
from editkit.report.measure import scores_of
from editkit.report.tables import Table

MOST_FAILED = 6000  # rows on the page, so that it stays below some megabytes
MOST_TEXT = 300  # characters of one cell


def title(runs: Sequence[Run]) -> str:
    """Name the run, or what is put side by side."""
    if len(runs) == 1:
        return runs[0].name
    return " and ".join(run.name for run in runs) if len(runs) == 2 else f"{len(runs)} runs"


def story(run: Run, scorer: str) -> str:
    """Say in a sentence or two what became of the edits themselves."""
    final = scores_of(run.last, "reliability", scorer)
    early = {s.name: s.value for s in scores_of(run.immediate, "reliability", scorer)}
    taken = [s.value for s in final if early.get(s.name) == 1.0]
    told = ""
    if final and early and scorer not in words.HAS_NO_RIGHT_ANSWER:
        kept = sum(value == 1.0 for value in taken)
        told = (
            f"Of {len(final)} edited prompts, {len(taken)} were answered right just after their "
            f"edit; {kept} of these still are, {len(taken) - kept} are forgotten."
        )
    if score := run.summary.get("score"):
        told += (
            f" CounterFact's score, the harmonic mean of efficacy, generalization and specificity "
            f"by pair, is {words.number(score['value'])}."
        )
    return told


def sections(runs: Sequence[Run], tables: dict[str, Table]) -> list[tuple[str, str]]:
    """List the sections that there are, for the links at the top."""
    has_axes = bool((tables["scores"].frame.axis != "").any()) if "scores" in tables else False
    return [
        ("glance", "At a glance"),
        *([("comparison", "Paired comparison")] if len(runs) > 1 else []),
        ("forgetting", "Forgetting"),
        ("ability", "General ability"),
        *([("breakdown", "Where it works")] if has_axes or "relations" in tables else []),
        *([("routing", "Routing")] if "routing" in tables else []),
        ("cost", "Cost"),
        ("failed", "Failed probes"),
        *([("conflicts", "Conflicts")] if "conflicts" in tables else []),
        ("protocol", "Protocol"),
    ]


def estimates(tables: dict[str, Table]) -> dict[tuple[str, str, str, str, str], Any]:
    """Return the estimates by run, moment, kind, scorer and axis."""
    if "scores" not in tables:
        return {}
    rows = tables["scores"].frame.itertuples(index=False)
    return {(r.run, r.moment, r.kind, r.scorer, r.axis): r for r in rows}


def retention(tables: dict[str, Table], names: Sequence[str]) -> list[Any]:
    """Return for each run its number, the columns of its matrix and its rows."""
    found: list[Any] = []
    if "retention" not in tables:
        return found
    frame = tables["retention"].frame
    for i, name in enumerate(names):
        cells = {(r.first, r.last, r.asked_after): r.value
                 for r in frame[frame.run == name].itertuples()}  # fmt: skip
        columns = sorted({seen for _, _, seen in cells})
        groups = sorted({key[:2] for key in cells})
        rows = [
            (f"{a} to {b}" if b > a else str(a), [cells.get((a, b, seen)) for seen in columns])
            for a, b in groups
        ]
        if rows:
            found.append((i, columns, rows))
    return found


def breakdown(cells: dict[Any, Any], names: Sequence[str], scorer: str) -> list[Any]:
    """Return (axis, kind, estimate of each run) of every axis."""
    axes = dict.fromkeys((key[4], key[2]) for key in cells if key[4] and key[3] == scorer)
    return [
        (axis, kind, [cells.get((name, "final", kind, scorer, axis)) for name in names])
        for axis, kind in axes
    ]


def relations(
    tables: dict[str, Table], names: Sequence[str], kinds: Sequence[str]
) -> dict[str, Any] | None:
    """Return the kinds, and (relation, probes, values by kind of each run), the largest first."""
    if "relations" not in tables:
        return None
    frame = tables["relations"].frame
    cells = {(r.relation, r.run, r.kind): r.value for r in frame.itertuples()}
    counts = frame.groupby("relation").probes.sum() // frame.run.nunique()
    counts = counts.sort_values(ascending=False, kind="stable")
    shown = [kind for kind in kinds if kind in set(frame.kind)]
    rows = [
        (relation, int(count), [[cells.get((relation, n, k)) for k in shown] for n in names])
        for relation, count in counts.items()
    ]
    return {"kinds": shown, "rows": rows}


def protocol_card(runs: Sequence[Run]) -> list[tuple[str, list[Any], bool, str]]:
    """Return each stamped field, its values, whether they differ, and why they may."""
    return [
        (name, values, protocol.differ(values), protocol.why_it_may_differ(name))
        for name, values in protocol.fields(runs).items()
    ]


def failed(runs: Sequence[Run], tables: dict[str, Table], scorer: str) -> dict[str, Any]:
    """Return what the table of failed probes needs, an even spread of at most `MOST_FAILED`."""
    if "failed" not in tables:
        told = any(scorer in row["scores"] for run in runs for row in run.last)
        has_right = told and scorer not in words.HAS_NO_RIGHT_ANSWER
        why = "No probe failed." if has_right else "There are no rows of single probes to show."
        return {"failed": None, "no_failed": why, "left_out": 0}
    frame = tables["failed"].frame
    step = -(-len(frame) // MOST_FAILED)
    shown = frame.iloc[::step]
    rows = [[_clip(value) for value in row] for row in shown.itertuples(index=False)]
    letters = {run.name: [letter(i), i % SERIES] for i, run in enumerate(runs)}
    failed = {"columns": [*frame.columns], "rows": rows, "letters": letters}
    return {"failed": failed, "no_failed": "", "left_out": len(frame) - len(rows)}


def _clip(value: Any) -> Any:
    """Return a value as JSON has it, long texts cut."""
    if isinstance(value, str):
        return value if len(value) <= MOST_TEXT else value[:MOST_TEXT] + "…"
    if value is None or value != value:
        return None
    return value.item() if hasattr(value, "item") else value


def plain(value: Any) -> str:
    """Return the value of a cell as text."""
    return words.number(value) if isinstance(value, float) else str(value)
