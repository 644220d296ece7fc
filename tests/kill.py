"""A small chain of all three stages in a process that is killed, again and again, until it has finished."""

import multiprocessing
import os
import random
import signal
import warnings
from pathlib import Path

import pandas as pd
import pytorch_lightning as pl
import torch

import race.files
import race.train.training
from race.data import RaceDataModule
from race.files import read_archive
from race.train.stages import Stage
from race.train.state import KeepState
from race.train.training import start_stage, train_stage

RECIPE = (("e1", 1e-3, 2), ("e2", 1e-3, 1), ("e3", 1e-4, 2))
MINUTES = 0.05 / 60  # between saves
SCHEDULED = {"schedule": "cosine", "warmup": 0.2, "max_grad_norm": 0.5}


def run_chain(folder: Path, cache: Path, workers: int = 0, minutes: float = MINUTES) -> None:
    """Three stages with dropout, so that the random state matters, a schedule, clipping, and selection by accuracy."""
    warnings.simplefilter("ignore")
    race.train.training.git_commit = lambda: None  # somebody may be editing the code while the tests run
    for name, rate, epochs in RECIPE:
        pl.seed_everything(0, verbose=False)
        stage = Stage(name, folder / "checkpoints", folder / "run", "val_acc")
        module = start_stage(stage, cache, learning_rate=rate, **SCHEDULED)
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.1
        data = RaceDataModule(cache, batch_size=8, num_workers=workers)
        exact = torch.cuda.is_available()
        train_stage(stage, module, data, epochs, save_minutes=minutes, log_every=2, deterministic=exact)


def in_a_process(target, *arguments) -> multiprocessing.Process:
    """Start `target` in a fork of this process, which has the libraries loaded already; its output goes nowhere."""

    def quietly() -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        torch.set_num_threads(1)
        target(*arguments)

    process = multiprocessing.get_context("fork").Process(target=quietly)
    process.start()
    return process


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def doomed_chain(place: str, number: int, *arguments) -> None:
    """The chain, which kills itself when it comes to `place` for the `number`-th time."""
    count = [0]

    def watch(owner, name: str, before: bool) -> None:
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            count[0] += 1
            if before and count[0] == number:
                die()
            value = original(*args, **kwargs)
            if not before and count[0] == number:
                die()
            return value

        setattr(owner, name, watched)

    owner, name, before = {
        "half written": (torch.serialization, "_save", False),
        "before renaming": (race.files, "flush", True),
        "after saving": (KeepState, "save", False),
        "in validation": (pl.LightningModule, "on_validation_epoch_start", True),
        "in an epoch's checkpoint": (pl.callbacks.ModelCheckpoint, "_save_checkpoint", False),
    }[place]
    watch(owner, name, before)
    run_chain(*arguments)


PLACES = ("half written", "before renaming", "after saving", "in validation", "in an epoch's checkpoint")


def killed_chain(folder: Path, cache: Path, most: int, rng: random.Random, workers: int) -> int:
    """Run the chain, killing it up to `most` times at random moments and places; returns the kills that hit."""
    for kills in range(most):
        if rng.random() < 0.4:
            number = rng.randint(1, 4) if rng.random() < 0.6 else rng.randint(1, 60)
            process = in_a_process(doomed_chain, rng.choice(PLACES), number, folder, cache, workers)
            process.join(120)
        else:
            process = in_a_process(run_chain, folder, cache, workers)
            process.join(rng.uniform(0.05, 1.6))
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
            process.join(120)
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL, process.exitcode
    process = in_a_process(run_chain, folder, cache, workers)
    process.join(300)
    assert process.exitcode == 0
    return most


def remains(folder: Path) -> dict:
    """All that a chain leaves and that has to be the same: tensors as bytes, log rows as text, the best checkpoints."""
    found = {}
    for stage in ("e1", "e2", "e3"):
        place = Stage(stage, folder / "checkpoints")
        state = read_archive(place.state_path)
        logs = sorted((folder / "run" / "logs" / stage).glob("*/metrics.csv"))
        assert len(logs) == 1, logs
        log = pd.read_csv(logs[0], dtype=str)
        found[stage] = {
            "weights": {name: tensor.numpy().tobytes() for name, tensor in state["state_dict"].items()},
            "optimizer": {
                (i, name): value.numpy().tobytes()
                for i, values in state["optimizer_states"][0]["state"].items()
                for name, value in values.items()
            },
            "log": log.drop(columns="tokens_per_second").to_csv(index=False),  # a measured speed is never the same
            "best": place.best().name,
            "position": {key: state["resume"][key] for key in ("epoch", "batches", "finished", "steps", "sums")},
        }
        for checkpoint in place.saved:
            found[stage][checkpoint.name] = checkpoint.path.read_bytes()
    found["others"] = [path for path in folder.rglob(".*") if path.name.endswith(".tmp")]
    return found
