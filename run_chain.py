"""Run the whole job headless: cache, three stages, both evaluations; executed notebooks stay in runs/NAME."""

import argparse
import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil

from demo import STAGES as DEMO_STAGES
from generate_race_cache import main as generate_race_cache
from race_cache import read_manifest, splits_of
from race_seeds import main as report_over_seeds

ROOT = Path(__file__).resolve().parent
STOPPED = 75  # exit status: ended by a signal, go on by running again (EX_TEMPFAIL of sysexits.h)
STAGES = {"e1": "ex01", "e2": "ex02", "e3": "ex03"}
EVALUATIONS = ("eval_test_dataset_race", "eval_test_dataset_race_2")
NOTEBOOKS = (*STAGES.values(), *EVALUATIONS)


def main(arguments: list[str] | None = None) -> int:
    """Run the chain "demo" or "race"; returns the exit status."""
    options = parse(arguments)
    logging.getLogger("papermill").setLevel(logging.WARNING)
    demo, cache = options.name == "demo", ROOT / "cache" / options.name
    if status := prepare_cache(cache, demo, options.source, options.model):
        return status
    held = splits_of(read_manifest(cache))
    if missing := {"train", "validation"} - set(held):
        print(f"error: {cache} has no {' and no '.join(sorted(missing))} split; the stages need both", file=sys.stderr)
        return 1
    split = "test" if "test" in held else "validation"
    if split == "validation":
        print("this cache has no test split: the evaluations use validation, which also chose the checkpoints")
    if options.seeds:
        return run_seeds(options, split)
    notebooks = plan(options, split)
    if run_all(notebooks, passing_over=False) == STOPPED:
        return STOPPED
    parameters = notebooks[0][1]
    print(pd.read_csv(ROOT / parameters["RUN_DIR"] / "results.csv").iloc[:, :9].to_string(index=False))
    print(f"notebooks, figures and predictions: {parameters['RUN_DIR']}; checkpoints: {parameters['CHECKPOINT_DIR']}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("demo", "race"), help="the embedded default, or RACE with albert-base-v2")
    parser.add_argument("--source", help="source of the cache of 'race' (default ehovy/race)")
    parser.add_argument("--model", help="base model of 'race' (default albert-base-v2)")
    parser.add_argument("--limit-questions", type=int, help="a trial run on so many questions of each split")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="these only (default all)")
    parser.add_argument("--base-checkpoint", help="what the first of --stages starts from, if not e1")
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="once with each, in folders NAME-seedN; what is finished is passed over"
    )
    parser.add_argument("--fresh", action="store_true", help="train finished and begun stages again; they move aside")
    options = parser.parse_args(arguments)
    if options.base_checkpoint and options.stages[0] == "e1":
        parser.error("--base-checkpoint goes with --stages e2 or e3: e1 starts from the pretrained model")
    if sorted(set(options.stages)) != options.stages:
        parser.error(f"--stages {' '.join(options.stages)}: name each once, in the order of the chain")
    if options.seeds and len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds {' '.join(map(str, options.seeds))}: name each once")
    return options


def plan(options: argparse.Namespace, split: str, seed: int | None = None) -> list[tuple[str, dict]]:
    """The notebooks to run, in order, each with its parameters."""
    name = run_name(options) + ("" if seed is None else f"-seed{seed}")
    common = {
        "CACHE_DIR": f"cache/{options.name}",
        "CHECKPOINT_DIR": f"checkpoints/{name}",
        "RUN_DIR": f"runs/{name}",
        "LIMIT_QUESTIONS": options.limit_questions,
    }
    common |= {} if seed is None else {"SEED": seed}
    notebooks = []
    for stage in options.stages:
        own = {"FRESH": options.fresh} | (DEMO_STAGES[STAGES[stage]] if options.name == "demo" else {})
        if options.base_checkpoint and stage == options.stages[0]:
            own = own | {"BASE_CHECKPOINT": options.base_checkpoint}
        notebooks.append((STAGES[stage], common | own))
    return notebooks + [(notebook, common | {"SPLIT": split}) for notebook in EVALUATIONS]


def run_name(options: argparse.Namespace) -> str:
    """The name of the run's folders; a trial run is kept apart from real results."""
    return options.name if options.limit_questions is None else f"{options.name}-trial"


