"""`editkit retain`: bind YAML and options, run the arms, write what came of them."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from editkit.callbacks.devices import ToldToEnd, one_end
from editkit.callbacks.progress import EditProgress
from editkit.metrics.protocol import EvalProtocol
from editkit.retention.afterwards import ARM_OF
from editkit.retention.answers import DONE
from editkit.retention.arms import (
    ARM_ORDER,
    IDENTITY_STEPS,
    Questions,
    Watch,
    checkpoint_of,
    keeper,
)
from editkit.retention.finetune import Arm, FineTuneEdited
from editkit.retention.folder import ITEMS, claim, tidy
from editkit.retention.items import facts_of, fingerprint, freeze, make_items
from editkit.retention.objectives import Objective
from editkit.retention.result import write_result
from editkit.retention.settings import Settings, parser
from editkit.retention.shared import control_name, known_answers, sole
from editkit.retention.source import EditedRun, instantiate
from editkit.retention.table import shown
from editkit.trainer_cli import quiet, report


def run_retain(args: list[str]) -> Path:
    """Parse, run the arms and write the results.

    Raises:
        ArgumentError: If an option is misspelt or a value does not fit.
        ValueError: If the input is wrong; the text names the fix.
    """
    quiet(
        ".*smaller than the logging interval.*",
        ".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*",
    )
    made = parser()
    config = made.parse_args(args)
    return Retention(made, config).finish()


class Retention:
    """One retention run: its folder, its questions, its arms.

    Args:
        made: The parser, which builds what the config names.
        config: The resolved config.

    Raises:
        ValueError: If the folder holds another run, or the input is wrong.
    """

    def __init__(self, made: LightningArgumentParser, config: Namespace) -> None:
        self.parser, self.config = made, config
        self.built = instantiate(made, config)
        self.settings: Settings = self.built.retain
        self.objective: Objective = self.built.data
        self.evaluation: EvalProtocol = self.built.evaluation
        if missing := {"generation", "nll"} - {*self.evaluation.scorers}:
            raise ValueError(f"evaluation.scorers lacks {sorted(missing)}, which retention needs")
        if config.trainer.max_epochs != 1:
            raise ValueError(
                f"trainer.max_epochs is {config.trainer.max_epochs}; the length is --data.steps, "
                "which deals the rows anew as often as it takes"
            )
        if wrong := [step for step in self.settings.at if not 1 <= step <= self.objective.steps]:
            raise ValueError(
                f"retain.at has {wrong[0]}; the steps are 1 to {self.objective.steps} (data.steps)"
            )
        self._check_reach(config)
        self.run = EditedRun(Path(config.run), config.trust)
        self.folder = Path(config.out or self.run.folder / "retention" / self.objective.name)
        self.items = make_items(self.run, self.built.probes)
        self.objective.gather(self.run, facts_of(self.run, self.items))
        self.sha = fingerprint(self.items)
        if _is_first():
            self.made = claim(self.folder, made, config)
            freeze(self.folder / ITEMS, self.items)

    def _check_reach(self, config: Namespace) -> None:
        """Refuse what some options cannot do together."""
        devices = config.trainer.devices
        is_alone = len(devices) == 1 if isinstance(devices, list) else str(devices) == "1"
        for name in ("shared", "reedit"):
            if getattr(self.settings, name) and not is_alone:
                raise ValueError(f"retain.{name} is for runs on one device; leave it out")
        if self.settings.reedit and config.model.kind == "dora":
            raise ValueError("retain.reedit edits plain weights; use model.kind full or lora")

    def finish(self) -> Path:
        """Run the arms that are not done, then write the results and the report."""
        try:
            if self._shares("control"):
                self.run_arm("control", wait=False)
            for arm in ARM_ORDER:
                if arm in self.settings.arms:
                    self.run_arm(arm)
        except BaseException:
            if _is_first():
                tidy(self.folder, self.made)
            raise
        if _is_first():
            write_result(self)
            if self.config.report:
                report(self.run.folder)
            Console().print(shown(self.folder), highlight=False)
        return self.folder

    def arm_folder(self, arm: Arm) -> Path:
        """Return where an arm's answers lie."""
        if self._shares(arm) and self.settings.shared is not None:
            return self.settings.shared / control_name(self)
        return self.folder / "arms" / arm

    def run_arm(self, arm: Arm, wait: bool = True) -> None:
        """Fine-tune one arm, unless that is done.

        Args:
            arm: Its name.
            wait: Wait where another run is at it, or else leave it.
        """
        folder = self.arm_folder(arm)
        with sole(folder, self._shares(arm), wait) as is_mine:
            if is_mine and not (folder / DONE).exists():
                self._run(arm, folder)

    @property
    def drift_texts(self) -> list[str]:
        """Held-out texts on which drift is measured: the stream's, else the rows to test on."""
        texts = [*self.run.data.texts] or [row.text for row in self.objective.tests]
        return texts[: self.settings.drift_texts]

    def _shares(self, arm: Arm) -> bool:
        """Whether other runs may have this arm, too."""
        told = self.settings
        is_own = any(ARM_OF[name] == arm for name in told.after)
        return arm == "control" and arm in told.arms and bool(told.shared) and not is_own

    def _run(self, arm: Arm, folder: Path) -> None:
        module = FineTuneEdited(
            run=self.run.folder, loss=self.objective.loss, arm=arm, trust=self.config.trust,
            **self.built.model.as_dict(),
        )  # fmt: skip
        self.objective.batches_done = 0
        seed_everything(self.config.seed_everything, verbose=False)
        trainer = self._trainer(arm, folder)
        resumed = checkpoint_of(folder)
        with one_end(trainer, "the same command goes on"):
            trainer.fit(module, datamodule=self.objective, ckpt_path=resumed)
            if trainer.received_sigterm:  # behind the last step, while the end was asked
                raise SIGTERMException
        if trainer.interrupted:
            raise KeyboardInterrupt

    def _trainer(self, arm: Arm, folder: Path) -> Trainer:
        options = instantiate(self.parser, self.config).trainer.as_dict()  # anew for each arm
        followed = 0 if self._shares(arm) else self.settings.drift_edits  # they are not its own
        questions = Questions(
            self.items, self.evaluation, self.settings.at,
            self.settings.mode == "ret_faithful", self.drift_texts,
            [*self.run.standing.values()][:followed], known_answers(self),
            self.settings.after, self.settings.relearn,
        )  # fmt: skip
        watch = Watch(folder, questions, self.objective, self.run)
        given = options["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        options["callbacks"] = [ToldToEnd(), *given, watch]
        if options["enable_checkpointing"] in (None, True):
            options["callbacks"].append(keeper(folder, self.settings.checkpoint_every))
        if options["enable_progress_bar"] in (None, True):
            options["callbacks"].append(EditProgress())
        if options["logger"] is None:
            options["logger"] = CSVLogger(folder, name="", version="")
        if arm == "identity":
            options["max_steps"] = IDENTITY_STEPS
        return Trainer(**{**options, "default_root_dir": str(folder)})


def _is_first() -> bool:
    """Whether this process writes: the first of several devices, or the only one."""
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0
