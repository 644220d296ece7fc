"""Processes wait for each other with a limit, and say who did not come."""

import os
import socket
import subprocess
import sys
import time

import pytest
from helpers import ROOT
from kill import in_a_process
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_only
from small_stage import position, stage, state

from race.train.together import meet

STAGE = """
import sys
from pathlib import Path
import race.train.training
from small_stage import stage
race.train.training.MEETING_MINUTES = 3 / 60
stage(Path(sys.argv[1]), Path(sys.argv[2]), epochs=1)
"""


def variables(rank: int, world: int, port: int) -> dict[str, str]:
    """What srun gives a task on one node, and where to meet."""
    of_step = {"STEP_NUM_TASKS": world, "STEP_NUM_NODES": 1, "NTASKS": world, "NTASKS_PER_NODE": world}
    of_task = {"PROCID": rank, "LOCALID": rank, "NODEID": 0}
    given = {f"SLURM_{name}": str(value) for name, value in (of_step | of_task).items()}
    return given | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def task(tmp_path):
    """task(rank, world, port, function) -> (a forked process as of srun, what it says); none is left at the end."""
    started = []

    def start(rank: int, world: int, port: int, function) -> tuple:
        log = tmp_path / f"{rank}.log"

        def run() -> None:
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = open(1, "w")
            os.environ.update(variables(rank, world, port))
            rank_zero_only.rank = rank  # as read from the environment by a new process
            function()

        started.append(in_a_process(run))
        return started[-1], log

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_process_that_never_comes_is_not_waited_for(cache, tmp_path):
    """The first of two alone, and the second of two alone: each ends by itself and says why."""
    of_tests = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    alone = []
    for rank in (0, 1):
        command = [sys.executable, "-c", STAGE, str(tmp_path / str(rank)), str(cache)]
        alone.append(subprocess.Popen(command, env=of_tests | variables(rank, 2, free_port()), **pipes))
    try:
        for rank, process in enumerate(alone):
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 1
            assert f"process {rank}: waiting for the other process, up to 0.05 minutes" in said
            assert "RaceError: only 1 of 2 processes came to 127.0.0.1, port" in said and "docs/cluster.md" in said
            assert "DistStoreError" not in said and "c10d" not in said
    finally:
        for process in alone:
            process.kill()
            process.communicate()


def test_two_tasks_of_srun_meet_and_train(cache, tmp_path, task):
    """The second comes first, and knocks until the first one is there."""
    port = free_port()
    second, _ = task(1, 2, port, lambda: stage(tmp_path, cache, epochs=1))
    time.sleep(1)
    first, log = task(0, 2, port, lambda: stage(tmp_path, cache, epochs=1))
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0, log.read_text()
    assert "process 0: waiting for the other process, up to 10 minutes" in log.read_text()
    assert position(tmp_path)["finished"] and state(tmp_path)["race"]["recipe"]["processes"] == 2


def test_all_who_came_hear_that_one_did_not(task):
    """Two of three, with limits that differ: the wait ends for both when it ends for one."""
    port = free_port()
    for process, log in [
        task(rank, 3, port, lambda minutes=minutes: meet(SLURMEnvironment(), minutes))
        for rank, minutes in ((0, 2 / 60), (1, 1))
    ]:
        process.join(30)
        said = log.read_text()
        assert process.exitcode == 1 and "RaceError: only 2 of 3 processes came" in said and "c10d" not in said
