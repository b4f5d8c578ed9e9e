"""The table that a finished retention run shows in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from editkit.retention.outcome import HEADLINE

SUMMARY = "summary.json"


def shown(folder: Path) -> Table:
    """Return the table that a finished run shows."""
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    main = summary["rates"][HEADLINE[0]]
    table = Table(
        "", "share", "95 % interval", "of",
        title=f"{summary['method']} after {summary['step']} steps of {summary['objective']}",
    )  # fmt: skip
    for name, label in (
        ("ERR", "edits kept"),
        ("ERR_overwritten", "  that overwrite"),
        ("ERR_inserted", "  that insert"),
        ("ERR_rephrase", "  in other words"),
        ("IRR", "intrinsic facts kept"),
        ("IRR_matched", "  matched to the edits"),
        ("neighbours", "neighbours kept"),
        ("portability", "consequences kept"),
    ):
        if name in main and main[name]["value"] is not None:
            table.add_row(label, *_cells(main[name]))
    if "control" in summary:
        table.add_row("facts kept by the never-edited", *_cells(summary["control"]["IRR"]))
    for name, label in (
        ("reapplied", "edits put on afterwards"),
        ("reedited", "edits made afterwards"),
        ("rekeyed", "edits kept, keys found again"),
    ):
        if name in summary:
            table.add_row(label, *_cells(summary[name]["ERR"]))
    told = ", ".join(
        f"{name} {value:.3g}" for name, value in summary["downstream"].items() if value is not None
    )
    kl = summary["drift"]["kl"]
    table.caption = f"{summary['measure']} on the task: {told}" + (
        "" if kl is None else f"; KL to the edited model {kl:.3g} nats a token"
    )
    if (summary.get("latent") or {}).get("pairs"):
        again, new = (summary["latent"][f"steps_{who}"]["value"] for who in ("lost", "partner"))
        table.caption += (
            f"; lost edits are learned again in {again:.2f} steps, new ones in {new:.2f}"
        )
    return table


def _cells(cell: dict[str, Any]) -> tuple[str, str, str]:
    low, high = cell["low"], cell["high"]
    interval = "" if low is None else f"{low:.3f} to {high:.3f}"
    value = "-" if cell["value"] is None else f"{cell['value']:.3f}"
    return value, interval, str(cell["n"])
