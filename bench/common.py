"""What the measurements share: the test data, rounds in turn, medians, and the JSON that remembers the machine."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST_DATA = Path(os.environ.get("RACE_TEST_DATA", ROOT.parent / "shared" / "data"))
WORK = ROOT / "cache" / "bench"
PACKAGES = ("torch", "transformers", "tokenizers", "pytorch-lightning", "pyarrow", "numpy")


def source() -> str:
    """Real RACE text where it is at hand, else the demo corpus."""
    race = TEST_DATA / "race.tar.xz"
    return str(race) if race.exists() else "demo"


def tokenizer_folder() -> str:
    """ALBERT's own vocabulary where it is at hand, else the demo's."""
    albert = TEST_DATA / "albert-base-v2"
    return str(albert) if albert.exists() else "demo"


def real_cache() -> Path:
    """The token cache of `source()`, made on first use."""
    from race_cache import build_cache

    folder = WORK / Path(source()).name.split(".")[0]
    if not (folder / "manifest.json").exists():
        build_cache(source(), tokenizer_folder(), folder)
    return folder


def in_turn(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every side once a round, in turn, so that a slow minute of the machine hits all of them; returns seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, run in sides.items():
            seconds[name].append(run())
            print(f"  round {number + 1}, {name}: {seconds[name][-1]:.2f} s", flush=True)
    return seconds


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes, to the end of what it started on the device."""
    import torch

    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(name: str, result: dict) -> None:
    """Print a result and keep it in bench/results/NAME.json, with the machine and the versions."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    machine = {
        "device": device,
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
    }
    record = {"machine": machine, "versions": {p: version(p) for p in PACKAGES}, "source": Path(source()).name} | result
    suffix = "-cuda" if torch.cuda.is_available() else ""
    path = ROOT / "bench" / "results" / f"{name}{suffix}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
