"""Resuming after a kill: the whole state of a stage, as it is between steps, is saved and restored to the last bit.

A state is a position (epoch, batches done in it) with weights, optimizer, loss scaler, callbacks, random states, sums
and the log so far. It is saved before a step, never after the last step of an epoch: what ends an epoch (validation,
checkpoint, log rows) is done again by a resumed run, with the same result.

Lightning's mid-epoch restart starts from another epoch's order where loaders prefetch, and forgets the epoch's sums and
log rows (2.6.6). It restores weights, optimizer, scaler and callbacks; the rest is here.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

from race import MONITORS, SIGNALS, Interrupted, RaceError
from race.device import CODE, random_state, set_random_state
from race.files import atomic_write, read_archive, remove_unfinished


class StageStoppedError(Exception):
    """A signal ended training; the state before the step is on disk."""


def say(line: str) -> None:
    """Print a line once, however many processes there are."""
    if rank_zero_only.rank == 0:
        print(line, flush=True)


def read_state(path: Path) -> dict | None:
    """The position of a stage that has begun (epoch, batches, identity, log, …), or None; weights are not read.

    Also lineage, and waited: how many epochs early stopping has seen without a better one.
    """
    if not path.exists():
        return None
    content = read_archive(path, mmap=True)
    waited = [it["wait_count"] for name, it in content.get("callbacks", {}).items() if name.startswith("EarlyStopping")]
    return content["resume"] | {"lineage": content["race"], "waited": waited[0] if waited else None}


def other_code(lineage: dict) -> str | None:
    """Which code made this, if it was not the one that runs now; None also for versions that did not note it."""
    known = [it for it in (lineage, *lineage.get("went_on_with", [])) if it.get("code")]
    return f"other code than this (commit {known[-1]['commit']})" if known and known[-1]["code"] != CODE else None


class KeepState(pl.Callback):
    """Saves the state every `minutes`, at the start and before the last step of each epoch, and on a signal."""

    def __init__(self, stage, minutes: float, identity: dict):
        self.stage, self.seconds, self.identity = stage, minutes * 60, identity
        self.signal: int | None = None
        self.position = (0, 0)  # epoch, batches done in it
        self.finished = False
        self._resumed: dict | None = None  # until the first step

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock; from now on a signal ends one process within a step, several between steps."""
        self._saved_at = time.monotonic()
        module.stop = (lambda: self._end_within_step(trainer, module)) if trainer.world_size == 1 else None
        # Lightning asks for a SIGTERM before each step, and waits for the device; `_requests` asks instead
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch, batch_idx: int) -> None:
        """Between two steps: all rows of the log are written, no gradient is half accumulated."""
        first = trainer.datamodule.first_batch(trainer.current_epoch)
        self.position = (trainer.current_epoch, first + batch_idx)
        if self._resumed is not None:
            states, self._resumed = self._resumed["random"], None
            if trainer.global_rank < len(states):  # a process that was not there before starts from the seed
                set_random_state(states[trainer.global_rank])
            return  # this state is on disk already
        ending, saving = self._requests(trainer, module)
        if ending or saving or batch_idx in (0, trainer.num_training_batches - 1):
            self.save(trainer, module)
        if ending:
            raise StageStoppedError

    def _requests(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[bool, bool]:
        """(end, save); several processes agree at logged steps, at which they wait for the device anyway."""
        own = self.signal is not None, time.monotonic() - self._saved_at >= self.seconds
        if trainer.world_size == 1:
            return own
        if trainer.global_step % trainer.log_every_n_steps:
            return False, False
        wanted = module.sum_over_processes(torch.tensor(own, dtype=torch.float32, device=module.device))
        return tuple((wanted > 0).tolist())

    def _end_within_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """End between two micro-batches. Of a validation the state before the epoch's last step is on disk."""
        if self.signal is None:
            return
        if module.step_start is not None:  # save the state as it was before the step, which has changed nothing
            set_random_state(module.step_start)
            module.step_start = None
            self.save(trainer, module)
        raise StageStoppedError

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save that the stage is finished."""
        self.position, self.finished = (trainer.current_epoch, 0), True
        self.save(trainer, module)

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Replace the saved state; raises RaceError if weights or losses are not finite."""
        sums = module.sums["train"].tolist() if "train" in module.sums else [0.0, 0.0, 0.0]
        own = {"random": random_state(), "sums": sums, "token_budgets": module.token_budget}
        processes = [own] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(processes, own)
        self._of_processes = {name: [each[name] for each in processes] for name in own}
        finite = torch.stack([parameter.isfinite().all() for parameter in module.parameters()]).all()
        check_finite(finite and np.isfinite(self._of_processes["sums"]).all(), trainer)
        trainer.save_checkpoint(self.stage.state_path)
        self._saved_at = time.monotonic()

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        """Add what Lightning's checkpoint does not hold."""
        csv, *further = trainer.loggers
        checkpoint["resume"] = self._of_processes | {
            "identity": self.identity,
            "epoch": self.position[0],
            "batches": self.position[1],
            "finished": self.finished,
            "stopped_early": trainer.should_stop,
            "steps": trainer.global_step,
            "version": csv.version,
            "log": _log_of(csv),
            "loggers": {type(it).__name__: {"version": it.version, "log": _log_of(it)} for it in further},
        }

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        """Restore position, counters, running sums and log; the random states follow right before the first step."""
        self._resumed = state = checkpoint["resume"]
        module.lineage = _went_on(checkpoint["race"], module.lineage, state)
        steps, loop = checkpoint["global_step"], trainer.fit_loop
        for progress in (loop.epoch_progress.current, loop.epoch_progress.total):
            progress.ready = progress.started = progress.processed = progress.completed = state["epoch"]
        loop.epoch_loop._batches_that_stepped = steps
        for progress in ("ready", "completed"):
            setattr(loop.epoch_loop.manual_optimization.optim_step_progress.total, progress, steps)
        trainer.datamodule.start_at(state["epoch"], state["batches"])
        budgets = state.get("token_budgets", [])  # the same micro-batches give the same bits
        if module.budget_is_fitted and len(budgets) == trainer.world_size:
            module.token_budget = budgets[trainer.global_rank]
        sums, rank = torch.tensor(state["sums"], dtype=torch.float64), trainer.global_rank  # [processes, 3]
        same = len(sums) == trainer.world_size  # otherwise the first process takes all
        module.sums = {"train": sums[rank] if same else sums.sum(0) * (rank == 0)}
        if trainer.is_global_zero:
            _restore_log(trainer.logger, state["log"])
            for logger in trainer.loggers[1:]:
                _restore_log(logger, state.get("loggers", {}).get(type(logger).__name__, {}).get("log", ""))


def _went_on(before: dict, now: dict, state: dict) -> dict:
    """The lineage of a stage that resumes: as it was, and from where on which code and settings are others."""
    lineage = {key: value for key, value in before.items() if key not in ("metrics", "epoch")}
    went, here = lineage.get("went_on_with", []), {key: now[key] for key in ("versions", "commit", "code")}
    changed = {name: [lineage["recipe"].get(name), it] for name, it in now["recipe"].items()}
    changed = {name: ends for name, ends in changed.items() if ends[0] != ends[1] and name in lineage["recipe"]}
    if changed or here != {name: (went[-1] if went else lineage).get(name) for name in here}:
        here |= {"epoch": state["epoch"], "batches": state["batches"], "recipe": changed}
        lineage["went_on_with"] = [*went, here]
    return lineage | {"recipe": now["recipe"] | lineage["recipe"] | {name: it for name, (_, it) in changed.items()}}


def _log_of(logger) -> str:
    """The rows so far of a CSV log; "" of another one."""
    logger.save()
    log = Path(logger.log_dir) / "metrics.csv" if isinstance(logger, CSVLogger) else None
    return log.read_bytes().decode() if log and log.exists() else ""


def _restore_log(csv, text: str) -> None:
    """Make a CSV log what it was when the state was saved: no row twice, none missing."""
    if not isinstance(csv, CSVLogger):
        return
    remove_unfinished(Path(csv.log_dir))
    writer = csv.experiment  # which begins by removing the file
    if text:
        atomic_write(writer.metrics_file_path, lambda path: path.write_bytes(text.encode()))
        writer.metrics_keys = text.splitlines()[0].split(",")


def check_finite(finite: bool, trainer: pl.Trainer) -> None:
    """Raise RaceError if losses or weights are no longer finite."""
    if not finite:
        raise RaceError(
            f"the loss became NaN or infinite by step {trainer.global_step}; the last good state is kept. Train again "
            "in another CHECKPOINT_DIR with a lower LEARNING_RATE; a stage in '16-mixed' may resume in '32-true'"
        )


def stage_identity(module: pl.LightningModule, data: pl.LightningDataModule, monitor: str) -> dict:
    """What must be unchanged to resume a stage, by the names of the notebooks' parameters."""
    base = {"the base": "base", "the base's sha256": "base_sha256", "the cache": "cache"}
    identity = {name: module.lineage.get(key) for name, key in base.items()}
    recipe = ["LEARNING_RATE", "MAX_GRAD_NORM", "weight_decay", "adam_epsilon", "ATTENTION_DROPOUT"]
    identity |= {name: getattr(module, name.lower()) for name in recipe}
    identity |= {"SCHEDULE": module.schedule.name, "WARMUP": module.schedule.warmup}
    if module.schedule.name != "constant" or 0 < module.schedule.warmup < 1:
        identity["steps of the schedule (MAX_EPOCHS)"] = module.schedule.steps
    of_data = {name.upper(): value for name, value in data.made_with.items() if name != "cache_dir"}
    return identity | {"MONITOR": monitor} | of_data


def check_identity(state: dict, identity: dict, stage, accepted: str | None) -> None:
    """Raise RaceError with every setting that differs from the run that is to be resumed, or for other code than CODE.

    accepted: CODE, if the run may go on with it.
    """
    old = {"SCHEDULE": "constant", "WARMUP": 0, "MONITOR": MONITORS[0]} | state["identity"]  # as before version 1.5
    changed = [f"{name} was {old.get(name)!r}, is {new!r}" for name, new in identity.items() if old.get(name) != new]
    if changed:
        begun = f"{stage.name} was begun with other settings: {'; '.join(changed)}. Set them back to resume"
        raise RaceError(f"{begun}. {stage.how_to_train_again}")
    if (other := other_code(state["lineage"])) and accepted != CODE:
        raise RaceError(
            f"{stage.name} was begun with {other}. Go back to that code; or set another CHECKPOINT_DIR and RUN_DIR; or "
            f'set ACCEPT_CODE = "{CODE}" to go on with the code as it is now, which its checkpoints will say'
        )


@contextlib.contextmanager
def ended_by_signals(keeper: KeepState, trainer: pl.Trainer) -> Iterator[None]:
    """Let signals save and end training; afterwards handlers are as before, and a signal has its usual effect."""

    def remember(number: int, frame) -> None:
        if keeper.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        keeper.signal = number
        os.write(2, f"{signal.Signals(number).name}: saving and ending\n".encode())  # print is not for handlers

    trainer._signal_connector.register_signal_handlers = lambda: None  # Lightning's end one process alone
    handlers = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield
    except StageStoppedError:
        for logger in trainer.loggers:  # what one keeps in memory (W&B) would be lost with the process
            getattr(logger.experiment, "finish", int)()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if keeper.finished and keeper.signal is None:
        return
    (epoch, batches), name = keeper.position, signal.Signals(keeper.signal).name if keeper.signal else "another process"
    say(f"stopped by {name} at epoch {epoch}, batch {batches}: run this again to resume")
    if keeper.signal in (None, signal.SIGINT):
        raise Interrupted("saved; run this cell again to resume")
    signal.signal(keeper.signal, signal.SIG_DFL)
    os.kill(os.getpid(), keeper.signal)
