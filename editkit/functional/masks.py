"""Sparse masks over a layer's inputs: chosen, packed to bits, matched by counting shared ones.

Source: TopHash and its routing, MEMOIR (Wang et al. 2025, arXiv 2506.07899), section 4.

Legend: B rows, F layer input, K stored masks, W 64-bit words of a packed mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 64
# masks compared at a time: on a CPU what stays in its cache, elsewhere what fills the device
CPU_WORDS, DEVICE_WORDS = 1 << 15, 1 << 25

# bit counts of a word in five steps (Warren, Hacker's Delight, figure 5-2)
PAIRS, NIBBLES, BYTES = 0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F
ONES = 0x0101010101010101

GOLDEN, MIXER = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9  # odd constants of a 63-bit mixer


def largest(values_BF: Tensor, k: int) -> Tensor:
    """Mark the k largest magnitudes of each row, bool [B, F] with exactly k ones.

    Equal magnitudes go to the lower index, on every device.
    """
    order_BF = values_BF.abs().sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(values_BF, dtype=torch.bool).scatter_(1, order_BF[:, :k], True)


def hashed(mask_BF: Tensor, k: int) -> Tensor:
    """Mark k places of each row that look random and depend on its mask alone, bool [B, F].

    Rows that differ in a single place have nothing in common but chance.
    """
    place_F = torch.arange(mask_BF.shape[1], device=mask_BF.device)
    seed_B1 = (mask_BF * _mix(place_F + 1)).sum(1, keepdim=True)
    order_BF = _mix(seed_B1 ^ (place_F * GOLDEN)).sort(dim=1, stable=True).indices
    return torch.zeros_like(mask_BF).scatter_(1, order_BF[:, :k], True)


def scattered(rows: int, width: int, k: int, generator: torch.Generator) -> Tensor:
    """Mark k random places in each row, bool [B, F] on the CPU."""
    order_BF = torch.rand(rows, width, generator=generator, dtype=torch.float32).argsort(dim=1)
    return torch.zeros(rows, width, dtype=torch.bool).scatter_(1, order_BF[:, :k], True)


def pack(mask_BF: Tensor) -> Tensor:
    """Pack masks to bits: bool [B, F] to int64 [B, W], W = F / 64 rounded up."""
    padded_BF = F.pad(mask_BF, (0, -mask_BF.shape[1] % WORD))
    bits_BWb = padded_BF.view(len(mask_BF), -1, WORD).long()
    return (bits_BWb << torch.arange(WORD, device=mask_BF.device)).sum(-1)


def unpack(packed_BW: Tensor, width: int) -> Tensor:
    """Undo `pack`: int64 [B, W] to bool [B, F] of the given width F."""
    bits_BWb = (packed_BW[..., None] >> torch.arange(WORD, device=packed_BW.device)) & 1
    return bits_BWb.flatten(1)[:, :width].bool()


def overlaps(queries_BW: Tensor, keys_KW: Tensor) -> Tensor:
    """Count the ones that each query shares with each key, exactly, int64 [B, K]."""
    words_BKW = queries_BW[:, None] & keys_KW
    part_BKW = words_BKW >> 1
    words_BKW -= part_BKW.bitwise_and_(PAIRS)
    torch.bitwise_right_shift(words_BKW, 2, out=part_BKW)
    words_BKW.bitwise_and_(NIBBLES).add_(part_BKW.bitwise_and_(NIBBLES))
    torch.bitwise_right_shift(words_BKW, 4, out=part_BKW)
    words_BKW.add_(part_BKW).bitwise_and_(BYTES)
    return words_BKW.mul_(ONES).bitwise_right_shift_(WORD - 8).sum(-1)


def best_match(queries_BW: Tensor, keys_KW: Tensor) -> tuple[Tensor, Tensor]:
    """Find the key that shares most ones with each query; the earliest among equals.

    Args:
        queries_BW: Packed masks asked about.
        keys_KW: Packed masks to search, at least one.

    Returns:
        Index of the best key and the number of shared ones, both int64 [B].
    """
    rows, width = queries_BW.shape
    words = CPU_WORDS if queries_BW.device.type == "cpu" else DEVICE_WORDS
    best_B = queries_BW.new_full((rows,), -1)
    index_B = torch.zeros_like(best_B)
    start = 0
    for part_KW in keys_KW.split(max(1, words // (rows * width))):
        found_B, place_B = overlaps(queries_BW, part_KW).max(dim=1)
        is_better_B = found_B > best_B
        index_B = torch.where(is_better_B, place_B + start, index_B)
        best_B = torch.maximum(best_B, found_B)
        start += len(part_KW)
    return index_B, best_B


def chance_threshold(k: int, width: int) -> float:
    """Overlap that unrelated masks do not reach, where no unrelated prompts tell.

    Two random masks share k/F of their ones, and MEMOIR's threshold of 0.4 at k/F = 4096/14336
    lies 16 % of the way from there to 1: k/F + 0.16 (1 - k/F).
    """
    return k / width + 0.16 * (1 - k / width)


def quantile_threshold(best_B: Tensor, rate: float, k: int) -> float:
    """Lowest overlap, as a share of k, that at most `rate` of the given best matches reach.

    Args:
        best_B: Most ones that each unrelated prompt shares with any key.
        rate: Allowed share of false activations.
        k: Ones of a mask; a perfect match stays one, so the threshold is at most 1.
    """
    allowed = int(rate * len(best_B))
    highest_B = best_B.sort(descending=True).values
    return min(int(highest_B[allowed]) + 1, k) / k if allowed < len(best_B) else 0.0


def _mix(values: Tensor) -> Tensor:
    """Scramble int64 values one to one, as the steps of splitmix64 do."""
    mixed = values * GOLDEN
    mixed = (mixed ^ (mixed >> 30)) * MIXER
    mixed = (mixed ^ (mixed >> 27)) * GOLDEN
    return mixed ^ (mixed >> 31)
