"""The stages of the chain: the notebook of each, where its files lie, and which of its checkpoints is the best."""

import contextlib
import dataclasses
import math
import re
from pathlib import Path

import pandas as pd

from race import CHAIN, MONITORS, RaceError
from race.train.checkpoints import Checkpoint

LOSS_IN_NAME = re.compile(r"val_loss_epoch\W*_?(\d+\.\d+|nan|inf)")  # of a damaged file there is nothing but its name


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the chain and its files; raises RaceError for a name that the chain does not have.

    monitor: which of MONITORS picks its best checkpoint; None: what the stage was trained with.
    """

    name: str
    checkpoint_dir: str | Path = "checkpoints/race"
    run_dir: str | Path = "runs/race"
    monitor: str | None = None

    def __post_init__(self):
        if self.name not in CHAIN:
            raise RaceError(f"stage {self.name!r}: expected one of {', '.join(CHAIN)}")
        if self.monitor not in (None, *MONITORS):
            raise RaceError(f"MONITOR is {self.monitor!r}, expected one of {', '.join(MONITORS)}")

    @property
    def notebook(self) -> str:
        """The notebook that trains it."""
        return f"{CHAIN[self.name]}.ipynb"

    @property
    def before(self) -> "Stage | None":
        """The stage whose best checkpoint this one starts from."""
        earlier = list(CHAIN)[: list(CHAIN).index(self.name)]
        return dataclasses.replace(self, name=earlier[-1], monitor=None) if earlier else None

    @property
    def onwards(self) -> list["Stage"]:
        """This stage and those that are built on it."""
        names = list(CHAIN)[list(CHAIN).index(self.name) :]
        return [dataclasses.replace(self, name=name, monitor=None) for name in names]

    @property
    def state_path(self) -> Path:
        """The whole state of a stage that has begun, from which it resumes."""
        return Path(self.checkpoint_dir) / "resume" / f"{self.name}.ckpt"

    @property
    def made_with(self) -> dict:
        """The parameters that it was made with."""
        made = {"CHECKPOINT_DIR": str(self.checkpoint_dir), "RUN_DIR": str(self.run_dir)}
        return made | ({"MONITOR": self.monitor} if self.monitor else {})

    def files(self) -> list[Path]:
        """The checkpoint files of this stage, by name; the stage is read from inside, or a damaged file's name."""
        found, damaged = self._read()
        named = [path for path, _, _ in damaged if path.name.startswith(self.name)]
        return sorted([*(checkpoint.path for checkpoint in found), *named])

    def saved(self) -> list[Checkpoint]:
        """Its checkpoints, best first, the earlier one of equals; damaged ones are printed."""
        found, damaged = self._read()
        for _, _, problem in damaged:
            print(f"skipped: {problem}")
        return found

    def damaged(self) -> list[str]:
        """What is wrong with files that may be its checkpoints."""
        return [problem for _, _, problem in self._read()[1]]

    @property
    def rule(self) -> str:
        """Which of MONITORS picks its best checkpoint."""
        return self._rule(self._read()[0])

    def checkpoints(self) -> pd.DataFrame:
        """Its checkpoints, best first: path, epoch, val_loss_epoch (exact), val_acc; damaged ones are printed."""
        rows = [(it.path, it.epoch, it.val_loss, it.val_acc) for it in self.saved()]
        return pd.DataFrame(rows, columns=["path", "epoch", "val_loss_epoch", "val_acc"]).astype({"val_acc": float})

    def best(self) -> Checkpoint:
        """The checkpoint with the lowest validation loss, or highest accuracy (`monitor`); the earlier one of equals.

        Raises RaceError if there is none, or if a damaged one may have been the best.
        """
        found, damaged = self._read()
        by_loss = self._rule(found) == MONITORS[0]
        lowest = _loss(found[0]) if found and by_loss else math.inf  # a name does not say the accuracy
        if problems := [problem for _, loss, problem in damaged if loss <= lowest + 0.005]:  # names have two digits
            raise RaceError("; ".join(problems))
        if not found:
            missing = f"{self.checkpoint_dir} has no checkpoint of stage {self.name}: run {self.notebook} first"
            raise RaceError(missing + _of_unknown_stage(self.checkpoint_dir))
        if not math.isfinite(_loss(found[0])):
            raise RaceError(f"{self.checkpoint_dir}: {self.name} diverged, no checkpoint has a finite validation loss")
        return found[0]

    def _read(self) -> tuple[list[Checkpoint], list[tuple[Path, float, str]]]:
        """(checkpoints, best first; of each damaged file that may be one: path, the loss in its name, the problem)"""
        found, damaged = [], []
        for path in sorted(Path(self.checkpoint_dir).glob("*.ckpt")):
            try:
                found.append(Checkpoint(path))
            except RaceError as error:
                of_another = re.match(r"e\d+", path.name) and not path.name.startswith(self.name)
                loss = LOSS_IN_NAME.search(path.name)
                if not of_another:
                    damaged.append((path, float(loss[1]) if loss else -math.inf, str(error)))
        own = [checkpoint for checkpoint in found if checkpoint.stage == self.name]
        worth = _loss if self._rule(own) == MONITORS[0] else _errors
        return sorted(own, key=lambda checkpoint: (worth(checkpoint), checkpoint.epoch)), damaged

    def _rule(self, checkpoints: list[Checkpoint]) -> str:
        """Which of MONITORS picks the best one of these."""
        return self.monitor or (checkpoints[0].monitor if checkpoints else MONITORS[0])


