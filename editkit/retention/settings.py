"""The options of `editkit retain`, bound by jsonargparse; nothing here loads weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionConfigFile
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from editkit.metrics.protocol import EvalProtocol
from editkit.retention.afterwards import ARM_OF
from editkit.retention.finetune import Arm, FineTuneEdited
from editkit.retention.items import ProbeSets
from editkit.retention.objectives import Objective
from editkit.trainer_cli import TRAINER_DEFAULTS as EDITING

SCORERS = ("generation", "sequence_accuracy", "first_token", "nll", "pair")
TRAINER_DEFAULTS: dict[str, Any] = {
    **{k: v for k, v in EDITING.items() if k != "default_root_dir"},  # `out` says where
    "limit_val_batches": 0,
    "log_every_n_steps": 10,
}


@dataclass(frozen=True)
class Settings:
    """What is asked of a retention run.

    Args:
        arms: `edited`; `control`, the never-edited model on the same rows in the same order;
            `identity`, the edited model at a learning rate of 0, which must lose nothing.
        at: Steps after which to ask the questions, besides the end.
        mode: `symmetric` scores edits and facts alike; `ret_faithful` also as Wen & Zhang did:
            edits by their first token, facts by a substring of 50 new tokens.
        reapply: A remedy: also put the edits on the fine-tuned control, as if they had sat out.
        reedit: A remedy: also edit the fine-tuned control afresh, by the same method in the same
            batches: the order swapped, which costs as much as the run.
        rekey: A remedy for memories: also find the keys of the fine-tuned edited model again, from
            the edits' prompts.
        relearn: Steps in which lost edits are learned again at the end, each beside the same answer
            taught of an untouched fact, to tell what is latent from what is gone; 0 leaves it out.
        drift_texts: Held-out texts on which drift is measured.
        drift_edits: Edits whose keys are followed.
        checkpoint_every: Steps between two checkpoints to resume from.
        shared: Folder of what runs have in common: control arms of the same base on the same rows
            in the same way, and answers before fine-tuning; none keeps all in the run.
    """

    arms: tuple[Arm, ...] = ("edited", "control", "identity")
    at: tuple[int, ...] = ()
    mode: Literal["symmetric", "ret_faithful"] = "symmetric"
    reapply: bool = False
    reedit: bool = False
    rekey: bool = False
    relearn: int = 0
    drift_texts: int = 50
    drift_edits: int = 100
    checkpoint_every: int = 50
    shared: Path | None = None

    def __post_init__(self) -> None:
        """Check user input."""
        if "edited" not in self.arms or not {ARM_OF[name] for name in self.after} <= {*self.arms}:
            raise ValueError(
                f"retain.arms is {list(self.arms)}; the edited arm must be among them, and with "
                "--retain.reapply or --retain.reedit the control arm, too"
            )
        told = {"checkpoint_every": 1, "relearn": 0, "drift_texts": 0, "drift_edits": 0}
        for name, least in told.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"retain.{name} is {value}; it must be at least {least}")

    @property
    def after(self) -> list[str]:
        """What is done at the end, by the name that its answers have."""
        told = {"reapplied": self.reapply, "reedited": self.reedit, "rekeyed": self.rekey}
        return [name for name, is_on in told.items() if is_on]


def parser() -> LightningArgumentParser:
    """Return the parser; it loads no weights."""
    made = LightningArgumentParser(
        prog="editkit retain",
        description="Fine-tune an edited model on something else and measure what is left of its "
        "edits, beside a never-edited control.",
        exit_on_error=False,
    )
    made.add_argument("-c", "--config", action=ActionConfigFile, help="YAML of an objective")
    made.add_argument("--run", type=str, required=True, help="folder of the edited run")
    made.add_argument(
        "--out", type=str | None, default=None,
        help="folder of the results; none takes RUN/retention/OBJECTIVE",
    )  # fmt: skip
    made.add_argument("--report", type=bool, default=True, help="draw the edited run's page anew")
    made.add_argument("--overwrite", type=bool, default=False, help="begin a run again")
    made.add_argument("--trust", type=bool, default=False, help="run classes from outside editkit")
    made.add_argument("--seed_everything", type=int, default=0, help="seed of dropout")
    made.add_class_arguments(Settings, "retain")
    made.add_class_arguments(ProbeSets, "probes")
    made.add_class_arguments(EvalProtocol, "evaluation", default=EvalProtocol(scorers=SCORERS))
    skipped = {"run", "loss", "arm", "trust"}
    made.add_class_arguments(FineTuneEdited, "model", skip=skipped, instantiate=False)
    made.add_subclass_arguments(Objective, "data", required=True)
    made.add_class_arguments(Trainer, "trainer", instantiate=False)
    made.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
    return made
