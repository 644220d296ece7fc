"""Run the whole job headless: the cache, the stages, both evaluations. Executed notebooks are kept in runs/NAME."""

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

from generate_race_cache import main as generate_race_cache
from race import RaceError
from race.data.cache import read_manifest, splits_of
from race.score.results import RESULT_COLUMNS
from race.score.seeds import main as report_over_seeds
from race.settings import ROOT, parse_set, read
from race.train.stages import CHAIN, DEMO

STOPPED = 75  # exit status: ended by a signal, run again to resume (EX_TEMPFAIL of sysexits.h)
EVALUATIONS = ("eval_test_dataset_race", "eval_test_dataset_race_2")


def main(arguments: list[str] | None = None) -> int:
    """Run the chain "demo" or "race", once or with each seed; returns the exit status."""
    options = parse(arguments)
    logging.getLogger("papermill").setLevel(logging.WARNING)
    cache = ROOT / parse_set(options.pairs).get("CACHE_DIR", f"cache/{options.name}")
    if status := prepare_cache(cache, options):
        return status
    splits = splits_of(read_manifest(cache))
    if options.stages and (missing := {"train", "validation"} - set(splits)):
        print(f"error: {cache} has no {' and no '.join(sorted(missing))} split; the stages need both", file=sys.stderr)
        return 1
    if "test" not in splits:
        print("this cache has no test split: the evaluations use validation, which also chose the checkpoints")
    runs, failed = [], []
    for seed in options.seeds or [None]:
        notebooks = plan(options, "test" if "test" in splits else "validation", seed)
        try:
            for notebook, parameters in unfinished(notebooks) if options.seeds and not options.fresh else notebooks:
                if run_notebook(notebook, parameters) == STOPPED:
                    return STOPPED
            runs.append(notebooks[0][1]["RUN_DIR"])
        except RaceError as error:  # the other seeds run all the same
            failed.append(f"seed {seed}: {error}")
            print(f"error: {error}", file=sys.stderr)
    if runs and options.seeds:
        out = ROOT / "runs" / f"{run_name(options)}-over-seeds" / "results.csv"
        if options.limit_questions is not None:
            print("a trial run: each seed has its own sample of questions, which adds to the spread")
        if report_over_seeds([*(str(ROOT / run) for run in runs), "--out", str(out)]):
            return 1
        if failed:
            print("\n".join(["", "not finished; the same command resumes them:", *failed]), file=sys.stderr)
    elif runs:
        print(pd.read_csv(ROOT / runs[0] / "results.csv")[RESULT_COLUMNS].to_string(index=False))
        print(f"notebooks, figures and predictions: {runs[0]}; checkpoints: {notebooks[0][1]['CHECKPOINT_DIR']}")
    return 1 if failed else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m race.chain", description=__doc__)
    add = parser.add_argument
    add("name", choices=("demo", "race"), help="the embedded corpus, or RACE with albert-base-v2")
    add("--source", help="source of the cache of 'race' (default ehovy/race)")
    add("--model", help="base model of 'race' (default albert-base-v2)")
    add("--limit-questions", type=int, metavar="N", help="trial run on N random questions of each split")
    add("--stages", nargs="*", choices=CHAIN, default=list(CHAIN), help="only these; none: the evaluations only")
    add("--base-checkpoint", help="checkpoint from which the first of --stages starts (e2 or e3)")
    add("--seeds", nargs="+", type=int, help="run once with each seed, in folders NAME-seedN; skips finished runs")
    again = "train the stages again from their start, once (--fresh 2: once more); old files move to earlier/"
    add("--fresh", nargs="?", const=1, default=0, type=int, metavar="N", help=again)
    given = "parameters of the notebooks, such as MAX_EPOCHS=3; e3.MAX_EPOCHS=3 for one stage"
    add("--set", nargs="+", action="extend", default=[], dest="pairs", metavar="NAME=VALUE", help=given)
    options = parser.parse_args(arguments)
    try:
        for stage in CHAIN:
            read(parse_set(options.pairs, stage))
        named = parse_set(options.pairs)
    except RaceError as error:
        parser.error(str(error))
    if options.name == "demo" and "CACHE_DIR" in named:
        parser.error("--set CACHE_DIR: the demo makes a cache of its own")
    if options.seeds and (taken := {"CHECKPOINT_DIR", "RUN_DIR", "SEED"} & named.keys()):
        parser.error(f"--set {', '.join(sorted(taken))}: --seeds sets it for each seed")
    if options.base_checkpoint and options.stages[:1] in ([], ["e1"]):
        parser.error("--base-checkpoint goes with --stages e2 or e3: e1 starts from the pretrained model")
    if sorted(set(options.stages)) != options.stages:
        parser.error(f"--stages {' '.join(options.stages)}: name each once, in the order of the chain")
    if options.seeds and len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds {' '.join(map(str, options.seeds))}: name each once")
    return options


