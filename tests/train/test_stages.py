"""Which checkpoint is a stage's best, by what the files say of themselves."""

import math
from pathlib import Path

import pytest
import torch

from race import RaceError
from race.train.checkpoints import Checkpoint
from race.train.stages import Stage, epochs_trained, open_checkpoint, stages_of

LOSSES = [(0.9, 0.60), (0.7, 0.64), (2.03, 0.705), (2.1, 0.705), (math.nan, 0.9)]


def save(folder: Path, name: str, stage: str | None, epoch: int = 0, loss: float = 1.0, accuracy: float = 0.5, **more):
    metrics = {"val_loss_epoch": loss, "val_acc": accuracy}
    record = {"stage": stage, "epoch": epoch, "metrics": metrics} | more
    torch.save({"race": record} if stage else {"state_dict": {}}, folder / name)


def test_the_exact_loss_decides_and_the_earlier_of_equals(tmp_path):
    """File names round to two digits; the checkpoint itself remembers the loss exactly."""
    for epoch, loss in enumerate((0.7849, 0.7751, 0.7751)):
        save(tmp_path, f"e1-albert-race-epoch=0{epoch}-val_loss_epoch=0.78.ckpt", "e1", epoch, loss)
    assert "epoch=01" in Stage("e1", tmp_path).best().name
    table = Stage("e1", tmp_path).checkpoints()
    assert table["epoch"].tolist() == [1, 2, 0] and table["val_loss_epoch"].is_monotonic_increasing


def test_a_name_is_only_a_name(tmp_path):
    """Renamed by a website or a browser, a checkpoint is what it was; of another's the stage is not guessed."""
    save(tmp_path, "e1-albert-race-epoch=00-val_loss_epoch=0.01.ckpt", None)
    for ask in (Stage("e1", tmp_path).best, lambda: stages_of(tmp_path)[-1].best()):
        with pytest.raises(RaceError, match=r"ex01.ipynb first"):
            ask()
    with pytest.raises(RaceError, match=r"unknown stage: e1-albert.*0.01.ckpt"):
        stages_of(tmp_path)
    save(tmp_path, "e3-epoch_00-val_loss_epoch_0.1.ckpt", "e1", 0, 1.5)
    save(tmp_path, "Kopie (1).ckpt", "e1", 1, 1.2)
    assert [stage.best().name for stage in stages_of(tmp_path)] == ["Kopie (1).ckpt"]
    assert open_checkpoint(str(tmp_path)).name == "Kopie (1).ckpt"


@pytest.mark.parametrize("name", ["e1-albert-race-epoch=09-val_loss_epoch=9.99.ckpt", "e2-other.ckpt"])
def test_a_damaged_file_stops_whoever_asks_for_a_best_one(tmp_path, name):
    """Of any stage: nobody knows what it was."""
    save(tmp_path, "e1.ckpt", "e1")
    (tmp_path / name).write_bytes((tmp_path / "e1.ckpt").read_bytes()[:300])
    for ask in (Stage("e1", tmp_path).best, lambda: stages_of(tmp_path)[-1].best()):
        with pytest.raises(RaceError, match=name):
            ask()


def test_the_rule_of_selection(tmp_path):
    """The highest accuracy, or the lowest loss: the rule that a stage was trained with, unless another is asked for."""
    for epoch, (loss, accuracy) in enumerate(LOSSES):
        save(tmp_path, f"e2-epoch={epoch}.ckpt", "e2", epoch, loss, accuracy, recipe={"monitor": "val_acc"})
    trained, by_loss = Stage("e2", tmp_path), Stage("e2", tmp_path, monitor="val_loss_epoch")
    assert (trained.best().monitor, trained.best().epoch) == ("val_acc", 2)
    assert by_loss.best().epoch == 1
    assert Stage("e3", tmp_path, monitor="val_loss_epoch").before.best().epoch == 2


def test_a_stage_that_diverged_says_so(tmp_path):
    save(tmp_path, "e1-nan.ckpt", "e1", 0, math.nan)
    with pytest.raises(RaceError, match="e1 diverged"):
        Stage("e1", tmp_path).best()


def test_a_stage_that_does_not_exist():
    with pytest.raises(RaceError, match="e1, e2, e3"):
        Stage("e4")


def test_epochs_are_known_where_all_files_of_a_run_are_there(tmp_path):
    for epoch, run in ((0, "a"), (1, "a"), (1, "b")):
        save(tmp_path, f"{epoch}-{run}.ckpt", "e1", epoch, weights_start=run)
    save(tmp_path, "theirs.ckpt", None)
    told = {name: epochs_trained(Checkpoint(tmp_path / f"{name}.ckpt")) for name in ("0-a", "1-a", "1-b", "theirs")}
    assert told == {"0-a": 2, "1-a": 2, "1-b": None, "theirs": None}
