"""Resuming after a kill: the whole state of a stage, as it is between steps, is saved and restored to the last bit.

A state is a position (epoch, batches done in it) with weights, optimizer, loss scaler, callbacks, random states, sums
and the log so far. It is saved before a step, never after the last step of an epoch: what ends an epoch (validation,
checkpoint, log rows) is done again by a resumed run, with the same result.

Lightning's mid-epoch restart is not used: with loaders that prefetch it starts from another epoch's order, and forgets
the epoch's sums and rows of the log (2.6.6). It restores weights, optimizer, scaler and callbacks; the rest is here.
"""

import collections
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException

from race import MONITORS, RaceError
from race.device import random_state, set_random_state
from race.files import atomic_write, locked, read_archive, remove_unfinished

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StageStoppedError(Exception):
    """A signal ended training; the state before the step is on disk, or will be (`KeepState.on_exception`)."""


def read_state(path: Path) -> dict | None:
    """The position of a stage that has begun (epoch, batches, identity, log, …), or None; weights are not read."""
    return read_archive(path, mmap=True)["resume"] if path.exists() else None


class Wishes:
    """What the processes wish, agreed on without waiting: each sends its own after a step, all read the highest of the
    step before last.
    """

    def __init__(self):
        self._sent = collections.deque()
        self._granted = 0  # so many of those that were sent are older than the last save

    def granted(self) -> None:
        """What has been wished so far has been done."""
        self._granted = len(self._sent)

    def send(self, wish: int, device: torch.device) -> None:
        """Exchange a number; on a GPU it comes back in its own time."""
        highest, back = torch.full((), wish, device=device), None  # made there: a copy to a GPU would wait for it
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        if device.type == "cuda":
            highest = torch.empty_like(highest, device="cpu", pin_memory=True).copy_(highest, non_blocking=True)
            back = torch.cuda.Event()
            back.record()
        self._sent.append((highest, back))

    def agreed(self) -> int:
        """The highest wish that was sent two steps ago; 0 before."""
        if len(self._sent) < 2:
            return 0
        highest, back = self._sent.popleft()
        if back is not None:
            back.synchronize()
        old, self._granted = self._granted > 0, max(0, self._granted - 1)
        return 0 if old and int(highest) == 1 else int(highest)


