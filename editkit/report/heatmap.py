"""What causal tracing found, as a table, a heat map and numbers."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from editkit.adapters.io import replacing
from editkit.lm.restoring import GROUPS, KINDS, LAST_SUBJECT
from editkit.lm.tracing import Trace

TITLES = {"block": "block output", "mlp": "MLP output", "attn": "attention output"}
COLOURS = {"block": "Purples", "mlp": "Greens", "attn": "Reds"}  # as in the paper


def trace_table(found: Trace) -> Table:
    """Lay out the effects at the subject's last token and at the prompt's."""
    table = Table(
        title=f"probability of the answer ({found.clean:.3f} clean, {found.corrupted:.3f} under "
        f"noise) that a state at the subject's or the prompt's last token brings back; "
        f"{int(found.facts_G.max())} facts"
    )
    table.add_column("layer", justify="right")
    for token in ("subject", "prompt"):
        for kind in TITLES.values():
            table.add_column(f"{token},\n{kind.removesuffix(' output')}", justify="right")
    for layer in range(found.effects_KLG.shape[1]):
        cells_GK = found.effects_KLG[:, layer, [LAST_SUBJECT, -1]].T
        table.add_row(str(layer), *(f"{cell:.3f}" for cell in cells_GK.flatten().tolist()))
    return table


def write_trace(folder: Path, found: Trace, about: Mapping[str, Any]) -> None:
    """Write `trace.png`, `trace.csv` and `trace.json`.

    Args:
        folder: Where to; made where it is missing.
        found: What tracing found.
        about: What was traced and how.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = _rows(found)
    with replacing(folder / "trace.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    record = {
        **about,
        "clean": found.clean,
        "corrupted": found.corrupted,
        "sigma": found.sigma,
        "facts": int(found.facts_G.max()),
        "skipped": found.skipped,
        "causal_layers": found.causal_layers,
        "effects": rows,
    }
    with replacing(folder / "trace.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    with replacing(folder / "trace.png") as temporary:
        _draw(found, str(about.get("model", "")), temporary)


def _rows(found: Trace) -> list[dict[str, Any]]:
    """One row a kind, layer and group of tokens that some fact has."""
    facts_G = found.facts_G.tolist()
    return [
        {
            "kind": kind,
            "layer": layer,
            "token": group,
            "effect": float(found.effects_KLG[k, layer, g]),
            "standard_error": float(found.errors_KLG[k, layer, g]) if facts_G[g] > 1 else None,
            "facts": facts_G[g],
        }
        for k, kind in enumerate(KINDS)
        for layer in range(found.effects_KLG.shape[1])
        for g, group in enumerate(GROUPS)
        if facts_G[g] > 0
    ]


def _draw(found: Trace, model: str, path: Path) -> None:
    """Draw one panel a kind, all on one scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    depth = found.effects_KLG.shape[1]
    figure = Figure(figsize=(4 + min(depth, 48) * 0.35, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    top = max(float(found.effects_KLG.nan_to_num(0).max()), 1e-9)
    groups = [f"{g} ({n})" for g, n in zip(GROUPS, found.facts_G.tolist(), strict=True)]
    panels = figure.subplots(len(KINDS), 1, sharex=True)
    for k, (axes, kind) in enumerate(zip(panels, KINDS, strict=True)):
        image = axes.imshow(
            found.effects_KLG[k].T.numpy(),
            cmap=COLOURS[kind], vmin=0, vmax=top, aspect="auto", interpolation="nearest",
        )  # fmt: skip
        axes.set_yticks(range(len(GROUPS)), groups)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"{TITLES[kind]} put back", fontsize="medium")
        figure.colorbar(image, ax=axes, label="indirect effect")
    panels[-1].set_xlabel("layer")
    figure.suptitle(
        f"{model}: the answer's probability, {found.clean:.2f} clean and {found.corrupted:.2f} "
        f"under noise,\nthat comes back ({int(found.facts_G.max())} facts)",
        fontsize="medium",
    )
    figure.savefig(path, format="png", dpi=150)
