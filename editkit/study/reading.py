"""Read a study's YAML and refuse what is not well-formed; see `editkit.study.plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from editkit.retention.outcome import KEPT_SCORERS
from editkit.study.plan import ARMS, KEYS, MADE_BY, NONE, REMEDY_KEYS, Study


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
    if wrong := sorted(set(told) - KEYS, key=str):
        raise ValueError(f"{str(path)!r} has a key {wrong[0]!r}; the keys are {sorted(KEYS)}")
    if missing := sorted({"seeds", "methods", "objectives"} - set(told)):
        raise ValueError(f"{str(path)!r} has no {missing[0]!r}")
    remedies = {NONE: {}, **_mapping(told, "remedies", path)}
    study = Study(
        path.stem, _seeds(told["seeds"], path), _texts(told, "fit", path),
        _texts(told, "retain", path), _labelled(told, "methods", path),
        _labelled(told, "objectives", path),
        {str(k): _remedy(str(k), v) for k, v in remedies.items()},
        told.get("scorer", "generation"), told.get("alone", 0),
    )  # fmt: skip
    if type(study.alone) is not int or study.alone < 0:
        raise ValueError(f"'alone' of {str(path)!r} is {study.alone!r}; give a number of edits")
    if study.scorer not in KEPT_SCORERS:
        raise ValueError(
            f"'scorer' of {str(path)!r} is {study.scorer!r}; use one of {KEPT_SCORERS}"
        )
    for label in study.remedies:
        _check_remedy(label, study)
    for label, options in (study.methods | study.objectives).items():
        if not options or not Path(options[0]).is_file():
            raise ValueError(
                f"{label!r} of {str(path)!r} names {options[:1]}, which is no file here; give its "
                "YAML first, and run the study from the folder its paths begin in"
            )
    _check_folders(study, path)
    return study


def _check_remedy(label: str, study: Study) -> None:
    """Refuse a remedy that names what is not there."""
    remedy = study.remedies[label]
    if wrong := sorted(set(remedy) - REMEDY_KEYS, key=str):
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


def _check_folders(study: Study, path: Path) -> None:
    """Refuse labels that differ in what folder names leave out: their runs would be one."""
    runs: dict[Path, tuple[str, ...]] = {}
    for method, objective, remedy, stream in study.points():
        root = Path()
        own = method, remedy if study.remedies[remedy].get("fit") else "", str(stream)
        tuned = study.tuned_folder(root, method, objective, remedy, stream)
        edited = study.edit_folder(root, method, remedy, stream)
        for folder, run in ((edited, own), (tuned, (method, objective, remedy, str(stream)))):
            if runs.setdefault(folder, run) != run:
                raise ValueError(
                    f"two runs of {str(path)!r} share the folder {folder.name!r}: {runs[folder]} "
                    f"and {run}; choose labels that differ in letters or digits"
                )


def _seeds(value: Any, path: Path) -> list[int]:
    """Check the seeds."""
    if not isinstance(value, list) or not value or any(type(seed) is not int for seed in value):
        raise ValueError(
            f"'seeds' of {str(path)!r} is {value!r:.60}; give a list of whole numbers, such as "
            "[0, 1, 2]"
        )
    if twice := [seed for seed in value if value.count(seed) > 1]:
        raise ValueError(f"'seeds' of {str(path)!r} has {twice[0]} twice; give each seed once")
    return value


def _remedy(label: str, told: Any) -> dict[str, Any]:
    """Check the form of a remedy."""
    if told is not None and not isinstance(told, dict):
        raise ValueError(
            f"remedy {label!r} is {told!r:.60}; give a mapping with {sorted(REMEDY_KEYS)}"
        )
    found = dict(told or {})
    for name in REMEDY_KEYS - {"arm"} & found.keys():
        if not isinstance(found[name], list):
            raise ValueError(f"{name!r} of remedy {label!r} is {found[name]!r:.60}; give a list")
        found[name] = [str(one) for one in found[name]]
    return found


def _mapping(told: dict[str, Any], name: str, path: Path) -> dict[Any, Any]:
    """Return what is told by label."""
    value = told.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name!r} of {str(path)!r} is {value!r:.60}; give a mapping by label")
    return value


def _labelled(told: dict[str, Any], name: str, path: Path) -> dict[str, list[str]]:
    """Return YAML and options of each label.

    Raises:
        ValueError: If there is no label.
    """
    found = _mapping(told, name, path)
    if not found:
        raise ValueError(f"{name!r} of {str(path)!r} is empty; name at least one")
    return {str(label): _texts(found, label, path) for label in found}


def _texts(told: dict[Any, Any], name: Any, path: Path) -> list[str]:
    value = told.get(name) or []
    if not isinstance(value, list) or any(isinstance(one, list | dict) for one in value):
        raise ValueError(f"{name!r} of {str(path)!r} is {value!r:.60}; give a list of options")
    return [str(one) for one in value]
