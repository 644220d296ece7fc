"""The learning rate of every step: that of transformers' schedulers, without their state."""

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from race import RaceError
from race.schedule import Schedule, is_schedule

NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "warmup"), [(50, 0), (50, 7), (50, 0.1), (50, 50), (3, 1), (1, 0), (20, 30)])
def test_rates_are_those_of_transformers(name, steps, warmup):
    schedule, optimizer = Schedule(name, warmup, steps), torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-5)
    warmup = round(warmup * steps) if warmup < 1 else warmup
    scheduler = get_scheduler(NAMES[name], optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        assert 2e-5 * schedule(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-20)
        optimizer.step()
        scheduler.step()


def test_a_step_falls_to_a_tenth_with_the_first_step_of_an_epoch():
    """After 13 of 23 epochs of 7 steps, as the chain's last stage."""
    factors = [*map(Schedule("step 13/23", 0, 23 * 7), range(23 * 7))]
    np.testing.assert_array_equal(factors, [1.0] * 91 + [0.1] * 70)


def test_a_schedule_that_needs_all_steps_says_so():
    assert Schedule()(10**9) == 1.0
    with pytest.raises(RaceError, match="schedule.steps"):
        Schedule("linear")(0)


@pytest.mark.parametrize("name", ["step", "step 3/2", "step 0/2", "step 1/2 ", "", None, "polynomial"])
def test_a_name_of_no_schedule(name):
    assert not is_schedule(name)
