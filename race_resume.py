"""Going on after a kill: the whole state of a stage on disk at step boundaries, and the way back from it.

A state is (epoch, batches done in it): weights, optimizer, loss scaler, callbacks, random states, running sums, the log
so far. It is written before a step, never after the last step of an epoch: what ends an epoch (validation, its
checkpoint, its log rows) is done again by a run that goes on, and gives the same again.

Lightning's own mid-epoch restart is not used: with loaders that prefetch it starts from another epoch's order, and it
forgets the running means of the epoch and the rows of the log (checked in 2.6.6). Its checkpoint connector restores
weights, optimizer, scaler and callbacks; position, order and log are restored here.
"""

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException

from race_checkpoints import StageError, read_checkpoint
from race_files import clean, write_whole

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StageStoppedError(Exception):
    """A signal ended training at a step boundary; the state is on disk."""


def state_path(checkpoint_dir: str | Path, stage: str) -> Path:
    """Where the state of a stage lies."""
    return Path(checkpoint_dir) / "resume" / f"{stage}.ckpt"


def read_state(checkpoint_dir: str | Path, stage: str) -> dict | None:
    """The position of a begun stage (epoch, batches, identity, log, finished …), or None; weights are not read."""
    path = state_path(checkpoint_dir, stage)
    return read_checkpoint(path, mmap=True)["resume"] if path.exists() else None


class KeepState(pl.Callback):
    """Writes the state every `minutes`, at the start and before the last step of each epoch, and on a signal."""

    def __init__(self, path: Path, minutes: float):
        self.path, self.seconds = path, minutes * 60
        self.signal: int | None = None
        self.position = (0, 0)  # epoch, batches done in it
        self.finished = False
        self._pending: dict | None = None
        self._weights: dict | None = None

    # ---------------------------------------------------------------------------------------------- when to write

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock, and take the signals over from Lightning, whose handlers may save in the midst of a step."""
        self._identity = stage_identity(module, trainer.datamodule)
        if self._weights is not None:  # with '64-true', Lightning loads them before the module becomes double
            module.load_state_dict(self._weights)
            self._weights = None
        self._saved_at = time.monotonic()
        with contextlib.suppress(ValueError):  # not the main thread: signals go elsewhere
            for number in SIGNALS:
                signal.signal(number, self._on_signal)
        if trainer.received_sigterm:
            self.signal = signal.SIGTERM

    def _on_signal(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        os.write(2, f"{signal.Signals(number).name}: saving after this step\n".encode())  # print is not for handlers

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch, batch_idx: int) -> None:
        """Between two steps: all rows of the log are written, no gradient is half done."""
        first = trainer.datamodule.first_batch(trainer.current_epoch)
        self.position = (trainer.current_epoch, first + batch_idx)
        if self._pending is not None:
            self._restore_random_states()
            return  # this very state is on disk
        last = batch_idx == trainer.num_training_batches - 1
        due = time.monotonic() - self._saved_at >= self.seconds
        wish = 2 if self.signal is not None else 1 if due or batch_idx == 0 or last else 0
        if trainer.world_size > 1:  # all processes save, or none
            wish = int(trainer.strategy.reduce(torch.tensor(wish, device=module.device), reduce_op="max"))
        if wish:
            self.save(trainer, module)
        if wish == 2:
            raise StageStoppedError

    def on_validation_batch_start(self, trainer: pl.Trainer, *_) -> None:
        """The state before the epoch's last step is on disk: a signal need not wait for the end of the validation."""
        alone = trainer.world_size == 1  # several processes stop together, at the next step
        if self.signal is not None and alone and not trainer.sanity_checking:
            raise StageStoppedError

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Say on disk that the stage is finished."""
        self.position, self.finished = (trainer.current_epoch, 0), True
        self.save(trainer, module)

    # ---------------------------------------------------------------------------------------------- writing

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the state in place of the one before; raises StageError where weights or losses are not finite."""
        self._sums = _gathered(module.own_sums(), trainer.world_size)
        finite = torch.stack([parameter.isfinite().all() for parameter in module.parameters()]).all()
        if not finite or not np.isfinite(self._sums).all():
            raise StageError(not_finite(trainer))
        self._random = _gathered(random_state(), trainer.world_size)
        trainer.save_checkpoint(self.path)
        self._saved_at = time.monotonic()

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        """Add to Lightning's checkpoint what it does not hold."""
        csv = _csv_logger(trainer)
        csv.save()
        log = Path(csv.log_dir) / "metrics.csv"
        checkpoint["resume"] = {
            "identity": self._identity,
            "epoch": self.position[0],
            "batches": self.position[1],
            "finished": self.finished,
            "stopped_early": trainer.should_stop,
            "random": self._random,
            "sums": self._sums,
            "steps": trainer.global_step,
            "version": csv.version,
            "log": log.read_bytes().decode() if log.exists() else "",
        }

    # ---------------------------------------------------------------------------------------------- reading

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        """Set position, counters, running sums and log; the random states follow right before the first step."""
        self._pending = state = checkpoint["resume"]
        self._weights = checkpoint["state_dict"]
        here = {key: module.lineage[key] for key in ("versions", "commit")}
        module.lineage = {key: value for key, value in checkpoint["race"].items() if key not in ("metrics", "epoch")}
        if here not in [{key: module.lineage[key] for key in here}, *module.lineage.get("went_on_with", [])]:
            module.lineage["went_on_with"] = [*module.lineage.get("went_on_with", []), here]
        steps, loop = checkpoint["global_step"], trainer.fit_loop
        trainer.num_sanity_val_steps = 0
        for progress in (loop.epoch_progress.current, loop.epoch_progress.total):
            progress.ready = progress.started = progress.processed = progress.completed = state["epoch"]
        loop.epoch_loop._batches_that_stepped = steps
        for progress in ("ready", "completed"):
            setattr(loop.epoch_loop.manual_optimization.optim_step_progress.total, progress, steps)
        trainer.datamodule.start_at(state["epoch"], state["batches"])
        sums = np.array(state["sums"])  # [processes, 3]
        if len(sums) != trainer.world_size:  # other processes than before: the first one takes all
            sums = np.concatenate([sums.sum(0, keepdims=True), np.zeros((trainer.world_size - 1, 3))])
        module.set_own_sums(sums[trainer.global_rank].tolist())
        if trainer.is_global_zero:
            _continue_log(_csv_logger(trainer), state["log"])

    def _restore_random_states(self) -> None:
        states, rank = self._pending["random"], _rank()
        if rank < len(states):
            set_random_state(states[rank])
        else:
            print(f"process {rank} is new: its random state begins with the seed", flush=True)
        self._pending = None


