"""Stage e1 on a small cache, trained or resumed in this process, and what it leaves."""

import dataclasses
import os
import signal

import pytorch_lightning as pl
import torch

from race.data import RaceDataModule
from race.files import read_archive
from race.train.stages import Stage
from race.train.state import read_state
from race.train.training import start_stage, train_stage

OF_MODULE = ("learning_rate", "token_budget", "schedule", "warmup", "max_grad_norm")


class At(pl.Callback):
    """Does something once, before the step with this number."""

    def __init__(self, step: int, what):
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.what(trainer, module)
            self.step = -1


def interrupt(*_) -> None:
    """What the stop button of a notebook does."""
    os.kill(os.getpid(), signal.SIGINT)


def stage(folder, cache, *callbacks, epochs: int = 2, minutes: float = 60.0, data: dict | None = None, **settings):
    """Train or resume e1 in this process, eight steps an epoch; settings of RaceModule, Stage and train_stage."""
    pl.seed_everything(0, verbose=False)
    of_module = {"learning_rate": 1e-3} | {name: settings.pop(name) for name in OF_MODULE if name in settings}
    place = dataclasses.replace(e1(folder), monitor=settings.pop("monitor", None))
    module = start_stage(place, cache, **of_module)
    settings = {"save_minutes": minutes, "log_every": 2, "callbacks": callbacks} | settings
    data = RaceDataModule(cache, **({"batch_size": 8, "limit_questions": 64} | (data or {})))
    return train_stage(place, module, data, epochs, **settings)


def e1(folder) -> Stage:
    return Stage("e1", folder / "checkpoints", folder / "run")


def state(folder) -> dict:
    return read_archive(e1(folder).state_path)


def position(folder) -> dict:
    return read_state(e1(folder).state_path)


def same_weights(*folders) -> bool:
    """Whether the states of two folders have the same weights, to the last bit."""
    one, other = (state(folder)["state_dict"] for folder in folders)
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
