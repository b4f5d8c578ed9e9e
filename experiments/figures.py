"""Measure the table of plain fine-tuning: `make figures`.

Each run is one `editkit fit`; the table is read from the runs' own summaries and written between
the markers in the README of this folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS, RESULTS = ROOT / "runs" / "figures", ROOT / "experiments" / "results"
# settings chosen on the development split, see experiments/LOG.md
METHODS = {
    "FT, depth-first": ["experiments/method/ft.yaml", "--model.lr=3e-3", "--model.append_eos=true"],
    "FT, breadth-first": ["experiments/method/ft_breadth_first.yaml", "--model.lr=3e-3"],
    "LoRA": [
        "experiments/method/lora.yaml",
        "--model.lr=1e-3",
        "--model.roles=[mlp.down]",
        "--model.layers=[5]",
        "--model.append_eos=true",
    ],
}
COLUMNS = [
    ("reliability", "right after"),
    ("reliability", "final"),
    ("generalization", "final"),
    ("locality", "final"),
    ("portability", "final"),
]
SCORER = "generation"


def run(name: str, arguments: list[str]) -> dict:
    """Edit fact-world 300 times and return the summary."""
    folder = RUNS / name.lower().replace(",", "").replace(" ", "_")
    method, *options = arguments
    command = [
        sys.executable, "-m", "editkit", "fit", f"--model={method}", "--model.lm.id=factworld",
        *options, "--data=experiments/data/factworld.yaml", "--data.limit=300",
        "--data.probes_per_batch=256", "--model.evaluation.batch_size=256",
        "--model.evaluation.max_new_tokens=20",
        f"--trainer.default_root_dir={folder.relative_to(ROOT)}", "--trainer.accelerator=cpu",
        "--run.overwrite=true",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((folder / "summary.json").read_text())


def cell(estimate: dict | None) -> str:
    """Write a value with its interval."""
    if not estimate or estimate["value"] is None:
        return "-"
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def table(summaries: dict[str, dict]) -> str:
    """Return both tables as markdown: all kinds, and reliability by age."""
    heads = [f"{kind}, {moment}" for kind, moment in COLUMNS]
    lines = [
        f"| `{SCORER}` | " + " | ".join(heads) + " | perplexity | s/edit |",
        "|---" * (len(heads) + 3) + "|",
    ]
    for name, summary in summaries.items():
        cells = [
            cell(
                summary["immediate" if moment == "right after" else "scores"]
                .get(kind, {})
                .get(SCORER)
            )
            for kind, moment in COLUMNS
        ]
        before, after = summary["perplexity"]["before"], summary["perplexity"]["after"]
        cells += [f"{before:.1f} to {after:.1f}", f"{summary['seconds_per_edit']:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    ages = [f"{a['age'][0]}-{a['age'][1]}" for a in next(iter(summaries.values()))["by_age"]]
    lines += [
        "",
        "Final reliability by the number of edits that came later (newest on the left):",
        "",
        "| later edits | " + " | ".join(ages) + " |",
        "|---" * (len(ages) + 1) + "|",
    ]
    for name, summary in summaries.items():
        values = [f"{a['scores']['reliability'][SCORER]['value']:.2f}" for a in summary["by_age"]]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    commits = {str(summary["protocol"]["commit"]) for summary in summaries.values()}
    lines += ["", f"One seed each; commit {', '.join(sorted(commits))}."]
    return "\n".join(lines)


def main() -> None:
    """Run everything and write the table into its place."""
    text = table({name: run(name, arguments) for name, arguments in METHODS.items()})
    for folder in RUNS.iterdir():
        kept = RESULTS / folder.name
        kept.mkdir(parents=True, exist_ok=True)
        for file in ("summary.json", "config.yaml"):
            shutil.copy(folder / file, kept / file)
    readme = ROOT / "experiments" / "README.md"
    begin, end = "<!-- figures: begin -->", "<!-- figures: end -->"
    head, rest = readme.read_text().split(begin)
    _, tail = rest.split(end)
    readme.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
    print(text)


if __name__ == "__main__":
    main()