def _csv_logger(trainer: pl.Trainer) -> CSVLogger:
    return next(logger for logger in trainer.loggers if isinstance(logger, CSVLogger))


def _continue_log(csv: CSVLogger, text: str) -> None:
    """Put the log back to what it was at the state: no row twice, none missing."""
    clean(Path(csv.log_dir))
    writer = csv.experiment  # which begins by removing the file
    if text:
        write_whole(writer.metrics_file_path, lambda path: path.write_bytes(text.encode()))
        writer.metrics_keys = text.splitlines()[0].split(",")


def not_finite(trainer: pl.Trainer) -> str:
    """What to tell a user whose loss or weights turned NaN or infinite."""
    return (
        f"the loss turned NaN or infinite by step {trainer.global_step}: training has stopped, and the last good state "
        "is kept. Run the stage again with a lower LEARNING_RATE (and FRESH = True); with PRECISION '16-mixed', try "
        "'32-true' first: run again with it, and the stage goes on from the last good state"
    )


# -------------------------------------------------------------------------------------------------- random states


def random_state() -> dict:
    """The states of python's, numpy's and torch's generators, on CPU and this process's GPU, as plain values."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_random_state(state: dict) -> None:
    """Put all generators back."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _gathered(value: object, processes: int) -> list:
    if processes == 1:
        return [value]
    values: list = [None] * processes
    torch.distributed.all_gather_object(values, value)
    return values


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


# -------------------------------------------------------------------------------------------------- going on


def stage_identity(module: pl.LightningModule, data: pl.LightningDataModule) -> dict:
    """What must stay the same for going on to mean anything, by the names of the notebooks' parameters."""
    lineage = module.lineage
    return {
        "the base": lineage.get("base"),
        "the base's sha256": lineage.get("base_sha256"),
        "the cache": lineage.get("cache"),
        "LEARNING_RATE": module.learning_rate,
        "weight_decay": module.weight_decay,
        "adam_epsilon": module.adam_epsilon,
        "BATCH_SIZE": data.batch_size,
        "MAX_LEN": data.max_len,
        "SEED": data.seed,
        "LIMIT_QUESTIONS": data.limit_questions,
    }


def check_identity(state: dict, identity: dict, stage: str) -> None:
    """Raise StageError with every parameter that differs from those of the run that is to go on."""
    before = state["identity"]
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in identity.items()
        if before.get(name) != value
    ]
    if changed:
        raise StageError(
            f"{stage} was begun with other settings: {'; '.join(changed)}. Set them back to go on, "
            "or set FRESH = True to start the stage again (what it has so far is moved aside)"
        )


@contextlib.contextmanager
def signals_as_before(keeper: KeepState) -> Iterator[None]:
    """Give the signals back after training, and let one that ended it have its usual effect, now that all is saved."""
    try:
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
    except ValueError:
        handlers = {}
    try:
        yield
    except StageStoppedError:
        pass
    except SIGTERMException:  # Lightning's own answer to a SIGTERM before the first step: nothing to save yet
        keeper.signal = signal.SIGTERM
    finally:
        with contextlib.suppress(ValueError):
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if keeper.signal is not None or not keeper.finished:
        _end(keeper)


def _end(keeper: KeepState) -> None:
    """Have the effect of the signal that ended training, or that came with its last step."""
    epoch, batches = keeper.position
    name = "another process" if keeper.signal is None else signal.Signals(keeper.signal).name
    if _rank() == 0:
        print(f"stopped by {name} at epoch {epoch}, batch {batches}: run this again to go on", flush=True)
    sys.stderr.flush()
    if keeper.signal in (None, signal.SIGINT):
        raise KeyboardInterrupt("saved; run this cell again to go on")
    signal.signal(keeper.signal, signal.SIG_DFL)
    os.kill(os.getpid(), keeper.signal)
