"""How many processes train, as torchrun or srun started them; and GPUs that torch cannot use, with stand-ins."""

import os
import runpy
from unittest import mock

import nbformat
import psutil
import pytest
import torch
from helpers import ROOT
from nbclient import NotebookClient
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.utilities import rank_zero_only

from race import RaceError
from race.device import check_precision, default_device, default_precision, driver_version, environment, processes
from race.device import gpu_problem as problem

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


# ------------------------------------------------------------------------------------------- the GPU and torch

CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version:  12.2.0\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22-I3)\n"
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
ON_CPU = '. ACCELERATOR = "cpu" runs on the CPU all the same'
INSTALL_12 = 'Install torch for CUDA 12: make install TORCH_INDEX=… (README, "Torch for your GPU")'


@pytest.fixture
def node(monkeypatch, tmp_path):
    """node(driver file, CUDA of torch, usable, capability, architectures, variables): a machine as torch sees it."""

    def make(driver=None, cuda="13.0", usable=False, capability=(9, 0), built=ARCHITECTURES, name="H100", **variables):
        path = tmp_path / "version"
        path.unlink(missing_ok=True)
        if driver:
            path.write_text(driver)
        monkeypatch.setattr("race.device.DRIVER_FILE", path)
        monkeypatch.setattr(torch, "__version__", "2.13.0" if cuda else "2.13.0+cpu")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
        for variable in ("SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(variable, raising=False)
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)

    return make


def test_a_driver_that_is_too_old(node):
    """The words that a user sees; the CPU is never taken without being asked for."""
    node(CLOSED)
    expected = (
        "this node has a GPU that torch cannot use: the NVIDIA driver is 535.183.01, and torch 2.13.0 is built for "
        f"CUDA 13.0, which needs driver 580 or newer. {INSTALL_12}{ON_CPU}"
    )
    assert problem() == expected
    for accelerator in (None, "gpu"):
        for refused in (default_device, default_precision):
            with pytest.raises(RaceError) as error:
                refused(accelerator)
            assert str(error.value) == expected
    assert default_device("cpu") == torch.device("cpu") and default_precision("cpu") == "32-true"
    rows = environment().data[""]
    assert rows["problem"] == expected and rows["device"].startswith("CPU") and rows["precision"] == "32-true"
    assert (rows["NVIDIA driver"], rows["CUDA of torch"]) == ("535.183.01", "13.0")
    assert expected.replace("&", "&amp;") in environment().to_html()  # whole, however long


@pytest.mark.parametrize(
    ("driver", "cuda", "what"),
    [
        (CLOSED.replace("535.183.01", "470.57.02"), "13.0", "Ask for driver 525 or newer on this node"),
        (CLOSED.replace("535.183.01", "470.57.02"), "12.6", "which needs driver 525 or newer. Ask for driver 525"),
        (CLOSED, None, f"is 535.183.01, and torch 2.13.0+cpu has no CUDA. {INSTALL_12}"),
        (OPEN, None, "is 580.65.06, and torch 2.13.0+cpu has no CUDA. Install torch for CUDA 13: make install"),
        (OPEN, "13.0", "The driver is new enough: was this job or container given a GPU (nvidia-smi lists them)? "),
        (CLOSED, "12.6", "The driver is new enough"),
        ("something else\n", "13.0", "no NVIDIA driver is found"),
    ],
)
def test_other_drivers_and_builds(node, driver, cuda, what):
    node(driver, cuda)
    assert what in problem() and problem().endswith(ON_CPU)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS is '0,1'"),
        ({"CUDA_VISIBLE_DEVICES": "3"}, "CUDA_VISIBLE_DEVICES is '3'"),
    ],
)
def test_a_job_with_a_gpu_by_its_variables(node, variables, said):
    """No driver, or a driver that shows the process nothing."""
    node(**variables)
    assert f"no NVIDIA driver is found ({environment.__globals__['DRIVER_FILE']}; {said})" in problem()
    node(OPEN, **variables)
    assert f"given a GPU (nvidia-smi lists them; {said})" in problem()


