"""From `import` to the end of the first training step of a stage: where the seconds go.

Runs the calls of ex01.ipynb in fresh processes on the demo's cache and its tiny model, so that what is left is not the
model's own time. Also lists the slowest imports, as `python -X importtime` counts them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PHASES = ("torch", "pytorch_lightning", "transformers", "ours", "data", "model", "first step")


def main(arguments: list[str] | None = None) -> dict:
    """Measure, and keep the result; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.once:
        print(json.dumps(stage(options.once)))
        return {}
    from bench.common import ROOT, WORK, report, spread  # loads torch, which the timed process must do on the clock
    from race.data.cache import build_cache

    cache = WORK / "demo"
    if not (cache / "manifest.json").exists():
        build_cache("demo", "demo", cache)
    command = [sys.executable, "-m", "bench.startup", "--once", str(cache)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    runs = []
    for _ in range(options.rounds):
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    timed = [sys.executable, "-X", "importtime", "-c", "import race.train.training, race.report.figures"]
    imports = subprocess.run(timed, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stderr
    result = {"rounds": options.rounds, "seconds": {name: spread([run[name] for run in runs]) for name in PHASES}}
    result["total"] = statistics.median(sum(run.values()) for run in runs)
    report("startup", result | {"slowest_imports": slowest(imports)})
    return result


def slowest(importtime: str, count: int = 12) -> dict[str, float]:
    """{top-level package: seconds of its own} of the slowest, from the output of `python -X importtime`."""
    own: dict[str, float] = {}
    for line in importtime.splitlines():
        if line.startswith("import time:") and "self" not in line:
            microseconds, _, name = line.removeprefix("import time:").split("|")
            package = name.strip().partition(".")[0]
            own[package] = own.get(package, 0.0) + int(microseconds) / 1e6
    return dict(sorted(own.items(), key=lambda item: -item[1])[:count])


def stage(cache: str) -> dict[str, float]:
    """Seconds of each phase in this process, which must be a fresh one."""
    seconds, last = {}, time.perf_counter()

    def done(phase: str) -> None:
        nonlocal last
        seconds[phase], last = time.perf_counter() - last, time.perf_counter()

    import torch

    assert torch.nn
    done("torch")
    import pytorch_lightning as pl

    done("pytorch_lightning")
    import transformers

    assert transformers.AutoModelForMultipleChoice
    done("transformers")
    from race.data import RaceDataModule
    from race.report.training_figures import training_curves
    from race.train.stages import Stage
    from race.train.training import start_stage, train_stage

    assert training_curves
    done("ours")
    data = RaceDataModule(cache, batch_size=8, limit_questions=8)
    data.setup()
    done("data")

    class FirstStep(pl.Callback):
        def on_train_batch_end(self, *_) -> None:
            done("first step")

    with tempfile.TemporaryDirectory() as folder:
        stage = Stage("e1", Path(folder) / "checkpoints", folder)
        module = start_stage(stage, cache, learning_rate=1e-4)
        done("model")
        train_stage(stage, module, data, 1, callbacks=[FirstStep()])
    return seconds


if __name__ == "__main__":
    main()
