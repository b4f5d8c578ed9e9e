"""A summary for people: two rich tables, readable at 100 columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from editkit.metrics.intervals import Estimate
from editkit.metrics.protocol import SCORERS

CURVE_SCORERS = (  # the first one there
    "generation", "judge", "sequence_accuracy", "choice", "pair", "token_accuracy", "nll",
)  # fmt: skip


def summary_table(summary: dict[str, Any]) -> Table:
    """Return kinds by scorers: final with its 95 % interval, and right after each edit.

    Args:
        summary: What `editkit.metrics.summary.summarise` returned.
    """
    seen = summary["edits_seen"]
    title = f"{summary['method']} on {summary['base']}, {seen} edit{'' if seen == 1 else 's'}"
    table = Table(title=title, caption=_caption(summary), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("kind", "scorer"):
        table.add_column(name, no_wrap=True)
    for name in ("final", "95 % interval", "immediate", "probes"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind, cells in summary["scores"].items():
        early = summary["immediate"].get(kind, {})
        scorers = [s for s in SCORERS if s in cells]
        for scorer in scorers:
            table.add_row(
                kind if scorer == scorers[0] else "",
                scorer,
                _number(cells[scorer]["value"]),
                _interval(cells[scorer]),
                _number(early[scorer]["value"]) if scorer in early else "",
                f"{cells[scorer]['n']}",
                end_section=scorer == scorers[-1],
            )
    return table


def age_table(summary: dict[str, Any], scorer: str | None = None) -> Table:
    """Return the final scores of old and new edits side by side, newest first.

    Args:
        summary: What `editkit.metrics.summary.summarise` returned.
        scorer: Score to show; None shows the strictest there is.
    """
    curve = summary["by_age"]
    kinds = list(dict.fromkeys(kind for bucket in curve for kind in bucket["scores"]))
    seen = {s for bucket in curve for cells in bucket["scores"].values() for s in cells}
    scorer = scorer or next((s for s in CURVE_SCORERS if s in seen), SCORERS[0])
    title = f"final {scorer} by the number of later edits"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("later edits", no_wrap=True)
    for name in ("edits", *kinds):
        table.add_column(name.replace("_", "\n"), justify="right", vertical="bottom")
    for bucket in curve:
        low, high = bucket["age"]
        cells = [bucket["scores"].get(kind, {}).get(scorer) for kind in kinds]
        shown = [_number(cell["value"]) if cell else "" for cell in cells]
        table.add_row(f"{low} to {high}", str(bucket["edits"]), *shown)
    return table


def _caption(summary: dict[str, Any]) -> str:
    """Name what the table leaves out and what editing has cost."""
    parts = []
    if score := summary.get("score"):
        parts.append(f"CounterFact score {_number(score['value'])} ({_interval(score)})")
    before, after = summary["perplexity"]["before"], summary["perplexity"]["after"]
    if before is not None and after is not None:
        parts.append(f"perplexity {before:.4g} to {after:.4g}")
    if rates := summary.get("routing"):
        told = [f"{name} {_number(cell['value'])}" for name, cell in rates.items()]
        parts.append("routing: " + ", ".join(told).replace("_", " "))
    if loop := summary.get("loop"):
        parts.append(", ".join(f"{name} {value:.3g}" for name, value in loop.items()))
    if summary["seconds_per_edit"] is not None:
        parts.append(f"{summary['seconds_per_edit']:.3g} s per edit")
    if summary["peak_memory_bytes"] is not None:
        parts.append(f"peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB")
    if summary["uncounted"]:
        named = ", ".join(f"{n} {kind}" for kind, n in summary["uncounted"].items())
        parts.append(f"left out, conditions not met: {named}")
    return "; ".join(parts)


def _number(value: float | None) -> str:
    """Return three decimals, or fewer where they would say nothing."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def _interval(cell: Estimate) -> str:
    """Return `low to high`, or a dash where there is none."""
    return "-" if cell["low"] is None else f"{_number(cell['low'])} to {_number(cell['high'])}"
