"""What runs that differ in part have in common: control arms, and answers before fine-tuning.

Both lie in `--retain.shared FOLDER` under a name made of all that they depend on, so a run finds
there just what it would have found itself. A control arm is trained by one run at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

import editkit
from editkit.adapters.io import replacing
from editkit.methods.base import EditModule
from editkit.retention.answers import Rows
from editkit.retention.result import plan_sha256

if TYPE_CHECKING:
    from editkit.retention.cli import Retention


@dataclass(frozen=True)
class Known:
    """Answers of models that are not fine-tuned yet.

    Args:
        folder: Where they lie; None keeps none.
        told: What the base model's answers depend on.
        artefact: What those of the edited model depend on besides.
    """

    folder: Path | None
    told: tuple[Any, ...]
    artefact: dict[str, Any]

    def rows(self, method: EditModule, is_edited: bool, ask: Callable[[], Rows]) -> Rows:
        """Return the answers that are kept, else ask and keep them.

        Args:
            method: The method; its references are taken over, too.
            is_edited: Whether the edited model is asked, or the base model.
            ask: Asks.
        """
        if self.folder is None:
            return ask()
        name = name_of([*self.told, self.artefact if is_edited else None])
        path = self.folder / f"answers-{name}.json"
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            method.references.load_state_dict(kept["references"])
            found: Rows = kept["rows"]
            return found
        rows = ask()
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            kept = {"rows": rows, "references": method.references.state_dict()}
            temporary.write_text(json.dumps(kept), encoding="utf-8")
        return rows


def known_answers(made: Retention) -> Known:
    """Return the answers that a run may find."""
    told = (
        *base_of(made), made.sha, made.evaluation.describe(), made.settings.mode,
        made.config.trainer.as_dict(),
    )  # fmt: skip
    return Known(made.settings.shared, told, made.run.artefact)


@contextmanager
def sole(folder: Path, is_shared: bool, wait: bool) -> Iterator[bool]:
    """Keep other runs out of a shared folder; yields whether that worked, always where it waits."""
    if not is_shared:
        yield True
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def control_name(made: Retention) -> str:
    """Name a control arm by all that its outcome depends on.

    The edits themselves are not among it: they are switched off. Where the layers that hold them
    decide what is frozen, these count.
    """
    frozen, task = made.built.model.freeze, made.objective
    sites = [] if frozen.policy == "none" else made.run.sites
    told = [
        *base_of(made), made.sha, sites, made.config.model.as_dict() | {"scope": "backbone"},
        plan_sha256(task.plan), [repr(row) for row in task.tests], task.loss, task.measure,
        task.room, task.batch_size, made.evaluation.describe(), made.settings.at,
        made.settings.mode, made.drift_texts, made.config.seed_everything,
        made.config.trainer.as_dict(),
    ]  # fmt: skip
    return name_of(told)


def base_of(made: Retention) -> tuple[Any, ...]:
    """Return what the base model is, and how a run asks it."""
    told = made.run.artefact["lm"]
    asked = (told.get(name) for name in ("dtype", "chat_template", "attn_implementation"))
    return made.run.artefact["base"]["hash"], *asked


def name_of(told: list[Any]) -> str:
    """Return a short name made of all this."""
    versions = editkit.__version__, torch.__version__
    text = json.dumps([*versions, *told], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
