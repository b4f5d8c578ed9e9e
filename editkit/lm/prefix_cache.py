"""Keys and values of the tokens on the left of rows, computed once and joined at every pass.

Legend: B rows, P tokens on the left, S tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

KeysValues = dict[int, tuple[Tensor, Tensor]]


class PrefixCache(DynamicCache):
    """A cache that joins what it was given with what a pass brings, and never grows.

    Each row's own tokens stand at the right end of the P columns.

    Args:
        given: Keys and values [., heads, P, .] by block; none where nothing stands on the left.
        rows: Which of the rows given each row of a pass looks back at; all by default.
        records: Note what the next pass brings in `brought`.
    """

    def __init__(
        self,
        given: KeysValues | None = None,
        rows: Tensor | None = None,
        records: bool = False,
    ) -> None:
        super().__init__()
        self.given: KeysValues = given or {}
        self.which = rows
        self.records = records
        self.brought: KeysValues = {}
        self.length = next(iter(self.given.values()))[0].shape[-2] if given else 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return a block's given keys and values with these behind them."""
        if self.records:
            self.brought[layer_idx] = (key_states, value_states)
        return self._joined(layer_idx, key_states, value_states)

    def _joined(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.given:
            return keys, values
        left = self.given[block]
        left_keys, left_values = left if self.which is None else (x[self.which] for x in left)
        return torch.cat([left_keys, keys], -2), torch.cat([left_values, values], -2)

    def closed(self, lengths_B: Tensor) -> PrefixCache:
        """Return what was given and brought as given, each row's own at the right end again.

        Args:
            lengths_B: Each row's own tokens among those brought, where they stand on the left.

        Raises:
            ValueError: If the pass brought nothing: the model has not used the cache.
        """
        if not self.brought:
            raise ValueError("no block has handed its keys and values to the cache")
        joined = {block: self._joined(block, *pair) for block, pair in self.brought.items()}
        length = next(iter(joined.values()))[0].shape[-2]
        spare_B1 = length - self.length - lengths_B[:, None]
        span_P = torch.arange(length, device=lengths_B.device)
        order_BP = (span_P - spare_B1) % length
        row_B1 = torch.arange(len(order_BP), device=order_BP.device)[:, None]
        return PrefixCache(joined)._each(
            lambda x: x.transpose(1, 2)[row_B1, order_BP].transpose(1, 2).contiguous()
        )

    def spread(self, rows: Sequence[int], records: bool = False) -> PrefixCache:
        """Return the same for rows that look back at these of its rows."""
        device = next(iter(self.given.values()))[0].device
        return PrefixCache(self.given, torch.tensor(rows, device=device), records)

    def keep(self, rows_B: Tensor) -> PrefixCache:
        """Return a copy of these rows (int64)."""
        return self._each(lambda x: x[rows_B])

    def part(self, rows: slice, length: int) -> PrefixCache:
        """Return a view of these rows' last columns."""
        return self._each(lambda x: x[rows, :, x.shape[2] - length :])

    def _each(self, function: Callable[[Tensor], Tensor]) -> PrefixCache:
        return PrefixCache({i: (function(k), function(v)) for i, (k, v) in self.given.items()})

    # what transformers asks of a cache; signatures differ between its versions

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Return P."""
        return self.length

    def get_query_offset(self, layer_idx: int | None = 0) -> int:
        """Return P."""
        return self.length

    def get_mask_sizes(self, query: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Return (P + S, 0), asked with the number of queries or with their positions."""
        return self.length + (query if isinstance(query, int) else len(query)), 0


def stacked(parts: Sequence[tuple[Sequence[int], PrefixCache]]) -> PrefixCache:
    """Return one cache of rows that were recorded in parts, each with the numbers of its rows."""
    length = max(cache.length for _, cache in parts)
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()

    def stack(block: int, which: int) -> Tensor:
        wide = [
            F.pad(cache.given[block][which], (0, 0, length - cache.length, 0)) for _, cache in parts
        ]
        return torch.cat(wide)[order.to(wide[0].device)]

    return PrefixCache({i: (stack(i, 0), stack(i, 1)) for i in parts[0][1].given})
