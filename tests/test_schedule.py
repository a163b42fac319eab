"""The learning rate of each step, and the steps that fit a time limit."""

import pytest

from pyfast.train import OptimConfig
from pyfast.train.schedule import learning_rate, steps_that_fit

OPTIM = OptimConfig(lr=2.0, min_lr_ratio=0.1, warmup_steps=10)


def test_learning_rate_warms_up_peaks_and_reaches_its_end():
    rates = [learning_rate(step, 100, OPTIM) for step in range(100)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[54] == pytest.approx(1.1, rel=0.02)  # half-way down the cosine


@pytest.mark.parametrize("total", [1, 2, 3, 7])  # shorter than the warm-up
def test_learning_rate_of_a_short_run_is_sane(total):
    rates = [learning_rate(step, total, OPTIM) for step in range(total)]
    assert all(0 < rate <= 2.0 for rate in rates)
    assert max(rates) == 2.0
    if total > 1:
        assert rates[-1] == pytest.approx(0.2)


def test_steps_that_fit_keeps_the_plan_unless_it_clearly_does_not_fit():
    assert steps_that_fit(10, 100, seconds_left=100, step_seconds=1.0) == 100
    assert steps_that_fit(10, 100, seconds_left=85, step_seconds=1.0) == 100  # within the slack
    assert steps_that_fit(10, 100, seconds_left=50, step_seconds=1.0) == 60
    assert steps_that_fit(10, 100, seconds_left=-5, step_seconds=1.0) == 11  # one, to end the run
