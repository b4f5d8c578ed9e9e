"""A canary in the stream: notices a collapse, names the edit behind it, and can take it back."""

from __future__ import annotations

import logging
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer

from editkit.callbacks.ability import Ability, Reading, intrinsic_probes, measure_ability
from editkit.callbacks.milestones import is_over
from editkit.edits import Edit
from editkit.methods.base import EditModule
from editkit.methods.snapshot import Snapshot, restore_snapshot, take_snapshot

log = logging.getLogger(__name__)


class Canary(Callback):
    """Checks every few edits that the model has not collapsed, and acts if it has.

    Which edit did it is found by making the edits since the last healthy check again, in halves:
    the culprit is the first batch behind a healthy commit. That costs less than one more pass over
    these edits, and a reading per halving. What was found is in `summary.json` under `canary`.

    A rollback puts edit layers, stream state and stream position back to the commit in front of the
    culprit, bit for bit, drops the rows that were scored behind it, and ends the run. Adapter,
    summary and last checkpoint are of that commit; the ledger keeps the edits that were taken back,
    marked `rolled_back`. Take the culprit out of the stream, and `--ckpt_path last` goes on.

    Args:
        action: `warn` tells of a collapse and goes on; `stop` ends the run as it is; `rollback`
            ends it at the last healthy commit; none does not watch.
        every: Edit batches from one check to the next.
        perplexity_ratio: It is a collapse where perplexity on the data's held-out texts is above
            this many times the unedited model's ...
        facts_kept: ... or the share of intrinsic probes answered right is below this part of the
            unedited model's.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        action: Literal["warn", "stop", "rollback"] | None = None,
        every: int = 10,
        perplexity_ratio: float = 10.0,
        facts_kept: float = 0.5,
    ) -> None:
        if action not in (None, "warn", "stop", "rollback"):
            raise ValueError(f"canary.action is {action!r}; use warn, stop, rollback or null")
        if every < 1:
            raise ValueError(f"canary.every is {every}; it must be at least 1")
        if perplexity_ratio <= 1:
            raise ValueError(f"canary.perplexity_ratio is {perplexity_ratio}; it must be above 1")
        if not 0 <= facts_kept <= 1:
            raise ValueError(f"canary.facts_kept is {facts_kept}; it must be from 0 to 1")
        self.action = action
        self.every = every
        self.perplexity_ratio = perplexity_ratio
        self.facts_kept = facts_kept
        self.events: list[dict[str, Any]] = []  # kept in checkpoints
        self.healthy: Snapshot | None = None  # None while the model is known to have collapsed
        self.since: list[list[Edit]] = []  # batches after `healthy`

    def setup(self, trainer: Trainer, pl_module: EditModule, stage: str) -> None:
        """Check that there is something to watch.

        Raises:
            ValueError: If the data has neither held-out texts nor intrinsic probes.
        """
        self.ability = next((c for c in trainer.callbacks if isinstance(c, Ability)), Ability())
        data = trainer.datamodule
        if self.action and stage == "fit" and not (data.texts or intrinsic_probes(data)):
            raise ValueError(
                f"canary.action is {self.action}, but the data has nothing to watch; give it "
                "held-out texts (JSONL: --data.text FILE) or probes of kind intrinsic"
            )

    def on_train_start(self, trainer: Trainer, pl_module: EditModule) -> None:
        """Take the first healthy commit.

        Raises:
            ValueError: If a resumed run has collapsed already.
        """
        if not self.action:
            return
        reason = self._reason(trainer, pl_module, self.ability.now(trainer, pl_module))
        if reason and self.action != "warn":
            raise ValueError(
                f"the checkpoint of {pl_module.edits_seen} edits has collapsed already: {reason}; "
                "resume from an earlier one, or set canary.action to warn"
            )
        self.healthy = None if reason else take_snapshot(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: EditModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the model where that is due."""
        if not self.action:
            return
        self.since.append(list(batch))
        if trainer.global_step % self.every and not is_over(trainer, pl_module):
            return
        reading = self.ability.now(trainer, pl_module)
        reason = self._reason(trainer, pl_module, reading)
        if not reason:
            self.healthy = take_snapshot(pl_module)
        elif self.healthy is not None:
            self._act(trainer, pl_module, reading, reason)
        self.since = []

    def state_dict(self) -> dict[str, Any]:
        """Return what was found so far."""
        return {"events": self.events}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take `state_dict` back."""
        self.events = state_dict["events"]

    def for_summary(self) -> dict[str, Any]:
        """Return the last thing found, for `summary.json`."""
        return {"canary": {**self.events[-1], "collapses": len(self.events)}} if self.events else {}

    def _reason(self, trainer: Trainer, pl_module: EditModule, now: Reading) -> str | None:
        """Say why a reading is a collapse, the same on all devices; None where it is healthy."""
        before = self.ability.before(trainer, pl_module)
        reason = None
        if (normal := before["perplexity"]) is not None:
            value, most = now["perplexity"], self.perplexity_ratio * normal
            if value is None or value > most:
                shown = "not finite" if value is None else f"{value:.4g}"
                reason = f"perplexity is {shown}, above {most:.4g} ({normal:.4g} unedited)"
        if reason is None and before["facts"] and now["facts"] is not None:
            least = self.facts_kept * before["facts"]
            if now["facts"] < least:
                reason = (
                    f"{now['facts']:.3g} of the facts are known, less than {least:.3g} "
                    f"({before['facts']:.3g} unedited)"
                )
        if trainer.strategy.reduce_boolean_decision(reason is not None, all=False):
            return reason or "another device says so"
        return None

    def _act(self, trainer: Trainer, pl_module: EditModule, reading: Reading, reason: str) -> None:
        """Name the culprit, tell of it, and warn, stop or roll back."""
        assert self.healthy is not None
        ledger, end = pl_module.ledger, take_snapshot(pl_module)
        last_check, healthy, culprit = self.healthy.edits_seen, *self._find(trainer, pl_module)
        ids = [edit.id for edit in culprit]
        named = f"edit {ids[0]}" if len(ids) == 1 else f"the batch of edits {ids[0]} to {ids[-1]}"
        message = (
            f"after {end.edits_seen} edits the model has collapsed: {reason}; it was healthy "
            f"after {last_check}, and {named} did it ({culprit[0].prompt!r} -> "
            f"{culprit[0].target!r})"
        )
        event = {
            "action": self.action, "edits_seen": end.edits_seen, "healthy_at": healthy.edits_seen,
            "perplexity": reading["perplexity"], "facts": reading["facts"], "reason": reason,
            "culprit": ids, "rolled_back": [],
        }  # fmt: skip
        pl_module.ledger = ledger
        if self.action == "rollback":
            restore_snapshot(pl_module, healthy)
            trainer.datamodule.edits_applied = ids[0]
            taken = ledger[healthy.entries :]
            pl_module.ledger = ledger[: healthy.entries] + [
                {**entry, "rolled_back": True} for entry in taken
            ]
            event["rolled_back"] = [entry["edit_id"] for entry in taken]
            message += f"; taken back to the commit of {healthy.edits_seen} edits"
            for callback in trainer.callbacks:
                getattr(callback, "rewind", lambda edits_seen: None)(healthy.edits_seen)
        else:
            restore_snapshot(pl_module, end)
        self.healthy = None
        self.events.append({**event, "message": message})
        trainer.should_stop = trainer.should_stop or self.action != "warn"
        log.warning(message)

    def _find(self, trainer: Trainer, pl_module: EditModule) -> tuple[Snapshot, list[Edit]]:
        """Return the last healthy commit and the batch behind it, by halving what lies between."""
        assert self.healthy is not None
        healthy, batches = self.healthy, self.since
        if len(batches) > 1:
            log.warning("the model has collapsed; making %d batches again to find out at which",
                        len(batches))  # fmt: skip
        while len(batches) > 1:
            half = len(batches) // 2
            restore_snapshot(pl_module, healthy)
            with trainer.precision_plugin.train_step_context():  # as the batches were made
                for edits in batches[:half]:
                    pl_module.apply_edits(edits)
            reading = measure_ability(pl_module, trainer.datamodule)
            if self._reason(trainer, pl_module, reading):
                batches = batches[:half]
            else:
                healthy, batches = take_snapshot(pl_module), batches[half:]
        return healthy, batches[0]
