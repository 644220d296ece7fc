"""Several processes are one: the same curve and weights, each question once, and going on with another number."""

import collections
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import nbformat
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from helpers import ROOT
from kill import in_a_process
from small_stage import position, stage, state
from test_memory import fill_memory
from tiny_models import write_tiny_model

from race.data import RaceDataModule
from race.data.batches import ShuffledBatches
from race.data.cache import build_cache

ALL = {"batch_size": 8, "limit_questions": None}


def together(world: int, *arguments, what=stage, **settings) -> list:
    """Processes that train e1 together, or do `what`, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def one(rank: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        names |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({name: str(value) for name, value in names.items()} if world > 1 else {})
        what(*arguments, **{"epochs": 1, "precision": "64-true", "data": ALL} | settings)

    return [in_a_process(one, rank) for rank in range(world)]


def ended(processes: list) -> list[int]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def left(folder):
    """Final weights, and the loss curve, of a stage."""
    (path,) = (folder / "run" / "logs" / "e1").glob("*/metrics.csv")
    return state(folder)["state_dict"], pd.read_csv(path).drop(columns="tokens_per_second")


def assert_same(one, other) -> None:
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert torch.allclose(tensor, other[0][name], rtol=0, atol=1e-6), name
    assert len(one[1]) == len(other[1])
    np.testing.assert_allclose(one[1].to_numpy(float), other[1][one[1].columns].to_numpy(float), atol=1e-6)


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory):
    """What one process leaves, and what two leave, by their number."""
    found = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp("runs")
        assert ended(together(world, folder, cache)) == [0] * world
        found[world] = left(folder)
    return found


def test_two_processes_are_one(runs):
    assert_same(runs[1], runs[2])
    assert len(runs[1][1]["train_loss_step"].dropna()) > 10


def test_a_script_under_torchrun_is_the_same(runs, cache, tmp_path):
    """ex01 as `jupyter nbconvert --to python` gives it."""
    from nbconvert import PythonExporter

    text, _ = PythonExporter().from_notebook_node(nbformat.read(ROOT / "ex01.ipynb", 4))
    (tmp_path / "ex01.py").write_text(text)
    given = {"CACHE_DIR": cache, "CHECKPOINT_DIR": tmp_path / "checkpoints", "RUN_DIR": tmp_path / "run"}
    given |= {"LEARNING_RATE": 1e-3, "MAX_EPOCHS": 1, "BATCH_SIZE": 8, "PRECISION": "64-true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "ex01.py", "--set"]
    command += [f"{name}={value}" for name, value in given.items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    weights, log = left(tmp_path)
    assert_same((weights, log), (runs[2][0], runs[2][1][runs[2][1]["step"].isin(log["step"])]))


def test_two_processes_of_a_padded_family_are_one(corpus, tmp_path):
    """XLNet has a weight that gets no gradient, for which processes would wait."""
    articles = [json.loads(path.read_text())["article"] for path in sorted(corpus.rglob("*.txt"))]
    model = write_tiny_model("xlnet", tmp_path / "model", articles)
    build_cache(str(corpus), str(model), tmp_path / "cache")
    few = {"data": {"batch_size": 8, "limit_questions": 24}, "token_budget": 2000}
    for world in (1, 2):
        assert ended(together(world, tmp_path / str(world), tmp_path / "cache", **few)) == [0] * world
    assert_same(left(tmp_path / "1"), left(tmp_path / "2"))


def begun(folder, batch: int, processes: list) -> list:
    """These processes, when the state on disk has come to a batch."""
    end = time.monotonic() + 90
    while not (found := position(folder)) or found["batches"] < batch:
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
    return processes


def test_one_of_two_is_killed_and_both_go_on_exactly(runs, cache, tmp_path):
    processes = begun(tmp_path, 3, together(2, tmp_path, cache, minutes=0))
    processes[1].kill()
    assert ended(processes)[0] != 0  # and does not wait for the other for ever
    assert ended(together(2, tmp_path, cache, minutes=0)) == [0, 0]
    weights, log = left(tmp_path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in runs[2][0].items())
    assert log.equals(runs[2][1])


def test_another_number_of_processes_goes_on(runs, cache, tmp_path):
    """Two are ended by SIGTERM; one brings the stage to its end."""
    processes = begun(tmp_path, 3, together(2, tmp_path, cache, minutes=0))
    for process in processes:
        process.terminate()
    assert ended(processes) == [-signal.SIGTERM] * 2
    reached = position(tmp_path)
    assert not reached["finished"] and reached["batches"] >= 3 and len(reached["random"]) == 2
    assert ended(together(1, tmp_path, cache)) == [0] and position(tmp_path)["finished"]
    assert_same(runs[1], left(tmp_path))


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


def counted_stage(folder, *arguments, **settings) -> None:
    """A stage that notes the collectives of each step."""
    count, steps = collections.Counter(), []

    def counted(name: str, call):
        return lambda *given, **more: (count.update([name]), call(*given, **more))[1]

    for name in ("barrier", "all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list"):
        setattr(torch.distributed, name, counted(name, getattr(torch.distributed, name)))

    class Steps(pl.Callback):
        def on_train_batch_start(self, *_):
            steps.append(dict(count))
            count.clear()

    stage(folder, *arguments, Steps(), **settings)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(steps))


def test_collectives_a_step(cache, tmp_path):
    """Beside the gradients': loss and tokens in one; no barrier, no broadcast.

    At logged steps, here every second one, another looks at the sums, and one asks who wants to save or to end.
    """
    few = {"batch_size": 2, "limit_questions": 96}
    assert ended(together(2, tmp_path, cache, what=counted_stage, data=few)) == [0, 0]
    steps = json.loads((tmp_path / "0.json").read_text())[2:-1]  # the state is saved before the first, and the last
    assert len(steps) > 40 and all(step.keys() == {"all_reduce"} for step in steps)
    assert sorted({step["all_reduce"] for step in steps}) == [1, 3]


def uneven_stage(folder, cache, **settings) -> None:
    """Of two processes the second takes smaller parts, finds its memory full once, and gets SIGTERM in validation."""

    class InValidation(pl.Callback):
        def on_validation_batch_start(self, trainer, module, *_):
            if not (folder / "1").exists() or not (folder / "0").exists():
                assert (module.token_budget < 900) == second
                (folder / os.environ["RANK"]).touch()
                os.kill(os.getpid(), signal.SIGTERM)

    second = os.environ["RANK"] == "1"
    with pytest.MonkeyPatch.context() as patch:
        if second and not (folder / "1").exists():
            fill_memory(patch, 4)
        stage(folder, cache, InValidation(), token_budget=900 if second else None, minutes=0, **settings)


def test_memory_full_in_one_of_two_uneven_processes_and_an_end_in_validation(runs, cache, tmp_path):
    for ends in ([-signal.SIGTERM] * 2, [0, 0]):
        assert ended(together(2, tmp_path, cache, what=uneven_stage)) == ends
    assert_same(runs[2], left(tmp_path))
