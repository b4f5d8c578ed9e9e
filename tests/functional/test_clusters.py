"""Batches of like samples, against a plain loop over all pairs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from editkit.functional.clusters import greedy_clusters


def plain(features, size):
    """Alg. 3 as printed: means and neighbours found anew for every batch."""
    left, found = list(range(len(features))), []
    while left:
        means = []
        for i in left:
            others = [j for j in left if j != i]
            near = [float(cosine_similarity(features[i], features[j], dim=0)) for j in others]
            means.append(sum(near) / max(1, len(near)))
        seed = left[max(range(len(left)), key=lambda n: means[n])]
        rest = [j for j in left if j != seed]
        rest.sort(key=lambda j: -float(cosine_similarity(features[seed], features[j], dim=0)))
        batch = [seed, *rest[: size - 1]]
        found.append(batch)
        left = [j for j in left if j not in batch]
    return found


@pytest.mark.parametrize("size", [2, 3, 5, 20])
def test_batches_are_those_of_the_plain_loop(size):
    features = torch.randn(13, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert greedy_clusters(features, size) == plain(features, size)


def test_two_bunches_come_out_as_two_batches():
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(8, 4, generator=generator)
    centre = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]).repeat(4, 1)
    batches = greedy_clusters(centre + noise, 4)
    assert sorted(sorted(b) for b in batches) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_every_sample_is_dealt_once_and_equals_by_order():
    assert greedy_clusters(torch.ones(5, 3), 2) == [[0, 1], [2, 3], [4]]