def run_seeds(options: argparse.Namespace, split: str) -> int:
    """Run the plan once with each seed, then report over the seeds; a seed that fails does not stop the others."""
    runs, failed = [], []
    for seed in options.seeds:
        notebooks = plan(options, split, seed)
        try:
            if run_all(notebooks, passing_over=not options.fresh) == STOPPED:
                return STOPPED
            runs.append(ROOT / notebooks[0][1]["RUN_DIR"])
        except SystemExit as error:
            failed.append(f"seed {seed}: {error}")
            print(error, file=sys.stderr)
    if runs:
        out = ROOT / "runs" / f"{run_name(options)}-over-seeds" / "results.csv"
        if options.limit_questions is not None:
            print("a trial run: each seed has drawn its own questions, and the spread holds that too")
        if report_over_seeds([*map(str, runs), "--out", str(out)]):
            return 1
    if failed:
        print("\n".join(["", "not finished, the same command goes on with them:", *failed]), file=sys.stderr)
    return 1 if failed else 0


def run_all(notebooks: list[tuple[str, dict]], passing_over: bool) -> int:
    """Run these notebooks, or from the first that is not finished on; returns 0, or STOPPED as soon as one was."""
    for notebook, parameters in notebooks:
        ended = finished(notebook, parameters) if passing_over else None
        if ended:
            print(f"── {parameters['RUN_DIR']}: {notebook} passed over, finished {ended}", flush=True)
            continue
        passing_over = False
        if run_notebook(notebook, parameters) == STOPPED:
            return STOPPED
    return 0


def finished(notebook: str, parameters: dict) -> str | None:
    """When this notebook was run to its end with these parameters, as papermill noted in it; None if it was not."""
    path = ROOT / parameters["RUN_DIR"] / f"{notebook}.ipynb"
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))["metadata"]["papermill"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    whole = noted["exception"] is None and noted["end_time"] is not None and noted["parameters"] == parameters
    return noted["end_time"] if whole else None


def prepare_cache(cache: Path, demo: bool, source: str | None, model: str | None) -> int:
    """Make the cache, or verify one that was made before on a node with internet; returns the exit status."""
    if demo:
        return generate_race_cache(["--source", "demo", "--out", str(cache), "--force"])
    if not (cache / "manifest.json").exists():
        made_from = ["--source", source or "ehovy/race", "--model", model or "albert-base-v2"]
        return generate_race_cache([*made_from, "--out", str(cache)])
    manifest = read_manifest(cache)
    for asked, part in ((source, "source"), (model, "model")):
        if asked not in (None, manifest[part]["name"]):
            print(
                f"error: {cache} was made from {part} {manifest[part]['name']}, not {asked}; move it", file=sys.stderr
            )
            return 1
    return generate_race_cache(["--verify", str(cache)])


def run_notebook(notebook: str, parameters: dict) -> int:
    """Execute one notebook with these parameters; what it printed is shown as it comes, and saved as it goes.

    Returns 0, or STOPPED where a signal ended it: run the chain again, and it goes on from there.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    executed = ROOT / parameters["RUN_DIR"] / f"{notebook}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    print(f"\n── {parameters['RUN_DIR']}: {notebook}", flush=True)
    started = time.perf_counter()
    with signals_for_the_notebook() as received:
        try:
            papermill.execute_notebook(
                ROOT / f"{notebook}.ipynb",
                executed,
                parameters,
                cwd=ROOT,
                progress_bar=False,
                stdout_file=sys.stdout,
                autosave_cell_every=30,
                extra_arguments=["--log-level=40"],  # errors only: a kernel warns of its own local connection
            )
        except papermill.exceptions.PapermillExecutionError as error:
            place = f"{notebook}, cell {error.exec_count}"
            sys.exit(f"error: {place}: {error.ename}: {error.evalue}\nwhat was executed is in {executed}")
        except (DeadKernelError, KeyboardInterrupt):
            if not received:
                sys.exit(f"error: {notebook}: its process died (out of memory?)\nwhat was executed is in {executed}")
    if received:
        print(f"── {notebook} was stopped: run this again to go on", flush=True)
        return STOPPED
    print(f"── {notebook} done in {time.perf_counter() - started:.0f} s", flush=True)
    return 0


@contextlib.contextmanager
def signals_for_the_notebook() -> Iterator[list[int]]:
    """Pass signals on to the notebook's process, which saves its state and ends; gives those received."""
    received: list[int] = []

    def pass_on(number: int, frame) -> None:
        received.append(number)
        kernels = [child for child in psutil.Process().children() if "ipykernel" in " ".join(child.cmdline())]
        for kernel in kernels:
            kernel.send_signal(signal.SIGTERM)
        if not kernels:
            raise KeyboardInterrupt

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
