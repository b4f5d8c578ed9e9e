from __future__ import annotations

import math

import pytest
import torch

from editkit.functional.losses import dpo_loss
from editkit.functional.retention import (
    cosine,
    edit_retention,
    emergence,
    fact_retention,
    fate_of,
    flips,
    log_odds_gap,
    mean_kl,
    nearest,
    relative_change,
    relative_decrease,
)

# six items: (right before the edit, right after it, right after fine-tuning)
ITEMS = [
    (0, 1, 1),  # an edit that is kept
    (0, 1, 0),  # an edit that is lost
    (1, 1, 1),  # known before, kept
    (1, 1, 0),  # known before, lost
    (1, 0, 1),  # lost by editing, come back
    (0, 0, 0),  # never right
]
BASE, EDITED, TUNED = ([bool(row[i]) for row in ITEMS] for i in range(3))


def rate(values):
    kept = [v for v in values if not math.isnan(v)]
    return sum(kept) / len(kept)


def test_edits_count_that_were_wrong_before_and_right_after_the_edit():
    assert rate(edit_retention(BASE, EDITED, TUNED)) == 1 / 2
    assert rate(edit_retention(BASE, EDITED, EDITED)) == 1.0  # nothing trained, nothing lost


def test_facts_count_that_were_right_before_and_after_the_edit():
    assert rate(fact_retention(BASE, EDITED, TUNED)) == 1 / 2
    assert rate(fact_retention(BASE, EDITED, EDITED)) == 1.0


def test_flips_have_every_item_that_was_right_as_their_denominator():
    assert rate(flips(EDITED, TUNED)) == 2 / 4
    assert rate(flips(EDITED, EDITED)) == 0.0


def test_emergence_has_the_rest_as_its_denominator():
    assert rate(emergence(EDITED, TUNED)) == 1 / 2


def test_flips_see_what_an_aggregate_hides():
    edited, tuned = [True, False], [False, True]
    assert relative_decrease(sum(edited) / 2, sum(tuned) / 2) == 0.0
    assert rate(flips(edited, tuned)) == 1.0
    assert math.isnan(relative_decrease(0.0, 0.5))


def test_log_odds_gap_is_the_difference_of_corrected_log_odds():
    found = log_odds_gap((3, 10), (9, 10))
    assert found == pytest.approx(math.log(9.5 / 1.5) - math.log(3.5 / 7.5))
    assert math.isfinite(log_odds_gap((0, 5), (5, 5)))


@pytest.mark.parametrize(
    ("edited", "tuned", "answer", "old", "fate"),
    [
        (True, True, "Oslo", "Rome", "stable"),
        (True, False, "The Rome!", "rome", "erased_true"),
        (True, False, "Bern", "Rome", "erased_other"),
        (True, False, "Rome", None, "erased_other"),
        (True, False, " . ", "Rome", "erased_other"),  # punctuation stands for itself
        (True, False, "", "Rome", "erased_empty"),
        (False, True, "Oslo", "Rome", "emergent"),
        (False, False, "Rome", "Rome", "impossible"),
    ],
)
def test_fates(edited, tuned, answer, old, fate):
    assert fate_of(edited, tuned, answer, old) == fate


def test_nearest_takes_each_of_the_pool_once_and_in_turns():
    wanted = [("a", 0.0), ("a", 0.0), ("b", 1.0)]
    pool = [("a", 0.2), ("a", 0.1), ("a", 5.0), ("b", 9.0), ("c", 1.0)]
    assert nearest(wanted, pool, 2) == [[1, 2], [0], [3]]


def test_mean_kl_equals_the_sum_over_the_vocabulary():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    by_hand = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert mean_kl(p.log(), q.log()) == pytest.approx(by_hand, rel=1e-5)
    assert mean_kl(q.log(), q.log()) == 0.0


def test_changes_of_weights():
    weight, change = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]])
    assert relative_change(weight, weight + change) == pytest.approx(0.2)
    assert cosine(change, weight) == pytest.approx(0.8)
    assert cosine(change, torch.zeros(1, 2)) is None
    assert relative_change(torch.zeros(2), torch.ones(2)) == math.inf


def test_dpo_loss_of_a_hand_worked_pair():
    better, worse, ref_better, ref_worse = (torch.tensor([v]) for v in (-1.0, -4.0, -2.0, -3.0))
    margin = 0.5 * ((-1.0 + 2.0) - (-4.0 + 3.0))
    expected = math.log1p(math.exp(-margin))
    found = dpo_loss(better, worse, ref_better, ref_worse, 0.5)
    assert float(found) == pytest.approx(expected)
    still = dpo_loss(better, worse, better, worse, 0.5)
    assert float(still) == pytest.approx(math.log(2))
