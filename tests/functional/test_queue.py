"""The queue: its normal form, its bound on any sequence of losses, its budget."""

import math

import pytest
import torch

from editkit.functional.queue import Queue, QueueSettings, kappa_step


@pytest.fixture
def losses():
    """Losses that rise and fall around any budget of about 1."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(200, generator=generator) * 3).square().tolist()


def papers_queue(queue, loss, budget, gain, drift, floor):
    """Return max(Z + a (PL - D) + b, floor), as the paper has it."""
    return max(queue + gain * (loss - budget) + drift, floor)


def test_kappa_is_the_papers_queue_in_normal_form(losses):
    budget = 1.7
    kappa, queue = 1.0, math.sqrt(budget)
    for loss in losses:
        kappa = kappa_step(kappa, loss, budget)
        queue = papers_queue(queue, loss, budget, 1 / math.sqrt(budget), 0.0, math.sqrt(budget))
        assert math.isclose(kappa, queue / math.sqrt(budget), rel_tol=1e-12)


def test_mean_loss_stays_within_the_pathwise_bound_whatever_happens(losses):
    for alpha in (0.3, 1.0, 2.5, 60.0):
        settings, queue, total = QueueSettings(alpha=alpha), Queue(), 0.0
        for t, loss in enumerate(losses, start=1):
            queue = queue.after(loss, 5, settings)
            total += loss
            assert queue.kappa >= 1.0
            assert total / t <= queue.D * (1 + (queue.kappa - 1) / t) * (1 + 1e-12)


def test_scaling_all_losses_changes_the_budget_and_not_kappa(losses):
    for scale in (1e-6, 1e6):
        one, other = Queue(), Queue()
        for loss in losses:
            one = one.after(loss, 1, QueueSettings(alpha=1.2))
            other = other.after(scale * loss, 1, QueueSettings(alpha=1.2))
            assert math.isclose(one.kappa, other.kappa, rel_tol=1e-9)


def test_budget_is_alpha_times_the_first_loss_or_as_given():
    first = Queue().after(0.5, 10, QueueSettings(alpha=60))
    assert (first.D, first.kappa, first.edits) == (30.0, 1.0, 10)
    assert Queue().after(0.5, 10, QueueSettings(D=0.1)).D == 0.1
    assert Queue().after(0.5, 10, QueueSettings(D=0.1)).kappa == pytest.approx(5.0)
    assert Queue().after(0.0, 10, QueueSettings()).D is None  # nothing was changed: not a unit


def test_budget_can_wait_for_as_many_edits_as_a_batch_would_have():
    settings, queue = QueueSettings(alpha=2, d_base_edits=3), Queue()
    for loss in (0.1, 0.2):
        queue = queue.after(loss, 1, settings)
        assert (queue.D, queue.kappa) == (None, 1.0)
    assert queue.after(0.3, 1, settings).D == 0.6


def test_kappa_max_caps_kappa():
    queue = Queue(D=1.0)
    for _ in range(5):
        queue = queue.after(11.0, 1, QueueSettings(kappa_max=15))
    assert queue.kappa == 15


@pytest.mark.parametrize(
    ("field", "value"),
    [("alpha", 0), ("D", -1), ("V", 0), ("d_base_edits", 0), ("kappa_max", 0.5), ("history", "x")],
)
def test_settings_that_make_no_sense_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        QueueSettings(**{field: value})
