"""What watches over a training stage: its start, its loss, its checkpoints of before, and how long it will take."""

import math
import os
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytorch_lightning as pl

from race_checkpoints import STAGES, StageError
from race_module import RaceModule, weights_hash
from race_resume import not_finite, state_path


class StartInForce(pl.Callback):
    """Stops a stage before its first step if learning rate or weights are not those that the stage starts with."""

    def on_train_start(self, trainer: pl.Trainer, module: RaceModule) -> None:
        """Compare every parameter group and all weights with what the stage was given."""
        rates = {group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups}
        if rates != {module.learning_rate}:
            raise StageError(f"learning rate in force: {rates}; this stage's is {module.learning_rate}")
        start = module.lineage.get("weights_start")
        if trainer.global_step == 0 and start not in (None, weights_hash(module.model)):
            raise StageError("the weights have been trained since the model was made: run the model's cell again first")


class EarlierRunAside(pl.Callback):
    """Moves what an earlier run of a stage left, and the stages built on it: they must not pass for this run's."""

    def __init__(self, checkpoint_dir: Path, stage: str, fresh: bool):
        self.checkpoint_dir, self.stage, self.fresh = checkpoint_dir, stage, fresh

    def on_train_start(self, trainer: pl.Trainer, module: RaceModule) -> None:
        """Move checkpoints and states to a folder of their own below `earlier`; not where a stage goes on."""
        if trainer.ckpt_path is not None or not trainer.is_global_zero:
            return
        later = STAGES[STAGES.index(self.stage) :]
        states = [state_path(self.checkpoint_dir, stage) for stage in later]
        files = [file for each in later for file in sorted(self.checkpoint_dir.glob(f"{each}-*.ckpt"))]
        files = [*filter(Path.exists, states), *files]  # states first: a stage without one starts again
        if files:
            aside = self._aside(files)
            print(f"{len(files)} file(s) of an earlier run, from {self.stage} on, are now in {aside}")

    def on_train_epoch_start(self, trainer: pl.Trainer, module: RaceModule) -> None:
        """Look after the epoch before."""
        self._keep_one(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: RaceModule) -> None:
        """Look after the last epoch."""
        self._keep_one(trainer)

    def _keep_one(self, trainer: pl.Trainer) -> None:
        """An epoch that is ended again after a kill may have, on a GPU, a loss that differs: keep its newest file."""
        if trainer.is_global_zero:
            found = self.checkpoint_dir.glob(f"{self.stage}-*epoch={trainer.current_epoch - 1:02d}-*.ckpt")
            self._aside(sorted(found, key=lambda file: file.stat().st_mtime_ns)[:-1])

    def _aside(self, files: list[Path]) -> Path:
        aside = self.checkpoint_dir / "earlier" / f"{self.stage}-{time.strftime('%Y%m%d-%H%M%S')}"
        for file in files:
            aside.mkdir(parents=True, exist_ok=True)
            os.replace(file, aside / (f"{file.stem}-state.ckpt" if file.parent.name == "resume" else file.name))
        return aside


class LossWatch(pl.Callback):
    """Tells a user whose model does not learn, and stops one whose loss is no number any more.

    stuck: a mean loss within 0.01 of ln 4 over so many questions is chance.
    """

    def __init__(self, stuck: int = 5000):
        self.stuck, self.told = stuck, False
        self._seen, self._window = np.zeros(3), np.zeros(3)  # loss, right answers, questions

    def state_dict(self) -> dict:
        """So that a stage that goes on does not tell again."""
        return {"told": self.told, "seen": self._seen.tolist(), "window": self._window.tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        self.told, self._seen, self._window = state["told"], np.array(state["seen"]), np.array(state["window"])

    def on_validation_end(self, trainer: pl.Trainer, module: RaceModule) -> None:
        """Before the epoch's checkpoint is written."""
        if not trainer.sanity_checking and not np.isfinite(float(trainer.callback_metrics["val_loss_epoch"])):
            raise StageError(not_finite(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, module: RaceModule, *_) -> None:
        """Look at the loss where it is logged anyway, so that a GPU is not waited for otherwise."""
        if trainer.global_step % trainer.log_every_n_steps:
            return
        now, before = np.array(module.all_sums()), self._seen
        if not np.isfinite(now).all():
            raise StageError(not_finite(trainer))
        self._window += now - before if now[2] > before[2] else now  # the sums begin anew with each epoch
        self._seen = now
        if self._window[2] < self.stuck or self.told:
            return
        mean, self._window = self._window[0] / self._window[2], np.zeros(3)
        if abs(mean - math.log(4)) < 0.01:
            self.told = True
            trainer.progress_bar_callback.print(
                f"the loss has stayed at {mean:.3f} for about {self.stuck:,} questions; ln 4 = 1.386 is chance: the "
                "model does not learn. What helps: a lower or higher LEARNING_RATE; pretrained weights (a model with "
                "random ones stays here for long); dropout 0 for ALBERT v2; a batch of 16 questions or more"
            )


class StageReport(pl.Callback):
    """One line after each epoch, and after the first minute of training how long the stage will take."""

    def __init__(self, after_seconds: float = 60.0):
        self.after_seconds, self.estimate = after_seconds, None

    def on_train_start(self, trainer: pl.Trainer, module: RaceModule) -> None:
        """Start the clock, and log short epochs more often, so that a trial run has curves too."""
        self._batches = trainer.datamodule.batches_per_epoch()
        trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, self._batches // 20))
        self._started, self._first_step, self.estimate = time.perf_counter(), trainer.global_step, None

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        """Give the estimate, once."""
        seconds = time.perf_counter() - self._started
        if self.estimate is None and seconds >= self.after_seconds:
            per_step = seconds / (trainer.global_step - self._first_step)
            total = timedelta(seconds=round(per_step * self._batches * trainer.max_epochs))
            self.estimate = (
                f"about {total} for {trainer.max_epochs} epochs of {self._batches:,} steps "
                f"at {per_step:.2f} s a step, without validation"
            )
            trainer.progress_bar_callback.print(self.estimate)

    def on_validation_end(self, trainer: pl.Trainer, module: RaceModule) -> None:
        """Report an epoch's validation."""
        metrics = trainer.callback_metrics
        if not trainer.sanity_checking and "val_acc" in metrics:
            trainer.progress_bar_callback.print(
                f"epoch {trainer.current_epoch}: validation loss {metrics['val_loss_epoch']:.4f}, "
                f"accuracy {metrics['val_acc']:.1%}"
            )
