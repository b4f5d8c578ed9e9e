"""What a method holds and does in one step, and the widths of a model that memory hangs on.

A family that does not descend on its own parameters registers what it takes with `work_of`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import singledispatch
from math import ceil

import torch

from editkit.adapters.base import EditLayer
from editkit.growth import growth_of
from editkit.lm.editable import EditableLM
from editkit.lm.sites import Site
from editkit.methods.base import EditModule
from editkit.methods.locate import LocateThenEdit
from editkit.methods.memory import MemoryEdit


@dataclass
class Work:
    """What one step of a method holds and does.

    Args:
        held: Bytes held throughout, by what they are for.
        step: Bytes held while a batch is edited.
        saved: Bytes of what is held that adapter and checkpoints have, too.
        kept: Bytes on disk beside them.
        rows: Rows that are trained on.
        passes: Passes forward and back over the blocks from `above` on.
        above: First block that these passes run.
        solves: Floating-point operations of closed-form solves.
        setting: The option that makes it smaller.
    """

    held: dict[str, int] = field(default_factory=dict)
    step: int = 0
    saved: int = 0
    kept: int = 0
    rows: int = 1
    passes: float = 1.0
    above: int = 0
    solves: float = 0.0
    setting: str = "--data.edits_per_step"


@singledispatch
def work_of(method: EditModule, edits: int, stream: int) -> Work:
    """Return what a step of `edits` edits takes; as a method that descends on its own parameters.

    A family that works otherwise registers its own.

    Args:
        method: With its sites attached.
        edits: Edits of a step.
        stream: Edits of the whole stream.
    """
    parameters = sum(_parameters(layer) for layer in method.lm.layers.values())
    lowest = min((_block(method.lm, path) for path in method.lm.layers), default=0)
    return Work(
        step=4 * 4 * parameters,  # scratch, gradient, Adam's two
        rows=edits,
        passes=getattr(method, "steps", 10),
        above=lowest,
        setting="--model.layer or --model.layers",
    )


@work_of.register
def _(method: LocateThenEdit, edits: int, stream: int) -> Work:
    squares = sum(site.in_features**2 for site in method.sites)
    largest = max(site.in_features**2 for site in method.sites)
    deltas = sum(site.in_features * site.out_features for site in method.sites)
    contexts = 1 + sum(count for count, _ in method.prefix_plan)
    if method.contexts is not None:
        contexts = 1 + len(method.contexts)
    together = 1 if method.one_by_one else edits
    size = min(together, method.search.micro_batch)
    past = sum(_past(method, site, stream) for site in method.sites)
    return Work(
        # fp64: penalty, its inverse root
        held={"second moments": 8 * squares * 2, "earlier edits": past},
        step=8 * (2 * largest + 2 * deltas) + past,  # a batch is tried on a copy
        kept=8 * squares,
        rows=contexts * size,
        passes=method.search.steps * ceil(edits / size),
        above=method.sites[-1].layer + 1,
        solves=ceil(edits / together)
        * sum(2 * site.in_features**2 * (together + site.out_features) for site in method.sites),
        setting="name fewer --model.layers",
    )


def _past(method: LocateThenEdit, site: Site, stream: int) -> int:
    """Return the bytes of what a site knows of earlier edits at most: their pairs, up to F.

    The sums that take the place of more are smaller.
    """
    rules, inputs, outputs = method.rules, site.in_features, site.out_features
    if rules.summed:
        return 8 * inputs * (inputs + outputs)
    count = min(stream, inputs)
    if not rules.remembers:  # pairs are kept for undo alone
        return 0 if rules.masked or rules.queue else count * (4 * inputs + 8 * outputs)
    targets = 16 if rules.queue is not None and rules.queue.history == "achieved" else 8
    return count * (12 * inputs + targets * outputs) + 8 * count**2


@work_of.register
def _(method: MemoryEdit, edits: int, stream: int) -> Work:
    contexts = 11 if method.contexts is None else 1 + len(method.contexts)
    parameters = sum(_parameters(layer) for layer in method.lm.layers.values())
    share = min(
        1.0, edits * getattr(method.memory, "k", method.site.in_features) / method.site.in_features
    )
    grown = growth_of(method, stream)
    return Work(
        held={"earlier edits": grown.saved + grown.derived},
        # tables are joined beside the old ones
        step=int(4 * 4 * parameters * share) + grown.saved + grown.derived + grown.scratch,
        saved=grown.saved,
        rows=contexts * edits,
        passes=getattr(method, "steps", 30),
        above=method.site.layer,
        setting=grown.setting,
    )


@dataclass(frozen=True)
class Widths:
    """Widths of a model that memory hangs on.

    Args:
        hidden: Width of the residual stream.
        inner: Inputs of the widest down-projection.
        vocabulary: Logits.
        blocks: Number of blocks.
        block: Parameters of a block.
        head: Parameters of the head.
        size: Bytes of a number.
    """

    hidden: int
    inner: int
    vocabulary: int
    blocks: int
    block: int
    head: int
    size: int

    @property
    def logits(self) -> int:
        """Bytes for the logits of a token, their softmax and its gradient."""
        return self.vocabulary * (self.size + 3 * 4)

    @property
    def asked(self) -> int:
        """Bytes for a token of a pass without gradients: one block's states, and all keys."""
        return self.size * (8 * self.hidden + 4 * self.inner + 2 * self.hidden * self.blocks)

    def held_above(self, block: int) -> int:
        """Bytes for a token of a pass that goes back to a block."""
        return self.size * (self.blocks - block) * (16 * self.hidden + 5 * self.inner)

    def parameters_above(self, block: int) -> int:
        """Parameters that a token meets from a block on."""
        return (self.blocks - block) * self.block + self.head


def widths_of(lm: EditableLM, dtype: torch.dtype) -> Widths:
    """Return the widths of a model in a dtype."""
    head = lm.model.get_output_embeddings().weight
    downs = [site for site in lm.sites if site.role == "mlp.down"] or lm.sites
    return Widths(
        hidden=head.shape[1],
        inner=max(site.in_features for site in downs),
        vocabulary=head.shape[0],
        blocks=len(lm.blocks),
        block=sum(weight.numel() for weight in lm.blocks[0].parameters()),
        head=head.numel(),
        size=dtype.itemsize,
    )


def _block(lm: EditableLM, path: str) -> int:
    """Return the block of a site's path."""
    return next(site.layer for site in lm.sites if site.path == path)


def _parameters(layer: EditLayer) -> int:
    return sum(p.numel() for p in layer.edit_parameters().values())
