"""Batches of text records, in an order that is fixed and the same on every device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar, overload

Row = TypeVar("Row")


class Batch(Generic[Row]):
    """Rows of one batch, to be iterated, indexed and sliced like a list.

    It is not a `Sequence` on purpose: Lightning rebuilds sequences and the dataclasses in them when
    it moves a batch or converts its precision, and raises on frozen ones (`bf16-true`, `64-true`).
    """

    __slots__ = ("rows",)

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self.rows[index]

    def __eq__(self, other: object) -> bool:
        return self.rows == (other.rows if isinstance(other, Batch) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Batch({self.rows!r})"


class Batches(Generic[Row]):
    """Batches in order, from batch `first` on.

    Not a `DataLoader`: there is nothing to collate, shuffle or prefetch, and Lightning gives only
    to a `DataLoader` a sampler that would deal every device another part of the stream.

    Args:
        rows: All rows.
        spans: (start, stop) of each batch in `rows`.
        first: Batches already done, which are not repeated. `len` still counts them, since
            Lightning's batch counter goes on where it was and ends the epoch at `len`.
    """

    def __init__(
        self, rows: Sequence[Row], spans: Sequence[tuple[int, int]], first: int = 0
    ) -> None:
        self.rows, self.spans, self.first = rows, spans, first

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Batch[Row]]:
        return (Batch(self.rows[start:stop]) for start, stop in self.spans[self.first :])

    def state_dict(self) -> dict[str, int]:
        """Tell Lightning that this loader can resume; the position is kept by the data module."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Take nothing: see `state_dict`."""
