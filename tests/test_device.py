"""How many processes train: as torchrun or srun started them; one in a notebook and in an interactive shell."""

import os
from unittest import mock

import nbformat
import psutil
import pytest
from helpers import ROOT
from nbclient import NotebookClient
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.utilities import rank_zero_only

from race import RaceError
from race.device import processes

STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4"}
PTY = STEP | {"SLURM_PTY_PORT": "44152", "SLURM_PTY_WIN_COL": "144", "SLURM_PTY_WIN_ROW": "38", "SLURM_PROCID": "0"}


@pytest.fixture
def started(monkeypatch, capsys):
    """started(variables) -> (processes on this node, nodes, class of the plugin, what was printed)."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("SLURM_") or name == "LOCAL_WORLD_SIZE"]:
            del os.environ[name]

        def call(variables: dict) -> tuple:
            os.environ.update(variables)
            devices, nodes, (plugin,) = processes()
            return devices, nodes, type(plugin), capsys.readouterr().out

        yield call


@pytest.mark.parametrize("per_node", [{}, {"SLURM_NTASKS_PER_NODE": "8"}])
def test_tasks_of_srun(started, per_node):
    """Also with --ntasks alone, and in a job whose own number differs: Lightning accepts neither by itself."""
    assert started(STEP | per_node) == (4, 1, SLURMEnvironment, "")
    SLURMEnvironment(auto_requeue=False).validate_settings(num_devices=4, num_nodes=1)


def test_tasks_on_two_nodes(started):
    two = STEP | {"SLURM_STEP_NUM_NODES": "2"}
    assert started(two | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}) == (2, 2, SLURMEnvironment, "")
    with pytest.raises(RaceError, match=r"4 tasks on 2 nodes \(3,1\): start as many on each, with --ntasks-per-node"):
        started(two | {"SLURM_STEP_TASKS_PER_NODE": "3,1"})


def test_torchrun_comes_first(started):
    assert started(PTY | {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}) == (2, 2, TorchElasticEnvironment, "")


def test_no_slurm(started):
    assert started({}) == (1, 1, LightningEnvironment, "")


@pytest.mark.parametrize("task", ["", "the shell"])
def test_an_interactive_shell_of_several_tasks_is_one_process(started, monkeypatch, task):
    """`srun -n 4 --pty bash`: only the first task is there, and nobody would come."""
    monkeypatch.setattr(psutil.Process, "terminal", lambda self: "/dev/pts/0")
    *found, said = started(PTY | ({"SLURM_TASK_PID": str(os.getppid())} if task else {}))
    assert found == [1, 1, LightningEnvironment]
    assert said.count("\n") == 1 and "4 tasks, but an interactive shell runs one process: training on 1" in said


@pytest.mark.parametrize("parent", [True, False])
def test_a_step_that_an_interactive_shell_starts(started, monkeypatch, parent):
    """It inherits the shell's variables; its tasks have no terminal, or are this process (`srun --pty python …`)."""
    monkeypatch.setattr(psutil.Process, "terminal", lambda self: None if parent else "/dev/pts/0")
    task = os.getppid() if parent else os.getpid()
    assert started(PTY | {"SLURM_TASK_PID": str(task)}) == (4, 1, SLURMEnvironment, "")


def test_a_shell_of_salloc_is_one_process(started):
    *found, said = started({"SLURM_NTASKS": "4"})
    assert found == [1, 1, LightningEnvironment]
    assert "this Slurm job has 4 tasks, but a script without srun runs one process: training on 1" in said


def test_a_kernel_is_one_process_in_whatever_task(started):
    """A real kernel, in the third of four tasks: it counts as the first of one."""
    code = "from race.device import processes\nfrom pytorch_lightning.utilities import rank_zero_only\n"
    code += "print(processes()[:2], rank_zero_only.rank)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    os.environ.update(STEP | {"SLURM_PROCID": "2", "PYTHONPATH": str(ROOT), "LOCAL_WORLD_SIZE": "4"})
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    said = "".join(output.text for output in notebook.cells[0].outputs if output.get("name") == "stdout")
    assert said.endswith("\n(1, 1) 0\n") and "4 tasks, but a notebook runs one process" in said
