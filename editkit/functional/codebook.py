"""A codebook's keys and radii, and the place that each edit takes among them.

Source: GRACE (Hartvigsen et al. 2023, arXiv 2211.11031), section 3 and Alg. 1.

Legend: B queries, E edits, K keys of a book, N keys and edits together, F width of a key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GUARD = 1e-5  # kept between two radii that met, as released (grace/editors/grace.py@f674183)
TOUCH = 0.01  # of a key's norm: nearer than this is the same prompt, moved by rounding


class Book(NamedTuple):
    """Keys and what is known of each; tables are replaced, never written in place.

    Args:
        key_KF: Where the keys stand, fp32.
        radius_K: How far from its key a query may be to be answered, fp32.
        label_K: What stands for the answer that is taught there, int64.
        edit_K: The edit that made the key, int64.
        text_K: What stands for that edit's prompt, int64.
        is_shaped_K: Whether the key would look otherwise, or others would, without the rest.
    """

    key_KF: Tensor
    radius_K: Tensor
    label_K: Tensor
    edit_K: Tensor
    text_K: Tensor
    is_shaped_K: Tensor


class Placement(NamedTuple):
    """A book after some edits.

    Args:
        book: The keys there are now.
        kept_K: Where each of them stood among the N.
        key_E: Key at which each edit is to be taught; -1 where a later one took it away.
    """

    book: Book
    kept_K: Tensor
    key_E: Tensor


def distances(query_BF: Tensor, key_KF: Tensor) -> Tensor:
    """Euclidean distances [B, K], fp32, exactly 0 from a key to itself."""
    mode = "donot_use_mm_for_euclid_dist"  # by matrix products small distances drown in rounding
    return torch.cdist(query_BF.float(), key_KF.float(), compute_mode=mode)


def placed(book: Book, edits: Book, eps: float) -> Placement:
    """Give edits their places, one after another (GRACE, Alg. 1).

    An edit farther from the nearest key than `eps` and that key's radius becomes a key. Nearer, it
    widens that key to itself where both teach the same answer; where they do not it becomes a key,
    and both radii become half the distance. An edited prompt that is to have another answer loses
    its old key first.

    Args:
        book: Keys so far.
        edits: The edits as keys, in order, each with the radius `eps`.
        eps: Radius of a key that nothing has shaped.
    """
    joined = Book(*map(torch.cat, zip(book, edits, strict=True)))
    n_keys = len(book.radius_K)
    _, radius_N, label_N, _, text_N, is_shaped_N = (table.cpu().clone() for table in joined)
    least_N = TOUCH * joined.key_KF.norm(dim=1).cpu()
    stands_N = torch.arange(len(radius_N)) < n_keys
    chosen = []
    for own, distance_N in enumerate(distances(edits.key_KF, joined.key_KF).cpu(), start=n_keys):
        is_former_N = stands_N & (text_N == text_N[own]) & (label_N != label_N[own])
        stands_N &= ~is_former_N
        distance_N = distance_N.masked_fill(~stands_N, torch.inf)
        distance, near = distance_N.min(0)
        is_reached_N = distance_N <= eps + radius_N
        is_near, is_same = bool(is_reached_N[near]), bool(label_N[near] == label_N[own])
        if is_reached_N.any():  # without the nearest key this edit would have come elsewhere
            is_shaped_N[near] = True
        if is_near and is_same:
            radius_N[near] = torch.maximum(radius_N[near], distance)
            chosen.append(int(near))
            continue
        stands_N[own] = True
        is_shaped_N[own] = is_near or bool(is_former_N.any())
        if is_near:
            radius_N[near] = torch.maximum(distance / 2 - GUARD, least_N[near])
            radius_N[own] = torch.maximum(distance / 2, least_N[own])
        chosen.append(own)
    place_N = torch.where(stands_N, stands_N.cumsum(0) - 1, -1)
    changed = joined._replace(
        radius_K=radius_N.to(joined.radius_K), is_shaped_K=is_shaped_N.to(joined.is_shaped_K)
    )
    kept_K = stands_N.nonzero()[:, 0].to(joined.key_KF.device)
    return Placement(Book(*(table[kept_K] for table in changed)), kept_K, place_N[chosen])


def mean_label(prompt: list[int], target: list[int]) -> int:
    """Return what the released code compares answers by, as bits: a mean over ids.

    The target's ids and -100 for each token of the prompt (grace/editors/grace.py@f674183,
    `label_match`).
    """
    mean = torch.tensor([-100] * len(prompt) + target).float().mean()
    return int(mean.view(torch.int32))
