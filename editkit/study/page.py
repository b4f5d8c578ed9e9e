"""The table and the figures of a study, as markdown and as one page that opens offline."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path

from editkit.metrics.intervals import Estimate
from editkit.report.compare import holm
from editkit.report.files import write_text
from editkit.report.words import chance, number
from editkit.study.numbers import Point
from editkit.study.plan import NONE, Study
from editkit.study.short import HEADS as SHORT_HEADS
from editkit.study.short import Short, shorten

HEADS = (
    "method", "objective", "remedy", "edits kept (ERR)", "facts kept (IRR)", "matched facts",
    "gap IRR - ERR", "never-edited keeps", "task before, after, never-edited", "KL", "key shift",
    "against no remedy, of the edits that held in both",
)  # fmt: skip
STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}
table{border-collapse:collapse;font-size:13px}td,th{padding:.25rem .5rem;text-align:left;
border-bottom:1px solid #ccc;vertical-align:top}figure{margin:1rem 0}svg{max-width:100%;height:auto}
.scroll{overflow-x:auto}@media(prefers-color-scheme:dark){body{background:#111;color:#eee}
figure{background:#fff}}"""


def write_study(study: Study, points: Sequence[Point], folder: Path) -> tuple[Path, Path]:
    """Write `table.md` and `page.html`; return both."""
    short = [_short_row(one) for one in shorten(points, bool(study.alone))]
    tables = [("In short", SHORT_HEADS, short), ("Every run", HEADS, table_rows(points))]
    note = notes(study, points)
    lines = [f"# {study.name}", ""]
    for title, heads, rows in tables:
        lines += [f"## {title}", "", *_markdown(heads, rows), ""]
    table, page = folder / "table.md", folder / "page.html"
    write_text(table, "\n".join([*lines, *note]) + "\n")
    first, every = (f"<h2>{title}</h2>{_html(heads, rows)}" for title, heads, rows in tables)
    figures = "".join(
        f"<figure><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>"
        for caption, svg in draw(points)
    )
    said = "".join(f"<p>{html.escape(line)}</p>" for line in note if line)
    write_text(
        page,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{study.name}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(study.name)}</h1>{first}"
        f"{figures}{every}{said}</body></html>\n",
    )
    return table, page


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in (heads, *rows)]
    return [lines[0], "|---" * len(heads) + "|", *lines[1:]]


