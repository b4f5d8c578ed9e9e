"""A run as a report needs it, finished or not: whatever its folder holds, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from editkit.report.files import Row, read_config, read_json, read_lines, read_metrics

PROBE_KEYS = (
    "moment", "edits_seen", "probe_id", "edit_id", "kind", "prompt", "target", "scores", "answer",
    "reference", "counted",
)  # fmt: skip
SUMMARY_KEYS = ("method", "base", "edits_seen", "scores", "immediate", "by_age", "protocol")
TUNED_KEYS = ("objective", "rates", "downstream", "measure", "drift", "step")
ASKED_ALL = ("milestone", "final")


@dataclass
class Run:
    """One run folder.

    Args:
        name: Short name, unique in its report.
        folder: Where it lies.
        summary: What `editkit.metrics.summary.summarise` returns; of an unfinished run, made from
            the rows of its last milestone.
        finished: Whether the run wrote its own summary at its end.
        rows: Lines of `probes.jsonl`.
        unedited: The same probes asked of the unedited model.
        ledger: Lines of `edits.jsonl`.
        metrics: Lightning's curves.
        ability: Lines of `ability.jsonl`.
        conflicts: Lines of `conflicts.jsonl`.
        harness: Tasks of `lm_eval.json`.
        tuned: Summaries of its finished retention runs (`editkit retain`).
        artefact_bytes: Size of the artefact; None where there is none.
        remarks: What a reader must know of this run.
    """

    name: str
    folder: Path
    summary: dict[str, Any]
    finished: bool
    rows: list[Row]
    unedited: list[Row] = field(default_factory=list)
    ledger: list[Row] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    ability: list[Row] = field(default_factory=list)
    conflicts: list[Row] = field(default_factory=list)
    harness: dict[str, Any] = field(default_factory=dict)
    tuned: list[Row] = field(default_factory=list)
    artefact_bytes: int | None = None
    remarks: list[str] = field(default_factory=list)

    @cached_property
    def asked(self) -> dict[int, list[Row]]:
        """Rows by the number of edits applied when all probes were asked, ascending."""
        found: dict[int, list[Row]] = {}
        for moment in ASKED_ALL:
            new: dict[int, list[Row]] = {}
            for row in self.rows:
                if row["moment"] == moment:
                    new.setdefault(row["edits_seen"], []).append(row)
            found |= new  # where a milestone was the end, the final rows
        return dict(sorted(found.items()))

    @cached_property
    def last(self) -> list[Row]:
        """Rows of the time all probes were asked last."""
        return self.asked[max(self.asked)] if self.asked else []

    @cached_property
    def immediate(self) -> list[Row]:
        """Rows scored right after their own edit."""
        return [row for row in self.rows if row["moment"] == "immediate"]

    @property
    def asked_at(self) -> int:
        """Edits applied when all probes were asked last."""
        return max(self.asked) if self.asked else int(self.summary["edits_seen"])

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """Every stamped field, and what the run is known by beside them."""
        stamped = {k: v for k, v in self.summary["protocol"].items() if k != "method_arguments"}
        arguments = self.summary["protocol"].get("method_arguments") or {}
        return {
            "method": self.summary["method"],
            **{f"method_arguments.{k}": v for k, v in arguments.items()},
            "edits_seen": self.asked_at,
            **stamped,
        }


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders; names are as much of their paths as tells them apart.

    Raises:
        ValueError: If there is no folder, one is there twice, holds no run, or is damaged.
    """
    if not folders:
        raise ValueError("a report needs at least one run folder, such as runs/quickstart")
    resolved = [Path(folder).resolve() for folder in folders]
    if twice := {str(f) for f in resolved if resolved.count(f) > 1}:
        raise ValueError(f"{min(twice)!r} is given twice; give each run once")
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    return [
        load_run(Path(folder), "/".join(path.parts[-depth:]))
        for folder, path in zip(folders, resolved, strict=True)
    ]