def epochs_trained(checkpoint: Checkpoint) -> int | None:
    """How many epochs the stage of a checkpoint was trained, by the files of its run beside it; None if some lack."""
    if checkpoint.stage not in CHAIN or checkpoint.path.is_dir():
        return None
    beside, _ = Stage(checkpoint.stage, checkpoint.path.parent)._read()
    start = checkpoint.lineage.get("weights_start")
    epochs = {it.epoch for it in beside if it.lineage.get("weights_start") == start}
    return len(epochs) if epochs == set(range(len(epochs))) else None


def by_the_other_rule(checkpoint: Checkpoint) -> Checkpoint | None:
    """What the other one of MONITORS would have picked in the stage of a checkpoint; None if that is not known."""
    if checkpoint.stage not in CHAIN or checkpoint.path.is_dir():
        return None
    rule = MONITORS[1 - MONITORS.index(checkpoint.monitor)]
    return next(iter(Stage(checkpoint.stage, checkpoint.path.parent, monitor=rule).saved()), None)


def _loss(checkpoint: Checkpoint) -> float:
    """Its validation loss; infinite if it is not known, or not a number."""
    loss = checkpoint.val_loss
    return math.inf if loss is None or math.isnan(loss) else loss


def _errors(checkpoint: Checkpoint) -> float:
    """Its share of wrong validation answers; infinite if that is not known, or its loss is not a number."""
    known = checkpoint.val_acc is not None and math.isfinite(_loss(checkpoint))
    return 1 - checkpoint.val_acc if known else math.inf


def _of_unknown_stage(checkpoint_dir: str | Path) -> str:
    """The end of a message: which files there are that do not say their stage."""
    names = []
    for path in sorted(Path(checkpoint_dir).glob("*.ckpt")):
        with contextlib.suppress(RaceError):
            names += [path.name] if Checkpoint(path).stage is None else []
    told = f" (which stage made {', '.join(names[:3])} is unknown: give its path as a parameter to use it)"
    return told if names else ""


def begun_stages(checkpoint_dir: str | Path) -> list[Stage]:
    """The stages that have checkpoints, in the order of the chain; raises RaceError if none has."""
    stages = [stage for name in CHAIN if (stage := Stage(name, checkpoint_dir)).files()]
    if not stages:
        raise RaceError(f"{checkpoint_dir} has no checkpoints: run ex01.ipynb first{_of_unknown_stage(checkpoint_dir)}")
    return stages


def best_checkpoints(checkpoint_dir: str | Path) -> list[Checkpoint]:
    """The best checkpoint of each stage that has any, in the order of the chain."""
    return [stage.best() for stage in begun_stages(checkpoint_dir)]


def latest_checkpoint(checkpoint_dir: str | Path) -> Checkpoint:
    """The best checkpoint of the latest stage that has any."""
    return begun_stages(checkpoint_dir)[-1].best()
