"""Weights & Biases as one YAML line: curves by edits seen, and what a run leaves behind.

Nothing else in editkit imports wandb. Offline where no key is known.
"""

from __future__ import annotations

import json
import netrc
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from editkit.adapters.io import CONFIG, TENSORS
from editkit.callbacks.folder import EDITS, PROBES, REPORT, SUMMARY

RUN_ID = "wandb_run.txt"
AXIS = "edits"
MOST_ROWS = 10_000  # wandb cuts longer tables
PROBE_COLUMNS = (
    "edit_id", "kind", "axis", "prompt", "target", "reference", "answer", "counted", "probe_id",
)  # fmt: skip


def has_wandb_key() -> bool:
    """Whether a W&B key is configured, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Wandb(WandbLogger):
    """Lightning's WandbLogger by edits seen, offline by itself where there is no key.

    Beside the curves, a run of `editkit fit` leaves there its config, a table of the final probes,
    its adapter and its report. `--ckpt_path last` goes on with the same W&B run.

    Args:
        project: W&B project.
        save_dir: Folder of the local files.
        offline: Write local files only; none decides by whether a key is configured.
        name: Name of the run in W&B; none takes the run folder's.
        options: Further arguments of Lightning's WandbLogger.
    """

    def __init__(
        self,
        project: str = "editkit",
        save_dir: Path = Path("runs"),
        offline: bool | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        save_dir = Path(save_dir).absolute()  # wandb's own process stays where it was started
        save_dir.mkdir(parents=True, exist_ok=True)
        offline = not has_wandb_key() if offline is None else offline
        super().__init__(name=name, save_dir=save_dir, project=project, offline=offline, **options)
        self._edits: float | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, made at first use; its curves are drawn by edits seen."""
        is_new = self._experiment is None
        run = super().experiment
        if is_new:
            axis = self._prefix + self.LOGGER_JOIN_CHAR + AXIS if self._prefix else AXIS
            run.define_metric(axis)
            run.define_metric("*", step_metric=axis, step_sync=True)
        return run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers together with the edits seen, which scores do not carry themselves."""
        self._edits = metrics.get(AXIS, self._edits)
        seen = {} if self._edits is None else {AXIS: self._edits}
        super().log_metrics({**metrics, **seen}, step)

    def resume(self, folder: Path) -> None:
        """Go on with the W&B run of a run folder where it has one; before the first use."""
        kept = folder / RUN_ID
        if kept.exists():
            self._wandb_init["id"] = kept.read_text(encoding="utf-8").strip()
        self._wandb_init["name"] = self._wandb_init["name"] or folder.resolve().name

    @rank_zero_only
    def begin(self, folder: Path) -> None:
        """Log the config of a run folder, and keep the W&B run's id in it."""
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        self.log_hyperparams(config)
        (folder / RUN_ID).write_text(f"{self.experiment.id}\n", encoding="utf-8")

    @rank_zero_only
    def keep(self, folder: Path) -> None:
        """Log what a finished run left in its folder: scores, probes, adapter and report."""
        if not (folder / SUMMARY).exists():
            return
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        self.log_hyperparams({"protocol": summary["protocol"]})
        estimates = {
            f"{key}/{kind}/{scorer}/{part}": cell[part]
            for moment, key in (("immediate", "right_after"), ("scores", "final"))
            for kind, cells in summary[moment].items()
            for scorer, cell in cells.items()
            for part in ("value", "low", "high")
        }
        self.experiment.summary.update(estimates)
        self._keep_probes(folder / PROBES)
        name = re.sub(r"[^\w.-]+", "-", folder.resolve().name)
        self._keep_files(
            f"{name}-adapter", "adapter", [folder / f for f in (CONFIG, TENSORS, EDITS)]
        )
        self._keep_files(f"{name}-report", "report", [folder / REPORT])

    @rank_zero_only
    def close(self, failed: bool) -> None:
        """End the W&B run, so that another run of this process gets one of its own."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(failed))
            self._experiment = None

    def _keep_probes(self, path: Path) -> None:
        """Log the final rows as a table, an even spread of them where they are many."""
        with path.open(encoding="utf-8") as file:
            rows = [row for row in map(json.loads, file) if row["moment"] == "final"]
        rows = rows[:: -(-len(rows) // MOST_ROWS) or 1]
        scorers = [*dict.fromkeys(scorer for row in rows for scorer in row["scores"])]
        data = [
            [*(row.get(name) for name in PROBE_COLUMNS), *(row["scores"].get(s) for s in scorers)]
            for row in rows
        ]
        self.log_table("probes", columns=[*PROBE_COLUMNS, *scorers], data=data)

    def _keep_files(self, name: str, kind: str, files: list[Path]) -> None:
        """Log the files that there are as one artefact."""
        import wandb

        artefact = wandb.Artifact(name, type=kind)
        found = [path for path in files if path.exists()]
        for path in found:
            artefact.add_file(str(path))
        if found:
            self.experiment.log_artifact(artefact)


def wandb_loggers(loggers: Iterable[Any]) -> list[Wandb]:
    """Return those of a Trainer's loggers that are W&B."""
    return [logger for logger in loggers if isinstance(logger, Wandb)]


@contextmanager
def kept_in_wandb(loggers: Iterable[Any], folder: Path) -> Iterator[None]:
    """Go on with a folder's W&B run, let it keep what the folder then holds, and end it.

    Args:
        loggers: Loggers of a Trainer; those of other kinds are left alone.
        folder: Run folder.
    """
    mine = wandb_loggers(loggers)
    failed = True
    try:
        for logger in mine:
            logger.resume(folder)
        yield
        for logger in mine:
            logger.keep(folder)
        failed = False
    finally:
        for logger in mine:
            logger.close(failed)
