"""The stages of the chain: the notebook of each, where its files lie, and which of its checkpoints is the best."""

import dataclasses
import functools
import math
import shlex
from pathlib import Path

import pandas as pd

from race import CHAIN, MONITORS, RaceError
from race.train.checkpoints import Checkpoint, read_checkpoints


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the chain and its files; raises RaceError for a name that the chain does not have.

    monitor: which of MONITORS picks its best checkpoint; None: that of its training. found: all checkpoints of the
    folder; None: they are read once, when they are first asked for.
    """

    name: str
    checkpoint_dir: str | Path = "checkpoints/race"
    run_dir: str | Path | None = "runs/race"
    monitor: str | None = None
    found: list[Checkpoint] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if self.name not in CHAIN:
            raise RaceError(f"stage {self.name!r}: expected one of {', '.join(CHAIN)}")

    @property
    def before(self) -> "Stage | None":
        """The stage whose best checkpoint this one starts from."""
        earlier = list(CHAIN)[: list(CHAIN).index(self.name)]
        return dataclasses.replace(self, name=earlier[-1], monitor=None) if earlier else None

    @property
    def state_path(self) -> Path:
        """The whole state of a stage that has begun, from which it resumes."""
        return Path(self.checkpoint_dir) / "resume" / f"{self.name}.ckpt"

    @property
    def made_with(self) -> dict:
        """The parameters that it was made with."""
        folders = {"checkpoint_dir": str(self.checkpoint_dir), "run_dir": str(self.run_dir)}
        return folders | {"monitor": self.monitor or MONITORS[0]}

    @property
    def how_to_train_again(self) -> str:
        """What to do to train it again from its start: a sentence."""
        folder, later = Path(self.checkpoint_dir), list(CHAIN)[list(CHAIN).index(self.name) :]
        names = [f"{it}.ckpt" for name in later for it in (f"{name}-*", f"resume/{name}")]
        files = " ".join(f"{shlex.quote(str(folder))}/{it}" for it in names if any(folder.glob(it)))
        again = "To train it again, set another CHECKPOINT_DIR and RUN_DIR, or move its files and those of later stages"
        return f"{again} to another folder: {files}"

    @functools.cached_property
    def saved(self) -> list[Checkpoint]:
        """Its checkpoints, best first, the earlier one of equals; raises RaceError if one of the folder is damaged."""
        found = read_checkpoints(self.checkpoint_dir) if self.found is None else self.found
        own = [checkpoint for checkpoint in found if checkpoint.stage == self.name]
        return sorted(own, key=lambda checkpoint: _cost(checkpoint, self.monitor or checkpoint.monitor))

    def best(self) -> Checkpoint:
        """The checkpoint with the lowest validation loss, or highest accuracy (`rule`); raises RaceError if none is."""
        if not self.saved:
            raise RaceError(f"{self.checkpoint_dir} has no {self.name} checkpoint: run {CHAIN[self.name]}.ipynb first")
        if math.isinf(_cost(self.saved[0], MONITORS[0])[0]):
            raise RaceError(f"{self.checkpoint_dir}: {self.name} diverged, no finite loss; try a lower LEARNING_RATE")
        return self.saved[0]

    def checkpoints(self) -> pd.DataFrame:
        """Its checkpoints as they are on disk now, best first: path, epoch, val_loss_epoch (exact), val_acc."""
        rows = [(it.path, it.epoch, it.val_loss, it.val_acc) for it in dataclasses.replace(self, found=None).saved]
        return pd.DataFrame(rows, columns=["path", "epoch", "val_loss_epoch", "val_acc"]).astype({"val_acc": float})


def _cost(checkpoint: Checkpoint, rule: str) -> tuple[float, int]:
    """What the best checkpoint has the least of: its loss, or share of wrong answers; infinite if either is unknown."""
    loss, accuracy = checkpoint.val_loss, checkpoint.val_acc
    known = loss is not None and math.isfinite(loss) and (rule == MONITORS[0] or accuracy is not None)
    return (loss if rule == MONITORS[0] else 1 - accuracy) if known else math.inf, checkpoint.epoch


def stages_of(checkpoint_dir: str | Path, run_dir: str | Path | None = None) -> list[Stage]:
    """The stages that have checkpoints, in the order of the chain; raises RaceError if none has."""
    found = read_checkpoints(checkpoint_dir)
    stages = [stage for name in CHAIN if (stage := Stage(name, checkpoint_dir, run_dir, found=found)).saved]
    if not stages:
        others = f" (of unknown stage: {', '.join(it.name for it in found[:3])})" if found else ""
        raise RaceError(f"{checkpoint_dir} has no checkpoints of a stage: run ex01.ipynb first{others}")
    return stages


def open_checkpoint(place: str) -> Checkpoint:
    """A checkpoint, or the best of the latest stage of a folder of stages; raises RaceError."""
    of_stages = any(Path(place).glob("*.ckpt")) and not (Path(place) / "config.json").exists()
    return stages_of(place)[-1].best() if of_stages else Checkpoint(place)


def epochs_trained(checkpoint: Checkpoint) -> int | None:
    """How many epochs the stage of a checkpoint was trained, by the files of its run beside it; None if some lack."""
    run = checkpoint.stage, checkpoint.lineage.get("weights_start")
    files = [] if checkpoint.path.is_dir() or run[0] not in CHAIN else checkpoint.beside
    epochs = {it.epoch for it in files if (it.stage, it.lineage.get("weights_start")) == run}
    return len(epochs) if epochs and epochs == set(range(len(epochs))) else None


def lineage_table(checkpoints: list[Checkpoint], names: list[str]) -> pd.DataFrame:
    """What each named checkpoint remembers, a row each.

    recipe: dict or None; epochs: of its stage; chosen_epoch: its own, from 0; parent: which of the others is its base.
    """
    rows, own = [], {it.sha256: name for it, name in zip(checkpoints, names, strict=True)}
    for it, name in zip(checkpoints, names, strict=True):
        row = {"name": name, "stage": it.stage or it.label, "base": it.base, "learning_rate": it.learning_rate}
        row |= {"recipe": it.lineage.get("recipe"), "epochs": epochs_trained(it), "chosen_epoch": it.epoch}
        rows.append(row | {"val_loss": it.val_loss, "parent": own.get(it.base_sha256), "code": it.code})
    return pd.DataFrame(rows)


def stages_behind(checkpoints: list[Checkpoint]) -> list[Stage]:
    """The stages of one folder that these checkpoints went through; none if they are of several folders or runs."""
    folders, names = {it.path.parent for it in checkpoints}, {it.stage for it in checkpoints}
    if len(folders) > 1 or len(names) < len(checkpoints):
        return []
    names.update(*(it.chain for it in checkpoints))
    stages = [Stage(name, *folders, None, found=checkpoints[0].beside) for name in CHAIN if name in names]
    return [stage for stage in stages if stage.saved]


def read_log(run_dir: str | Path, stage: str) -> pd.DataFrame:
    """The metrics of a stage's newest run, from its CSV log; one row per logged step. Raises RaceError."""
    logs = Path(run_dir) / "logs" / stage
    versions = sorted(logs.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    if not versions:
        raise RaceError(f"{logs} has no metrics.csv: train {stage} first, or set the RUN_DIR that it was trained with")
    return pd.read_csv(versions[-1])