class KeepState(pl.Callback):
    """Saves the state every `minutes`, at the start and before the last step of each epoch, and on a signal."""

    def __init__(self, stage, minutes: float, fresh: int = 0):
        self.stage, self.seconds, self.fresh = stage, minutes * 60, fresh
        self.signal: int | None = None
        self.position = (0, 0)  # epoch, batches done in it
        self.finished = False
        self._pending: dict | None = None
        self._weights: dict | None = None
        self._wishes = Wishes()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock, and take the signals over from Lightning, whose handlers may save within a step."""
        self._identity = stage_identity(module, trainer.datamodule, self.stage.monitor or MONITORS[0])
        if self._weights is not None:  # with '64-true', Lightning loads them before the module becomes double
            module.load_state_dict(self._weights)
            self._weights = None
        self._saved_at = time.monotonic()
        if trainer.world_size == 1:  # several processes stop together, between steps
            module.stop = lambda: self._end_within_step(module)
        # Lightning's own way of telling the processes of a SIGTERM waits for the GPU before each step; ours does not
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self._wishes = Wishes()
        with contextlib.suppress(ValueError):  # not the main thread: signals go elsewhere
            for number in SIGNALS:
                signal.signal(number, self._on_signal)
        if trainer.received_sigterm:
            self.signal = signal.SIGTERM
            trainer._signal_connector.received_sigterm = False  # or Lightning would end this process alone

    def _on_signal(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        os.write(2, f"{signal.Signals(number).name}: saving and ending\n".encode())  # print is not for handlers

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch, batch_idx: int) -> None:
        """Between two steps: all rows of the log are written, no gradient is half accumulated."""
        first = trainer.datamodule.first_batch(trainer.current_epoch)
        self.position = (trainer.current_epoch, first + batch_idx)
        if self._pending is not None:
            self._restore_random_states(trainer.global_rank)
            return  # this state is on disk already
        last = batch_idx == trainer.num_training_batches - 1
        wish = self._wish() if trainer.world_size == 1 else self._wishes.agreed()  # all processes save, or none
        if wish or batch_idx == 0 or last:
            self.save(trainer, module)
        if wish == 2:
            raise StageStoppedError

    def _wish(self) -> int:
        """2: save and end; 1: save; 0: go on."""
        return 2 if self.signal is not None else int(time.monotonic() - self._saved_at >= self.seconds)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        """Tell the other processes what this one wishes."""
        if trainer.world_size > 1:
            self._wishes.send(self._wish(), module.device)

    def _end_within_step(self, module: pl.LightningModule) -> None:
        if self.signal is not None and module.step_start is not None:
            raise StageStoppedError

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """A signal between two micro-batches: save the state as it was before the step, which has changed nothing."""
        if isinstance(exception, StageStoppedError) and module.step_start is not None:
            set_random_state(module.step_start)
            module.step_start = None
            self.save(trainer, module)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_) -> None:
        """A signal ends a validation at once: the state before the epoch's last step is on disk."""
        alone = trainer.world_size == 1  # several processes stop together, at the next step
        if self.signal is not None and alone and not trainer.sanity_checking:
            raise StageStoppedError

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save that the stage is finished."""
        self.position, self.finished = (trainer.current_epoch, 0), True
        self.save(trainer, module)

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Replace the saved state; raises RaceError if weights or losses are not finite."""
        sums = module.sums["train"].tolist() if "train" in module.sums else [0.0, 0.0, 0.0]
        self._sums = _gathered(sums, trainer.world_size)
        finite = torch.stack([parameter.isfinite().all() for parameter in module.parameters()]).all()
        if not finite or not np.isfinite(self._sums).all():
            raise RaceError(not_finite(trainer))
        self._random = _gathered(random_state(), trainer.world_size)
        self._budgets = _gathered(module.token_budget, trainer.world_size)
        trainer.save_checkpoint(self.stage.state_path)
        self._saved_at = time.monotonic()
        self._wishes.granted()

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        """Add what Lightning's checkpoint does not hold."""
        csv = trainer.logger  # the first one
        csv.save()
        log = Path(csv.log_dir) / "metrics.csv"
        checkpoint["resume"] = {
            "identity": self._identity,
            "epoch": self.position[0],
            "batches": self.position[1],
            "finished": self.finished,
            "fresh": self.fresh,
            "stopped_early": trainer.should_stop,
            "random": self._random,
            "sums": self._sums,
            "token_budgets": self._budgets,
            "steps": trainer.global_step,
            "version": csv.version,
            "log": log.read_bytes().decode() if log.exists() else "",
        }

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        """Restore position, counters, running sums and log; the random states follow right before the first step."""
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
        budgets = state.get("token_budgets", [])  # the same micro-batches give the same bits
        if module.budget_is_fitted and len(budgets) == trainer.world_size:
            module.token_budget = budgets[trainer.global_rank]
        sums = np.array(state["sums"])  # [processes, 3]
        if len(sums) != trainer.world_size:  # other processes than before: the first one takes all
            sums = np.concatenate([sums.sum(0, keepdims=True), np.zeros((trainer.world_size - 1, 3))])
        module.sums = {"train": torch.tensor(sums[trainer.global_rank], dtype=torch.float64, device=module.device)}
        if trainer.is_global_zero:
            _continue_log(trainer.logger, state["log"])

    def _restore_random_states(self, rank: int) -> None:
        states = self._pending["random"]
        if rank < len(states):
            set_random_state(states[rank])
        else:
            print(f"process {rank} was not there before: its random state starts from the seed", flush=True)
        self._pending = None


