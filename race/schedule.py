"""The learning rate of a step, as a function of the recipe and the step's number alone: nothing to save or restore."""

import dataclasses
import math
import re

from race import RaceError

STEP = re.compile(r"step (\d+)/(\d+)")
NAMES = "constant, linear, cosine, or step N/M (a tenth from N/M of the steps on)"


def is_schedule(name: str) -> bool:
    """Whether this is the name of a schedule."""
    drop = STEP.fullmatch(str(name))
    return name in ("constant", "linear", "cosine") or bool(drop and 0 < int(drop[1]) < int(drop[2]))


@dataclasses.dataclass
class Schedule:
    """schedule(step): what the learning rate is multiplied with at optimizer step `step`, from 0; as transformers does.

    The rate grows from 0 over the warm-up; then it stays ("constant"), falls to 0 at the last step in a straight line
    ("linear") or along half a cosine ("cosine"), or falls to a tenth after a part of the steps ("step 13/23").
    """

    name: str = "constant"
    warmup: float = 0  # steps, or below 1 a share of them
    steps: int | None = None  # of the whole stage; training sets it

    def __call__(self, step: int) -> float:
        if self.name == "constant" and not self.warmup:
            return 1.0
        if self.steps is None:
            raise RaceError("a schedule needs to know all steps of the stage: set schedule.steps, as train_stage does")
        warmup = math.ceil(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return step / warmup
        if drop := STEP.fullmatch(self.name):
            return 0.1 if step * int(drop[2]) >= self.steps * int(drop[1]) else 1.0
        done = (step - warmup) / max(1, self.steps - warmup)
        falling = {"linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return max(0.0, falling.get(self.name, 1.0))
