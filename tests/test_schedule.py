"""The learning rate of every step: that of transformers' schedulers, without their state."""

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from race import RaceError
from race.schedule import check_schedule, is_schedule, rate_factor, warmup_steps

NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize(("steps", "warmup"), [(50, 0), (50, 7), (50, 0.1), (50, 50), (3, 1), (1, 0), (20, 30)])
def test_rates_are_those_of_transformers(schedule, steps, warmup):
    warmup = warmup_steps(warmup, steps)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-5)
    scheduler = get_scheduler(NAMES[schedule], optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        assert 2e-5 * rate_factor(schedule, step, steps, warmup) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-20)
        optimizer.step()
        scheduler.step()


def test_a_step_falls_to_a_tenth_with_the_first_step_of_an_epoch():
    """After 13 of 23 epochs of 7 steps, as the chain's last stage."""
    factors = [rate_factor("step 13/23", step, 23 * 7, 0) for step in range(23 * 7)]
    np.testing.assert_array_equal(factors, [1.0] * 91 + [0.1] * 70)


@pytest.mark.parametrize("schedule", ["step", "step 3/2", "step 0/2", "step 1/2 ", "", None, "polynomial"])
def test_a_name_of_no_schedule(schedule):
    assert not is_schedule(schedule)


def test_what_is_no_schedule_is_refused():
    with pytest.raises(
        RaceError, match="SCHEDULE is 'step', expected constant, linear, cosine, or step N/M .*; WARMUP is 1.5"
    ):
        check_schedule("step", 1.5, None)
    with pytest.raises(RaceError, match="MAX_GRAD_NORM is 0, expected"):
        check_schedule("cosine", 0.1, 0)
