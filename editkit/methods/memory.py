"""MemoryEdit: the family of methods that keep edits in a routed memory at one site.

It shares the site, the prefixes behind which edits are trained, and the account of where prompts
are routed: a scored row says which edit answered it, and every validation logs four rates.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from editkit.adapters.routed import RoutedLayer
from editkit.edits import Edit, Probe
from editkit.lm.blocks import tap
from editkit.lm.editable import EditableLM
from editkit.lm.openings import STARTS, written
from editkit.lm.rows import SiteRows, adds_up
from editkit.methods.base import EditModule
from editkit.metrics.evaluate import ProbeRow
from editkit.metrics.routing import routing_rates
from editkit.parallel import agreed, ranks_of

LENGTHS = (5, 10)  # tokens of the prefixes that the model writes, one of each for every start


class Answerer(NamedTuple):
    """Which edit answers a prompt; None for the unedited model. `match` is the best fit found."""

    edit_id: int | None
    match: float


class MemoryEdit(EditModule):
    """Base class of the family.

    Args:
        layer: Block to edit; none takes the model's memory layer.
        prefixes: Texts in front of an edit's prompt, each a further row to train on; none lets the
            model write ten.
        append_eos: Train the end of the text behind each target.
    """

    memory: RoutedLayer

    def __init__(
        self,
        layer: int | None = None,
        prefixes: list[str] | None = None,
        append_eos: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layer = layer
        self.prefixes = prefixes
        self.append_eos = append_eos
        self.contexts: list[str] | None = prefixes
        self.asked: list[ProbeRow] = []  # of the validation under way

    @abstractmethod
    def make_memory(self, base_layer: nn.Module) -> RoutedLayer:
        """Build the memory around the site's layer."""

    @property
    @abstractmethod
    def held(self) -> Collection[int]:
        """Ids of the edits that the memory answers for."""

    @abstractmethod
    def owners(self, slot_B: Tensor) -> list[int | None]:
        """Return the edit that owns each slot of the memory; None for slot -1."""

    def attach(self) -> None:
        """Wrap the down-projection of the block."""
        block = self.lm.memory_layer if self.layer is None else self.layer
        self.site = self.lm.site(block)
        self.memory = self.lm.attach(self.site.path, self.make_memory)

    def prepare(self) -> None:
        """Let the unedited model write the prefixes, where none are given."""
        self.adds_up = adds_up(self.lm, self.site)
        if self.contexts is None:
            found = [written(self.lm, STARTS, length, self.generator) for length in LENGTHS]
            self.contexts = [text for texts in found for text in texts]

    def found_args(self) -> dict[str, Any]:
        """Return the prefixes that the model wrote."""
        return {"prefixes": self.contexts}

    @torch.no_grad()
    def inputs(self, prompts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the site's inputs [B, T, F] and the prompt tokens [B, T], batch by batch."""
        size = self.evaluation.batch_size
        for start in range(0, len(prompts), size):
            tokens = self.lm.encode(list(prompts[start : start + size]))
            with tap(self.memory, inputs=True, stop=True) as found:
                self.lm.forward(tokens)
            yield found[0], tokens.prompt_BT

    def routes(self, prompts: Sequence[str]) -> list[Answerer]:
        """Return who answers each prompt, whether its answer is forced or free."""
        found, ranks = [], ranks_of(self.lm.model)
        with agreed():
            for pair in self.inputs(prompts[ranks.own(len(prompts))]):
                route = self.memory.route(*pair)
                owners = self.owners(route.slot_B)
                found += map(Answerer, owners, route.match_B.tolist())
            return ranks.gather_list(found, len(prompts))

    def standing(self) -> list[dict[str, Any]]:
        """Return the ledger's entries of edits that stand and have not given their place away."""
        held = set(self.held)
        return [e for e in super().standing() if e["edit_id"] in held]

    def rekey(self, edits: list[Edit]) -> None:
        """Find the keys of edits again where their prompts lie now, the base having changed.

        Answers stay as they were written.

        Raises:
            ValueError: If this memory has no way to.
        """
        raise ValueError(f"{type(self).__name__} cannot find its keys again after fine-tuning")

    def rows(self, edits: list[Edit]) -> SiteRows:
        """Return the rows that edits train on: each behind nothing and behind every prefix."""
        fronts = ["", *(f"{context} " for context in self.contexts or [])]
        return SiteRows(
            self.lm,
            self.site,
            self.adds_up,
            [front + edit.prompt for edit in edits for front in fronts],
            [edit.target for edit in edits for _ in fronts],
            self.append_eos,
        )

    def score(self, probes: list[Probe]) -> list[ProbeRow]:
        """Score probes as every method does, and note in each row who answered it."""
        rows = super().score(probes)
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))
        who = dict(zip(prompts, self.routes(prompts), strict=True))
        return [{**row, "route": who[row["prompt"]]._asdict()} for row in rows]

    def stream_state(self) -> dict[str, Any]:
        """Return the prefixes."""
        return {"contexts": self.contexts}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take the prefixes back."""
        self.contexts = state["contexts"]

    def kept_state(self) -> dict[str, Any]:
        """Return all of it: what goes on being written rests on it."""
        return self.stream_state()

    def on_validation_batch_end(self, outputs: dict[str, Any], *args: Any) -> None:
        """Collect the rows of a validation."""
        self.asked += outputs["rows"]

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self) -> None:
        """Log the scores, and where the probes were routed."""
        super().on_validation_epoch_end()
        self.log_dict({f"routing/{name}": rate for name, rate in routing_rates(self.asked).items()})
        self.asked = []

    on_test_epoch_end = on_validation_epoch_end


def wordings(edits: Sequence[Edit]) -> list[str]:
    """Return every prompt that may be a key to one of these edits, once."""
    return list(dict.fromkeys(text for e in edits for text in (e.prompt, *e.rephrases)))


def text_hashes(lm: EditableLM, prompts: Sequence[str]) -> list[int]:
    """Return what prompts are known by: hashes of their ids, as int64 has room for."""
    rows = lm.policy.pieces(list(prompts))[0] if prompts else []
    digests = [blake2b(repr(row).encode(), digest_size=8).digest() for row in rows]
    return [int.from_bytes(digest, "big", signed=True) for digest in digests]
