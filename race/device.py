"""Where a run computes, in what precision, in how many processes; and what to note of it with a result."""

import os
import platform
import sys
from importlib.metadata import version

import pandas as pd
import psutil
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from race import RaceError

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # precision → type under autocast


def versions() -> dict[str, str]:
    """The libraries that decide a result."""
    return {name: version(name) for name in ("torch", "transformers", "pytorch-lightning", "pyarrow", "numpy")}


def default_device() -> torch.device:
    """The GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The GPU's name, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def default_precision() -> str:
    """bf16 on GPUs that have it (Ampere and newer), fp16 with loss scaling on older ones, fp32 on CPU."""
    if not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"


def environment() -> pd.DataFrame:
    """Versions and hardware of this run, a row each."""
    device = default_device()
    name = device_name(device) + ("" if device.type == "cuda" else f", {torch.get_num_threads()} threads")
    rows = {"python": platform.python_version()} | versions() | {"device": name, "precision": default_precision()}
    return pd.DataFrame({"": rows})


def processes() -> tuple[int, int, list]:
    """(processes on this node, nodes, Lightning's environment plugins) as torchrun or srun started them; else one."""
    if "LOCAL_WORLD_SIZE" in os.environ and not _in_notebook():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return devices, int(os.environ["WORLD_SIZE"]) // devices, [TorchElasticEnvironment()]
    tasks, nodes = (int(os.environ.get(f"SLURM_STEP_NUM_{name}", 1)) for name in ("TASKS", "NODES"))
    alone = "a notebook" if _in_notebook() else "an interactive shell" if _in_interactive_step() else None
    if tasks > 1 and alone is None:
        return tasks // nodes, nodes, [_slurm(tasks, nodes)]
    given = max(tasks, int(os.environ.get("SLURM_NTASKS", 1)))  # as salloc says it, where there is no step
    if given > 1:
        of, where = "step" if tasks > 1 else "job", alone or "a script without srun"
        print(
            f"this Slurm {of} has {given} tasks, but {where} runs one process: training on 1; for all of them, run the "
            "stage as a script with torchrun or srun (docs/cluster.md)",
            flush=True,
        )
    single = LightningEnvironment()
    single.set_global_rank(0)  # whichever task of a step this is
    return 1, 1, [single]


def _slurm(tasks: int, nodes: int) -> SLURMEnvironment:
    """Lightning's plugin for the tasks of a step."""
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if "," in per_node or tasks % nodes:
        raise RaceError(f"{tasks} tasks on {nodes} nodes ({per_node}): start as many on each, with --ntasks-per-node")
    os.environ["SLURM_NTASKS_PER_NODE"] = str(tasks // nodes)  # that of the job, or missing: Lightning would refuse
    return SLURMEnvironment(auto_requeue=False)


def _in_notebook() -> bool:
    """Whether this is a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython and ipython.get_ipython(), "kernel", None) is not None


def _in_interactive_step() -> bool:
    """Whether a shell of `srun --pty` started this process, and not srun itself."""
    if "SLURM_PTY_PORT" not in os.environ:
        return False
    try:  # steps started from such a shell inherit the variable, but their tasks have no terminal
        task = psutil.Process(int(os.environ.get("SLURM_TASK_PID", 0)))
        return task.pid != os.getpid() and task.terminal() is not None
    except psutil.NoSuchProcess:
        return True
