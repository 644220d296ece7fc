"""Callbacks that check a training stage: its start, its earlier run, its loss, and how long it will take."""

import math
import os
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

from race import CHANCE, RaceError
from race.data.batches import part_ends
from race.device import AUTOCAST, hardware
from race.encoder import attention_kernel
from race.train.checkpoints import weights_hash
from race.train.state import not_finite

CHANCE_LOSS = -math.log(CHANCE)
STUCK = 5000  # questions


class StartInForce(pl.Callback):
    """Stops a stage whose weights or learning rate are not those that it starts with, or at some step should have."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        """Compare every parameter group with the rate of the step that was taken."""
        self._compare(trainer, module.learning_rate * module.schedule(trainer.global_step - 1))

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compare every parameter group and all weights with what the stage was given."""
        if trainer.global_step:
            return
        self._compare(trainer, module.learning_rate)
        start = module.lineage.get("weights_start")
        if start not in (None, weights_hash(module.model)):
            raise RaceError("the weights have been trained since the model was made: run the model's cell again first")

    def _compare(self, trainer: pl.Trainer, expected: float) -> None:
        rates = {group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups}
        step = trainer.global_step
        if rates != {expected}:
            raise RaceError(f"learning rate in force: {rates}; at step {max(0, step - 1)} it should be {expected}")


class EarlierRun(pl.Callback):
    """Moves the files of an earlier run of a stage away, so that they are not mistaken for this run's."""

    def __init__(self, stage):
        self.stage = stage

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Move checkpoints and states of this stage, and of those built on it, to `earlier/`; not on a resume."""
        if trainer.ckpt_path is not None or not trainer.is_global_zero:
            return
        states = [stage.state_path for stage in self.stage.onwards if stage.state_path.exists()]
        files = [*states, *(file for stage in self.stage.onwards for file in stage.files())]  # states go first
        if files:
            aside = self._move(files)
            print(f"{len(files)} file(s) of an earlier run, from {self.stage.name} on, are now in {aside}")

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """An epoch that is validated again after a kill may have another loss on a GPU: keep its newest file."""
        if trainer.is_global_zero:
            found = [it.path for it in self.stage.saved() if it.epoch == trainer.current_epoch - 1]
            self._move(sorted(found, key=lambda file: file.stat().st_mtime_ns)[:-1])

    on_train_end = on_train_epoch_start

    def _move(self, files: list[Path]) -> Path:
        aside = Path(self.stage.checkpoint_dir) / "earlier" / f"{self.stage.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        for file in files:
            aside.mkdir(parents=True, exist_ok=True)
            os.replace(file, aside / (f"{file.stem}-state.ckpt" if file.parent.name == "resume" else file.name))
        return aside


class LossWatch(pl.Callback):
    """Warns a user whose model has not begun to learn, and stops a stage whose loss is NaN or infinite."""

    def __init__(self):
        self.told = False
        self._seen, self._window = np.zeros(3), np.zeros(3)  # loss, correct answers, questions

    def state_dict(self) -> dict:
        """So that a resumed stage does not warn again."""
        return {"told": self.told, "seen": self._seen.tolist(), "window": self._window.tolist()}

    def load_state_dict(self, state: dict) -> None:
        """The opposite of `state_dict`."""
        self.told, self._seen, self._window = state["told"], np.array(state["seen"]), np.array(state["window"])

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Before the epoch's checkpoint is written."""
        if not trainer.sanity_checking and not np.isfinite(float(trainer.callback_metrics["val_loss_epoch"])):
            raise RaceError(not_finite(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        """Look at the loss where it is logged anyway, which avoids another wait for the GPU."""
        if trainer.global_step % trainer.log_every_n_steps:
            return
        now, before = np.array(module.sum_over_processes(module.sums["train"]).tolist()), self._seen
        if not np.isfinite(now).all():
            raise RaceError(not_finite(trainer))
        self._window += now - before if now[2] > before[2] else now  # the sums begin anew with each epoch
        self._seen = now
        if self._window[2] < STUCK or self.told:
            return
        mean, self._window = self._window[0] / self._window[2], np.zeros(3)
        if abs(mean - CHANCE_LOSS) < 0.01:
            self.told = True
            trainer.progress_bar_callback.print(
                f"the loss has stayed at {mean:.3f} for about {STUCK:,} questions; chance is ln 4 = {CHANCE_LOSS:.3f}: "
                "so far the model has learned nothing. Random weights stay here for long; with pretrained ones, try a "
                "lower or higher LEARNING_RATE, dropout 0 for ALBERT v2, a batch of 16 questions or more"
            )


class StageReport(pl.Callback):
    """The speed in the log, a line after each epoch, and after the first minute how long the stage will take."""

    def __init__(self, after_seconds: float = 60.0):
        self.after_seconds, self.estimate = after_seconds, None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Say what is in force; start the clock; log short epochs more often, so that a trial run has curves too."""
        if trainer.is_global_zero:
            print(in_force(trainer, module), flush=True)
        self._batches = trainer.datamodule.batches_per_epoch()
        trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, self._batches // 20))
        self._started, self._first_step, self.estimate = time.perf_counter(), trainer.global_step, None

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Time between epochs (validation, saving) does not count as training."""
        self._step_ended = None

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, batch_idx: int):
        """Log the speed; print the estimate, once."""
        now, before = time.perf_counter(), self._step_ended
        self._step_ended = now
        if before is not None:
            module.log("tokens_per_second", module.tokens / (now - before), on_step=True)
        seconds = now - self._started
        if self.estimate is None and seconds >= self.after_seconds:
            per_step = seconds / (trainer.global_step - self._first_step)
            total = timedelta(seconds=round(per_step * self._batches * trainer.max_epochs))
            steps = f"{trainer.max_epochs} epochs of {self._batches:,} steps at {per_step:.2f} s a step"
            self.estimate = f"about {total} for {steps}, without validation"
            trainer.progress_bar_callback.print(self.estimate)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Report an epoch's validation."""
        metrics = trainer.callback_metrics
        if not trainer.sanity_checking and "val_acc" in metrics:
            trainer.progress_bar_callback.print(
                f"epoch {trainer.current_epoch}: validation loss {metrics['val_loss_epoch']:.4f}, "
                f"accuracy {100 * metrics['val_acc']:.1f} %"
            )


def in_force(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """What a stage runs on and how: device, precision, attention, micro-batches of its longest batch."""
    device, data, precision = trainer.strategy.root_device, trainer.datamodule, trainer.precision
    kernel = attention_kernel(module.model.config, device, AUTOCAST.get(precision))
    dataset = data.dataset("train")
    longest = dataset.length_order()[: -(-data.batch_size // trainer.world_size)]
    parts = len(part_ends(dataset.lengths()[longest], module.token_budget, module.padded))
    return (
        f"{module.lineage.get('stage', 'training')} runs on {hardware(device)}, {precision}, {kernel}; "
        f"micro-batches in its longest step: {parts} (TOKEN_BUDGET {module.token_budget:,})"
    )


class ProgressBar(TQDMProgressBar):
    """Lightning's, without the number of the log."""

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict:
        """What stands at the end of the bar."""
        return {name: value for name, value in super().get_metrics(trainer, module).items() if name != "v_num"}