def load_run(folder: Path, name: str | None = None) -> Run:
    """Read one run folder.

    Raises:
        ValueError: If the folder is missing, holds no run, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {str(folder)!r}; give the folder of a run of `editkit fit`")
    summary = read_json(folder / "summary.json", SUMMARY_KEYS)
    rows, torn = read_lines(folder / "probes.jsonl", PROBE_KEYS, unfinished=not summary)
    if not summary and not rows:
        raise ValueError(
            f"{str(folder)!r} holds no run (neither summary.json nor rows in probes.jsonl); give "
            "the folder of a run of `editkit fit`"
        )
    run = Run(
        name=name or folder.resolve().name,
        folder=folder,
        summary=summary,
        finished=bool(summary),
        rows=rows,
        unedited=read_lines(folder / "unedited.jsonl", PROBE_KEYS[2:])[0],
        ledger=read_lines(folder / "edits.jsonl", {"edit_id", "seconds"})[0],
        metrics=read_metrics(folder),
        ability=read_lines(folder / "ability.jsonl", {"edits_seen"}, unfinished=not summary)[0],
        conflicts=read_lines(folder / "conflicts.jsonl", unfinished=not summary)[0],
        harness=read_json(folder / "lm_eval.json", {"tasks"}).get("tasks", {}),
    )
    run.tuned, others = _tuned(folder)
    artefact = [folder / f"adapter_{part}" for part in ("model.safetensors", "config.json")]
    if all(path.exists() for path in artefact):
        run.artefact_bytes = sum(path.stat().st_size for path in artefact)
    stale = bool(run.asked) and summary.get("edits_seen", 0) < max(run.asked)
    if not summary or stale:
        run.finished = False
        run.summary = _summary_so_far(run, read_config(folder / "config.yaml"))
    run.remarks = [*_remarks(run), *others, *(["the last line of probes.jsonl was cut off"] * torn)]
    return run


def _tuned(folder: Path) -> tuple[list[Row], list[str]]:
    """Return the retention runs of the edits that are here, and remarks on those of others."""
    found, others = [], []
    for path in sorted(folder.glob("retention/*/summary.json")):
        summary = read_json(path, TUNED_KEYS)
        told = (summary.get("manifest") or {}).get("tensors_sha256")  # older ones do not say
        if told is None or told == read_json(folder / "adapter_config.json").get("tensors_sha256"):
            found.append(summary)
        else:
            others.append(
                f"retention/{path.parent.name} is left out: it is of an earlier model of this "
                "folder; run editkit retain again"
            )
    return found, others


def _summary_so_far(run: Run, config: Row) -> dict[str, Any]:
    """Summarise the last time all probes were asked, with what the config says of the protocol."""
    from editkit.metrics.protocol import EvalProtocol
    from editkit.metrics.summary import RunFacts, summarise

    model = config.get("model") or {}
    arguments = dict(model.get("init_args") or {})
    spec = arguments.pop("lm", None) or {}
    told = arguments.pop("evaluation", None) or {}
    data = config.get("data") or {}
    source = data.get("init_args") or {}
    facts = RunFacts(
        method=str(model.get("class_path", "unknown")).rpartition(".")[2],
        base=str(spec.get("id", "unknown")),
        edits_seen=run.asked_at if run.asked else 0,
    )
    summary: dict[str, Any] = summarise(run.last, run.immediate, facts, EvalProtocol())  # type: ignore[arg-type]
    summary["edits_seen"] = max(row["edits_seen"] for row in run.rows)
    summary["protocol"] = {
        **told,
        "base_id": spec.get("id"),
        "base_revision": spec.get("revision"),
        "data": str(data.get("class_path", "")).rpartition(".")[2] or None,
        "data_start": source.get("start"),
        "data_order": source.get("order"),
        "data_seed": source.get("seed"),
        "edits_per_step": source.get("edits_per_step"),
        "seed": arguments.pop("seed", None),
        "method_arguments": arguments,
    }
    return summary


def _remarks(run: Run) -> list[str]:
    """Say what is missing, or limits what the numbers mean."""
    found = []
    seen, planned = run.summary["edits_seen"], run.summary["protocol"].get("n_edits")
    if not run.finished:
        found.append(
            f"not finished: {seen} edits are made so far; the scores called final are of the last "
            f"time all probes were asked, after {run.asked_at} edits"
            if run.asked
            else f"not finished: {seen} edits are made so far, and all probes were never asked"
        )
    elif planned is not None and seen < planned:
        found.append(f"stopped after {seen} of {planned} edits")
    if not run.rows:
        found.append("no probes.jsonl: no curves by edits seen, failed probes or paired tests")
    elif not run.unedited:
        found.append("no unedited.jsonl: what the model said before is known for locality only")
    if run.finished and run.artefact_bytes is None:
        found.append("the artefact is missing: no bytes per edit")
    for kind, count in (run.summary.get("uncounted") or {}).items():
        found.append(
            f"{count} {kind} probes are left out: the unedited model does not meet their conditions"
        )
    if canary := run.summary.get("canary"):
        found.append(f"canary: {canary.get('message', 'the model has collapsed')}")
    if run.conflicts:
        found.append(f"{len(run.conflicts)} edits clash with earlier ones, see Conflicts")
    if str(run.summary["protocol"].get("commit") or "").endswith("+dirty"):
        found.append("made from a checkout with changes that were not committed")
    return found
