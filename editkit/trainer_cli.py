"""LightningCLI with editkit's classes, defaults and tidiness."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from editkit.callbacks.ability import Ability
from editkit.callbacks.canary import Canary
from editkit.callbacks.conflicts import Conflicts
from editkit.callbacks.devices import ToldToEnd, one_end
from editkit.callbacks.folder import (
    SUMMARY,
    check_checkpoint,
    claim,
    keep_metrics,
    last_checkpoint,
    sweep,
    tidy,
)
from editkit.callbacks.logger import kept_in_wandb, wandb_loggers
from editkit.callbacks.milestones import Milestones
from editkit.callbacks.progress import EditProgress
from editkit.callbacks.run_folder import RunFolder
from editkit.data.base import EditDataModule
from editkit.data.records import RecordModule
from editkit.methods.base import EditModule
from editkit.report.page import write_report
from editkit.strategy import ShardedBase

log = logging.getLogger(__name__)

# what editing needs of a Trainer; each can be set otherwise in YAML
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 1,
    "devices": 1,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
    "default_root_dir": "runs/run",
}
StrategyRegistry.register("sharded", ShardedBase, "parts a base model over all devices")
VERBS = ("fit", "validate", "test", "predict")
MEANT = (  # what Lightning warns of, in any run
    ".*does not have many workers.*",
    ".*exists and is not empty.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*have overridden `transfer_batch_to_device`.*",
    ".*in eval mode at the start of training.*",
)


class RunConfig(SaveConfigCallback):
    """Writes the resolved config into the run folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait until the run folder is known to be free."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml`."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.config_filename
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save once the fit has begun, in W&B too where that is a logger."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")
            for logger in wandb_loggers(trainer.loggers):
                logger.begin(Path(trainer.default_root_dir))


class EditCLI(LightningCLI):
    """Binds YAML and options to a method, a stream and a Trainer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks every run has, under names of their own."""
        parser.add_lightning_class_args(Milestones, "milestones")
        parser.add_lightning_class_args(RunFolder, "run")
        parser.add_lightning_class_args(Ability, "ability")
        parser.add_lightning_class_args(Canary, "canary")
        parser.add_lightning_class_args(Conflicts, "conflicts")

    def _parse_ckpt_path(self) -> None:
        """Refuse what is no checkpoint, before Lightning opens it; ours hold no arguments."""
        verb = self.config.get("subcommand")
        path = self.config[verb].get("ckpt_path") if verb else None
        if path and path not in ("last", "best", "hpc"):
            check_checkpoint(Path(path))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the Trainer a CSV logger, checkpoints and a bar where the config names none."""
        config = self._get(self.config_init, "trainer", default={})
        folder = Path(config["default_root_dir"])
        if self.subcommand != "fit":
            kwargs["logger"] = False  # a CSV logger would begin the run's own file again
        elif config["logger"] is None:
            kwargs["logger"] = CSVLogger(folder, name="", version="")
        given = config["callbacks"] or []
        callbacks = [ToldToEnd(), *(given if isinstance(given, list) else [given])]
        wanted = config["enable_checkpointing"] in (None, True)
        if wanted and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            callbacks.append(
                ModelCheckpoint(
                    folder / "checkpoints",
                    every_n_train_steps=100,
                    save_last=True,
                    enable_version_counter=False,
                )
            )
        if config["enable_progress_bar"] in (None, True):
            callbacks.append(EditProgress())
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a verb, on all devices or on none."""
        with one_end(self.trainer):
            super()._run_subcommand(subcommand)

    def fit(self, model: EditModule, **kwargs: Any) -> None:
        """Edit; where that fails before anything could be resumed, leave no folder behind."""
        folder = Path(self.trainer.default_root_dir)
        if isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                "this trainer.strategy edits in forked or spawned processes, from which no edited "
                "model comes back; use --trainer.strategy ddp"
            )
        with tidy(folder):
            self.datamodule.setup("fit")  # bad rows are told before anything is touched
            tell(self.datamodule)
            kwargs["ckpt_path"], can_begin = self._place_to_go_on(folder, kwargs.get("ckpt_path"))
            if kwargs["ckpt_path"] is None:
                claim(folder, can_begin or self._get(self.config_init, "run").overwrite)
            else:
                keep_metrics(folder)
            sweep(folder)
            with kept_in_wandb(self.trainer.loggers, folder):
                self.trainer.fit(model, **kwargs)
                report(folder)

    def _place_to_go_on(self, folder: Path, asked: str | None) -> tuple[str | None, bool]:
        """Return the checkpoint that is asked for, and whether what lies there may go.

        `last` is the newest whole one. Where there is none yet, a run that was killed early begins
        again at its first edit.
        """
        if asked != "last":
            return asked, False
        named = (c.dirpath for c in self.trainer.checkpoint_callbacks if hasattr(c, "dirpath"))
        found = last_checkpoint({folder / "checkpoints", *(Path(path) for path in named if path)})
        if found is None and not (folder / SUMMARY).exists():
            log.warning("no checkpoint in %s yet: beginning at the first edit", folder)
        return (str(found), False) if found else (None, not (folder / SUMMARY).exists())


class PlanCLI(EditCLI):
    """Takes the arguments of a fit, and says what it would take."""

    def fit(self, model: EditModule, **kwargs: Any) -> None:
        """Predict instead of editing."""
        from editkit.plan import forecast, told

        Console().print(told(forecast(model, self.datamodule, self.trainer)), highlight=False)


@rank_zero_only
def tell(data: EditDataModule) -> None:
    """Show what came of a file or a Hub data set: rows in, used and refused, and what is asked."""
    if isinstance(data, RecordModule):
        Console().print(data.report)


@rank_zero_only
def report(folder: Path) -> None:
    """Write `report.html` into a finished run's folder; where that fails, the results stay."""
    if not (folder / SUMMARY).exists():
        return
    try:
        path = write_report([folder])
    except (ValueError, LookupError, TypeError, OSError, ImportError, RuntimeError) as error:
        sys.stderr.write(
            f"editkit: no report.html ({error}); `editkit report {folder}` says more\n"
        )
    else:
        Console().print(f"report: {path}", highlight=False, soft_wrap=True)


def run_trainer(args: list[str] | None, cli: type[EditCLI] = EditCLI) -> None:
    """Parse, build and run; `args` None takes the process's own.

    Raises:
        ArgumentError: If an option is misspelt or a value does not fit.
        ValueError: If the input is wrong; the text names the fix.
    """
    quiet(
        ".*configure_optimizers.*returned `None`.*",
        "(?s).*ModelCheckpoint with manual optimization.*",
        ".*args parameter is intended.*",
        ".*sync_dist=True.*",  # devices have gathered the rows: what they log is the same on all
    )
    try:
        _run(args, cli)
    except MisconfigurationException as error:
        raise ValueError(
            f"{error} Check the --trainer options; accelerator cpu always works."
        ) from error


def quiet(*more: str) -> None:
    """Silence what Lightning says of things that are meant, and `more` of its warnings."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (*MEANT, *more):
        warnings.filterwarnings("ignore", message=message)


def _run(args: list[str] | None, cli: type[EditCLI]) -> None:
    """Hand over to LightningCLI, whose parsers raise instead of exiting."""
    parser_kwargs: dict[str, Any] = {verb: {"exit_on_error": False} for verb in VERBS}
    cli(
        EditModule,
        EditDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=RunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=0,
        parser_kwargs={"prog": "editkit", "exit_on_error": False, **parser_kwargs},
        args=args,
    )
