"""The run folder: everything a run leaves behind, complete or not there at all.

runs/<name>/  config.yaml  adapter_config.json  adapter_model.safetensors  edits.jsonl
              probes.jsonl  summary.json  metrics.csv  checkpoints/last.ckpt
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import track

from editkit.adapters.io import replacing, write_lines
from editkit.callbacks.folder import EDITS, PREDICTIONS, PROBES, SUMMARY, claim
from editkit.callbacks.protocol import peak_memory_bytes, stamp
from editkit.methods.artefact import save_edits
from editkit.methods.base import EditModule
from editkit.metrics.evaluate import ProbeRow
from editkit.metrics.perplexity import perplexity
from editkit.metrics.summary import RunFacts, summarise, write_json
from editkit.metrics.tables import age_table, summary_table


def is_over(trainer: Trainer, pl_module: EditModule) -> bool:
    """Whether the last edit of this run is made: of the stream, or of `max_steps`."""
    at_end = pl_module.edits_seen >= len(trainer.datamodule.edits)
    return at_end or 0 < trainer.max_steps <= trainer.global_step


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
        self.perplexity_before: float | None = None
        self.rows: list[ProbeRow] = []  # of the validation under way
        self.finished = False  # kept in checkpoints: Lightning runs nothing behind the last epoch
        self.asked_at = -1  # edits applied when all probes were asked last
        self.answers: list[dict[str, Any]] = []  # of the prediction under way
        self.hits: list[float] = []  # immediate reliability, for the progress bar

    def setup(self, trainer: Trainer, pl_module: EditModule, stage: str) -> None:
        """Learn where the folder is."""
        self.folder = Path(trainer.default_root_dir)

    def on_fit_start(self, trainer: Trainer, pl_module: EditModule) -> None:
        """Cut the rows back to where a resumed run goes on; ask the unedited model.

        Raises:
            ValueError: If a new run would write over another and `overwrite` is off, or the
                checkpoint is of a finished run.
        """
        resumed = pl_module.edits_seen > 0
        if resumed and self.finished:
            raise ValueError(
                f"the checkpoint is of a finished run of {pl_module.edits_seen} edits; begin a new "
                "run in another --trainer.default_root_dir for a longer stream"
            )
        if not resumed:
            claim(self.folder, self.overwrite)
        self._keep_rows_up_to(pl_module.edits_seen)
        texts = trainer.datamodule.texts
        if texts and self.perplexity_before is None:
            with pl_module.lm.unedited():
                self.perplexity_before = perplexity(pl_module.lm, texts)
        if self.immediate:  # all at once is several times faster than a few at each edit
            probes, size = trainer.datamodule.probes, pl_module.evaluation.batch_size
            starts = range(0, len(probes), size)
            silent = trainer.progress_bar_callback is None
            for i in track(starts, "asking the unedited model", disable=silent, transient=True):
                pl_module.ask_unedited(probes[i : i + size])

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run cannot measure again."""
        kept = ("perplexity_before", "hits", "finished")
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
        self.hits += [r["scores"][scorer] for r in told]
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
        self.folder.mkdir(parents=True, exist_ok=True)
        write_lines(self.folder / PREDICTIONS, self.answers)

    def on_train_end(self, trainer: Trainer, pl_module: EditModule) -> None:
        """Write what the run has found, then a last checkpoint."""
        if self.asked_at != pl_module.edits_seen:  # killed before its last validation, resumed
            probes, size = trainer.datamodule.probes, pl_module.evaluation.batch_size
            starts = range(0, len(probes), size)
            self.rows = [r for i in starts for r in pl_module.score(probes[i : i + size])]
            self._append(self.rows, "final", pl_module.edits_seen)
        self._finish(trainer, pl_module)
        self.finished = pl_module.edits_seen >= len(trainer.datamodule.edits)
        if self.finished and isinstance(trainer.checkpoint_callback, ModelCheckpoint):
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
        texts, ledger = trainer.datamodule.texts, pl_module.ledger
        facts = RunFacts(
            method=type(pl_module).__name__,
            base=pl_module.spec.id,
            edits_seen=pl_module.edits_seen,
            perplexity_before=self.perplexity_before,
            perplexity_after=perplexity(pl_module.lm, texts) if texts else None,
            seconds_per_edit=sum(e["seconds"] for e in ledger) / len(ledger) if ledger else None,
            peak_memory_bytes=peak_memory_bytes(pl_module.device),
        )
        summary = summarise(self.rows, immediate, facts, pl_module.evaluation)
        summary["protocol"] |= stamp(trainer, pl_module)
        return summary

    @rank_zero_only
    def _show(self, summary: dict[str, Any]) -> None:
        console = Console()
        if not console.is_terminal:
            console.width = 100
        console.print(summary_table(summary))
        if len(summary["by_age"]) > 1:
            console.print(age_table(summary))
        if (self.folder / SUMMARY).exists():
            console.print(f"run folder: {self.folder}", highlight=False)

    @rank_zero_only
    def _append(self, rows: list[ProbeRow], moment: str, edits_seen: int) -> None:
        """Add rows to `probes.jsonl`, each with the moment it was scored at."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / PROBES).open("a", encoding="utf-8") as file:
            for row in rows:
                line = {"moment": moment, "edits_seen": edits_seen, **row}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _read(self, moment: str) -> list[Any]:
        """Return the rows of a moment from `probes.jsonl`."""
        path = self.folder / PROBES
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if row["moment"] == moment]

    @rank_zero_only
    def _keep_rows_up_to(self, edits_seen: int) -> None:
        """Drop rows that a killed run wrote after its last checkpoint, and a torn last line."""
        path = self.folder / PROBES
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["edits_seen"] <= edits_seen]
        with replacing(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
