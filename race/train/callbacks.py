"""Callbacks that watch a training stage: its files, its loss, and how long it will take."""

import math
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning import callbacks

from race import MONITORS
from race.train.checkpoints import Checkpoint
from race.train.state import check_finite, say

STUCK = 5000  # questions


class NewestOfEpoch(pl.Callback):
    """Keeps one checkpoint of an epoch: one that is validated again after a kill may have another loss on a GPU."""

    def __init__(self, stage):
        self.stage = stage

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Remove the older files of the epoch before, now that the newest is on disk, if they are of this run."""
        if trainer.is_global_zero:
            files = Path(self.stage.checkpoint_dir).glob(f"{self.stage.name}-*epoch={trainer.current_epoch - 1:02d}-*")
            for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)[:-1]:
                if Checkpoint(path).lineage.get("weights_start") == module.lineage.get("weights_start"):
                    path.unlink()

    on_train_end = on_train_epoch_start


class ProgressBar(callbacks.TQDMProgressBar):
    """Lightning's, with the loss when it is drawn: `prog_bar=True` would read it from the GPU after each step."""

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict:
        """What stands behind the bar."""
        loss, shown = trainer.callback_metrics.get("train_loss_step"), super().get_metrics(trainer, module)
        shown.pop("v_num", None)
        return shown | ({} if loss is None else {"loss": f"{loss:.3f}"})


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's, under the same name in a state; its patience is what is asked for now, also after a resume."""

    def load_state_dict(self, state: dict) -> None:
        """All but the patience of before."""
        super().load_state_dict(state | {"patience": self.patience})


class LossWatch(pl.Callback):
    """Warns a user whose model has not begun to learn, and stops a stage whose loss is NaN or infinite."""

    def __init__(self):
        self.warned = False
        self._before, self._window = np.zeros(3), np.zeros(3)  # loss, correct answers, questions

    def state_dict(self) -> dict:
        """So that a resumed stage does not warn again."""
        return {"told": self.warned, "seen": self._before.tolist(), "window": self._window.tolist()}

    def load_state_dict(self, state: dict) -> None:
        """The opposite of `state_dict`."""
        self.warned, self._before, self._window = state["told"], np.array(state["seen"]), np.array(state["window"])

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Before the epoch's checkpoint is written."""
        check_finite(trainer.callback_metrics["val_loss_epoch"].isfinite(), trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        """Look at the loss where it is logged anyway, which avoids another wait for the GPU."""
        if trainer.global_step % trainer.log_every_n_steps:
            return
        now, before = np.array(module.sum_over_processes(module.sums["train"]).tolist()), self._before
        check_finite(np.isfinite(now).all(), trainer)
        self._window += now - before if now[2] > before[2] else now  # the sums begin anew with each epoch
        self._before = now
        if self._window[2] < STUCK or self.warned:
            return
        mean, self._window = self._window[0] / self._window[2], np.zeros(3)
        chance = math.log(options := trainer.datamodule.cache.options)
        if abs(mean - chance) < 0.01:
            self.warned = True
            advice = "try another LEARNING_RATE, dropout 0 for ALBERT v2, or a batch of 16 questions or more"
            if module.lineage.get("base") == "demo":
                advice = "normal here: the demo's random weights take about an epoch to leave it"
            told = f"the loss has stayed at {mean:.3f} for {STUCK:,} questions; chance is ln {options} = {chance:.3f}"
            trainer.progress_bar_callback.print(f"{told}: {advice}")


class StageReport(pl.Callback):
    """The speed in the log, a line after each epoch, and after the first minute how long the stage will take."""

    def __init__(self, device: str, after_seconds: float = 60.0):
        self.device, self.after_seconds = device, after_seconds  # device: how it computes, in words
        self.estimated = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Say and log what is in force; start the clock; log short epochs more often, so that a trial has curves."""
        say(f"training on {self.device}; TOKEN_BUDGET {module.token_budget:,}")
        known = {name: module.lineage.get(name) for name in ("stage", "base", "code")} | module.lineage["recipe"]
        for logger in trainer.loggers if trainer.global_step == 0 else ():  # MLflow refuses other values later
            logger.log_hyperparams(known | {"cache": module.lineage["cache"]["source"]})
        self._batches = trainer.datamodule.batches_per_epoch()
        trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, self._batches // 20))
        self._seconds, self._steps = 0.0, 0  # of training

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Time between epochs (validation, saving) does not count as training."""
        self._since = None

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, batch_idx: int):
        """Log the speed between logged rows, for which the host waits anyway; print the estimate, once."""
        if self._since is not None:
            self._tokens, self._row = self._tokens + module.tokens, self._row + 1
            if trainer.global_step % trainer.log_every_n_steps:
                return
        now, since = time.perf_counter(), self._since
        if since is not None:
            module.log("tokens_per_second", self._tokens / (now - since), on_step=True)
            self._seconds, self._steps = self._seconds + now - since, self._steps + self._row
        self._since, self._tokens, self._row = now, 0, 0
        if self._steps and not self.estimated and self._seconds >= self.after_seconds:
            self.estimated, per_step = True, self._seconds / self._steps
            total = timedelta(seconds=round(per_step * self._batches * trainer.max_epochs))
            steps = f"{trainer.max_epochs} epochs of {self._batches:,} steps at {per_step:.2f} s a step"
            trainer.progress_bar_callback.print(f"about {total} for {steps}, without validation")

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Report an epoch's validation."""
        loss, accuracy = (trainer.callback_metrics[name] for name in MONITORS)
        epoch = f"epoch {trainer.current_epoch}: validation loss {loss:.4f}, accuracy {100 * accuracy:.1f} %"
        trainer.progress_bar_callback.print(epoch)
