"""The course of the training, read back from logs, and loggers that a user adds."""

from types import SimpleNamespace
from typing import ClassVar

import pandas as pd
import pytest
import torch
import yaml
from pytorch_lightning.loggers import Logger
from small_stage import At, interrupt
from small_stage import stage as train_e1
from statsmodels.stats.proportion import proportion_confint

from race import RaceError
from race.data import Cache
from race.score.runs import learning_story
from race.train.stages import read_log, stages_of


def test_an_epoch_of_few_steps_is_logged_more_often(cache, tmp_path):
    """64 steps, every 3 of them instead of every 10."""
    train_e1(tmp_path, cache, epochs=1, log_every=10, data={"batch_size": 1})
    steps = read_log(tmp_path / "run", "e1").dropna(subset="train_loss_step")["step"]
    assert steps.tolist() == [2, 5, 8, *range(11, 64, 3)]  # counted from 0


def test_learning_story_on_one_axis(cache, tmp_path):
    """e1 with two epochs, of which the second was logged twice after a resume; e2 with one; e3's log is another run's.

    All numbers of questions are those of the training, whatever is evaluated.
    """
    rows = {"e1": [(0, 1.2, 0.4), (1, 1.1, 0.45), (1, 1.0, 0.5)], "e2": [(0, 0.9, 0.6)], "e3": [(0, 0.7, 0.7)]}
    for stage, values in rows.items():
        folder = tmp_path / "logs" / stage / "version_0"
        folder.mkdir(parents=True)
        log = pd.DataFrame(values, columns=["epoch", "val_loss_epoch", "val_acc"])
        steps = pd.DataFrame({"epoch": [0], "learning_rate": [2e-5 if stage == "e1" else 2e-6]})
        pd.concat([steps, log]).to_csv(folder / "metrics.csv", index=False)
    for stage, epoch, loss in (("e1", 1, 1.0), ("e2", 0, 0.9), ("e3", 0, 0.8)):
        record = {"stage": stage, "epoch": epoch, "metrics": {"val_loss_epoch": loss}, "cache": Cache(cache).identity}
        torch.save({"race": record | {"recipe": {"limit_questions": 30, "seed": 1}}}, tmp_path / f"{stage}.ckpt")
    stages = stages_of(tmp_path)
    story, notes = learning_story(tmp_path, stages, Cache(cache))
    assert story["questions"].tolist() == [30, 60, 90] and story["val_loss"].tolist() == [1.2, 1.0, 0.9]
    assert story["learning_rate"].tolist() == [2e-5, 2e-5, 2e-6] and story["val_acc"].tolist() == [0.4, 0.5, 0.6]
    low, high = proportion_confint(12, 30, method="wilson")
    assert story.loc[0, ["val_low", "val_high"]].tolist() == pytest.approx([low, high])
    assert len(notes) == 1 and notes[0].startswith("e3 is missing: no log")
    assert learning_story(tmp_path / "none", stages, Cache(cache))[0].empty
    other = Cache(cache)
    other.manifest = other.manifest | {"source": {"name": "other", "sha256": "0"}}
    assert learning_story(tmp_path, stages, other)[0].empty
    assert "not stages of one run" in learning_story(tmp_path, [], Cache(cache))[1][0]


class Kept(Logger):
    """A logger of the user's own, which keeps what it is given."""

    kept: ClassVar[list] = []

    def __init__(self, save_dir: str, project: str = ""):
        super().__init__()
        self.where = (save_dir, project)

    name, version = "kept", 0

    def log_metrics(self, metrics, step=None):
        self.kept.append((self.where, step, metrics))

    def log_hyperparams(self, *_, **__):
        pass


def test_a_logger_of_the_users_is_given_all_metrics_and_changes_nothing(cache, tmp_path):
    """Beside CSV and TensorBoard; the weights are the same bytes as without it."""
    train_e1(tmp_path / "without", cache, epochs=1, minutes=60.0)
    Kept.kept.clear()
    train_e1(tmp_path / "with", cache, epochs=1, loggers={f"{__name__}.Kept": {"project": "race"}})
    (where,) = {where for where, _, _ in Kept.kept}
    assert where == (str(tmp_path / "with" / "run" / "loggers"), "race")
    names = {name for _, _, metrics in Kept.kept for name in metrics}
    assert {"train_loss_step", "learning_rate", "val_loss_epoch", "val_acc"} <= names
    files = [next((tmp_path / it / "checkpoints").glob("*.ckpt")).read_bytes() for it in ("with", "without")]
    assert files[0] == files[1] and read_log(tmp_path / "with" / "run", "e1")["val_acc"].notna().any()


def test_a_users_csv_log_goes_on_where_a_stage_resumes(cache, tmp_path):
    """With a version of its own, or as it comes; a row of each logged step, once; the recipe and seed are in it."""
    for loggers in ({"CSVLogger": {"version": 0}}, {"CSVLogger": {}}):
        folder = tmp_path / str(len(loggers["CSVLogger"]))
        with pytest.raises(KeyboardInterrupt):
            train_e1(folder, cache, At(5, interrupt), epochs=1, loggers=loggers, schedule="constant", warmup=0)
        train_e1(folder, cache, epochs=1, loggers=loggers, schedule="constant", warmup=0)
        (log,) = (folder / "run" / "loggers" / "run-e1-seed0").glob("version_*/metrics.csv")
        ours = read_log(folder / "run", "e1")
        assert pd.read_csv(log)["step"].tolist() == ours["step"].tolist() and len(ours) > 4
        known = yaml.safe_load((log.parent / "hparams.yaml").read_text())
        assert {"learning_rate", "schedule", "warmup", "batch_size", "seed", "max_epochs", "precision"} <= known.keys()
        assert known["stage"] == "e1" and known["cache"].endswith("corpus")


def test_a_logger_is_closed_before_a_signal_ends_the_process(cache, tmp_path):
    """W&B without a network keeps the last rows in memory until it is."""
    Kept.experiment = SimpleNamespace(finish=lambda: Kept.kept.append("finished"))
    with pytest.raises(KeyboardInterrupt):
        train_e1(tmp_path, cache, At(3, interrupt), epochs=1, loggers={f"{__name__}.Kept": {}})
    assert Kept.kept[-1] == "finished"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("WandbLogger", {}), ("NoLogger", {}), ("CSVLogger", {"colour": 1}), ("nowhere.at.All", {}), ("pathlib.Path", {})],
)
def test_a_logger_that_cannot_be_made_stops_before_the_training(cache, tmp_path, name, arguments):
    """A package that is not installed, a name that nobody knows, an argument that it does not take."""
    with pytest.raises(RaceError, match=f"LOGGERS, {name}: "):
        train_e1(tmp_path, cache, loggers={name: arguments})
    assert not (tmp_path / "checkpoints").exists()
