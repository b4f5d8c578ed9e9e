"""What a retention run leaves behind: `retention.jsonl`, `summary.json` and a table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import editkit
from editkit.adapters.io import write_lines
from editkit.callbacks.protocol import commit
from editkit.data.finetuning import Example
from editkit.metrics.summary import write_json
from editkit.retention.afterwards import ARM_OF
from editkit.retention.answers import ArmResult, gate_rates
from editkit.retention.outcome import (
    FAITHFUL,
    HEADLINE,
    Line,
    against_control,
    control_rates,
    lines,
    match_facts,
    rates,
)
from editkit.retention.relearn import latent_rates

if TYPE_CHECKING:
    from editkit.retention.cli import Retention

ROWS, SUMMARY = "retention.jsonl", "summary.json"
LOWER_IS_BETTER = {"perplexity"}


def write_result(made: Retention) -> dict[str, Any]:
    """Write the lines and the summary of a run whose arms are done.

    Raises:
        ValueError: If the identity arm lost anything: then something besides training moved it.
    """
    settings, items = made.settings, made.items
    arms = {arm: ArmResult.read(arm, made.arm_folder(arm)) for arm in settings.arms}
    own = arms["edited"]
    assert own.edited is not None, "the edited arm asks the edited model"
    per = made.built.probes.matched_per_edit
    matched = match_facts(items, own.base, own.edited, per)
    name = made.run.folder.name
    told: dict[tuple[str, int], list[Line]] = {}
    for arm, found in arms.items():
        for step, tuned in found.steps.items():
            told[arm, step] = [
                *lines(name, arm, step, items, found.base, found.edited, tuned, matched)
            ]
        for after, rows in found.after.items():
            told[after, found.last] = [
                *lines(name, after, found.last, items, found.base, own.edited, rows, matched)
            ]
    write_lines(made.folder / ROWS, (line for part in told.values() for line in part))
    summary = _summary(made, arms, told)
    _check_identity(summary)
    write_json(made.folder / SUMMARY, summary)
    return summary


def _summary(
    made: Retention, arms: dict[Any, ArmResult], told: dict[tuple[str, int], list[Line]]
) -> dict[str, Any]:
    """Return the content of `summary.json`."""
    own, last = arms["edited"], arms["edited"].last
    end = told["edited", last]
    found: dict[str, Any] = {
        "run": str(made.run.folder),
        "method": made.run.artefact["class_path"].rpartition(".")[2],
        "objective": made.objective.name,
        "measure": made.objective.measure,
        "step": last,
        "rates": {s: rates(end, s, s) for s in HEADLINE if any(r["scorer"] == s for r in end)},
        "checkpoints": [
            {"step": step, **_brief(rates(rows)), "downstream": own.numbers[f"downstream_{step}"]}
            for (arm, step), rows in told.items()
            if arm == "edited"
        ],
        "downstream": _downstream(arms, made.objective.measure),
        "drift": own.numbers["drift"],
        "gate": {"before": gate_rates(own.edited), "after": gate_rates(own.steps[last])},
        "manifest": _manifest(made, own),
    }
    if made.settings.mode == "ret_faithful":
        found["rates"]["ret_faithful"] = rates(end, *FAITHFUL)
    if "control" in arms:
        control = told["control", arms["control"].last]
        found["control"] = control_rates(control) | against_control(end, control)
        found["control"]["drift"] = {"kl": arms["control"].numbers["drift"]["kl"]}
    if own.relearned is not None:
        found["latent"] = latent_rates(own.relearned) if own.relearned else {"pairs": 0}
    if "identity" in arms:
        found["identity"] = _identity(told["identity", arms["identity"].last])
    for (arm, _), rows in told.items():
        if arm in ARM_OF:
            found[arm] = rates(rows)
    return found


def _brief(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("ERR", "IRR", "IRR_matched")}


def _downstream(arms: dict[Any, ArmResult], measure: str) -> dict[str, float | None]:
    """Return the objective's own score before and after, with and without edits.

    `tax` is what editing costs there: how much better the control is than the edited model, the
    difference of their scores with the sign turned where lower is better (perplexity).
    """
    own = arms["edited"]
    found = {
        "base": own.numbers["downstream_base"],
        "edited": own.numbers["downstream_before"],
        "tuned": own.numbers[f"downstream_{own.last}"],
    }
    for arm in arms.values():
        found |= {name: arm.numbers[f"downstream_{name}"] for name in arm.after}
    if "control" in arms:
        control = arms["control"]
        found["control"] = control.numbers[f"downstream_{control.last}"]
        if None not in (found["control"], found["tuned"]):
            sign = -1.0 if measure in LOWER_IS_BETTER else 1.0
            found["tax"] = sign * (found["control"] - found["tuned"])
    return found


def _identity(rows: Sequence[Line]) -> dict[str, Any]:
    """Return the rates of the identity arm, and whether not one score or likelihood moved."""
    found = rates(rows)
    moved = [
        r["item_id"]
        for r in rows
        if r["score_Mft"] != r["score_Med"] or r["logp_Mft"] != r["logp_Med"]
    ]
    return {
        "ERR": found["ERR"]["value"],
        "IRR": found["IRR"]["value"],
        "moved": len(moved),
        "exact": not moved,
    }


def _check_identity(summary: dict[str, Any]) -> None:
    told = summary.get("identity")
    if told is not None and not told["exact"]:
        raise ValueError(
            f"the identity arm (learning rate 0) changed {told['moved']} answers or likelihoods; "
            "the numbers of the other arms cannot be trusted (is the arithmetic of this device "
            "deterministic? try --trainer.deterministic true)"
        )


def _manifest(made: Retention, own: ArmResult) -> dict[str, Any]:
    """Return what the numbers are stamped with."""
    objective = made.objective
    return {
        "base": made.run.artefact["base"],
        "tensors_sha256": made.run.artefact["tensors_sha256"],
        "edits": len(made.run.standing),
        "items": len(made.items),
        "items_sha256": made.sha,
        "data": {"path": objective.path, **objective.sources},
        "rows": len(objective.examples),
        "rows_sha256": plan_sha256(objective.plan),
        "decontamination": objective.account,
        "steps": own.last,
        "model": {
            "kind": made.config.model.kind,
            "scope": made.config.model.scope,
            "lr": made.config.model.lr,
            "freeze": made.config.model.freeze.policy,
            "embeddings_frozen": made.config.model.freeze.embeddings,
        },
        "batch_size": objective.batch_size,
        "loss": own.numbers["loss"],
        "trained_parameters": own.numbers["trained_parameters"],
        "trained_tensors": own.numbers["trained_tensors"],
        "evaluation": made.evaluation.describe(),
        "mode": made.settings.mode,
        "seeds": {"order": objective.seed, "everything": made.config.seed_everything},
        "precision": made.config.trainer.precision,
        "devices": made.config.trainer.devices,
        "commit": commit(),
        "editkit": editkit.__version__,
    }


def plan_sha256(plan: Sequence[Example]) -> str:
    """Hash of all rows in the order in which they are trained on."""
    digest = hashlib.sha256()
    for row in plan:
        digest.update(repr((row.prompt, row.target, row.rejected)).encode())
    return digest.hexdigest()