def _html(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    head = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _short_row(one: Short) -> list[str]:
    """Return the cells of one remedy and objective."""
    names = [one.remedy, one.objective, str(one.methods)]
    more = (one.more_edits, one.more_facts, one.gap_change)
    paired = ["" if cell is None else _cell(cell) for cell in more]
    task = ", ".join(number(value) for value in one.task or () if value is not None)
    return [*names, *map(_cell, (one.ERR, one.IRR, one.gap)), *paired, task]


def table_rows(points: Sequence[Point]) -> list[list[str]]:
    """Return the cells of the table; p-values are corrected by Holm over the whole table."""
    tested = [p for p in points if p.mcnemar_p is not None]
    corrected = dict(zip(map(id, tested), holm([p.mcnemar_p or 0.0 for p in tested]), strict=True))
    found = []
    for p in points:
        names = [p.method, p.objective, p.remedy]
        if not p.done:
            found.append([*names, "not run", *[""] * (len(HEADS) - 4)])
            continue
        task = [number(p.downstream.get(m)) for m in ("edited", "tuned", "control")]
        paired = ""
        if p.mcnemar_p is not None:
            paired = f"+{p.only_here} -{p.only_there}, p {chance(corrected[id(p)])}"
        cells = map(_cell, (p.ERR, p.IRR, p.IRR_matched, p.gap, p.control))
        tail = [f"{p.measure} {', '.join(task)}", number(p.kl), number(p.keys), paired]
        found.append([*names, *cells, *tail])
    return found


def notes(study: Study, points: Sequence[Point]) -> list[str]:
    """Say how the numbers came about and what is missing."""
    alone = f", {study.alone} edits of each alone in a model of their own" if study.alone else ""
    found = [
        f"Score: {study.scorer}. Seeds {study.seeds}, pooled{alone}; brackets are 95 % bootstrap "
        "intervals over edits. ERR and IRR count what the edited model had right before "
        "fine-tuning. Key shift is the mean relative change of what edited layers see at the "
        "edits' subjects. Against no remedy, of the edits that held before fine-tuning with it and "
        "without it: those kept with it alone (+), without it alone (-), and McNemar's exact p, "
        "corrected by Holm's procedure over the table. In short, all "
        "methods stand together, and a remedy is set against none on the same edits and facts.",
    ]
    lacking = [
        f"{p.method}, {p.objective}, {p.remedy}: seeds {', '.join(map(str, p.missing))}"
        for p in points
        if p.missing
    ]
    return [*found, "", f"Not run: {'; '.join(lacking)}."] if lacking else found


def draw(points: Sequence[Point]) -> list[tuple[str, str]]:
    """Return captions and SVGs: edits and facts kept by method, and against task score and KL."""
    done = [p for p in points if p.done]
    plain = [p for p in done if p.remedy == NONE]
    objectives = [*dict.fromkeys(p.objective for p in plain)]
    found = []
    if plain:
        found.append((
            "Edits kept (bars) and intrinsic facts kept (lines: of the edited, dotted: of the "
            "never-edited model), without a remedy", _bars(plain, objectives),
        ))  # fmt: skip
    if done:
        found.append(("Edits kept against the task's score and against KL", _scatter(done)))
    return found


def _bars(points: Sequence[Point], objectives: Sequence[str]) -> str:
    figure, axes = _figure(len(objectives))
    for ax, objective in zip(axes, objectives, strict=True):
        mine = [p for p in points if p.objective == objective]
        at = [*range(len(mine))]
        values = [_value(p.ERR) for p in mine]
        low = [v - (_bound(p.ERR, "low", v)) for p, v in zip(mine, values, strict=True)]
        high = [_bound(p.ERR, "high", v) - v for p, v in zip(mine, values, strict=True)]
        ax.bar(at, values, yerr=[low, high], color="C0", capsize=2)
        for x, p in zip(at, mine, strict=True):
            ax.hlines(_value(p.IRR), x - 0.45, x + 0.45, color="C1")
            ax.hlines(_value(p.control), x - 0.45, x + 0.45, color="C2", ls=":")
        ax.set_xticks(at, [p.method for p in mine], rotation=60, ha="right", fontsize=8)
        ax.set_ylim(0, 1.02)
        ax.set_title(objective, fontsize=10)
    return _svg(figure)


def _scatter(points: Sequence[Point]) -> str:
    objectives = [*dict.fromkeys(p.objective for p in points)]
    remedies = [*dict.fromkeys(p.remedy for p in points)]
    methods = [*dict.fromkeys(p.method for p in points)]
    figure, axes = _figure(len(objectives) + 1)
    marks = "os^DvPX*<>"
    for p in points:
        style = {
            "color": f"C{methods.index(p.method) % 10}",
            "marker": marks[remedies.index(p.remedy) % len(marks)],
            "ls": "",
            "ms": 5,
        }
        ax = axes[objectives.index(p.objective)]
        if "tuned" in p.downstream:
            ax.plot([p.downstream["tuned"]], [_value(p.ERR)], **style)
            ax.set_xlabel(p.measure)
        ax.set_title(p.objective, fontsize=10)
        if p.kl:
            axes[-1].plot([p.kl], [_value(p.ERR)], **style)
    for ax in axes:
        ax.set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("edits kept")
    axes[-1].set_xscale("log")
    axes[-1].set_title("all objectives", fontsize=10)
    axes[-1].set_xlabel("KL to the edited model")
    for i, method in enumerate(methods):
        axes[-1].plot([], [], color=f"C{i % 10}", marker="o", ls="", label=method)
    for i, remedy in enumerate(remedies):
        axes[-1].plot([], [], color="0.4", marker=marks[i % len(marks)], ls="", label=remedy)
    axes[-1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left", frameon=False)
    return _svg(figure)


def _figure(columns: int):  # noqa: ANN202 - matplotlib is imported where used
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * columns + 1.6, 3.6), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _svg(figure) -> str:  # noqa: ANN001
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "editkit"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _value(cell: Estimate | None) -> float:
    return float("nan") if cell is None or cell["value"] is None else cell["value"]


def _bound(cell: Estimate | None, name: str, value: float) -> float:
    bound = None if cell is None else cell[name]  # type: ignore[literal-required]
    return value if bound is None else bound


def _cell(cell: Estimate | None) -> str:
    if cell is None or cell["value"] is None:
        return "-"
    if cell["low"] is None or cell["high"] is None:
        return f"{cell['value']:.2f}"
    return f"{cell['value']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"
