"""Figures as inline SVG that takes its colours and its typeface from the page.

Runs are told apart by letter, marker and colour at once; the letters stand at the lines' ends. One
figure is as wide as a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

WIDTH, HEIGHT = 5.0, 3.1  # inches of 72 CSS pixels
MARKERS = "osD^vP"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (6, 2, 1, 2)))
WIDE = 50  # a larger ratio of values calls for a logarithmic axis
SERIES = 6  # colours of the page's style
TEXT, MUTED, GRID = "#00f001", "#00f002", "#00f003"  # stand for the style's colours
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.axisbelow": True,
}


def letter(i: int) -> str:
    """Return a run's letter: A to Z, then A1 to Z1."""
    return chr(ord("A") + i % 26) + (str(i // 26) if i >= 26 else "")


def colour(i: int) -> str:
    """Return what stands for a run's colour."""
    return f"#00c0{i % SERIES:02x}"


def figure(draw: Callable[[Axes], None], described: str, height: float = HEIGHT) -> str:
    """Return an SVG element.

    Args:
        draw: Draws on the axes it is given.
        described: What the figure shows, for who cannot see it.
        height: Inches; the width is the same for all.
    """
    from html import escape

    import matplotlib as mpl
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": described}):
        drawn = Figure(figsize=(WIDTH, height))  # margins that are the same for all line up
        drawn.subplots_adjust(left=0.11, right=0.9, bottom=0.5 / height, top=1 - 0.1 / height)
        draw(drawn.add_subplot())
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", svg, count=5)
    for i in range(SERIES):
        svg = svg.replace(colour(i), f"var(--run{i})")
    for stand_in, name in ((TEXT, "text"), (MUTED, "muted"), (GRID, "line")):
        svg = svg.replace(stand_in, f"var(--{name})")
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))  # other names would come twice
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(described)}"', 1)


def glance(frame: DataFrame, names: Sequence[str], kinds: Sequence[str], scorer: str) -> str:
    """Draw every kind's score before, right after and at the end, run by run.

    Args:
        frame: The table of scores.
        names: Names of the runs, in their order.
        kinds: Kinds to draw.
        scorer: Score to draw.
    """
    mine = frame[(frame.scorer == scorer) & (frame.axis == "")]
    cells = {(r.run, r.moment, r.kind): r for r in mine.itertuples()}
    rows = [(kind, i) for kind in kinds for i in range(-1, len(names))]

    def draw(ax: Axes) -> None:
        ticks, labels = [], []
        for y, (kind, i) in enumerate(rows):
            if i < 0:
                label = kind.replace("_", " ")
                ax.text(0, y + 0.2, label, transform=ax.get_yaxis_transform(), weight="bold")
                continue
            ticks.append(y)
            labels.append(letter(i) if len(names) > 1 else "")
            found = [cells.get((names[i], m, kind)) for m in ("before", "right after", "final")]
            _dots(ax, y, i, found)
        ax.set_yticks(ticks, labels)
        ax.tick_params(axis="y", length=0, labelcolor=TEXT)
        ax.grid(visible=False, axis="y")
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_xlabel(scorer.replace("_", " "))
        if _is_share(mine.value):
            ax.set_xlim(-0.02, 1.02)

    return figure(draw, f"{scorer} of every kind and run", 0.7 + 0.29 * len(rows))


def curves(
    frame: DataFrame,
    names: Sequence[str],
    x: str,
    described: str,
    log_ticks: Sequence[float] = (),
    markers: bool = True,
) -> str:
    """Draw one line a run, with its interval where there is one.

    Args:
        frame: Columns `run`, `value`, perhaps `low` and `high`, and the one named by `x`.
        names: Names of the runs, in their order.
        x: Column of the horizontal axis, which names it too.
        described: What the figure shows.
        log_ticks: Ticks of a logarithmic horizontal axis; empty for a linear one.
        markers: Mark each point.
    """

    def draw(ax: Axes) -> None:
        ends = []
        for i, name in enumerate(names):
            part = frame[frame.run == name].sort_values(x)
            if part.empty:
                continue
            (line,) = ax.plot(part[x], part.value, color=colour(i), lw=1.8, markersize=4.5)
            line.set_linestyle(DASHES[i % len(DASHES)])
            line.set_marker(MARKERS[i % len(MARKERS)] if markers else "")
            if "low" in part and part.low.notna().any():
                ax.fill_between(part[x], part.low, part.high, color=colour(i), alpha=0.15, lw=0)
            ends.append((i, part[x].iloc[-1], part.value.iloc[-1]))
        _scale(ax, frame, log_ticks)
        ax.set_xlabel(x.replace("_", " "))
        if len(names) > 1:
            _name_ends(ax, ends)

    return figure(draw, described)


def _scale(ax: Axes, frame: DataFrame, log_ticks: Sequence[float]) -> None:
    """Choose the scales of both axes."""
    if log_ticks:
        ax.set_xscale("log")
        ax.set_xlim(log_ticks[0] / 1.2, log_ticks[-1] * 1.2)
        ax.set_xticks(log_ticks, [f"{tick:g}" for tick in log_ticks])
        ax.set_xticks([], minor=True)
    else:
        ax.locator_params(axis="x", integer=True)
    if frame.value.min() > 0 and frame.value.max() > WIDE * frame.value.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    elif _is_share(frame.value) and "low" in frame:
        ax.set_ylim(-0.04, 1.04)


def _dots(ax: Axes, y: float, i: int, found: Sequence[Any]) -> None:
    """Draw one run's three moments on a line, and the final value beside it."""
    before, early, final = found
    if before is not None:
        ax.plot(before.value, y, "|", color=MUTED, markersize=11, markeredgewidth=2)
    if early is not None:
        ax.plot(early.value, y, "o", mfc="none", mec=colour(i), markersize=8, markeredgewidth=1.5)
    if final is not None:
        if final.low == final.low:
            ax.plot([final.low, final.high], [y, y], color=colour(i), lw=2.5, alpha=0.6)
        ax.plot(final.value, y, MARKERS[i % len(MARKERS)], color=colour(i), markersize=6)
        ax.text(1.02, y, f"{final.value:.2f}", transform=ax.get_yaxis_transform(), va="center")


def _name_ends(ax: Axes, ends: Sequence[tuple[int, float, float]]) -> None:
    """Write each line's letter at its end, apart from one another."""
    ax.get_xlim(), ax.get_ylim()  # what brings the limits up to date
    last = float("-inf")
    for i, x, y in sorted(ends, key=lambda end: end[2]):
        _, share = ax.transAxes.inverted().transform(ax.transData.transform((x, y)))
        last = max(share, last + 0.08)
        ax.text(
            1.02, last, letter(i), transform=ax.transAxes, va="center", color=colour(i),
            weight="bold",
        )  # fmt: skip


def _is_share(values: Any) -> bool:
    """Whether values are all between 0 and 1."""
    return bool(values.between(0, 1).all())
