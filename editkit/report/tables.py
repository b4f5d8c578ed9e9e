"""The tables of a report, one long frame each: what the page shows, and what CSV files hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from editkit.report import rows, words
from editkit.report.compare import Comparison
from editkit.report.failed import failed_rows
from editkit.report.files import Row
from editkit.report.load import Run

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Table:
    """A frame with what it is.

    Args:
        title: A few words.
        note: How to read it, in a sentence or two.
        frame: The rows.
    """

    title: str
    note: str
    frame: DataFrame


def strictest(runs: Sequence[Run]) -> str:
    """Return the strictest score that all runs have; the one shown first."""
    named = [{s for cells in run.summary["scores"].values() for s in cells} for run in runs]
    common = set.intersection(*named) or set.union(*named)
    known = (scorer for scorer in words.STRICTEST_FIRST if scorer in common)
    return next(known, min(common, default=words.STRICTEST_FIRST[0]))


def kinds_of(runs: Sequence[Run]) -> list[str]:
    """Return the kinds of row that any run has, in the order of the summaries."""
    return list(dict.fromkeys(kind for run in runs for kind in run.summary["scores"]))


def all_tables(runs: Sequence[Run], compared: Sequence[Comparison]) -> dict[str, Table]:
    """Build every table; empty ones are left out."""
    made = {**_of_scores(runs, compared), **_of_runs(runs)}
    return {name: table for name, table in made.items() if len(table.frame)}


def _of_scores(runs: Sequence[Run], compared: Sequence[Comparison]) -> dict[str, Table]:
    """Build the tables of scores."""
    scorer = strictest(runs)
    return {
        "scores": _table(
            "Scores",
            "Means with 95 % intervals from a bootstrap over edits: before editing, right after "
            "each edit, and final.",
            rows.scores(runs),
            ("run", "moment", "kind", "axis", "scorer", *rows.ESTIMATE),
        ),
        "comparison": _table(
            "Paired comparison",
            "Difference is run minus reference on the same probes; p by edits (sign flips), "
            "corrected by Holm for the number of runs; McNemar's exact p on single probes.",
            (asdict(one) for one in compared),
            tuple(f.name for f in fields(Comparison)),
        ),
        "by_age": _table(
            "Final scores by age",
            "Scores at the end of edits with so many later edits; age 0 is the newest.",
            rows.ages(runs),
            ("run", "youngest", "oldest", "kind", "scorer", *rows.ESTIMATE),
        ),
        "by_edits": _table(
            f"{scorer} by edits seen",
            "All probes of the edits made so far, asked again at each milestone and at the end.",
            rows.by_edits(runs, scorer),
            ("run", "edits_seen", "kind", "scorer", *rows.ESTIMATE),
        ),
        "retention": _table(
            f"Retention matrix, reliability by {scorer}",
            "Each group of edits, asked again after ever more edits.",
            rows.retention(runs, scorer),
            ("run", "first", "last", "asked_after", *rows.ESTIMATE),
        ),
        "relations": _table(
            f"Final {scorer} by relation",
            "The relation of the edited fact.",
            rows.relations(runs, scorer),
            ("run", "relation", "kind", "scorer", *rows.ESTIMATE),
        ),
        "failed": _table(
            "Failed probes",
            f"Every final probe with {scorer} below 1, and what was said before and after.",
            failed_rows(runs, scorer),
        ),
    }


def _of_runs(runs: Sequence[Run]) -> dict[str, Table]:
    """Build the tables of everything else."""
    return {
        "ability": _table(
            "General ability by edits seen",
            "What the model can do beside the edits; 0 edits is the unedited model.",
            rows.abilities(runs),
            ("run", "edits_seen", "measure", "value"),
        ),
        "harness": _table(
            "lm-evaluation-harness",
            "Tasks asked of the unedited and of the edited model, with standard errors.",
            rows.harness(runs),
            ("run", "task", "metric", *rows.HARNESS, "questions"),
        ),
        "routing": _table(
            "Routing by edits seen",
            "Edited prompts and other wordings that their own edit, another one or none answers; "
            "prompts to be left alone that some edit answers; what a method's own loop counted.",
            rows.routing(runs),
            ("run", "edits_seen", "rate", *rows.ESTIMATE),
        ),
        "cost": _table("Cost", "Time and memory on the machine of each run.", rows.costs(runs)),
        "conflicts": _table(
            "Conflicts",
            "Edits that were found to clash with earlier ones.",
            ({"run": run.name, **row} for run in runs for row in run.conflicts),
        ),
        "protocol": _table("Protocol", "How each run was measured.", rows.protocol_rows(runs)),
        "remarks": _table(
            "Remarks",
            "What limits the numbers.",
            ({"run": run.name, "remark": text} for run in runs for text in run.remarks),
        ),
    }


def _table(
    title: str, note: str, found: Iterable[Row], columns: Sequence[str] | None = None
) -> Table:
    """Make a table of records; columns name them where there may be none."""
    import pandas as pd

    return Table(title, note, pd.DataFrame([*found], columns=columns))
