"""How many processes train, as torchrun or srun started them; and GPUs that torch cannot use, with stand-ins."""

import os
import runpy
import shutil
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
from race.device import METHOD, code_hash, default_device, default_precision, environment, gpu_problem, processes

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


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (1, 1, LightningEnvironment)),
        (STEP, (4, 1, SLURMEnvironment)),
        (STEP | {"SLURM_NTASKS_PER_NODE": "8"}, (4, 1, SLURMEnvironment)),  # that of the job, which Lightning refuses
        (STEP | {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, (2, 2, SLURMEnvironment)),
        (PTY | {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}, (2, 2, TorchElasticEnvironment)),  # comes first
        (PTY | {"SLURM_TASK_PID": str(os.getpid())}, (4, 1, SLURMEnvironment)),  # `srun --pty python …`
    ],
)
def test_processes_as_they_were_started(started, monkeypatch, variables, expected):
    monkeypatch.setattr(psutil.Process, "terminal", lambda self: "/dev/pts/0")
    assert started(variables) == (*expected, "")
    if expected[2] is SLURMEnvironment:
        SLURMEnvironment(auto_requeue=False).validate_settings(num_devices=expected[0], num_nodes=expected[1])


def test_unequal_numbers_on_the_nodes_are_refused(started):
    with pytest.raises(RaceError, match=r"4 tasks on 2 nodes \(3,1\): .*--ntasks-per-node"):
        started(STEP | {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "3,1"})


@pytest.mark.parametrize("variables", [PTY, PTY | {"SLURM_TASK_PID": str(os.getppid())}, {"SLURM_NTASKS": "4"}])
def test_in_an_interactive_shell_of_several_tasks_one_process_trains(started, monkeypatch, variables):
    """`srun -n 4 --pty bash` and salloc: only the first task is there, and nobody would come."""
    monkeypatch.setattr(psutil.Process, "terminal", lambda self: "/dev/pts/0")
    *found, said = started(variables)
    assert found == [1, 1, LightningEnvironment] and said.startswith("one process of 4 Slurm tasks: ")
    if "SLURM_TASK_PID" in variables:  # a step started there inherits the variables, but its tasks have no terminal
        monkeypatch.setattr(psutil.Process, "terminal", lambda self: None)
        assert started(variables) == (4, 1, SLURMEnvironment, "")


def test_a_kernel_is_one_process_in_whatever_task(started):
    """A real kernel, in the third of four tasks: it counts as the first of one."""
    code = "from race.device import processes\nfrom pytorch_lightning.utilities import rank_zero_only\n"
    code += "print(processes()[:2], rank_zero_only.rank)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    os.environ.update(STEP | {"SLURM_PROCID": "2", "PYTHONPATH": str(ROOT), "LOCAL_WORLD_SIZE": "4"})
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    said = "".join(output.text for output in notebook.cells[0].outputs if output.get("name") == "stdout")
    assert said.endswith("\n(1, 1) 0\n") and "one process of 4 Slurm tasks" in said


CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version: 12.2\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22-I3)\n"
OLD = "The NVIDIA driver on your system is too old (found version 12020).\nPlease update your GPU driver"


@pytest.fixture
def node(monkeypatch, tmp_path):
    """node(what the driver says, capability of a GPU that torch can use, kernels, CUDA_VISIBLE_DEVICES)."""

    def make(driver=None, capability=None, built=("sm_75", "sm_90a", "compute_90"), visible="NoDevFiles"):
        (tmp_path / "version").unlink(missing_ok=True)
        if driver:
            (tmp_path / "version").write_text(driver)
        monkeypatch.setattr("race.device.DRIVER", tmp_path / "version")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(torch, "__version__", "2.13.0")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "init", mock.Mock(side_effect=None if capability else RuntimeError(OLD)))
        facts = {"is_available": capability is not None, "get_device_capability": capability, "get_arch_list": built}
        for name, value in (facts | {"get_device_name": "H100", "mem_get_info": (39.2e9, 80e9)}).items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)

    return make


