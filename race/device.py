"""Where a run computes: device, precision, processes, random generators; and what to note of it with a result."""

import os
import platform
import random
import re
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from race import RaceError

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # precision → type under autocast
PRECISIONS = (*AUTOCAST, "64-true")  # of training; weights are float32 in all but the last
ACCELERATORS = ("cpu", "gpu")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
LEAST_DRIVER = {13: 580, 12: 525}  # CUDA → driver (NVIDIA's "CUDA Compatibility"), newest first
INSTALL = 'make install TORCH_INDEX=… (README, "Torch for your GPU")'


def versions() -> dict[str, str]:
    """The libraries that decide a result."""
    return {name: version(name) for name in ("torch", "transformers", "pytorch-lightning", "pyarrow", "numpy")}


def default_device(accelerator: str | None = None) -> torch.device:
    """None: the GPU, or the CPU if there is none; "cpu", "gpu": that one.

    Raises RaceError if there is a GPU that torch cannot use, and for "gpu" if there is none.
    """
    if accelerator not in (None, *ACCELERATORS):
        raise RaceError(f"ACCELERATOR is {accelerator!r}, expected one of {', '.join(ACCELERATORS)} or None")
    if accelerator == "cpu":
        return torch.device("cpu")
    if problem := gpu_problem():
        raise RaceError(problem)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator == "gpu":
        hidden = " (CUDA_VISIBLE_DEVICES hides all)" if _hidden() else ""
        raise RaceError(f"ACCELERATOR is 'gpu', but there is no NVIDIA GPU here{hidden}; None takes the CPU then")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The GPU's name, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def hardware(device: torch.device) -> str:
    """A device with what decides how it computes: "NVIDIA A100 (driver 580.65.06, CUDA 13.0, 39.2 GB free)"."""
    if device.type != "cuda":
        return f"{device_name(device)}, {torch.get_num_threads()} threads"
    free = torch.cuda.mem_get_info(device)[0] / 1e9
    return (
        f"{device_name(device)} (driver {driver_version() or 'unknown'}, CUDA {torch.version.cuda}, {free:.1f} GB free)"
    )


def default_precision(accelerator: str | None = None) -> str:
    """bf16 on GPUs that have it (Ampere, 8.0, and newer), fp16 with loss scaling on Turing (7.5), fp32 on CPU."""
    return _precision_of(default_device(accelerator))


def _precision_of(device: torch.device) -> str:
    if device.type == "cpu":
        return "32-true"
    return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"


def check_precision(precision: str | None, known: tuple[str, ...] = PRECISIONS) -> None:
    """Raise RaceError unless a precision is None (by device) or one of those `known`."""
    if precision is None or precision in known:
        return
    half = precision in ("bf16-true", "16-true")
    why = ", which rounds the weights themselves: small updates would be lost, so they stay float32" if half else ""
    raise RaceError(f"PRECISION is {precision!r}{why}; expected one of {', '.join(known)}")


def environment():
    """Versions and hardware of this run, a row each; also what keeps torch from using a GPU."""
    import pandas as pd

    problem = {}
    try:
        device = default_device()
    except RaceError as error:
        device, problem = torch.device("cpu"), {"problem": str(error)}
    name = device_name(device) + ("" if device.type == "cuda" else f", {torch.get_num_threads()} threads")
    rows = {"python": platform.python_version()} | versions()
    if device.type == "cuda" or problem:
        rows |= {"CUDA of torch": torch.version.cuda or "none", "NVIDIA driver": driver_version() or "not found"}
    rows |= {"device": name, "precision": _precision_of(device)} | problem
    return pd.DataFrame({"": rows}).style.set_properties(**{"text-align": "left", "white-space": "normal"})


def driver_version() -> str | None:
    """The version of the NVIDIA driver, such as "535.183.01"; None if there is none."""
    try:
        found = re.search(r"Module.*?\s(\d+(\.\d+)+)\s", DRIVER_FILE.read_text())
    except OSError:
        return None
    return found and found[1]


