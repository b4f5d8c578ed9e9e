"""The rows of a report's tables, each a record of plain values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from editkit.metrics.routing import routing_table
from editkit.report import protocol
from editkit.report.files import Row
from editkit.report.load import Run
from editkit.report.measure import measure, measures

AFTERWARDS = {
    "reapplied": "put on afterwards",
    "reedited": "edited afterwards",
    "rekeyed": "keys found again",
}
HARNESS = ("before", "after", "difference", "difference_stderr")
ESTIMATE = ("value", "low", "high", "probes", "edits")


def scores(runs: Sequence[Run]) -> Iterable[Row]:
    """Yield each estimate of the summaries, and of the unedited model."""
    for run in runs:
        for moment, table in (
            ("before", _score_table(run.unedited)),
            ("right after", run.summary["immediate"]),
            ("final", run.summary["scores"]),
        ):
            for kind, cells in table.items():
                for scorer, cell in cells.items():
                    yield _row(cell, run, moment=moment, kind=kind, axis="", scorer=scorer)
        for kind, named in run.summary.get("axes", {}).items():
            for axis, cells in named.items():
                for scorer, cell in cells.items():
                    yield _row(cell, run, moment="final", kind=kind, axis=axis, scorer=scorer)


def ages(runs: Sequence[Run]) -> Iterable[Row]:
    """Yield the final scores by the number of later edits."""
    for run in runs:
        for bucket in run.summary["by_age"]:
            for kind, cells in bucket["scores"].items():
                for scorer, cell in cells.items():
                    youngest, oldest = bucket["age"]
                    yield _row(
                        cell, run, youngest=youngest, oldest=oldest, kind=kind, scorer=scorer
                    )


def by_edits(runs: Sequence[Run], scorer: str) -> Iterable[Row]:
    """Yield the scores each time all probes were asked."""
    for run in runs:
        for seen, rows in run.asked.items():
            for kind in dict.fromkeys(row["kind"] for row in rows):
                cell = measure(rows, kind, scorer)
                if cell["n"]:
                    yield _row(cell, run, edits_seen=seen, kind=kind, scorer=scorer)


def retention(runs: Sequence[Run], scorer: str) -> Iterable[Row]:
    """Yield reliability of the edits made between two milestones, at every later one."""
    for run in runs:
        ends = [*run.asked]
        for start, end in zip([0, *ends], ends, strict=False):
            for seen in (s for s in ends if s >= end and len(ends) > 1):
                rows = [r for r in run.asked[seen] if r["edit_id"] is not None]
                group = [r for r in rows if start <= r["edit_id"] < end]
                cell = measure(group, "reliability", scorer)
                if cell["n"]:
                    yield _row(cell, run, first=start, last=end - 1, asked_after=seen)


def abilities(runs: Sequence[Run]) -> Iterable[Row]:
    """Yield every number of `ability.jsonl`, and perplexity before and after from the summary."""
    for run in runs:
        perplexity = run.summary.get("perplexity") or {}
        ends = {0: perplexity.get("before"), run.asked_at: perplexity.get("after")}
        told = {row["edits_seen"] for row in run.ability if "perplexity" in row}
        known = [{"edits_seen": k, "perplexity": v} for k, v in ends.items() if k not in told]
        for row in sorted([*run.ability, *known], key=lambda row: row["edits_seen"]):
            for name, value in row.items():
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if name not in ("edits_seen", "seconds") and is_number:
                    seen = row["edits_seen"]
                    yield {"run": run.name, "edits_seen": seen, "measure": name, "value": value}


def routing(runs: Sequence[Run]) -> Iterable[Row]:
    """Yield where prompts were routed each time all probes were asked; nothing where none are."""
    for run in runs:
        for seen, rows in run.asked.items():
            for name, cell in routing_table(rows).items():
                yield _row(cell, run, edits_seen=seen, rate=name)
        for name, value in run.summary.get("loop", {}).items():
            seen = run.summary["edits_seen"]
            yield {"run": run.name, "edits_seen": seen, "rate": name, "value": value}


def harness(runs: Sequence[Run]) -> Iterable[Row]:
    """Yield what `editkit lm-eval` left in `lm_eval.json`."""
    for run in runs:
        for task, entry in run.harness.items():
            for metric, cell in entry["scores"].items():
                told = {name: cell.get(name) for name in HARNESS}
                name = metric.removesuffix(",none")
                count = entry.get("n")
                yield {"run": run.name, "task": task, "metric": name, **told, "questions": count}


def tuned(runs: Sequence[Run]) -> Iterable[Row]:
    """Yield what `editkit retain` found: a row per run and objective, and per remedy put on."""
    for run in runs:
        for one in run.tuned:
            found, control = one["rates"]["generation"], one.get("control") or {}
            frozen = one.get("manifest", {}).get("model", {})
            yield {
                "run": run.name, "objective": one["objective"], "steps": one["step"],
                "kind": frozen.get("kind"), "frozen": frozen.get("freeze"),
                "edits_kept": found["ERR"], "facts_kept": found["IRR"],
                "matched_facts_kept": found["IRR_matched"], "gap": found["gap"],
                "never_edited_keeps": control.get("IRR"), "rephrases_kept": found["ERR_rephrase"],
                "neighbours_kept": found["neighbours"], "measure": one["measure"],
                "task_before": one["downstream"].get("edited"),
                "task_after": one["downstream"].get("tuned"),
                "task_never_edited": one["downstream"].get("control"), "kl": one["drift"]["kl"],
                "fates": found["fates"],
                "afterwards": {w: one[n]["ERR"] for n, w in AFTERWARDS.items() if n in one},
                "identity": (one.get("identity") or {}).get("exact"),
            }  # fmt: skip


def relations(runs: Sequence[Run], scorer: str) -> Iterable[Row]:
    """Yield final scores by the relation that rows carry; nothing where none do."""
    for run in runs:
        for relation in sorted({row["relation"] for row in run.last if row.get("relation")}):
            rows = [row for row in run.last if row.get("relation") == relation]
            for kind in dict.fromkeys(row["kind"] for row in rows):
                cell = measure(rows, kind, scorer)
                if cell["n"]:
                    yield _row(cell, run, relation=relation, kind=kind, scorer=scorer)


def seconds(run: Run) -> list[tuple[int, float]]:
    """Return (edits seen, seconds per edit): of the ledger, else of the logged curves."""
    if run.ledger:
        return [(int(entry["edit_id"]) + 1, float(entry["seconds"])) for entry in run.ledger]
    logged = [row for row in run.metrics if row.get("edits/s")]
    return [(int(row["edits"]), 1 / row["edits/s"]) for row in logged if "edits" in row]


def costs(runs: Sequence[Run]) -> Iterable[Row]:
    """Yield time, memory and disk of each run."""
    for run in runs:
        times = sorted(s for _, s in seconds(run))
        seen, size = run.summary["edits_seen"], run.artefact_bytes
        mean = run.summary.get("seconds_per_edit")
        yield {
            "run": run.name,
            "seconds_per_edit": sum(times) / len(times) if mean is None and times else mean,
            "median_seconds": times[len(times) // 2] if times else None,
            "slowest_seconds": times[-1] if times else None,
            "peak_memory_bytes": run.summary.get("peak_memory_bytes"),
            "artefact_bytes": size,
            "bytes_per_edit": size / seen if size is not None and seen else None,
        }


def protocol_rows(runs: Sequence[Run]) -> Iterable[Row]:
    """Yield every stamped field with its value in each run."""
    for name, values in protocol.fields(runs).items():
        why = protocol.why_it_may_differ(name)
        yield {
            "field": name,
            "must_match": "no, " + why if why else "yes",
            "differs": protocol.differ(values),
            **{f"in {r.name}": protocol.short(v) for r, v in zip(runs, values, strict=True)},
        }


def _score_table(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return an estimate by kind and scorer."""
    return {
        kind: {scorer: measure(rows, kind, scorer) for scorer in scorers}
        for kind, scorers in measures(rows).items()
    }


def _row(cell: Any, run: Run, **names: Any) -> Row:
    told = {"probes" if name == "n" else name: value for name, value in cell.items()}
    return {"run": run.name, **names, **told}
