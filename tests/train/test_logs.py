"""The course of the training, read back from logs."""

from pathlib import Path

import pandas as pd
import pytest
import pytorch_lightning as pl
from small_stage import stage as train_e1
from statsmodels.stats.proportion import proportion_confint

from race.train.logs import learning_story, read_log


class Seen(pl.Callback):
    """The steps whose rows are in metrics.csv on disk before each step; whether each row is there once it is logged."""

    def __init__(self):
        self.rows: list[list[int]] = []
        self.at_once: list[bool] = []

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        log, path = trainer.logger.log_metrics, Path(trainer.logger.log_dir) / "metrics.csv"

        def logged(metrics: dict, step: int) -> None:
            log(metrics, step)
            self.at_once.append(path.exists() and path.read_text().count("\n") == len(self.at_once) + 2)

        trainer.logger.log_metrics = logged

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch, batch_idx: int) -> None:
        path = Path(trainer.logger.log_dir) / "metrics.csv"
        self.rows.append(pd.read_csv(path)["step"].tolist() if path.exists() else [])


def test_rows_are_on_disk_at_every_logged_step(cache, tmp_path):
    """An epoch of 64 steps is logged every 3 steps instead of 10."""
    seen = Seen()
    train_e1(tmp_path, cache, seen, epochs=1, log_every=10, data={"batch_size": 1})
    logged = [2, 5, 8, *range(11, 64, 3)]  # steps are counted from 0
    assert seen.rows == [[step for step in logged if step < now] for now in range(64)]
    assert len(seen.at_once) == len(read_log(tmp_path / "run", "e1")) and all(seen.at_once)


def test_learning_story_on_one_axis(tmp_path):
    """e1 with two epochs, of which the second was logged twice after a resume; e2 with one; no log of e3."""
    rows = {"e1": [(0, 1.2, 0.4), (1, 1.1, 0.45), (1, 1.0, 0.5)], "e2": [(0, 0.9, 0.6)]}
    for stage, values in rows.items():
        folder = tmp_path / "logs" / stage / "version_0"
        folder.mkdir(parents=True)
        log = pd.DataFrame(values, columns=["epoch", "val_loss_epoch", "val_acc"])
        steps = pd.DataFrame({"epoch": [0], "learning_rate": [2e-5 if stage == "e1" else 2e-6]})
        pd.concat([steps, log]).to_csv(folder / "metrics.csv", index=False)
    story, notes = learning_story(
        tmp_path, dict.fromkeys(["e1", "e2", "e3"], "val_acc"), questions_per_epoch=30, validation_questions=50
    )
    assert story["questions"].tolist() == [30, 60, 90] and story["val_loss"].tolist() == [1.2, 1.0, 0.9]
    assert story["learning_rate"].tolist() == [2e-5, 2e-5, 2e-6] and story["val_acc"].tolist() == [0.4, 0.5, 0.6]
    low, high = proportion_confint(20, 50, method="wilson")
    assert story.loc[0, ["val_low", "val_high"]].tolist() == pytest.approx([low, high])
    assert learning_story(tmp_path, {"e1": "val_acc"}, 0, 0)[0]["val_low"].isna().all()
    assert len(notes) == 1 and notes[0].startswith("no log of e3")
    assert learning_story(tmp_path / "none", {"e1": "val_acc"}, 30, 50)[0].empty
