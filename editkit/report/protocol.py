"""Which runs may be compared: those that differ only in what is compared, or changes no score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from editkit.report.load import Run

# Every stamped field must be the same in runs that are compared, but for these and the arguments
# of the method. A field that is new, or that only one run records, therefore counts.
MAY_DIFFER = {
    "method": "it is what is compared",
    "seed": "it is what is compared",
    "base_id": "base_hash decides",
    "base_revision": "base_hash decides",
    "data": "data_sha256 and probes_sha256 decide",
    "data_sources": "data_sha256 and probes_sha256 decide",
    "data_start": "data_sha256 decides",
    "data_order": "data_sha256 decides",
    "data_seed": "data_sha256 decides",
    "n_edits": "data_sha256 and edits_seen decide",
    "batch_size": "it changes no score",
    "devices": "it changes no score",
    "commit": "it is told, not compared",
    "editkit": "it is told, not compared",
    "torch": "it is told, not compared",
    "transformers": "it is told, not compared",
    "lightning": "it is told, not compared",
    "python": "it is told, not compared",
}
ARGUMENTS = "method_arguments."
NOT_RECORDED = "not recorded"


def why_it_may_differ(field: str) -> str:
    """Return why comparable runs may differ in a field; nothing where they may not."""
    return MAY_DIFFER["method"] if field.startswith(ARGUMENTS) else MAY_DIFFER.get(field, "")


def fields(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return all stamped fields, each with its value in every run."""
    names = dict.fromkeys(name for run in runs for name in run.protocol)
    return {name: [_value(run, name) for run in runs] for name in names}


def differ(values: Sequence[Any]) -> bool:
    """Whether the runs' values of a field are not all the same."""
    return any(value != values[0] for value in values)


def mixed_fields(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the fields, with their values, in which the runs differ but must not."""
    return {
        name: values
        for name, values in fields(runs).items()
        if differ(values) and not why_it_may_differ(name)
    }


def check_protocol(runs: Sequence[Run]) -> None:
    """Refuse runs of different protocol.

    Raises:
        ValueError: If they differ in a field in which they must not; names each with its values.
    """
    if mixed := mixed_fields(runs):
        told = "; ".join(
            f"{name} is {' and '.join(short(value) for value in values)}"
            for name, values in mixed.items()
        )
        raise ValueError(
            f"the runs {', '.join(run.name for run in runs)} were not measured alike, so their "
            f"scores do not compare: {told}. Measure them alike, or pass --allow_mixed true to "
            "put them side by side all the same"
        )


def short(value: Any) -> str:
    """Return a value in few characters: a hash by its first 12."""
    if isinstance(value, str):
        is_hash = len(value) >= 40 and not set(value.split("+")[0]) - set("0123456789abcdef")
        return value[:12] + value[40:] * (len(value) < 64) if is_hash else value
    if isinstance(value, (list, tuple)):
        return ", ".join(repr(v) if isinstance(v, str) and not v.isidentifier() else str(v)
                         for v in value)  # fmt: skip
    return str(value)


def _value(run: Run, name: str) -> Any:
    """Return a field's value as JSON has it."""
    value = run.protocol.get(name, NOT_RECORDED)
    if value is None and not run.finished:
        return NOT_RECORDED
    return list(value) if isinstance(value, tuple) else value
