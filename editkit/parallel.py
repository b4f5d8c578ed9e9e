"""More devices, same answer: ranks split the rows of a batch, gather the results, share errors.

Every rank sees the whole stream and ends each step with the same values. On one device everything
here is the identity.

Gradients. Of what `Ranks.gather` returns, this rank's rows carry `size` times their gradient and
the others none; `mean_over_ranks` then averages. So parts of a loss that every rank computes for
itself count once, too.

Errors. A rank that fails inside `agreed` must not leave the others waiting: every exchange begins
with each rank's word that it is well, and the one that failed says so in the others' next exchange.
Then all raise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class RankError(ValueError):
    """Something failed on one rank or on several; raised on all of them, with the same text.

    `is_told` where the first rank has it to tell.
    """

    is_told = False


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that split rows among them.

    Args:
        rank: This one's number.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def present(cls) -> Ranks:
        """Return the ranks of the process group; one where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def own(self, count: int) -> slice:
        """Return which of `count` rows are this rank's, in order and never none.

        Where there are fewer rows than ranks, those without one run the last again, for nothing.
        """
        return self._share(self.rank, count)

    def gather(self, own: Tensor, count: int) -> Tensor:
        """Return all `count` rows from those of each rank, the first axis being rows."""
        return own if self.size == 1 else cast(Tensor, _Gather.apply(own, self, count))

    def scatter(self, rows: Tensor) -> Tensor:
        """Return this rank's rows of what all ranks have; its gradient comes from all of them."""
        return rows if self.size == 1 else cast(Tensor, _Scatter.apply(rows, self))

    def gather_list(self, own: list[T], count: int) -> list[T]:
        """Return what all ranks found for their shares of `count` rows, in order."""
        if self.size == 1:
            return own
        found = from_all_ranks(own)
        return [one for rank, part in enumerate(found) if self._counts(rank, count) for one in part]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the ranks."""
        if self.size == 1:
            return
        _meet()
        for tensor in tensors:
            wire = tensor.to(_wire_device()).contiguous()
            dist.all_reduce(wire)
            if wire is not tensor:
                tensor.copy_(wire)

    def _share(self, rank: int, count: int) -> slice:
        if count < self.size:
            return slice(min(rank, count - 1), min(rank, count - 1) + 1)
        return slice(count * rank // self.size, count * (rank + 1) // self.size)

    def _counts(self, rank: int, count: int) -> bool:
        """Whether a rank's share counts: the repeated last row does not."""
        return rank < count

    def _sizes(self, count: int) -> list[int]:
        """Rows of each rank that count."""
        shares = [self._share(rank, count) for rank in range(self.size)]
        return [(s.stop - s.start) * self._counts(r, count) for r, s in enumerate(shares)]

    def collect(self, own: Tensor, count: int) -> Tensor:
        """Gather without gradients."""
        _meet()
        sizes, sent = self._sizes(count), own.detach().to(_wire_device()).contiguous()
        short = max(sizes) - len(sent)
        if short > 0:
            sent = torch.cat([sent, sent.new_zeros(short, *sent.shape[1:])])
        found = [torch.empty_like(sent) for _ in sizes]
        dist.all_gather(found, sent)
        whole = torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])
        return whole.to(own.device)


class _Gather(torch.autograd.Function):
    """All rows forward; this rank's gradient backward, times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks, count: int) -> Tensor:
        """Gather."""
        ctx.ranks, ctx.count = ranks, count
        return ranks.collect(own, count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Take this rank's rows."""
        ranks: Ranks = ctx.ranks
        weight = ranks.size * ranks._counts(ranks.rank, ctx.count)
        return grads[0][ranks.own(ctx.count)] * weight, None, None


class _Scatter(torch.autograd.Function):
    """This rank's rows forward; the gradients of all rows backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        """Take this rank's rows."""
        ctx.ranks, ctx.count = ranks, len(rows)
        return rows[ranks.own(len(rows))].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Gather."""
        ranks: Ranks = ctx.ranks
        return ranks.collect(grads[0], ctx.count) / ranks.size, None


def ranks_of(model: nn.Module) -> Ranks:
    """Return the ranks that split the rows a model runs.

    Where they hold parts of its weights (FSDP), all run all rows: a pass needs every rank.
    """
    is_sharded = any(hasattr(weight, "placements") for weight in model.parameters())
    return Ranks() if is_sharded else Ranks.present()


def mean_over_ranks(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Average tensors in place."""
    ranks = Ranks.present()
    ranks.add_up(tensors)
    for tensor in tensors if ranks.size > 1 else ():
        tensor.div_(ranks.size)
    return tensors


def from_rank_zero(value: T) -> T:
    """Return the first rank's value on all ranks."""
    return from_all_ranks(value)[0]


def from_all_ranks(value: T) -> list[T]:
    """Return every rank's value."""
    if Ranks.present().size == 1:
        return [value]
    _meet()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@contextmanager
def agreed() -> Iterator[None]:
    """Let all ranks raise where one does.

    Raises:
        RankError: If the work inside failed on some rank and there are several.
    """
    try:
        yield
    except RankError:
        raise
    except Exception as error:
        if Ranks.present().size == 1:
            raise
        _meet(error)
    else:
        if Ranks.present().size > 1:
            _meet()


def _meet(error: Exception | None = None) -> None:
    """Exchange whether all ranks are well, and raise on all where one is not."""
    failed = torch.tensor([error is not None], dtype=torch.int32, device=_wire_device())
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if not int(failed):
        return
    words = None if error is None else str(error) or type(error).__name__
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, words)
    told = [(rank, text) for rank, text in enumerate(said) if text is not None]
    rank, text = told[0]
    where = "" if set(said) == {text} else f"on device {rank} of {len(said)}: "
    agreed_on = RankError(where + text)
    agreed_on.is_told = dist.get_rank() != 0
    raise agreed_on from error


def _wire_device() -> torch.device:
    """Where tensors must lie to be sent."""
    return torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