def test_a_gpu_that_torch_cannot_use_stops_the_run_in_words(node):
    """torch's own facts and the driver's; the CPU is never taken without being asked for."""
    node(CLOSED)
    problem = gpu_problem()
    assert problem.startswith("torch 2.13.0 (driver 535.183.01, CUDA 13.0) cannot use the GPU of this node: The NVIDIA")
    assert "too old (found version 12020)." in problem and '"Torch for your GPU"' in problem and "\n" not in problem
    for accelerator in (None, "gpu"):
        for refused in (default_device, default_precision):
            with pytest.raises(RaceError) as error:
                refused(accelerator)
            assert str(error.value) == problem
    assert default_device("cpu") == torch.device("cpu") and default_precision("cpu") == "32-true"
    assert environment().data["problem"][0] == problem and problem in environment().to_html()  # whole
    node(visible="3")  # a job's variable is evidence of a GPU too
    assert gpu_problem().startswith("torch 2.13.0 (driver not found, ")


@pytest.mark.parametrize("given", [{}, {"driver": CLOSED, "visible": ""}, {"driver": CLOSED, "visible": "-1"}])
def test_without_a_gpu_or_with_all_hidden_on_purpose_the_cpu_is_meant(node, given):
    """Only "gpu" insists."""
    node(**given)
    assert gpu_problem() is None and default_device() == torch.device("cpu") and default_precision() == "32-true"
    assert environment().data["device"][0].startswith("CPU, ") and "problem" not in environment().data
    with pytest.raises(RaceError, match="ACCELERATOR is 'gpu', but there is no NVIDIA GPU here"):
        default_device("gpu")


@pytest.mark.parametrize(
    ("capability", "built", "precision"),
    [
        ((7, 5), ["sm_100", "sm_75"], "16-mixed"),
        ((9, 0), ["sm_75", "sm_90a"], "bf16-mixed"),
        ((9, 0), ["gfx90a"], "bf16-mixed"),  # AMD
        ((7, 0), ["sm_75", "sm_90a"], None),
        ((12, 0), ["sm_50", "sm_90"], None),
        ((12, 0), ["sm_50", "compute_90"], "bf16-mixed"),
    ],
)
def test_a_gpu_is_used_if_the_build_has_kernels_for_it(node, capability, built, precision):
    node(OPEN, capability, built)
    if precision is None:
        with pytest.raises(RaceError, match=rf"H100 has compute capability {capability[0]}.0, this build sm_"):
            default_device()
        return
    assert default_device() == default_device("gpu") == torch.device("cuda") != default_device("cpu")
    assert default_precision() == precision and default_precision("cpu") == "32-true"
    assert environment().data["device"][0] == "H100 (driver 580.65.06, CUDA 13.0, 39.2 GB free)"


def test_an_import_does_not_start_cuda(monkeypatch):
    for name in ("is_available", "get_arch_list", "get_device_capability", "init", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, None)
    runpy.run_path(str(ROOT / "race" / "device.py"))


def test_the_hash_of_the_method_is_of_its_statements(tmp_path):
    """Label smoothing changes it; a comment, a docstring and a blank line do not."""
    for name in METHOD:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f"{name}.py", tmp_path / f"{name}.py")
    assert code_hash(tmp_path) == code_hash()
    path = tmp_path / "race_module.py"
    text = path.read_text()
    assert all(part in text for part in ('"""What training', "    def loss(", 'reduction="sum"'))
    path.write_text(
        f"# a comment\n{text}".replace('"""What training', '"""A').replace("    def loss(", "\n\n    def loss(")
    )
    assert code_hash(tmp_path) == code_hash()
    path.write_text(text.replace('reduction="sum"', 'reduction="sum", label_smoothing=0.1'))
    assert code_hash(tmp_path) != code_hash()


def test_tasks_that_see_one_gpu_each_are_told_what_to_ask_for(started, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RaceError, match="ask for --gpus-per-node"):
        started(STEP)


@pytest.mark.parametrize("compiler", ["", "gcc"])
def test_without_a_compiler_torch_starts_no_triton(monkeypatch, compiler):
    """Torch 2.13 of CUDA multiplies with it in ModernBERT, and would fail in the first step."""
    switched_off = []
    monkeypatch.setattr("torch._native.triton_utils.deregister_op_overrides", lambda: switched_off.append(True))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("PATH", "")
    runpy.run_path(str(ROOT / "race" / "device.py"))
    assert switched_off == ([] if compiler else [True])
