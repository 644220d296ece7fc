"""The learning rate of a step, as a function of the recipe and the step's number alone: nothing to save or restore."""

import math
import re

from race import RaceError

STEP = re.compile(r"step (\d+)/(\d+)")
NAMES = "constant, linear, cosine, or step N/M (a tenth from N/M of the steps on)"


def is_schedule(name: str) -> bool:
    """Whether this is the name of a schedule."""
    drop = STEP.fullmatch(str(name))
    return name in ("constant", "linear", "cosine") or bool(drop and 0 < int(drop[1]) < int(drop[2]))


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps of warm-up of `steps` in all; `warmup`: their number, or below 1 their share."""
    return math.ceil(warmup * steps) if warmup < 1 else int(warmup)


def rate_factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """What the learning rate is multiplied with at optimizer step `step`, from 0, of `steps`; as transformers does.

    The rate grows from 0 over `warmup` steps; then it stays ("constant"), falls to 0 at `steps` in a straight line
    ("linear") or along half a cosine ("cosine"), or falls to a tenth after a part of the steps ("step 13/23").
    """
    if step < warmup:
        return step / warmup
    if drop := STEP.fullmatch(schedule):
        return 0.1 if step * int(drop[2]) >= steps * int(drop[1]) else 1.0
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return max(0.0, 1.0 - done)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done))) if schedule == "cosine" else 1.0


def check_schedule(schedule: str, warmup: float, max_grad_norm: float | None) -> None:
    """Raise RaceError with everything that is not a schedule."""
    problems = [] if is_schedule(schedule) else [f"SCHEDULE is {schedule!r}, expected {NAMES}"]
    if not (0 <= warmup < 1 or (1 <= warmup < math.inf and warmup == int(warmup))):
        problems.append(f"WARMUP is {warmup}, expected a number of steps, or a share of them below 1")
    if max_grad_norm is not None and not max_grad_norm > 0:
        problems.append(f"MAX_GRAD_NORM is {max_grad_norm}, expected a number above 0, or None")
    if problems:
        raise RaceError("; ".join(problems))
