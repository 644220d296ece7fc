"""Where a run computes, in what precision, in how many processes; and what to note of it with a result."""

import os
import platform
from importlib.metadata import version

import pandas as pd
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

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
    if "LOCAL_WORLD_SIZE" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return devices, int(os.environ["WORLD_SIZE"]) // devices, [TorchElasticEnvironment()]
    tasks, nodes = (int(os.environ.get(f"SLURM_STEP_NUM_{name}", 1)) for name in ("TASKS", "NODES"))
    if tasks > 1:
        return tasks // nodes, nodes, [SLURMEnvironment(auto_requeue=False)]
    return 1, 1, [LightningEnvironment()]