def test_no_gpu_or_all_hidden_on_purpose(node):
    """Then the CPU is what is meant; only "gpu" insists."""
    node()
    assert problem() is None and default_device() == torch.device("cpu") and default_precision() == "32-true"
    assert not {"problem", "NVIDIA driver"} & set(environment().data.index)
    with pytest.raises(
        RaceError, match="ACCELERATOR is 'gpu', but there is no NVIDIA GPU here; None takes the CPU then"
    ):
        default_device("gpu")
    for hidden in ("", "-1"):
        node(CLOSED, SLURM_JOB_GPUS="0", CUDA_VISIBLE_DEVICES=hidden)
        assert problem() is None and default_device() == torch.device("cpu")
        with pytest.raises(RaceError, match=r"no NVIDIA GPU here \(CUDA_VISIBLE_DEVICES hides all\)"):
            default_device("gpu")
    node(CUDA_VISIBLE_DEVICES="NoDevFiles")  # Slurm, for a job without a GPU
    assert problem() is None
    node(OPEN, CUDA_VISIBLE_DEVICES="NoDevFiles")
    assert "given a GPU (nvidia-smi lists them; CUDA_VISIBLE_DEVICES is 'NoDevFiles')" in problem()


def test_a_gpu_without_kernels(node):
    node(OPEN, usable=True, capability=(7, 0), name="Tesla V100-SXM2-16GB")
    assert problem() == (
        "torch 2.13.0, built for CUDA 13.0, has no kernels for this GPU: Tesla V100-SXM2-16GB has compute capability "
        "7.0, and the build sm_75, sm_80, sm_86, sm_90, sm_100, sm_120. Install torch for CUDA 12.6 (driver 525 or "
        f'newer): make install TORCH_INDEX=… (README, "Torch for your GPU"){ON_CPU}'
    )
    with pytest.raises(RaceError, match="has no kernels for this GPU"):
        default_device()
    assert default_device("cpu") == torch.device("cpu")
    assert "no kernels" in environment().data.loc["problem", ""]
    node(OPEN, "12.6", usable=True, capability=(10, 0), built=["sm_70", "sm_90"], name="B200")
    assert "Install torch for CUDA 13 (driver 580 or newer)" in problem()
    node(OPEN, usable=True, capability=(13, 0), name="next")
    assert "No other build of this torch has them" in problem()


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 5), ARCHITECTURES, True),
        ((8, 9), ARCHITECTURES, True),  # kernels of 8.6
        ((12, 1), ARCHITECTURES, True),
        ((6, 0), ARCHITECTURES, False),
        ((7, 0), ARCHITECTURES, False),  # 7.5 is newer
        ((11, 0), ARCHITECTURES, False),
        ((11, 0), [*ARCHITECTURES, "compute_100"], True),
        ((9, 0), ["sm_120", "compute_120"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a", "compute_90a"], False),
        ((7, 0), [], True),  # not known
    ],
)
def test_which_kernels_run(node, capability, built, runs):
    node(OPEN, usable=True, capability=capability, built=built)
    assert (problem() is None) == runs


def test_a_gpu_that_torch_can_use(node):
    node(OPEN, usable=True)
    assert problem() is None and default_device() == default_device("gpu") == torch.device("cuda")
    assert default_precision() == "bf16-mixed" and default_precision("cpu") == "32-true"
    rows = environment().data[""]
    assert rows["device"] == "H100" and (rows["NVIDIA driver"], rows["CUDA of torch"]) == ("580.65.06", "13.0")
    node(OPEN, usable=True, capability=(7, 5))
    assert default_precision() == "16-mixed"
    node(None, None, usable=True, built=["gfx90a"])  # AMD: torch has no CUDA, and counts in another way
    assert problem() is None and driver_version() is None


def test_other_accelerators_are_refused(node):
    node()
    with pytest.raises(RaceError, match="ACCELERATOR is 'cuda', expected one of cpu, gpu or None"):
        default_device("cuda")


def test_precisions_that_round_the_weights_are_refused():
    expected = "expected one of 32-true, bf16-mixed, 16-mixed, 64-true"
    for precision in ("bf16-true", "16-true"):
        with pytest.raises(RaceError) as error:
            check_precision(precision)
        assert str(error.value) == (
            f"PRECISION is '{precision}', which rounds the weights themselves: small updates would be lost, so they "
            f"stay float32; {expected}"
        )
    with pytest.raises(RaceError, match=f"^PRECISION is 'fp8'; {expected}$"):
        check_precision("fp8")
    for precision in (None, "32-true", "bf16-mixed", "16-mixed", "64-true"):
        check_precision(precision)


def test_an_import_does_not_start_cuda(monkeypatch):
    for name in ("is_available", "get_arch_list", "get_device_capability", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, None)
    runpy.run_path(str(ROOT / "race" / "device.py"))