def _continue_log(csv: CSVLogger, text: str) -> None:
    """Restore the log to what it was when the state was saved: no row twice, none missing."""
    remove_unfinished(Path(csv.log_dir))
    writer = csv.experiment  # which begins by removing the file
    if text:
        atomic_write(writer.metrics_file_path, lambda path: path.write_bytes(text.encode()))
        writer.metrics_keys = text.splitlines()[0].split(",")


def not_finite(trainer: pl.Trainer) -> str:
    """The message for a loss or weights that became NaN or infinite."""
    return (
        f"the loss became NaN or infinite by step {trainer.global_step}: training has stopped, and the last good state "
        "is kept. Train the stage again with a lower LEARNING_RATE and FRESH = True. With PRECISION = '16-mixed', try "
        "'32-true' first: the stage then resumes from the last good state"
    )


def _gathered(value: object, processes: int) -> list:
    if processes == 1:
        return [value]
    values: list = [None] * processes
    torch.distributed.all_gather_object(values, value)
    return values


def stage_identity(module: pl.LightningModule, data: pl.LightningDataModule, monitor: str) -> dict:
    """What must be unchanged to resume a stage, by the names of the notebooks' parameters."""
    base = {"the base": "base", "the base's sha256": "base_sha256", "the cache": "cache"}
    recipe = ["LEARNING_RATE", "MAX_GRAD_NORM", "weight_decay", "adam_epsilon"]
    recipe += ["ATTENTION_DROPOUT"]
    identity = {name: module.lineage.get(key) for name, key in base.items()}
    identity |= {name: getattr(module, name.lower()) for name in recipe}
    identity |= {"SCHEDULE": module.schedule.name, "WARMUP": module.schedule.warmup}
    if module.schedule.name != "constant" or 0 < module.schedule.warmup < 1:
        identity["steps of the schedule (MAX_EPOCHS)"] = module.schedule.steps
    identity["MONITOR"] = monitor
    return identity | {name: value for name, value in data.made_with.items() if name != "CACHE_DIR"}


def changed_settings(state: dict, identity: dict) -> list[str]:
    """What differs from the run that a state is of, in words."""
    old = {"SCHEDULE": "constant", "WARMUP": 0, "MONITOR": MONITORS[0]} | state["identity"]  # as before version 1.5
    return [f"{name} was {old.get(name)!r}, is {new!r}" for name, new in identity.items() if old.get(name) != new]


def check_identity(state: dict, identity: dict, stage: str) -> None:
    """Raise RaceError with every setting that differs from the run that is to be resumed."""
    if changed := changed_settings(state, identity):
        raise RaceError(
            f"{stage} was begun with other settings: {'; '.join(changed)}. Set them back to resume, "
            "or set FRESH = True to train the stage again (the files so far are moved to earlier/)"
        )


@contextlib.contextmanager
def only_process(stage) -> Iterator[None]:
    """Keep a second run away from the files of a stage, and remove what a killed one left half written."""
    if rank_zero_only.rank != 0:
        yield
        return
    path = stage.state_path
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path.with_suffix(".lock")))
        except BlockingIOError as error:
            raise RaceError(f"another process trains {stage.name} in {stage.checkpoint_dir}: wait for it") from error
        remove_unfinished(path.parent, path.name)
        remove_unfinished(Path(stage.checkpoint_dir), f"{stage.name}-")
        yield


@contextlib.contextmanager
def signals_as_before(keeper: KeepState) -> Iterator[None]:
    """Restore the signal handlers after training; a signal that ended it then has its usual effect."""
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
    """The effect of the signal that ended training, or that came with its last step."""
    epoch, batches = keeper.position
    name = "another process" if keeper.signal is None else signal.Signals(keeper.signal).name
    if rank_zero_only.rank == 0:
        print(f"stopped by {name} at epoch {epoch}, batch {batches}: run this again to resume", flush=True)
    sys.stderr.flush()
    if keeper.signal in (None, signal.SIGINT):
        raise KeyboardInterrupt("saved; run this cell again to resume")
    signal.signal(keeper.signal, signal.SIG_DFL)
    os.kill(os.getpid(), keeper.signal)
