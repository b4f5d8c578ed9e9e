"""`report.html`: one file with everything in it, readable without a network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from editkit.report import panels, protocol, view, words
from editkit.report.compare import Comparison, compare_runs
from editkit.report.export import write_tables
from editkit.report.figures import letter
from editkit.report.files import write_text
from editkit.report.load import Run, load_runs
from editkit.report.tables import Table, all_tables, kinds_of, strictest

REPORT = "report.html"
SHOWN_WHOLE = ("ability", "harness", "routing", "cost", "conflicts")  # tables, as they are


def write_report(
    runs: Sequence[Path],
    out: Path | None = None,
    allow_mixed: bool = False,
    tables: Path | None = None,
) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        runs: Run folders; the first is the reference the others are compared with.
        out: File to write; None is `report.html` in the first run's folder.
        allow_mixed: Also put runs side by side that were not measured alike.
        tables: Folder for the same tables as CSV and markdown; None writes none.

    Returns:
        The file written.

    Raises:
        ValueError: If a folder holds no run, a file in it is damaged, or runs that were not
            measured alike are not allowed.
    """
    loaded = load_runs(runs)
    if not allow_mixed:
        protocol.check_protocol(loaded)
    out = Path(out) if out is not None else loaded[0].folder / REPORT
    if out.is_dir():
        raise ValueError(f"{str(out)!r} is a folder; --out takes a file, such as {out / REPORT}")
    compared = compare_runs(loaded)
    made = all_tables(loaded, compared)
    write_text(out, render(loaded, made, compared))
    if tables is not None:
        write_tables(Path(tables), made)
    return out


def render(runs: Sequence[Run], tables: dict[str, Table], compared: Sequence[Comparison]) -> str:
    """Return the page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("editkit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["short"] = protocol.short
    environment.globals |= {
        "letter": letter, "number": words.number, "chance": words.chance, "size": words.size,
        "plain": view.plain, "scorers": words.SCORERS, "moments": words.MOMENTS,
        "kind_words": words.KINDS, "fates": words.FATES,
    }  # fmt: skip
    return environment.get_template("page.html").render(
        runs=runs,
        title=view.title(runs),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        tables={name: tables.get(name) for name in SHOWN_WHOLE},
        index={run.name: i for i, run in enumerate(runs)},
        compared=compared,
        mixed=protocol.mixed_fields(runs),
        protocol=view.protocol_card(runs),
        remarks=[(i, text) for i, run in enumerate(runs) for text in run.remarks],
        sections=view.sections(runs, tables),
        **_scores(runs, tables),
        **_figures(runs, tables),
    )


def _scores(runs: Sequence[Run], tables: dict[str, Table]) -> dict[str, Any]:
    """Return what the page says of scores."""
    names = [run.name for run in runs]
    scorer, kinds = strictest(runs), kinds_of(runs)
    cells = view.estimates(tables)
    named = dict.fromkeys(key[3] for key in cells)
    return {
        "scorer": scorer,
        "other_scorers": [name for name in named if name != scorer],
        "kinds": kinds,
        "story": lambda run: view.story(run, scorer),
        "cell": lambda run, moment, kind, score: cells.get((run, moment, kind, score, "")),
        "retention": view.retention(tables, names),
        "axes": view.breakdown(cells, names, scorer),
        "relations": view.relations(tables, names, kinds),
        **view.failed(runs, tables, scorer),
    }


def _figures(runs: Sequence[Run], tables: dict[str, Table]) -> dict[str, Any]:
    """Return the page's figures."""
    names = [run.name for run in runs]
    scorer, kinds = strictest(runs), kinds_of(runs)
    return {
        "glance": panels.glance_svg(tables, names, kinds, scorer),
        "age_figures": panels.age_panels(tables, names, kinds, scorer),
        "edits_figures": panels.edits_panels(tables, names, kinds, scorer),
        "ability_figures": panels.ability_panels(tables, names),
        "cost_figures": panels.cost_panels(runs),
    }
