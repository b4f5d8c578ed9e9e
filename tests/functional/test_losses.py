"""Losses against a plain loop."""

import math

import torch

from editkit.functional.losses import target_nll


def test_target_nll_is_the_mean_over_each_rows_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator)
    ids, rows = torch.tensor([1, 6, 0, 3, 3]), torch.tensor([0, 0, 1, 2, 2])
    found = target_nll(logits, ids, rows, 3)
    for row in range(3):
        nll = []
        for n in range(5):
            if rows[n] == row:
                values = logits[n].tolist()
                total = sum(math.exp(v) for v in values)
                nll.append(-math.log(math.exp(values[ids[n]]) / total))
        assert math.isclose(found[row].item(), sum(nll) / len(nll), rel_tol=1e-5)
