"""What a stream of edits leaves in a memory, in bytes, told before the first edit."""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

from editkit.methods.grace import GRACE
from editkit.methods.memoir import MEMOIR
from editkit.methods.memory import MemoryEdit
from editkit.methods.windows import Windowed
from editkit.methods.wise import WISE


class Growth(NamedTuple):
    """What a memory grows by.

    Args:
        saved: Bytes that a saved run has, too.
        derived: Bytes of what is found again from those.
        scratch: Bytes held beside them while a batch is written.
        setting: What makes it smaller.
    """

    saved: int = 0
    derived: int = 0
    scratch: int = 0
    setting: str = "lower --data.edits_per_step"


@singledispatch
def growth_of(method: MemoryEdit, stream: int) -> Growth:
    """Return what a memory grows by in a stream of so many edits; a family registers its own.

    Args:
        method: With its memory attached.
        stream: Edits of the whole stream.
    """
    return Growth()


@growth_of.register
def _(method: GRACE, stream: int) -> Growth:
    return Growth(stream * 4 * sum(method.memory.shape_oi))  # a key and a value each


@growth_of.register
def _(method: MEMOIR, stream: int) -> Growth:
    masks = stream * 8 * (method.memory.keys.bits_KW.shape[1] + 3)  # and whose each is
    return Growth(masks + (4 * method.site.in_features**2 if method.shield else 0))


@growth_of.register
def _(method: WISE, stream: int) -> Growth:
    shards = method.shards
    merged = stream // shards.merge if shards.retrieve else min(1, stream // shards.merge)
    return _pools(method, min(stream, merged + shards.merge // shards.save))


@growth_of.register
def _(method: Windowed, stream: int) -> Growth:
    return _pools(method, stream)  # at most: an edit that no window can keep has a pool to itself


def _pools(method: WISE, count: int) -> Growth:
    """Return so many weight changes, the sketches that bound their scores, and one in the making.

    Each has room for the inputs of the widest: of columns drawn for shards that were merged. In the
    making are a shard with its gradient and mask, or those of a window while they merge.
    """
    (outputs, inputs), shards = method.memory.shape_oi, method.shards
    together, rows = shards.merge // shards.save, len(method.memory.pools.draw_SD)
    is_whole = shards.mask == "elementwise"
    share = 1 - (1 - shards.density) ** together if shards.retrieve else 1.0
    width = inputs if is_whole else round(share * inputs)
    return Growth(
        saved=count * width * (4 * outputs + 8),
        derived=count * width * 4 * rows,
        scratch=max(4, 3 * together) * 4 * outputs * inputs,
        setting="set --model.shards.mask columns" if is_whole else "lower --model.shards.density",
    )
