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

import yaml

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


def read_study(path: Path) -> Study:
    """Read a study.

    Raises:
        ValueError: If the file is missing or damaged, a key is misspelt, or a label or a YAML that
            it names is not there.
    """
    if not path.is_file():
        raise ValueError(f"no study {str(path)!r}; experiments/studies holds some")
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(told, dict):
        raise ValueError(f"{str(path)!r} is no mapping; see editkit.study.plan")
    if wrong := sorted(set(told) - KEYS):
        raise ValueError(f"{str(path)!r} has a key {wrong[0]!r}; the keys are {sorted(KEYS)}")
    if missing := sorted({"seeds", "methods", "objectives"} - set(told)):
        raise ValueError(f"{str(path)!r} has no {missing[0]!r}")
    remedies: dict[str, Any] = {NONE: {}, **(told.get("remedies") or {})}
    study = Study(
        path.stem, list(told["seeds"]), _texts(told, "fit", path), _texts(told, "retain", path),
        {str(k): _texts(told["methods"], k, path) for k in told["methods"]},
        {str(k): _texts(told["objectives"], k, path) for k in told["objectives"]},
        {str(k): dict(v or {}) for k, v in remedies.items()},
        told.get("scorer", "generation"), told.get("alone", 0),
    )  # fmt: skip
    if not isinstance(study.alone, int) or study.alone < 0:
        raise ValueError(f"'alone' of {str(path)!r} is {study.alone!r}; give a number of edits")
    for label, remedy in study.remedies.items():
        if wrong := sorted(set(remedy) - REMEDY_KEYS):
            raise ValueError(f"remedy {label!r} has a key {wrong[0]!r}; use {sorted(REMEDY_KEYS)}")
        if remedy.get("arm", "edited") not in ARMS:
            raise ValueError(f"remedy {label!r} has arm {remedy['arm']!r}; use one of {ARMS}")
        option = MADE_BY.get(study.arm(label))
        given = [*study.retain, *remedy.get("retain", [])]
        if option is not None and not any(one.startswith(option) for one in given):
            raise ValueError(
                f"remedy {label!r} counts arm {study.arm(label)!r}, which none of its options "
                f"makes; add {option}=true to its 'retain'"
            )
        for name, known in (("objectives", study.objectives), ("methods", study.methods)):
            if unknown := [one for one in remedy.get(name, []) if one not in known]:
                raise ValueError(f"remedy {label!r} names {unknown[0]!r}, which is none of {name}")
    for label, options in (study.methods | study.objectives).items():
        if not options or not Path(options[0]).is_file():
            raise ValueError(
                f"{label!r} of {str(path)!r} names {options[:1]}, which is no file here; give its "
                "YAML first, and run the study from the folder its paths begin in"
            )
    return study


def _texts(told: dict[str, Any], name: str, path: Path) -> list[str]:
    value = told.get(name) or []
    if not isinstance(value, list):
        raise ValueError(f"{name!r} of {str(path)!r} is {value!r:.60}; give a list of options")
    return [str(one) for one in value]
