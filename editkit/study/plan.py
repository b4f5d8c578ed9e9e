"""From a study's YAML to its runs.

    seeds: [0, 1, 2]
    alone: 50                       # the first 50 edits in a model each; none: all in one
    fit: [options of every edit run]
    retain: [options of every fine-tuning]
    methods: {LABEL: [method YAML, options...]}
    objectives: {LABEL: [objective YAML, options...]}
    remedies:                       # `none` is always there
      LABEL: {fit: [options], retain: [options], objectives: [LABELs], methods: [LABELs], arm: ARM}

Every method is edited with every seed, and once more for each remedy that has options of `fit`.
Each edited model is fine-tuned by every objective with the seed of its stream. `{seed}` in an
option stands for the seed. A remedy counts the edited arm, or what was done afterwards where
`arm` names that (`rekeyed`). Edits made together stand in each other's way; made alone, a model
each (Wen & Zhang 2025), they show what fine-tuning does to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from editkit.study.cells import Cell, slug

NONE = "none"
KEYS = {"seeds", "alone", "fit", "retain", "methods", "objectives", "remedies", "scorer"}
REMEDY_KEYS = {"fit", "retain", "objectives", "methods", "arm"}
MADE_BY = {  # options of the arms that a remedy may count beside the edited one
    "reapplied": "--retain.reapply", "reedited": "--retain.reedit", "rekeyed": "--retain.rekey",
}  # fmt: skip
ARMS = ("edited", *MADE_BY)


class Stream(NamedTuple):
    """What one model is edited with.

    Args:
        seed: Seed of the edits.
        edit: The one edit that is made; None makes all.
    """

    seed: int
    edit: int | None = None

    def __str__(self) -> str:
        """Return its part of folder names."""
        return str(self.seed) if self.edit is None else f"{self.seed}-{self.edit}"

    @property
    def options(self) -> list[str]:
        """Options of its edit run."""
        if self.edit is None:
            return []
        return [f"--data.start={self.edit}", "--data.limit=1", "--data.edits_per_step=1"]


@dataclass(frozen=True)
class Study:
    """A grid of methods, objectives, remedies and seeds.

    Args:
        name: Its name.
        seeds: Seeds of streams and orders.
        fit: Options of every edit run.
        retain: Options of every fine-tuning.
        methods: YAML and options, by label.
        objectives: YAML and options, by label.
        remedies: What each changes, by label.
        scorer: Score that the table shows.
        alone: Edits that are made in a model of their own; 0 makes all in one.
    """

    name: str
    seeds: list[int]
    fit: list[str]
    retain: list[str]
    methods: dict[str, list[str]]
    objectives: dict[str, list[str]]
    remedies: dict[str, dict[str, Any]]
    scorer: str = "generation"
    alone: int = 0

    @property
    def streams(self) -> list[Stream]:
        """What the models are edited with."""
        if not self.alone:
            return [Stream(seed) for seed in self.seeds]
        return [Stream(seed, edit) for seed in self.seeds for edit in range(self.alone)]

    def arm(self, remedy: str) -> str:
        """Return the arm that a remedy counts."""
        return str(self.remedies[remedy].get("arm", "edited"))

    def edit_folder(self, root: Path, method: str, remedy: str, stream: Stream) -> Path:
        """Return the folder of an edited model; remedies of fine-tuning alone share one."""
        extra = f"-{slug(remedy)}" if self.remedies[remedy].get("fit") else ""
        return root / "edited" / f"{slug(method)}{extra}-{stream}"

    def tuned_folder(
        self, root: Path, method: str, objective: str, remedy: str, stream: Stream
    ) -> Path:
        """Return the folder of a fine-tuning."""
        name = f"{slug(method)}-{slug(objective)}-{slug(remedy)}-{stream}"
        return root / "tuned" / name

    def points(self) -> list[tuple[str, str, str, Stream]]:
        """Return (method, objective, remedy, stream) of every fine-tuning; streams go slowest."""
        found = []
        for stream in self.streams:
            for remedy, told in self.remedies.items():
                for objective in told.get("objectives", [*self.objectives]):
                    for method in told.get("methods", [*self.methods]):
                        found.append((method, objective, remedy, stream))  # noqa: PERF401
        return found

    def cells(self, root: Path) -> list[Cell]:
        """Return every run: the edited models, each followed by its fine-tunings."""
        found: dict[Path, Cell] = {}
        for method, objective, remedy, stream in self.points():
            seed, edited = stream.seed, self.edit_folder(root, method, remedy, stream)
            told = self.remedies[remedy]
            if edited not in found:
                path, *options = self.methods[method]
                args = [
                    "fit", f"--model={path}", *self.fit, *options, *told.get("fit", []),
                    *stream.options, f"--model.seed={seed}", f"--data.seed={seed}",
                    f"--seed_everything={seed}", f"--trainer.default_root_dir={edited}",
                    "--run.overwrite=true", "--trainer.enable_progress_bar=false",
                ]  # fmt: skip
                found[edited] = Cell(f"edit {edited.name}", edited, _filled(args, seed))
            tuned = self.tuned_folder(root, method, objective, remedy, stream)
            path, *options = self.objectives[objective]
            args = [
                "retain", f"--run={edited}", f"--config={path}", *self.retain, *options,
                *told.get("retain", []), f"--data.seed={seed}", f"--probes.seed={seed}",
                f"--seed_everything={seed}", f"--model.seed={seed}", f"--out={tuned}",
                f"--retain.shared={root / 'shared'}", "--trainer.enable_progress_bar=false",
                "--report=false",
            ]  # fmt: skip
            found[tuned] = Cell(tuned.name, tuned, _filled(args, seed), (edited,))
        return [*found.values()]


def _filled(args: list[str], seed: int) -> tuple[str, ...]:
    return tuple(arg.replace("{seed}", str(seed)) for arg in args)
