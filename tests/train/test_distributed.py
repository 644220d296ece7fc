"""Several processes are one: the same curve and weights, each question once, and going on with another number."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from helpers import ROOT
from tiny_models import write_tiny_model

from race.data import RaceDataModule
from race.data.batches import ShuffledBatches
from race.data.cache import build_cache
from race.files import read_archive
from race.train.stages import Stage
from race.train.state import read_state


@pytest.fixture(scope="module")
def script(cache, tmp_path_factory):
    """script(folder) -> ex01 as a script, as `jupyter nbconvert --to python` gives it, with parameters of a test."""
    from nbconvert import PythonExporter

    text, _ = PythonExporter().from_notebook_node(nbformat.read(ROOT / "ex01.ipynb", 4))

    def make(folder, **parameters):
        settings = {"CACHE_DIR": str(cache), "CHECKPOINT_DIR": str(folder / "checkpoints"), "RUN_DIR": str(folder)}
        settings |= {"LEARNING_RATE": 1e-3, "MAX_EPOCHS": 1, "BATCH_SIZE": 8, "PRECISION": "64-true"} | parameters
        made = text
        for name, value in settings.items():
            made, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", made, flags=re.MULTILINE)
            assert count == 1, name
        path = folder / "ex01.py"
        folder.mkdir(exist_ok=True)
        path.write_text(made)
        return path

    return make


def start(path, processes: int) -> subprocess.Popen:
    command = [sys.executable, str(path)]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command[1:1] = torchrun
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    with open(path.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=path.parent)


def run(path, processes: int) -> None:
    status = start(path, processes).wait(240)
    assert status == 0, path.with_suffix(".log").read_text()[-3000:]


def state_path(folder):
    return Stage("e1", folder / "checkpoints").state_path


def left(folder):
    """Final weights, and the loss curve, of a stage."""
    logs = sorted((folder / "logs" / "e1").glob("*/metrics.csv"))
    assert len(logs) == 1
    log = pd.read_csv(logs[0]).drop(columns="tokens_per_second")
    return read_archive(state_path(folder))["state_dict"], log


def assert_same(one, other) -> None:
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert torch.allclose(tensor, other[0][name], rtol=0, atol=1e-6), name
    assert len(one[1]) == len(other[1])
    np.testing.assert_allclose(one[1].to_numpy(float), other[1][one[1].columns].to_numpy(float), atol=1e-6)


@pytest.fixture(scope="module")
def one_process(script, tmp_path_factory):
    """The stage on one process, uninterrupted."""
    folder = tmp_path_factory.mktemp("one")
    run(script(folder), 1)
    return left(folder)


@pytest.fixture(scope="module")
def two_processes(script, tmp_path_factory):
    """The stage on two processes, uninterrupted."""
    folder = tmp_path_factory.mktemp("two")
    run(script(folder), 2)
    return left(folder)


def test_two_processes_are_one(one_process, two_processes):
    assert_same(one_process, two_processes)
    assert len(one_process[1]["train_loss_step"].dropna()) > 10


def test_two_processes_of_a_padded_family_are_one(script, corpus, tmp_path):
    """XLNet has a weight that gets no gradient, for which processes would wait."""
    articles = [json.loads(path.read_text())["article"] for path in sorted(corpus.rglob("*.txt"))]
    model = write_tiny_model("xlnet", tmp_path / "model", articles)
    build_cache(str(corpus), str(model), tmp_path / "cache")
    ended = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run(script(folder, CACHE_DIR=str(tmp_path / "cache"), LIMIT_QUESTIONS=24, TOKEN_BUDGET=2000), processes)
        ended.append(left(folder))
    assert_same(*ended)


def kill_one_of_two(path, folder) -> int:
    """Begin with two processes and kill one of them after some steps; returns the batch of the state that is left."""
    torchrun = start(path, 2)
    workers = wait_for(lambda: at_batch(folder, 3) and psutil.Process(torchrun.pid).children())
    os.kill(workers[1].pid, signal.SIGKILL)
    assert torchrun.wait(60) != 0
    return read_state(state_path(folder))["batches"]


def test_one_of_two_is_killed_and_both_go_on_exactly(script, two_processes, tmp_path):
    path = script(tmp_path / "killed", SAVE_MINUTES=0)
    kill_one_of_two(path, tmp_path / "killed")
    run(path, 2)
    weights, log = left(tmp_path / "killed")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in two_processes[0].items())
    assert log.equals(two_processes[1])


def test_another_number_of_processes_goes_on(script, one_process, tmp_path):
    """One of two is killed; two go on and are ended by SIGTERM; one brings the stage to its end."""
    folder = tmp_path / "changing"
    path = script(folder, SAVE_MINUTES=0)
    reached = kill_one_of_two(path, folder)
    torchrun = start(path, 2)
    wait_for(lambda: at_batch(folder, reached + 2))
    torchrun.send_signal(signal.SIGTERM)
    assert torchrun.wait(60) != 0
    state = read_state(state_path(folder))
    assert not state["finished"] and state["batches"] >= reached + 2 and len(state["random"]) == 2
    run(path, 1)
    assert "e1 resumes from epoch 0, batch" in path.with_suffix(".log").read_text()
    assert read_state(state_path(folder))["finished"]
    assert_same(one_process, left(folder))


def at_batch(folder, batch: int) -> bool:
    state = read_state(state_path(folder))
    return state is not None and state["batches"] >= batch


def wait_for(condition, seconds: float = 90.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError("it did not come")


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_each_question_once_whatever_the_processes(world):
    """70 questions in batches of 32: the shares make up the same batches; from a later batch on, the rest of them."""
    whole = list(ShuffledBatches(70, 32, 0, epoch=3))
    for first in (0, 1, 2):
        shares = [list(ShuffledBatches(70, 32, 0, 3, first, rank, world)) for rank in range(world)]
        assert {len(share) for share in shares} == {3 - first} == {len(ShuffledBatches(70, 32, 0, 3, first, 0, world))}
        for batch, parts in zip(whole[first:], zip(*shares, strict=True), strict=True):
            assert sorted(itertools.chain(*parts)) == sorted(batch)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_each_validation_question_on_one_process(cache, world, monkeypatch):
    seen = []
    for rank in range(world):
        data = RaceDataModule(cache, batch_size=4)
        monkeypatch.setattr(data, "_process", lambda rank=rank: (rank, world))
        seen += itertools.chain(*data.val_dataloader().batch_sampler)
    assert sorted(seen) == list(range(len(RaceDataModule(cache).dataset("validation"))))


def test_collectives_a_step(cache, tmp_path):
    """Beside the gradients': loss and tokens in one; no barrier, no broadcast.

    At logged steps, here every second one, another looks at the sums, and one asks who wants to save or to end.
    """
    code = (
        "import collections, sys, torch, pytorch_lightning as pl\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, 'tests')\n"
        "from small_stage import stage\n"
        "count, steps = collections.Counter(), []\n"
        "def counted(name):\n"
        "    call = getattr(torch.distributed, name)\n"
        "    def counting(*arguments, **settings):\n"
        "        count[name] += 1\n"
        "        return call(*arguments, **settings)\n"
        "    return counting\n"
        "names = 'barrier', 'all_reduce', 'all_gather', 'all_gather_object', 'broadcast', 'broadcast_object_list'\n"
        "for name in names:\n"
        "    setattr(torch.distributed, name, counted(name))\n"
        "class Steps(pl.Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, batch_idx):\n"
        "        steps.append(dict(count))\n"
        "        count.clear()\n"
        f"stage(Path({str(tmp_path)!r}), {str(cache)!r}, Steps(), epochs=1, precision='64-true',\n"
        "    log_every=2, data={'batch_size': 2, 'limit_questions': 96})\n"
        "if torch.distributed.get_rank() == 0:\n"
        "    print('counted', steps[2:-1])\n"  # the state is saved before the first step, and before the last
    )
    path = tmp_path / "count.py"
    path.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = json.loads(re.search(r"counted (\[.*?\])", done.stdout)[1].replace("'", '"'))
    assert len(steps) > 40 and all(step.keys() == {"all_reduce"} for step in steps)
    assert sorted({step["all_reduce"] for step in steps}) == [1, 3]
