"""Where a run computes: device, precision, processes, random generators; and what to note of it with a result."""

import ast
import contextlib
import hashlib
import importlib
import os
import platform
import random
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from race import ROOT, RaceError

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # precision → type under autocast
DRIVER = Path("/proc/driver/nvidia/version")
DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # of containers and WSL, which have no /proc file

METHOD = ("race_module", "race/encoder", "race/attention", "race/memory", "race/schedule")
METHOD += ("race/data/encoding", "race/data/module", "race/data/batches")  # what decides what a run learns and answers


def code_hash(root: Path = ROOT) -> str:
    """Of the METHOD's statements: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for name in METHOD:
        tree = ast.parse((root / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                text = [it for it in body if isinstance(it, ast.Expr) and isinstance(it.value, ast.Constant)]
                node.body = [it for it in body if it not in text]
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:12]


CODE = code_hash()  # as it is imported: who edits it then has to restart the kernel


def has_compiler() -> bool:
    """Whether Triton finds a C compiler, with which it builds what starts its kernels."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


if torch.version.cuda and not has_compiler():  # torch 2.13 multiplies with Triton where one side is a single column
    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module("torch._native.triton_utils").deregister_op_overrides()


def check_ready(compile: bool) -> None:
    """Raise RaceError if the method's code was edited after its import, or there is no C compiler to compile with."""
    if code_hash() != CODE:
        raise RaceError("the code of the method was edited after this process imported it: restart the kernel")
    if compile and not has_compiler():
        raise RaceError("COMPILE = True needs a C compiler (gcc or clang): install one, or set CC")


def versions() -> dict[str, str]:
    """The libraries that decide a result."""
    return {name: version(name) for name in ("torch", "transformers", "pytorch-lightning", "pyarrow", "numpy")}


def default_device(accelerator: str | None = None) -> torch.device:
    """None: the GPU, or the CPU if there is none; "cpu", "gpu": that one.

    Raises RaceError if there is a GPU that torch cannot use, and for "gpu" if there is none.
    """
    if accelerator != "cpu" and (problem := gpu_problem()):
        raise RaceError(problem)
    gpu = accelerator != "cpu" and torch.cuda.is_available()
    if accelerator == "gpu" and not gpu:
        raise RaceError("ACCELERATOR is 'gpu', but there is no NVIDIA GPU here, or CUDA_VISIBLE_DEVICES hides it")
    return torch.device("cuda" if gpu else "cpu")


def default_precision(accelerator: str | None = None) -> str:
    """bf16 on GPUs that have it (Ampere, 8.0, and newer), fp16 with loss scaling on others, fp32 on CPU."""
    if default_device(accelerator).type == "cpu":
        return "32-true"
    return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"


def device_name(device: torch.device) -> str:
    """The GPU's name, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def hardware(device: torch.device) -> str:
    """A device with what decides how it computes: "NVIDIA A100 (driver 580.65.06, CUDA 13.0, 39.2 GB free)"."""
    if device.type != "cuda":
        return f"{device_name(device)}, {torch.get_num_threads()} threads"
    return f"{device_name(device)} ({_build()}, {torch.cuda.mem_get_info(device)[0] / 1e9:.1f} GB free)"


def environment(precision: str | None = None, accelerator: str | None = None):
    """Versions and hardware of a run with these parameters, in one row; also what keeps torch from using a GPU."""
    import pandas as pd

    row = {"python": platform.python_version()} | versions()
    if problem := gpu_problem() if accelerator != "cpu" else None:
        row["problem"] = problem
    else:
        row["device"] = hardware(default_device(accelerator))
        row["precision"] = precision or default_precision(accelerator)
    wrapped = {"text-align": "left", "white-space": "normal"}
    return pd.DataFrame([row]).style.hide(axis="index").set_properties(**wrapped)


def gpu_problem() -> str | None:
    """Why torch cannot use the GPU of this node; None if it can, if there is none, or if all are hidden on purpose."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "NoDevFiles").strip()  # Slurm's word for a job without a GPU
    given = visible != "NoDevFiles" or "SLURM_JOB_GPUS" in os.environ
    none = visible in ("", "-1") or not (given or any(path.exists() for path in (DRIVER, *DEVICES)))
    if none and not torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
        (major, minor), built = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
        kernels = [(kind, int(it)) for kind, it in re.findall(r"(sm|compute)_(\d+)", " ".join(built))]
        if not kernels or any(it <= 10 * major + minor and (kind != "sm" or it // 10 == major) for kind, it in kernels):
            return None
        why = f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, this build {' '.join(built)}"
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
    return (
        f"torch {torch.__version__} ({_build()}) cannot use the GPU of this node: {why}. Install the build for "
        'its driver (docs/cluster.md, "Torch for your GPU"), or ask for a GPU if this job has none; '
        'ACCELERATOR = "cpu" does without'
    )


def _build() -> str:
    """The NVIDIA driver and torch's CUDA: "driver 535.183.01, CUDA 13.0"."""
    found = re.search(r"Module.*?\s(\d+(\.\d+)+)\s", DRIVER.read_text() if DRIVER.exists() else "")
    return f"driver {found[1] if found else 'not found'}, CUDA {torch.version.cuda or 'none'}"


def random_state() -> dict:
    """The states of Python's, NumPy's and torch's random generators, on CPU and this process's GPU."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    state = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}
    return state | {"torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    """Restore all random generators."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def processes(gpu: bool = True) -> tuple[int, int, list]:
    """(processes on this node, nodes, Lightning's environment plugins) as torchrun or srun started them; else one."""
    ipython = sys.modules.get("IPython")
    notebook = getattr(ipython and ipython.get_ipython(), "kernel", None) is not None  # one process, whoever started it
    if "LOCAL_WORLD_SIZE" in os.environ and not notebook:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return devices, int(os.environ["WORLD_SIZE"]) // devices, [TorchElasticEnvironment()]
    tasks, nodes = (int(os.environ.get(f"SLURM_STEP_NUM_{name}", 1)) for name in ("TASKS", "NODES"))
    if tasks > 1 and not notebook and not _in_interactive_step():
        per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
        if "," in per_node or tasks % nodes:
            raise RaceError(f"{tasks} tasks on {nodes} nodes ({per_node}): start as many on each (--ntasks-per-node)")
        if gpu and tasks // nodes > torch.cuda.device_count() == 1:
            raise RaceError("each task sees one GPU only: ask for --gpus-per-node in place of --gpus-per-task")
        os.environ["SLURM_NTASKS_PER_NODE"] = str(tasks // nodes)  # that of the job, or missing: Lightning would refuse
        return tasks // nodes, nodes, [SLURMEnvironment(auto_requeue=False)]
    given = max(tasks, int(os.environ.get("SLURM_NTASKS", 1)))  # as salloc says it, where there is no step
    if given > 1:
        print(f"one process of {given} Slurm tasks: for all, run a script with srun or torchrun (docs/cluster.md)")
    single = LightningEnvironment()
    single.set_global_rank(0)  # whichever task of a step this is
    return 1, 1, [single]


def _in_interactive_step() -> bool:
    """Whether a shell of `srun --pty` started this process, and not srun itself."""
    import psutil

    task = int(os.environ.get("SLURM_TASK_PID", 0))
    # steps started from such a shell inherit the variable, but their tasks have no terminal
    of_another_step = psutil.pid_exists(task) and psutil.Process(task).terminal() is None
    return "SLURM_PTY_PORT" in os.environ and task != os.getpid() and not of_another_step
