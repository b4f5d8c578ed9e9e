"""Losses against a plain loop."""

import math

import torch

from editkit.functional.losses import kl_from, target_nll


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


def test_kl_is_torchs_with_the_start_as_its_input():
    torch.manual_seed(0)
    start, now = torch.randn(4, 9).log_softmax(-1), torch.randn(4, 9, requires_grad=True)
    logp = now.log_softmax(-1)
    expected = torch.nn.functional.kl_div(start, logp, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_from(start, now), expected)
    assert kl_from(start, start).abs().max() < 1e-6
