"""The run folder: everything a run leaves behind, complete or not there at all.

runs/<name>/  config.yaml  adapter_config.json  adapter_model.safetensors  edits.jsonl
              unedited.jsonl  probes.jsonl  summary.json  metrics.csv  checkpoints/last.ckpt
              ability.jsonl  conflicts.jsonl (where there are any)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.progress import track

from editkit.adapters.io import write_lines
from editkit.callbacks.ability import Ability
from editkit.callbacks.folder import EDITS, PREDICTIONS, PROBES, SUMMARY, UNEDITED, claim
from editkit.callbacks.milestones import Milestones, is_over
from editkit.callbacks.protocol import peak_memory_bytes, stamp
from editkit.callbacks.rows import append_rows, is_before_checkpoint, keep_rows, read_rows
from editkit.methods.artefact import save_edits
from editkit.methods.base import EditModule
from editkit.metrics.evaluate import ProbeRow
from editkit.metrics.summary import RunFacts, summarise, write_json
from editkit.metrics.tables import age_table, summary_table


class RunFolder(Callback):
    """Writes probes as they are scored, and ledger, adapter and summary at the end.

    A row of `probes.jsonl` says when it was scored: `immediate` (right after its own edit),
    `milestone` (on the way) or `final` (after the whole stream).

    Args:
        immediate: Score each edit's probes right after the edit, too.
        overwrite: Replace a finished run in the same folder.
    """

    def __init__(self, immediate: bool = True, overwrite: bool = False) -> None:
        self.immediate = immediate
        self.overwrite = overwrite
        self.rows: list[ProbeRow] = []  # of the validation under way
        self.finished = False  # kept in checkpoints: Lightning runs nothing behind the last epoch
        self.asked_at = -1  # edits applied when all probes were asked last
        self.answers: list[dict[str, Any]] = []  # of the prediction under way
        self.hits: list[float] = []  # immediate reliability, for the progress bar

    def setup(self, trainer: Trainer, pl_module: EditModule, stage: str) -> None:
        """Learn where the folder is, and what each edit's fact is about."""
        self.folder = Path(trainer.default_root_dir)
        self.ability = next((c for c in trainer.callbacks if isinstance(c, Ability)), Ability())
        self.relations = {edit.id: edit.relation for edit in trainer.datamodule.edits}

    def on_fit_start(self, trainer: Trainer, pl_module: EditModule) -> None:
        """Cut the rows back to where a resumed run goes on; ask the unedited model.

        Raises:
            ValueError: If a new run would write over another and `overwrite` is off, or the
                checkpoint is of a finished run.
        """
        resumed = bool(trainer.ckpt_path)
        if resumed and self.finished:
            raise ValueError(
                f"the checkpoint is of a finished run of {pl_module.edits_seen} edits; begin a new "
                "run in another --trainer.default_root_dir for a longer stream"
            )
        if not resumed:
            claim(self.folder, self.overwrite)
        keep_rows(self.folder / PROBES, pl_module.edits_seen, is_before_checkpoint)
        self.ability.before(trainer, pl_module)
        if not resumed:
            self._ask_unedited(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: EditModule) -> None:
        """Ask again, on resume, what a milestone asked behind the checkpoint."""
        marks = [c for c in trainer.callbacks if isinstance(c, Milestones)]
        is_due = any(pl_module.edits_seen in mark.asked_at(trainer) for mark in marks)
        if trainer.ckpt_path and is_due and not is_over(trainer, pl_module):
            self._append(self._ask_all(trainer, pl_module), "milestone", pl_module.edits_seen)

    def on_exception(
        self, trainer: Trainer, pl_module: EditModule, exception: BaseException
    ) -> None:
        """Keep what was done where the run is told to end, or a batch is refused as a whole."""
        is_whole = isinstance(exception, SIGTERMException) or pl_module.is_refused
        if is_whole and trainer.state.fn == TrainerFn.FITTING:
            trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")

    def _ask_all(self, trainer: Trainer, pl_module: EditModule) -> list[ProbeRow]:
        probes, size = trainer.datamodule.probes, trainer.datamodule.probes_per_batch
        starts = range(0, len(probes), size)
        return [row for i in starts for row in pl_module.score(probes[i : i + size])]

    def _ask_unedited(self, trainer: Trainer, pl_module: EditModule) -> None:
        """Write what the unedited model says to all probes, before the first edit.

        All at once is several times faster than a few of them at each edit.
        """
        probes, size = trainer.datamodule.probes, trainer.datamodule.probes_per_batch
        starts = range(0, len(probes), size)
        silent = trainer.progress_bar_callback is None or not trainer.is_global_zero
        rows: list[ProbeRow] = []
        for i in track(starts, "asking the unedited model", disable=silent, transient=True):
            rows += pl_module.score_unedited(probes[i : i + size])
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_lines(self.folder / UNEDITED, rows)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run cannot measure again."""
        kept = ("hits", "finished")
        return {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take `state_dict` back."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: EditModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Score the batch's own probes right after the edit."""
        if not self.immediate:
            return
        rows = pl_module.score(trainer.datamodule.probes_of([edit.id for edit in batch]))
        self._append(rows, "immediate", pl_module.edits_seen)
        scorer = pl_module.evaluation.scorers[0]
        told = [r for r in rows if r["kind"] == "reliability" and r["counted"]]
        self.hits += [r["scores"][scorer] for r in told if scorer in r["scores"]]
        if self.hits:
            pl_module.log("immediate", sum(self.hits) / len(self.hits), prog_bar=True, batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: EditModule) -> None:
        """Begin a new set of rows."""
        self.rows = []

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: EditModule, outputs: Any, *args: Any
    ) -> None:
        """Collect the rows of a batch."""
        self.rows += outputs["rows"]

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: EditModule) -> None:
        """Write the rows; outside a fit, show the table."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn != TrainerFn.FITTING:
            self._show(self._summary(trainer, pl_module, []))
            return
        self.asked_at = pl_module.edits_seen
        moment = "final" if is_over(trainer, pl_module) else "milestone"
        self._append(self.rows, moment, pl_module.edits_seen)

    on_test_end = on_validation_end

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: EditModule, outputs: Any, *args: Any
    ) -> None:
        """Collect the answers of a batch."""
        self.answers += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: EditModule) -> None:
        """Write `predictions.jsonl`."""
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_lines(self.folder / PREDICTIONS, self.answers)

    def on_train_end(self, trainer: Trainer, pl_module: EditModule) -> None:
        """Write what the run has found, then a last checkpoint."""
        if self.asked_at != pl_module.edits_seen:  # killed before its last validation, resumed
            self.rows = self._ask_all(trainer, pl_module)
            self._append(self.rows, "final", pl_module.edits_seen)
        self.ability.now(trainer, pl_module)  # on all devices, for the summary
        self._finish(trainer, pl_module)
        self.finished = pl_module.edits_seen >= len(trainer.datamodule.edits)
        if isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            # all ranks take part
            trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")

    @rank_zero_only
    def _finish(self, trainer: Trainer, pl_module: EditModule) -> None:
        """Write ledger, adapter and summary, and show the table."""
        write_lines(self.folder / EDITS, pl_module.ledger)
        save_edits(self.folder, pl_module)
        summary = self._summary(trainer, pl_module, self._read("immediate"))
        write_json(self.folder / SUMMARY, summary)
        self._show(summary)

    def _summary(
        self, trainer: Trainer, pl_module: EditModule, immediate: list[ProbeRow]
    ) -> dict[str, Any]:
        """Build the summary from the last validation's rows."""
        ledger = pl_module.ledger
        after = self.ability.now(trainer, pl_module)
        before = self.ability.unedited
        facts = RunFacts(
            method=type(pl_module).__name__,
            base=pl_module.spec.id,
            edits_seen=pl_module.edits_seen,
            perplexity_before=before["perplexity"] if before else None,
            perplexity_after=after["perplexity"],
            seconds_per_edit=sum(e["seconds"] for e in ledger) / len(ledger) if ledger else None,
            peak_memory_bytes=peak_memory_bytes(pl_module.device),
        )
        summary = summarise(self.rows, immediate, facts, pl_module.evaluation)
        summary["protocol"] |= stamp(trainer, pl_module)
        for teller in (pl_module, *trainer.callbacks):
            summary |= getattr(teller, "for_summary", dict)()
        return summary

    @rank_zero_only
    def _show(self, summary: dict[str, Any]) -> None:
        console = Console()
        if not console.is_terminal:
            console.width = 100
        console.print(summary_table(summary))
        if len(summary["by_age"]) > 1:
            console.print(age_table(summary))
        if said := summary.get("canary"):
            console.print(said["message"], style="bold red", highlight=False)
        if (self.folder / SUMMARY).exists():
            console.print(f"run folder: {self.folder}", highlight=False)

    def _append(self, rows: list[ProbeRow], moment: str, edits_seen: int) -> None:
        """Add rows to `probes.jsonl`, each with the moment it was scored at."""
        when = {"moment": moment, "edits_seen": edits_seen}
        about = [{"relation": self.relations.get(row["edit_id"], "")} for row in rows]
        told = [{**when, **row, **more} for row, more in zip(rows, about, strict=True)]
        append_rows(self.folder / PROBES, told)

    def _read(self, moment: str) -> list[Any]:
        """Return the rows of a moment from `probes.jsonl`."""
        return [row for row in read_rows(self.folder / PROBES) if row["moment"] == moment]

    def rewind(self, edits_seen: int) -> None:
        """Drop the rows of later edits: of a part after the checkpoint, or of edits taken back."""
        keep_rows(self.folder / PROBES, edits_seen)