def gpu_problem() -> str | None:
    """Why torch cannot use the GPU of this node, and what to do; None if it can, or if there is none, or all hidden."""
    if torch.cuda.is_available():
        problem = _missing_kernels()
    else:
        problem = _unusable() if _evident() else None
    return problem and f'{problem}. ACCELERATOR = "cpu" runs on the CPU all the same'


def _hidden() -> bool:
    """Whether all GPUs are hidden on purpose."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")


def _evident() -> bool:
    """Whether this node has a GPU for us, whatever torch says: a driver, or variables of the job."""
    given = os.environ.get("SLURM_JOB_GPUS") or os.environ.get("CUDA_VISIBLE_DEVICES", "NoDevFiles") != "NoDevFiles"
    return not _hidden() and (DRIVER_FILE.exists() or bool(given))


def _unusable() -> str:
    """What keeps torch from a GPU that is here: the driver, torch's build, or something that neither knows of."""
    driver, cuda = driver_version(), torch.version.cuda
    number = int(driver.split(".")[0]) if driver else 0
    least = LEAST_DRIVER.get(int(cuda.split(".")[0]), 0) if cuda else 0
    names = [name for name in ("SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES") if name in os.environ]
    given = "".join(f"; {name} is {os.environ[name]!r}" for name in names)
    said = "this node has a GPU that torch cannot use: "
    said += f"the NVIDIA driver is {driver}" if driver else f"no NVIDIA driver is found ({DRIVER_FILE}{given})"
    said += f", and torch {torch.__version__} " + (f"is built for CUDA {cuda}" if cuda else "has no CUDA")
    said += f", which needs driver {least} or newer. " if least else ". "
    if driver and cuda and number >= least:
        return (
            f"{said}The driver is new enough: was this job or container given a GPU (nvidia-smi lists them{given})? "
            "Slurm gives one with --gres=gpu:1"
        )
    fitting = next((version for version, needed in LEAST_DRIVER.items() if number >= needed), None)
    if fitting is None:
        return f"{said}Ask for driver {min(LEAST_DRIVER.values())} or newer on this node"
    return f"{said}Install torch for CUDA {fitting}: {INSTALL}"


def _missing_kernels() -> str | None:
    """Words about a GPU for which this build of torch has no kernels; None if it has some."""
    cuda, built = torch.version.cuda, torch.cuda.get_arch_list()
    if not cuda or not built or _runs(torch.cuda.get_device_capability(), built):  # no CUDA: torch for AMD
        return None
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    fitting = "12.6" if capability < (7, 5) else "13"
    least = LEAST_DRIVER[int(fitting.split(".")[0])]
    other = f"Install torch for CUDA {fitting} (driver {least} or newer): {INSTALL}"
    return (
        f"torch {torch.__version__}, built for CUDA {cuda}, has no kernels for this GPU: {name} has "
        f"compute capability {'.'.join(map(str, capability))}, and the build {', '.join(built)}. "
        + ("No other build of this torch has them" if cuda.startswith(fitting) else other)
    )


def _runs(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether a GPU runs one of these: sm_XY is for X.Y to X.9, compute_XY for all from X.Y, sm_XYa for X.Y alone."""
    for kind, major, minor, only in re.findall(r"\b(sm|compute)_(\d+)(\d)([a-z]?)\b", " ".join(built)):
        able = (int(major), int(minor))
        same = able == capability if only else kind == "compute" or able[0] == capability[0]
        if able <= capability and same:
            return True
    return False


def random_state() -> dict:
    """The states of Python's, NumPy's and torch's random generators, on CPU and this process's GPU."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_random_state(state: dict) -> None:
    """Restore all random generators."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


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
    import psutil

    if "SLURM_PTY_PORT" not in os.environ:
        return False
    try:  # steps started from such a shell inherit the variable, but their tasks have no terminal
        task = psutil.Process(int(os.environ.get("SLURM_TASK_PID", 0)))
        return task.pid != os.getpid() and task.terminal() is not None
    except psutil.NoSuchProcess:
        return True
