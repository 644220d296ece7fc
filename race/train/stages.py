"""The stages of the chain: the notebook of each, where its files lie, and which of its checkpoints is the best."""

import dataclasses
import math
from pathlib import Path

import pandas as pd

from race import RaceError
from race.train.checkpoints import IN_NAME, Checkpoint

# Each stage starts from the best checkpoint of the one before, the first from the pretrained model. Learning rate and
# epochs of a stage are defined in its notebook's parameters.
CHAIN = {"e1": "ex01", "e2": "ex02", "e3": "ex03"}
DEMO = {  # what the demo's tiny model takes instead: the same ratios, about a minute of training on two CPU cores
    "e1": {"LEARNING_RATE": 2.5e-4, "MAX_EPOCHS": 1},
    "e2": {"LEARNING_RATE": 2.5e-4, "MAX_EPOCHS": 2},
    "e3": {"LEARNING_RATE": 2.5e-5, "MAX_EPOCHS": 2},
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the chain and its files; raises RaceError for a name that the chain does not have."""

    name: str
    checkpoint_dir: str | Path = "checkpoints/race"
    run_dir: str | Path = "runs/race"

    def __post_init__(self):
        if self.name not in CHAIN:
            raise RaceError(f"stage {self.name!r}: expected one of {', '.join(CHAIN)}")

    @property
    def notebook(self) -> str:
        """The notebook that trains it."""
        return f"{CHAIN[self.name]}.ipynb"

    @property
    def before(self) -> "Stage | None":
        """The stage whose best checkpoint this one starts from."""
        earlier = list(CHAIN)[: list(CHAIN).index(self.name)]
        return dataclasses.replace(self, name=earlier[-1]) if earlier else None

    @property
    def onwards(self) -> list["Stage"]:
        """This stage and those that are built on it."""
        return [dataclasses.replace(self, name=name) for name in list(CHAIN)[list(CHAIN).index(self.name) :]]

    @property
    def state_path(self) -> Path:
        """The whole state of a stage that has begun, from which it resumes."""
        return Path(self.checkpoint_dir) / "resume" / f"{self.name}.ckpt"

    def files(self) -> list[Path]:
        """The checkpoint files of this stage, by name; none is read."""
        return sorted(
            path for path in Path(self.checkpoint_dir).glob(f"{self.name}-*.ckpt") if IN_NAME.match(path.name)
        )

    def checkpoints(self) -> pd.DataFrame:
        """Its checkpoints, best first: path, epoch, val_loss_epoch (exact), val_acc; damaged ones are printed."""
        found, damaged = self._read()
        for _, problem in damaged:
            print(f"skipped: {problem}")
        rows = [(checkpoint.path, checkpoint.epoch, checkpoint.val_loss, checkpoint.val_acc) for checkpoint in found]
        return pd.DataFrame(rows, columns=["path", "epoch", "val_loss_epoch", "val_acc"]).astype({"val_acc": float})

    def best(self) -> Checkpoint:
        """The checkpoint with the lowest validation loss, the earlier one of equals.

        Raises RaceError if there is none, or if a damaged one may have been the best.
        """
        found, damaged = self._read()
        lowest = found[0].val_loss if found else math.inf
        if problems := [problem for loss, problem in damaged if loss <= lowest + 0.005]:  # names have two digits
            raise RaceError("; ".join(problems))
        if not found:
            raise RaceError(f"{self.checkpoint_dir} has no checkpoint of stage {self.name}: run {self.notebook} first")
        if not math.isfinite(lowest):
            raise RaceError(f"{self.checkpoint_dir}: {self.name} diverged, no checkpoint has a finite validation loss")
        return found[0]

    def _read(self) -> tuple[list[Checkpoint], list[tuple[float, str]]]:
        """(checkpoints, best first; of each damaged one: the loss in its name, and what is wrong)"""
        found, damaged = [], []
        for path in self.files():
            try:
                found.append(Checkpoint(path))
            except RaceError as error:
                damaged.append((float(IN_NAME.match(path.name)["loss"]), str(error)))
        return sorted(found, key=lambda it: (math.isnan(it.val_loss), it.val_loss, it.epoch)), damaged


def begun_stages(checkpoint_dir: str | Path) -> list[Stage]:
    """The stages that have checkpoints, in the order of the chain; raises RaceError if none has."""
    stages = [stage for name in CHAIN if (stage := Stage(name, checkpoint_dir)).files()]
    if not stages:
        raise RaceError(f"{checkpoint_dir} has no checkpoints: run ex01.ipynb first")
    return stages


def best_checkpoints(checkpoint_dir: str | Path) -> list[Checkpoint]:
    """The best checkpoint of each stage that has any, in the order of the chain."""
    return [stage.best() for stage in begun_stages(checkpoint_dir)]


def latest_checkpoint(checkpoint_dir: str | Path) -> Checkpoint:
    """The best checkpoint of the latest stage that has any."""
    return begun_stages(checkpoint_dir)[-1].best()