def prepare_cache(cache: Path, options: argparse.Namespace) -> int:
    """Make the cache, or verify one that was made before on a node with internet; returns the exit status."""
    if options.name == "demo":
        return generate_race_cache(["--source", "demo", "--out", str(cache), "--force"])
    if not (cache / "manifest.json").exists():
        made_from = ["--source", options.source or "ehovy/race", "--model", options.model or "albert-base-v2"]
        return generate_race_cache([*made_from, "--out", str(cache)])
    manifest = read_manifest(cache)
    for asked, part in ((options.source, "source"), (options.model, "model")):
        if asked not in (None, manifest[part]["name"]):
            made_from = f"{part} {manifest[part]['name']}, not {asked}"
            print(f"error: {cache} was made from {made_from}; move it away", file=sys.stderr)
            return 1
    return generate_race_cache(["--verify", str(cache)])


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
        own = {"FRESH": options.fresh}
        own |= DEMO[stage] if options.name == "demo" else {}
        if options.base_checkpoint and stage == options.stages[0]:
            own |= {"BASE_CHECKPOINT": options.base_checkpoint}
        notebooks.append((CHAIN[stage], common | own, stage))
    notebooks += [(notebook, common | {"SPLIT": split}, None) for notebook in EVALUATIONS]
    return [(notebook, parameters | _given(options, notebook, stage)) for notebook, parameters, stage in notebooks]


def _given(options: argparse.Namespace, notebook: str, stage: str | None) -> dict:
    """What --set says for a notebook: those of its parameters that are named."""
    import papermill

    known = papermill.inspect_notebook(Path(__file__).parents[1] / f"{notebook}.ipynb")
    return {name: value for name, value in parse_set(options.pairs, stage).items() if name in known}


def run_name(options: argparse.Namespace) -> str:
    """The name of the run's folders; a trial run is kept apart from real results."""
    return options.name if options.limit_questions is None else f"{options.name}-trial"


def unfinished(notebooks: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The notebooks from the first one on that was not finished with its parameters, as papermill noted in it."""
    for number, (notebook, parameters) in enumerate(notebooks):
        try:
            path = ROOT / parameters["RUN_DIR"] / f"{notebook}.ipynb"
            noted = json.loads(path.read_text(encoding="utf-8"))["metadata"]["papermill"]
            if noted["exception"] is not None or noted["end_time"] is None or noted["parameters"] != parameters:
                return notebooks[number:]
        except (FileNotFoundError, ValueError, KeyError):
            return notebooks[number:]
        print(f"── {parameters['RUN_DIR']}: {notebook} skipped, finished {noted['end_time']}", flush=True)
    return []


def run_notebook(notebook: str, parameters: dict) -> int:
    """Execute one notebook; what it prints is shown at once, and saved. Raises RaceError if a cell fails.

    Returns 0, or STOPPED if a signal ended it: the same command resumes it.
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
            raise RaceError(f"{place}: {error.ename}: {error.evalue}\nthe executed cells are in {executed}") from None
        except (DeadKernelError, KeyboardInterrupt):
            if not received:
                raise RaceError(f"{notebook}: its process died (out of memory?); see {executed}") from None
    if received:
        print(f"── {notebook} was stopped: run this again to resume", flush=True)
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
