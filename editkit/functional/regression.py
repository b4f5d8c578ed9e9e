"""One site's share of a locate-then-edit method: its penalty, its past and its queue.

Everything here is immutable: a batch is tried on a copy and taken over, or dropped, as a whole.
Legend: F layer input, D layer output, E edits of a batch.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from editkit.functional.grams import Batch, Grams
from editkit.functional.pairs import Pairs
from editkit.functional.queue import START, Queue, QueueSettings
from editkit.functional.spectral import Penalty, preservation_loss

FORMS: dict[str, type[Pairs] | type[Grams]] = {"pairs": Pairs, "sums": Grams}
NOT_KEPT = "it was made before this run was loaded, and a saved run does not keep its keys"
DERIVED = ("white_FN", "gram_NN")  # made again from the keys, to the same bits


@dataclass(frozen=True)
class Rules:
    """How a method treats every site.

    Args:
        remembers: Solve with the keys of earlier batches.
        masked: What is written is not all that was solved for.
        queue: Hold the whole change back as LyapLock does; none holds increments back.
        shrinks: The penalty weighs the norm of increments, too, whatever the queue does.
    """

    remembers: bool = False
    masked: bool = False
    queue: QueueSettings | None = None
    shrinks: bool = False

    @property
    def summed(self) -> bool:
        """Whether a site keeps sums over its past from the start: its steps depend on their order.

        Without a queue they do not, for then all pairs are held back alike.
        """
        return self.queue is not None and self.shrinks


@dataclass(frozen=True)
class Regression:
    """The ridge regression of one site.

    Args:
        rules: How the method treats it.
        penalty: What holds its change back.
        cov_FF: Moments that the preservation loss is taken with; needed with a queue only.
        shape_oi: D and F.
        past: Its pairs, or their sums once they are more than F; None once a method that keeps
            them only for undo has let them go.
        queue: Where its queue stands.
        loss: Preservation loss after the last batch; nan where it is not measured.
    """

    rules: Rules
    penalty: Penalty
    cov_FF: Tensor | None
    shape_oi: tuple[int, int]
    past: Pairs | Grams | None
    queue: Queue = START
    loss: float = float("nan")

    @classmethod
    def begin(
        cls,
        rules: Rules,
        penalty: Penalty,
        cov_FF: Tensor,
        shape_oi: tuple[int, int],
        saved: dict[str, Any] | None = None,
    ) -> Regression:
        """Return a site without a past, or with one that `state` took apart.

        Raises:
            ValueError: If rules and penalty say different things of the norm of increments.
        """
        if rules.queue is not None and rules.shrinks != (penalty.shrink > 0):
            raise ValueError(
                f"the penalty weighs the norm of increments by {penalty.shrink}, and the rules say "
                f"shrinks={rules.shrinks}; under a queue both must agree"
            )
        device = cov_FF.device if rules.remembers else torch.device("cpu")
        kept_FF = cov_FF if rules.queue is not None else None
        if saved is not None:
            past = None if saved["past"] is None else _past_from(saved["past"], device)
            queue = Queue(*saved["queue"])
            return cls(rules, penalty, kept_FF, shape_oi, past, queue)
        blank = cls(rules, penalty, kept_FF, shape_oi, None)
        if not rules.remembers and (rules.masked or rules.queue):
            return blank  # neither solving nor undoing asks for the past
        form = Grams if rules.summed else Pairs
        return replace(blank, past=form.none(shape_oi, device))

    def step(self, batch: Batch) -> tuple[Tensor, Regression]:
        """Return the change [D, F] that a batch asks for, and the site with the batch in its past.

        Raises:
            ValueError: If the solve is singular.
        """
        count, room = len(batch.ids), self.shape_oi[1]
        batch = replace(batch, queue=self.queue, refit=self._refits)
        if self.rules.remembers:
            past = self.past
            assert past is not None
            if isinstance(past, Pairs) and past.count + count > room:
                past = past.summed()
            change_DF, past = past.step(batch, self.penalty)
            return change_DF, replace(self, past=past)
        form = Pairs if count <= room else Grams
        blank = form.none(self.shape_oi, batch.keys_FE.device)
        change_DF, _ = blank.step(batch, self.penalty)
        past = self.past
        if isinstance(past, Pairs):  # kept for undo alone
            past = past.joined(batch, batch.resid_DE) if past.count + count <= room else None
        return change_DF, replace(self, past=past)

    def settled(self, delta_DF: Tensor, count: int) -> Regression:
        """Return the site after a batch of `count` edits was written.

        Args:
            delta_DF: Change of the weight as it is written, fp64.
            count: Edits in the batch.
        """
        settings = self.rules.queue
        if settings is None:
            return self
        assert self.cov_FF is not None
        loss = preservation_loss(delta_DF, self.cov_FF)
        past = self.past
        if self.rules.remembers and past is not None and settings.history == "achieved":
            past = past.settled(delta_DF)
        return replace(self, past=past, loss=loss, queue=self.queue.after(loss, count, settings))

    def numbers(self) -> dict[str, float]:
        """Return what there is to log: kappa for the next batch, PL, D and PL / D."""
        if self.rules.queue is None:
            return {}
        found = {"kappa": self.queue.kappa, "PL": self.loss}
        if self.queue.D is not None:
            found |= {"D": self.queue.D, "PL_per_D": self.loss / self.queue.D}
        return found

    def why_not_undo(self, edit_id: int) -> str | None:
        """Return why an edit cannot be taken out, or None where it can."""
        if self.rules.masked:
            return "only the largest entries of what a batch solves for are written"
        if self.rules.summed or (self.rules.queue is not None and not self.rules.remembers):
            return "with a queue its steps depend on the order of all edits before them"
        if not isinstance(self.past, Pairs):
            return (
                f"a site keeps the keys of up to {self.shape_oi[1]} edits, and there were more; "
                "beyond that only sums over them are kept"
            )
        if edit_id not in self.past.ids:
            return NOT_KEPT
        if not self.rules.remembers and not self.past.is_together(edit_id):
            return "its wordings were written one after another"
        return None

    def without(self, edit_id: int, delta_DF: Tensor) -> tuple[Tensor, Regression]:
        """Return the change [D, F] fitted again to the pairs that remain, and the site with them.

        Where the last batch goes as a whole, its step of the queue goes with it.

        Args:
            edit_id: Edit to take out.
            delta_DF: Change of the weight as it is, fp64.
        """
        past = self.past
        assert isinstance(past, Pairs)
        rest = past.without(edit_id)
        if not self.rules.remembers:
            with_it = _past_to(past.batch_of(edit_id), delta_DF.device)
            without_it = with_it.without(edit_id)
            delta_DF = delta_DF - with_it.fit(self.penalty) + without_it.fit(self.penalty)
            return delta_DF, replace(self, past=rest)
        delta_DF = rest.fit(self.penalty)
        if rest.reached_DN is not None:
            rest = rest.settled(delta_DF)
        was_last = len(rest.sizes) < len(past.sizes) and edit_id == past.ids[-1]
        queue = past.queues[-1] if was_last else self.queue
        return delta_DF, replace(self, past=rest, queue=queue)

    def state(self) -> dict[str, Any]:
        """Return past and queue as plain values and tensors."""
        past = None if self.past is None else _past_state(self.past)
        return {"past": past, "queue": astuple(self.queue)}

    @property
    def _refits(self) -> bool:
        """Whether the next batch must solve for the whole change: what it was fitted to moved."""
        rules, past = self.rules, self.past
        if rules.queue is None:
            return False
        if rules.masked or not rules.remembers or rules.summed or past is None:
            return True
        return past.kappa != self.queue.kappa


def _past_state(past: Pairs | Grams) -> dict[str, Any]:
    form = "pairs" if isinstance(past, Pairs) else "sums"
    state = {f.name: getattr(past, f.name) for f in fields(past) if f.name not in DERIVED}
    if "queues" in state:
        state["queues"] = [astuple(queue) for queue in state["queues"]]
    return {"form": form, **state}


def _past_from(state: dict[str, Any], device: torch.device) -> Pairs | Grams:
    values: dict[str, Any] = {
        k: v.to(device) if isinstance(v, Tensor) else v for k, v in state.items()
    }
    form = FORMS[values.pop("form")]
    if "queues" in values:
        values["queues"] = tuple(Queue(*queue) for queue in values["queues"])
    return form(**values)


def _past_to(past: Pairs, device: torch.device) -> Pairs:
    moved = _past_from(_past_state(past), device)
    assert isinstance(moved, Pairs)
    return moved
