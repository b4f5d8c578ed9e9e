"""What the harness returned, put side by side: in a file and in a table."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from editkit.metrics.summary import write_json

Scores = dict[str, dict[str, Any]]


def pair_scores(task: str, before: dict[str, Any], after: dict[str, Any] | None) -> Scores:
    """Put the scores of one task side by side.

    Args:
        task: Name of a task or group.
        before: What `lm_eval.simple_evaluate` returned for the unedited model.
        after: The same for the edited model; None where there is none.
    """
    first, second = (
        {**run["results"], **run.get("groups", {})}[task] if run else {} for run in (before, after)
    )
    table: Scores = {}
    for key, value in first.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or _number(value) is None:
            continue
        error = f"{metric}_stderr,{filter_name}"
        cell = {
            "before": _number(value),
            "before_stderr": _number(first.get(error)),
            "higher_is_better": before["higher_is_better"].get(task, {}).get(metric),
        }
        if after is not None:
            cell["after"] = _number(second.get(key))
            cell["after_stderr"] = _number(second.get(error))
            if cell["after"] is not None:
                cell["difference"] = cell["after"] - cell["before"]
                pairs = [_by_question(run, task, metric, filter_name) for run in (before, after)]
                cell["difference_stderr"] = _paired_error(*pairs, cell["difference"])
        table[key] = cell
    return table


def _by_question(run: dict[str, Any], task: str, metric: str, filter_name: str) -> dict[Any, Any]:
    """Return one metric by question; empty for a group."""
    samples = run.get("samples", {}).get(task, [])
    return {s["doc_id"]: s.get(metric) for s in samples if s["filter"] == filter_name}


def _paired_error(one: dict[Any, Any], other: dict[Any, Any], difference: float) -> float | None:
    """Return the standard error of a mean difference over questions; None if it is no mean."""
    if len(one) < 2 or one.keys() != other.keys():
        return None
    values = [(_number(one[i]), _number(other[i])) for i in one]
    changes = [b - a for a, b in values if a is not None and b is not None]
    if len(changes) < len(values) or not math.isclose(
        statistics.fmean(changes), difference, rel_tol=1e-6, abs_tol=1e-9
    ):
        return None
    return statistics.stdev(changes) / math.sqrt(len(changes))


def _number(value: Any) -> float | None:
    """Return a finite number, or None: the harness writes `N/A` for what it does not know."""
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if is_number else None


def save_scores(path: Path, tasks: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """Write scores to a file; those of other tasks of the same model stay in it.

    Args:
        path: Such as `runs/x/lm_eval.json`.
        tasks: What `measure_tasks` returned.
        about: What was measured, such as its base and the hash of its edits.

    Raises:
        ValueError: If there is another file of that name.
    """
    kept: dict[str, Any] = {}
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            kept = old["tasks"] if old["about"] == about else {}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is no file of scores; give another --out") from error
    write_json(path, {"about": about, "tasks": {**kept, **tasks}})


def score_table(tasks: dict[str, dict[str, Any]]) -> Table:
    """Return the scores for people, each with its standard error."""
    edited = any("after" in c for t in tasks.values() for c in t["scores"].values())
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("task", "metric"):
        table.add_column(name, overflow="fold")
    heads = ("before", "after", "difference") if edited else ("before",)
    for name in (*heads, "questions"):
        label = "unedited" if name == "before" else "edited" if name == "after" else name
        table.add_column(label, justify="right", no_wrap=True)
    for task, entry in tasks.items():
        for i, (key, cell) in enumerate(entry["scores"].items()):
            shown = [_shown(cell, name, name == "difference") for name in heads]
            count = "" if entry["n"] is None else str(entry["n"])
            label = key.removesuffix(",none").replace(",", ", ")
            table.add_row("" if i else task, label, *shown, "" if i else count)
    return table


def _shown(cell: dict[str, Any], name: str, signed: bool) -> str:
    """Return `value ± standard error`, as far as known."""
    value, error = cell.get(name), cell.get(f"{name}_stderr")
    if value is None:
        return "-"
    digits = ".3f" if abs(value) < 1000 else ".3g"
    text = format(value, ("+" if signed else "") + digits)
    return text if error is None else f"{text} ± {error:.3f}"
