"""Run methods beside each other on the same streams: `python experiments/grid.py NAME`.

`experiments/grids/NAME.yaml` names the methods, seeds and options. Each cell is one `editkit fit`
of its own; a cell that is done is not run again, so a killed grid goes on where it was. What came
out is written to `experiments/results/NAME/`: `numbers.json`, `table.md` and `curves.svg`. With
`--numbers` nothing is run: table and curves are made again from the numbers.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from pathlib import Path
from statistics import median

import yaml

from editkit.metrics.intervals import estimate
from editkit.study.cells import Cell, run_cells, slug

ROOT = Path(__file__).parents[1]
RUNS, RESULTS = ROOT / "runs" / "grids", ROOT / "experiments" / "results"
KINDS = ("reliability", "generalization", "locality", "portability")
MAIN = KINDS[:3]
RATES = {
    "self_match": "edit to its own", "self_wrong": "to another's", "self_rejected": "to the base",
    "right_route": "rephrase to its own", "wrong_route": "to another's", "rejected": "to the base",
    "false_activations": "locality probe to a memory",
}  # fmt: skip


def cells(grid: dict) -> list[tuple[str, int]]:
    """Return (method, seed) of every run."""
    return [(method, seed) for seed in grid["seeds"] for method in grid["methods"]]


def flat(options: list) -> list[str]:
    """Return options in a row; a grid shares lists of them between methods, inside one another."""
    return [o for one in options for o in (flat(one) if isinstance(one, list) else [one])]


def cell_of(name: str, grid: dict, method: str, seed: int) -> Cell:
    """Return the run of one method and seed."""
    folder = RUNS / name / f"{slug(method)}-{seed}"
    path, *options = flat(grid["methods"][method])
    args = [
        "fit", f"--model={path}", *grid.get("options", []),
        *options, f"--model.seed={seed}", f"--data.seed={seed}", f"--seed_everything={seed}",
        f"--trainer.default_root_dir={folder.relative_to(ROOT)}", "--run.overwrite=true",
    ]  # fmt: skip
    return Cell(f"{method}, seed {seed}", folder, tuple(args))


def rows_of(folder: Path, moment: str) -> list[dict]:
    """Return the rows of a run that were scored at a moment and count."""
    lines = (folder / "probes.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["moment"] == moment and r["counted"]]


def pooled(folders: list[Path], moment: str, scorer: str) -> dict[str, dict]:
    """Return estimates by kind over all seeds; an edit of a seed is a cluster."""
    found: dict[str, dict] = {}
    rows = [(seed, r) for seed, f in enumerate(folders) for r in rows_of(f, moment)]
    for kind in KINDS:
        mine = [(s, r) for s, r in rows if r["kind"] == kind and r["edit_id"] is not None]
        if mine:
            values = [r["scores"][scorer] for _, r in mine]
            found[kind] = dict(estimate(values, [s * 1_000_000 + r["edit_id"] for s, r in mine], 0))
    return found


def difference(one: list[Path], other: list[Path], scorer: str) -> dict[str, dict]:
    """Return the paired difference `one - other` by kind, final rows, pooled over seeds."""
    found: dict[str, dict] = {}
    for kind in KINDS:
        values, ids = [], []
        for seed, (a, b) in enumerate(zip(one, other, strict=True)):
            theirs = {
                r["probe_id"]: r["scores"][scorer] for r in rows_of(b, "final") if r["kind"] == kind
            }
            for r in rows_of(a, "final"):
                if r["kind"] == kind and r["probe_id"] in theirs and r["edit_id"] is not None:
                    values.append(r["scores"][scorer] - theirs[r["probe_id"]])
                    ids.append(seed * 1_000_000 + r["edit_id"])
        if values:
            found[kind] = dict(estimate(values, ids, 0))
    return found


def by_edits(folder: Path, scorer: str) -> list[dict]:
    """Return the mean of every kind at each milestone, over all edits applied by then."""
    rows = rows_of(folder, "milestone") + rows_of(folder, "final")
    ability = {}
    if (folder / "ability.jsonl").exists():
        lines = map(json.loads, (folder / "ability.jsonl").read_text().splitlines())
        ability = {a["edits_seen"]: a for a in lines}
    points = []
    for seen in sorted({r["edits_seen"] for r in rows}):
        point: dict = {"edits": seen, "perplexity": ability.get(seen, {}).get("perplexity")}
        for kind in KINDS:
            values = [
                r["scores"][scorer] for r in rows if r["edits_seen"] == seen and r["kind"] == kind
            ]
            point[kind] = sum(values) / len(values) if values else None
        points.append(point)
    return points


def drift(folders: list[Path]) -> dict | None:
    """Return how the drift of runs with a queue stands to its bound, None for those without.

    Whatever the losses are, mean PL <= D (1 + (kappa_T+1 - kappa_1) / T) at every site of every
    run (LyapLock, the queue summed up; kappa_1 = 1), as long as no `kappa_max` cuts in. Named are
    the site and seed with the largest mean PL / D, with its bound, and the largest final kappa.
    """
    found = []
    for folder in folders:
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        for ratio in [name for name in rows[0] if name.startswith("edit/PL_per_D/")]:
            kappa = ratio.replace("PL_per_D", "kappa")
            known = [(float(r[ratio]), float(r[kappa])) for r in rows if r[ratio]]
            mean, last = sum(p for p, _ in known) / len(known), known[-1][1]
            bound = 1 + (last - 1) / len(known)
            found.append({"mean": mean, "bound": bound, "kappa": last})
    if not found:
        return None
    highest = max(found, key=lambda site: site["mean"])
    return highest | {
        "kappa": max(site["kappa"] for site in found),
        "holds": all(site["mean"] <= site["bound"] * (1 + 1e-6) for site in found),
        "sites": len(found),
    }


def drift_lines(methods: dict) -> list[str]:
    """Write a line for every method with a queue."""
    return [
        f"{method}: largest mean PL / D {n['drift']['mean']:.3f}, its bound "
        f"{n['drift']['bound']:.3f}, largest final kappa {n['drift']['kappa']:.1f}; the bound "
        f"{'holds at all' if n['drift']['holds'] else 'is BROKEN among'} "
        f"{n['drift']['sites']} layers of all seeds."
        for method, n in methods.items()
        if n.get("drift")
    ]


def mean(values: list) -> float:
    """Return the mean of numbers."""
    return sum(values) / len(values)


def by_edits_lines(methods: dict) -> list[str]:
    """Write scores by edits seen, mean of the seeds, with the third root of their product."""
    heads = [p["edits"] for p in next(iter(methods.values()))["by_edits"][0]]
    lines = [
        "",
        f"{' / '.join(MAIN)}, and the third root of their product (OP), by edits seen, mean of the "
        "seeds:",
        "",
        "| edits | " + " | ".join(map(str, heads)) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for method, n in methods.items():
        row = []
        for points in zip(*n["by_edits"], strict=True):
            values = [[p[kind] for p in points if p[kind] is not None] for kind in MAIN]
            if not all(values):
                row.append("-")
                continue
            means = [mean(v) for v in values]
            root = (means[0] * means[1] * means[2]) ** (1 / 3)
            row.append(" / ".join(f"{m:.2f}" for m in means) + f", {root:.2f}")
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    lines += ["", "Perplexity by edits seen, mean of the seeds:", "", *lines[3:5]]
    for method, n in methods.items():
        columns = [[p["perplexity"] for p in points] for points in zip(*n["by_edits"], strict=True)]
        row = ["-" if None in column else f"{mean(column):.2f}" for column in columns]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return lines


def routing_lines(methods: dict) -> list[str]:
    """Write where prompts went, in shares, and what a closed loop counted, mean of the seeds."""
    routed = {m: n["routing"] for m, n in methods.items() if n.get("routing")}
    looped = {m: n["loop"] for m, n in methods.items() if n.get("loop")}
    lines = []
    if routed:
        lines += ["", "Routes of the final model, mean of the seeds:", ""]
        lines += ["| | " + " | ".join(RATES.values()) + " |", "|---" * (len(RATES) + 1) + "|"]
        lines += [
            f"| {method} | "
            + " | ".join(f"{rates[name]:.3f}" if name in rates else "-" for name in RATES)
            + " |"
            for method, rates in routed.items()
        ]
    if looped:
        heads = [name for name in next(iter(looped.values())) if not name.endswith("_pool")]
        lines += ["", "Counted by the loop, mean of the seeds:", ""]
        lines += ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        lines += [
            f"| {method} | " + " | ".join(f"{counts[name]:g}" for name in heads) + " |"
            for method, counts in looped.items()
        ]
    return lines


def shared(summaries: list[dict], part: str) -> dict | None:
    """Return the means over seeds of a part of the summaries, None where one lacks it."""
    parts = [s.get(part) for s in summaries]
    if not all(parts):
        return None
    values = [{k: v["value"] if isinstance(v, dict) else v for k, v in p.items()} for p in parts]
    return {
        name: mean([v[name] for v in values])
        for name in values[0]
        if all(v.get(name) is not None for v in values)
    }


def collect(name: str, grid: dict) -> dict:
    """Return everything the table and the curves show."""
    scorer, numbers = grid.get("scorer", "generation"), {}
    folders = {m: [RUNS / name / f"{slug(m)}-{s}" for s in grid["seeds"]] for m in grid["methods"]}
    reference = grid.get("reference")
    for method, its in folders.items():
        if not all((f / "summary.json").exists() for f in its):
            numbers[method] = {"failed": [f.name for f in its if not (f / "summary.json").exists()]}
            continue
        summaries = [json.loads((f / "summary.json").read_text()) for f in its]
        numbers[method] = {
            "final": pooled(its, "final", scorer),
            "immediate": pooled(its, "immediate", scorer),
            "by_age": [
                [
                    {"age": a["age"], "reliability": a["scores"]["reliability"][scorer]["value"]}
                    for a in s["by_age"]
                ]
                for s in summaries
            ],
            "by_edits": [by_edits(f, scorer) for f in its],
            "perplexity": [s["perplexity"] for s in summaries],
            "seconds_per_edit": [s["seconds_per_edit"] for s in summaries],
            "drift": drift(its),
            "routing": shared(summaries, "routing"),
            "loop": shared(summaries, "loop"),
            "commits": sorted({str(s["protocol"]["commit"]) for s in summaries}),
            "arguments": summaries[0]["protocol"]["method_arguments"],
        }
        if reference and method != reference and "failed" not in numbers.get(reference, {}):
            done = all((f / "summary.json").exists() for f in folders[reference])
            if done:
                numbers[method]["reference_minus_this"] = difference(
                    folders[reference], its, scorer
                )
    return {"grid": grid, "scorer": scorer, "methods": numbers}


def cell(estimate: dict | None, sign: bool = False) -> str:
    """Write a value with its interval."""
    if not estimate or estimate["value"] is None:
        return "-"
    form = "+.2f" if sign else ".2f"
    return f"{estimate['value']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"


def table(found: dict) -> str:
    """Return the tables as markdown."""
    grid, seeds = found["grid"], len(found["grid"]["seeds"])
    heads = ["reliability, right after", *(f"{k}, final" for k in KINDS), "perplexity", "s/edit"]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for method, n in found["methods"].items():
        if "failed" in n:
            lines.append(f"| {method} | failed: {', '.join(n['failed'])} |")
            continue
        row = [cell(n["immediate"].get("reliability")), *(cell(n["final"].get(k)) for k in KINDS)]
        after = [p["after"] for p in n["perplexity"]]
        row.append(f"{sum(after) / len(after):.1f} ({min(after):.1f} to {max(after):.1f})")
        row.append(f"{median(n['seconds_per_edit']):.3f}")
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    reference = grid.get("reference")
    compared = {m: n for m, n in found["methods"].items() if "reference_minus_this" in n}
    if compared:
        lines += ["", f"{reference} minus each, paired by probe, final:", ""]
        lines += ["| | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
        for method, n in compared.items():
            pairs = [cell(n["reference_minus_this"].get(k), sign=True) for k in KINDS]
            lines.append(f"| {method} | " + " | ".join(pairs) + " |")
    done = {method: n for method, n in found["methods"].items() if "failed" not in n}
    if not done:
        return "\n".join(lines) + "\n"
    lines += by_edits_lines(done)
    ages = next(iter(done.values()))["by_age"][0]
    lines += [
        "",
        "Final reliability by the number of edits that came later, mean of the seeds:",
        "",
    ]
    lines.append(
        "| later edits | " + " | ".join(f"{a['age'][0]}-{a['age'][1]}" for a in ages) + " |"
    )
    lines.append("|---" * (len(ages) + 1) + "|")
    for method, n in done.items():
        columns = zip(*n["by_age"], strict=True)
        means = [mean([a["reliability"] for a in column]) for column in columns]
        lines.append(f"| {method} | " + " | ".join(f"{m:.2f}" for m in means) + " |")
    lines += routing_lines(done)
    if drifts := drift_lines(found["methods"]):
        lines += ["", *(f"- {line}" for line in drifts)]
    commits = {c for n in found["methods"].values() for c in n.get("commits", [])}
    lines += [
        "",
        f"`{found['scorer']}`, {seeds} seeds pooled; brackets are 95 % bootstrap intervals over "
        "edits; perplexity is the seeds' mean (lowest to highest); seconds: median of the seeds, "
        "machine under load. "
        f"Commit {', '.join(sorted(commits))}.",
    ]
    return "\n".join(lines) + "\n"


def curves(found: dict, path: Path) -> None:
    """Draw scores and perplexity by edits seen, mean of the seeds."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "editkit"
    panels = ("reliability", "generalization", "locality", "perplexity")
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for index, (method, n) in enumerate(found["methods"].items()):
        if "failed" in n:
            continue
        style = {"color": f"C{index % 10}", "ls": ("-", "--")[index // 10 % 2]}
        for ax, panel in zip(axes, panels, strict=True):
            columns = list(zip(*n["by_edits"], strict=True))
            points = [(c[0]["edits"], [p[panel] for p in c]) for c in columns]
            known = [(e, sum(v) / len(v)) for e, v in points if None not in v]
            ax.plot(*zip(*known, strict=True), label=method, **style) if known else None
    for ax, panel in zip(axes, panels, strict=True):
        ax.set_title(panel, fontsize=10)
        ax.set_xlabel("edits")
        ax.set_yscale("log") if panel == "perplexity" else ax.set_ylim(0, 1.02)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(
        handles, labels, fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left", frameon=False
    )
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run the grid and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="name of a file in experiments/grids")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--only", nargs="*", help="labels of the methods to run")
    parser.add_argument("--numbers", action="store_true", help="run nothing, draw from the numbers")
    args = parser.parse_args()
    folder = RESULTS / args.name
    if args.numbers:
        show(json.loads((folder / "numbers.json").read_text()), folder)
        return
    grid = yaml.safe_load((ROOT / "experiments" / "grids" / f"{args.name}.yaml").read_text())
    wanted = [(m, s) for m, s in cells(grid) if args.only is None or m in args.only]
    os.chdir(ROOT)
    run_cells([cell_of(args.name, grid, *point) for point in wanted], args.jobs, print)
    found = collect(args.name, grid)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "numbers.json").write_text(json.dumps(found, indent=1) + "\n")
    show(found, folder)


def show(found: dict, folder: Path) -> None:
    """Write table and curves, and print the table."""
    (folder / "table.md").write_text(table(found))
    curves(found, folder / "curves.svg")
    print(table(found))


if __name__ == "__main__":
    main()
