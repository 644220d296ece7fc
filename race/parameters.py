"""Parameters and their ranges."""

import math

from race import RaceError
from race.schedule import NAMES, is_schedule

RANGES = {
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "adam_epsilon"), (lambda it: 0 <= it < math.inf, "a number of 0 or more")
    ),
    "token_budget": (lambda it: it is None or it >= 1, "1 or more, or None"),
    "attention_dropout": (lambda it: it is None or 0 <= it < 1, "0 or more and below 1, or None"),
    "schedule": (is_schedule, NAMES),
    "warmup": (
        lambda it: 0 <= it < 1 or (it < math.inf and it == int(it) >= 1),
        "a number of steps, or a share of them below 1",
    ),
    "max_grad_norm": (lambda it: it is None or it > 0, "a number above 0, or None"),
}


def check(**values) -> None:
    """Raise RaceError with every value that its parameter does not allow."""
    wrong = [(name, value) for name, value in values.items() if not RANGES[name][0](value)]
    if wrong:
        raise RaceError("; ".join(f"{name.upper()} is {value!r}, expected {RANGES[name][1]}" for name, value in wrong))
