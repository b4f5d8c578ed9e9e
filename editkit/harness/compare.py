"""Tasks of lm-evaluation-harness on the unedited and on the edited model, side by side."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from editkit.adapters.io import CONFIG
from editkit.api import load_edited
from editkit.harness.model import harness_model, part_of_harness
from editkit.harness.scores import pair_scores
from editkit.lm.editable import EditableLM
from editkit.lm.load import pick_device
from editkit.lm.spec import LMSpec

BOOTSTRAP = 1000  # draws behind the standard error of a score that is no mean


def load_model(
    model: str, device: str | None = None, trust: bool = False
) -> tuple[EditableLM, Path | None]:
    """Load an edited model from its run folder, or a model without edits.

    Args:
        model: Run folder; or the Hub id or folder of a model.
        device: Such as `cpu` or `cuda`; None takes the GPU where there is one.
        trust: Allow a method class from outside `editkit.methods`.

    Returns:
        The model, and its run folder where it is one.

    Raises:
        ImportError: If lm-evaluation-harness is not installed; told before anything is loaded.
        ValueError: If the model cannot be loaded; the text names the fix.
    """
    part_of_harness("lm_eval")
    run, place = Path(model), pick_device(device)
    if (run / CONFIG).is_file():
        return load_edited(run, device, trust=trust).lm, run
    return EditableLM.load(LMSpec(id=model)).to(place), None


def measure_tasks(
    lm: EditableLM,
    tasks: Sequence[str],
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    manager: Any = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks on the unedited and on the edited model, with the same questions.

    Args:
        lm: The model. Where it carries no edit it is asked once.
        tasks: Names of tasks, groups or tags, patterns such as `mmlu_*`, or paths of task YAMLs.
        include_path: Folder of further task YAMLs.
        limit: Questions per task; None asks all.
        num_fewshot: Examples in front of each question; None takes the task's own.
        batch_size: Rows per forward pass.
        manager: What `find_tasks` returned beside the names; None finds them now.

    Returns:
        By task: `version`, `n_shot`, `n`, `limit`, and `scores`: by metric and filter, such as
        `acc,none`, the values `before` and `after`, their `difference`, and the standard error of
        each. That of a difference is over the paired questions, where the score is their mean.

    Raises:
        ImportError: If lm-evaluation-harness is not installed.
        ValueError: If a task is not there; the text names those of a similar name.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    evaluate = part_of_harness("lm_eval.evaluator").simple_evaluate
    names = list(tasks)
    if manager is None:
        names, manager = find_tasks(tasks, include_path)

    def run() -> dict[str, Any]:
        results: dict[str, Any] = evaluate(
            harness_model(lm, batch_size),
            tasks=names,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=BOOTSTRAP,
            apply_chat_template=lm.spec.chat_template,
        )
        return results

    with lm.unedited():
        before = run()
    after = run() if any(layer.is_written for layer in lm.layers.values()) else None
    return {
        task: {
            "version": before["versions"].get(task),
            "n_shot": before["n-shot"].get(task),
            "n": before["n-samples"].get(task, {}).get("effective"),
            "limit": limit,
            "scores": pair_scores(task, before, after),
        }
        for task in {**before["results"], **before.get("groups", {})}
    }


def find_tasks(tasks: Sequence[str], include_path: Path | None) -> tuple[list[str], Any]:
    """Return the names of the tasks meant, and the harness' manager that knows them.

    Raises:
        ImportError: If lm-evaluation-harness is not installed.
        ValueError: If a task or the folder is not there.
    """
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"no folder {str(include_path)!r}; give the folder of your task YAMLs")
    if not tasks:
        raise ValueError("no tasks given; name some, such as --tasks arc_easy,hellaswag")
    make = part_of_harness("lm_eval.tasks").TaskManager
    manager = make(include_path=include_path and str(include_path), include_defaults=False)
    if not set(tasks) <= set(manager.all_subtasks):  # the harness' own 14,000 take seconds to read
        manager = make(include_path=include_path and str(include_path))
    found: list[str] = []
    for task in tasks:
        is_file = task.endswith((".yaml", ".yml")) and Path(task).is_file()
        names = [task] if is_file else manager.match_tasks([task])
        if not names:
            near = difflib.get_close_matches(task, manager.all_tasks)
            raise ValueError(
                f"no task {task!r} in lm-evaluation-harness"
                + (f"; did you mean {', '.join(near)}?" if near else "")
                + " Give the folder of your own task YAMLs as include_path."
            )
        found += names
    return list(dict.fromkeys(found)), manager


def about_model(lm: EditableLM, run: Path | None) -> dict[str, Any]:
    """Return what tells one measured model from another."""
    config = json.loads((run / CONFIG).read_text(encoding="utf-8")) if run else {}
    return {
        "base": lm.spec.id,
        "edits_seen": config.get("edits_seen", 0),
        "tensors_sha256": config.get("tensors_sha256"),
        "lm_eval": part_of_harness("lm_eval").__version__,
    }
