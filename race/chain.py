"""Run the whole job headless: the cache, the stages, the evaluations. Executed notebooks are kept in runs/NAME."""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import psutil
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient.exceptions import DeadKernelError

from generate_race_cache import main as generate_race_cache
from race import CHAIN, SIGNALS, RaceError
from race.data import Cache, RaceDataModule
from race.device import CODE
from race.files import atomic_write, file_hash, write_json
from race.parameters import ROOT, Settings, check, names_in, parse_set, read, table
from race.recipes import BASELINE, Recipe, named_recipes, run_name
from race.report.sentences import over_seeds
from race.report.tables import ACCURACIES, styled
from race.score.runs import Run, record_margin, stages_over_seeds

STOPPED = 75  # exit status: ended by a signal, run again to resume (EX_TEMPFAIL of sysexits.h)
EVALUATIONS = ("eval_test_dataset_race", "eval_test_dataset_race_2")
COMPARISON = "compare_recipes"
SHOWN = "name, learning_rate, epochs: epochs trained, chosen_epoch: its epoch (from 0), accuracy, "
SHOWN += "accuracy_low: 95 % interval, middle, high"  # of the checkpoints
MADE_FROM = {"race": {"source": "ehovy/race", "model": "albert-base-v2"}, "demo": {"source": "demo", "model": "demo"}}
OF_A_RUN = {"CHECKPOINT_DIR", "RUN_DIR", "SEED", "RECIPES", "SEEDS", "RUNS"}  # of several runs each has its own


def main(arguments: list[str] | None = None) -> int:
    """Run the recipes of "demo" or "race", once or with each seed; returns the exit status. Raises RaceError."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    folder = ROOT / parse_set(options.pairs).get("CACHE_DIR", f"cache/{options.name}")
    if status := prepare_cache(folder, options):
        return status
    split = "test" if "test" in Cache(folder).splits else "validation"
    if split == "validation":
        print("this cache has no test split: the evaluations use validation, which also chose the checkpoints")
    if len(options.recipes) > 1:
        planned = comparison(options, split)[1]
        record_margin(ROOT / planned["RUN_DIR"], read(planned).get("DIFFERENCE", 1.0))
    notebooks, evaluated = [], []
    for seed, recipe in itertools.product(options.seeds or [None], options.recipes):
        own = plan(options, recipe, split, seed)
        evaluated.append((own[-1][1], recipe))
        notebooks += itertools.dropwhile(finished, own) if options.several else own
    failed = run_all(notebooks)
    ended = [(parameters, recipe) for parameters, recipe in evaluated if parameters["RUN_DIR"] not in failed]
    for parameters, recipe in ended:
        write_json(ROOT / parameters["RUN_DIR"] / "recipe.json", dataclasses.asdict(recipe))
    if len(options.recipes) == 1 and options.seeds and ended:
        report_seeds(options, [parameters for parameters, _ in ended])
    elif len(options.recipes) == 1:
        for parameters, _ in ended:
            report(parameters, EVALUATIONS[1], "chain", "checkpoints", SHOWN)
    elif not failed and not (failed := run_all([compared := comparison(options, split)])):
        report(compared[1], COMPARISON, "recipes", "accuracies", ACCURACIES)
    if failed:
        print("\nnot finished:", *failed.values(), sep="\n", file=sys.stderr)
    return int(bool(failed))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line, with recipes for their names; raises RaceError for what does not go together."""
    parser = argparse.ArgumentParser("python -m race.chain", description=__doc__, epilog=table())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("corpus", choices=MADE_FROM, help="RACE with albert-base-v2, or the embedded corpus")
    add("--name", help="of the folders in cache, checkpoints and runs (default: race or demo)")
    add("--source", type=os.path.expanduser, help="source of the cache (of 'race': ehovy/race)")
    add("--model", type=os.path.expanduser, help="base model (of 'race': albert-base-v2)")
    add("--limit-questions", type=int, metavar="N", help="trial run on N random questions of each split")
    named = "chain (the default), constant, resets, step, linear, cosine, or a TOML file; several are compared"
    add("--recipe", nargs="+", action="extend", type=os.path.expanduser, metavar="NAME", dest="recipes", help=named)
    add("--stages", nargs="*", choices=CHAIN, help="only these; none: the evaluations only")
    add("--seeds", nargs="+", type=int, help="run once with each seed, in folders NAME-seedN; skips finished notebooks")
    given = "parameters in capitals below, such as MAX_EPOCHS=3; e3.MAX_EPOCHS=3 for one stage"
    add("--set", nargs="+", action="extend", default=[], dest="pairs", metavar="NAME=VALUE", help=given)
    options = parser.parse_args(arguments)
    check(limit_questions=options.limit_questions, seeds=options.seeds)
    options.recipes = named_recipes(options.recipes or [BASELINE], options.corpus)
    options.name = options.name or options.corpus
    if len(options.recipes) > 1 and options.stages is not None:
        raise RaceError("--stages goes with one recipe")
    stages = sorted({stage for recipe in options.recipes for stage in recipe.stages})
    if missing := sorted({*(options.stages or ())}.difference(stages)):
        raise RaceError(f"--stages {' '.join(missing)}: recipe {options.recipes[0].name} has {', '.join(stages)} only")
    options.run = options.name + ("" if options.limit_questions is None else "-trial")  # apart from real results
    options.seeds = options.seeds and list(dict.fromkeys(options.seeds))
    options.several = bool(options.seeds) or len(options.recipes) > 1
    own, others = OF_A_RUN if options.several else set(), EVALUATIONS
    if len(options.recipes) > 1:
        own, others = own.union(*(given for it in options.recipes for given in it.stages.values())), [COMPARISON]
    takers = {it: names_in(CHAIN[it]) - own for it in options.stages or stages}
    takers[""] = set().union(*map(names_in, [*map(CHAIN.get, stages), *others])) - own
    with contextlib.chdir(ROOT):  # from which folders are meant
        for stage in CHAIN:
            read(parse_set(options.pairs, stage, takers))
    return options


def prepare_cache(folder: Path, options: argparse.Namespace) -> int:
    """Make the cache, or verify one that was made before on a node with internet; returns the exit status."""
    asked = {part: name for part, name in (("source", options.source), ("model", options.model)) if name}
    if options.corpus == "race" != options.name and not (options.source or folder.exists()):
        raise RaceError(f"there is no {folder}: make it with generate_race_cache.py, or give --source and --model")
    if options.corpus == "demo" or not folder.exists():
        made_from = MADE_FROM[options.corpus] | asked
        return generate_race_cache([*(f"--{part}={name}" for part, name in made_from.items()), f"--out={folder}"])
    for part, name in asked.items():
        if (made := Cache(folder).manifest[part]["name"]) != name:
            raise RaceError(f"{folder} was made from {part} {made}, not {name}; move it away")
    return generate_race_cache([f"--verify={folder}"])


def plan(options: argparse.Namespace, recipe: Recipe, split: str, seed: int | None = None) -> list[tuple[str, dict]]:
    """The notebooks of one run, in order, each with its parameters; of several recipes the stages only."""
    name = run_name(options.run, recipe.name, seed)
    own = {"CHECKPOINT_DIR": f"checkpoints/{name}", "RUN_DIR": f"runs/{name}"}
    own |= {} if seed is None else {"SEED": seed}
    stages = [stage for stage in recipe.stages if options.stages is None or stage in options.stages]
    notebooks = [prepared(options, CHAIN[stage], own | recipe.stages[stage], stage) for stage in stages]
    evaluations = EVALUATIONS if len(options.recipes) == 1 else ()
    return notebooks + [prepared(options, notebook, own | {"SPLIT": split}) for notebook in evaluations]


def comparison(options: argparse.Namespace, split: str) -> tuple[str, dict]:
    """The notebook that compares all recipes of the command, with its parameters."""
    recipes = [recipe.name for recipe in options.recipes]
    compared = "-".join([*recipes, f"{len(options.seeds)}-seeds"] if options.seeds else recipes)
    own = {"CHECKPOINT_DIR": f"checkpoints/{options.run}", "RUNS": f"runs/{options.run}", "SPLIT": split}
    own |= {"RUN_DIR": f"runs/{options.run}-recipes/{compared}", "RECIPES": recipes, "SEEDS": options.seeds}
    return prepared(options, COMPARISON, own)


def prepared(options: argparse.Namespace, notebook: str, own: dict, stage: str | None = None) -> tuple[str, dict]:
    """A notebook with its parameters: those of all notebooks, its own, and those of --set that it has."""
    given = {name: value for name, value in parse_set(options.pairs, stage).items() if name in names_in(notebook)}
    return notebook, {"CACHE_DIR": f"cache/{options.name}", "LIMIT_QUESTIONS": options.limit_questions} | own | given


def finished(notebook: tuple[str, dict]) -> bool:
    """Whether a notebook was finished, as run_notebook noted in it, with what it would be run with now."""
    name, parameters = notebook
    executed = ROOT / parameters["RUN_DIR"] / f"{name}.ipynb"
    try:
        noted = json.loads(executed.read_text(encoding="utf-8"))["metadata"]["papermill"]
    except (FileNotFoundError, ValueError, KeyError):
        return False
    if same := noted["parameters"] == parameters and noted.get("finished") == inputs(name, parameters):
        print(f"── {parameters['RUN_DIR']}: {name} skipped, finished {noted['end_time']}", flush=True)
    return same


def inputs(notebook: str, parameters: dict) -> dict:
    """What decides a notebook's results beside its parameters: cells, code, cache, checkpoints of its stage and before.

    Of a stage the code of the method, of an evaluation all code; and whether its results are still there.
    """
    cells, folder = nbformat.read(ROOT / f"{notebook}.ipynb", 4).cells, ROOT / parameters["CHECKPOINT_DIR"]
    cells, names = [cell.source for cell in cells if cell.cell_type == "code"], list(CHAIN.values())
    stages = list(CHAIN)[: names.index(notebook) + 1 if notebook in names else None]
    files = [path for stage in stages for path in sorted(folder.glob(f"{stage}-*.ckpt"))]
    given = [ROOT / parameters[name] for name in ("BASE_CHECKPOINT", "CHECKPOINT") if parameters.get(name)]
    found = [(path.name, path.stat()) for path in (*files, *filter(Path.is_file, given))]
    code = [path.read_bytes() for path in sorted(ROOT.glob("race/**/*.py")) if notebook not in names]
    return {
        "cells": hashlib.sha256("\n".join(cells).encode()).hexdigest(),
        "code": [CODE, hashlib.sha256(b"".join(code)).hexdigest()],
        "cache": file_hash(ROOT / parameters["CACHE_DIR"] / "manifest.json"),
        "checkpoints": [[name, of_file.st_size, of_file.st_mtime_ns] for name, of_file in found],
        "results": notebook in names or (ROOT / parameters["RUN_DIR"] / "results.csv").exists(),
    }


def report(parameters: dict, notebook: str, kind: str, table: str, columns: str) -> None:
    """Print what a notebook has found, as it kept that in KIND-SPLIT.json, and where it is."""
    folder = ROOT / parameters["RUN_DIR"]
    newest = max(folder.glob(f"{kind}-*.json"), key=lambda path: path.stat().st_mtime_ns)
    kept = json.loads(newest.read_text(encoding="utf-8"))
    print(*kept["verdict"], sep="\n")
    print(styled(pd.DataFrame(kept[table]), columns).data.to_string(index=False))
    print(f"the notebook, with its figures: {parameters['RUN_DIR']}/{notebook}.ipynb")


def report_seeds(options: argparse.Namespace, evaluated: list[dict]) -> None:
    """Print how the stages of one recipe do over its seeds, from the parameters of the last notebook of each run."""
    name = options.recipes[0].name
    settings = Settings(evaluated[0] | {"SEED": 0, "RUN_DIR": f"runs/{run_name(options.run, name)}-over-seeds"})
    how, data = settings.scoring(), RaceDataModule(**settings.data())  # one sample of questions for all seeds
    split, out = how.pop("split"), ROOT / how.pop("run_dir")
    places = [(it["SEED"], str(ROOT / it["CHECKPOINT_DIR"]), str(ROOT / it["RUN_DIR"])) for it in evaluated]
    runs = [Run(name, *it, str(out) if settings.LIMIT_QUESTIONS else run_dir) for *it, run_dir in places]
    means, compared = stages_over_seeds(runs, data, split, **how)
    verdict = over_seeds(means, compared, [run.seed for run in runs])
    print(*verdict, sep="\n")
    kept = "-".join(filter(None, ["stages", split, data.level]))
    write_json(out / f"{kept}.json", {"verdict": verdict, "accuracies": means} | compared)


def run_all(notebooks: list[tuple[str, dict]]) -> dict[str, str]:
    """Run the notebooks in their order; {RUN_DIR: what failed there}, after which the other runs go on.

    A signal is passed on to the notebook's process, which saves its state and ends; then raises SystemExit.
    """
    received, failed = [], {}
    handlers = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in SIGNALS}
    try:
        with ThreadPoolExecutor(1) as worker:  # nbclient takes the main thread's signals over
            for notebook, parameters in notebooks:
                if received or (folder := parameters["RUN_DIR"]) in failed:
                    continue
                work, told = worker.submit(run_notebook, notebook, parameters), set()
                while not wait([work], timeout=0.2).done:
                    for kernel in set(psutil.Process().children()) - told if received else ():  # each once
                        told.add(kernel)
                        with contextlib.suppress(psutil.Error):  # one that has just ended
                            kernel.terminate()
                if (error := work.exception()) and not received:
                    failed[folder] = f"{folder}: {error if isinstance(error, RaceError) else repr(error)}"
                    print(f"error: {failed[folder]}", file=sys.stderr)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        print("── stopped: run this again to resume", flush=True)
        sys.exit(STOPPED)
    return failed


class OwnKernel(AsyncKernelManager):  # of this environment's Python, whatever kernel specs are registered
    kernel_spec = KernelSpecManager(kernel_dirs=[]).get_kernel_spec("python3")


def run_notebook(notebook: str, parameters: dict) -> None:
    """Execute one notebook and print what it prints; raises RaceError if a cell fails, or its process is ended."""
    finished = ROOT / parameters["RUN_DIR"] / f"{notebook}.ipynb"
    executed = finished.with_name(f"{notebook}-last-run.ipynb") if finished.exists() else finished
    executed.parent.mkdir(parents=True, exist_ok=True)
    what = f"── {parameters['RUN_DIR']}: {notebook}"
    print(f"\n{what}", flush=True)
    how = {"progress_bar": False, "stdout_file": sys.stdout, "extra_arguments": ["--log-level=40"]}  # errors only
    how |= {"cwd": ROOT, "kernel_manager_class": OwnKernel}
    try:
        done = papermill.execute_notebook(ROOT / f"{notebook}.ipynb", executed, parameters, **how)
    except papermill.exceptions.PapermillExecutionError as error:
        told = f"{notebook}, cell {error.exec_count}: {error.ename}: {error.evalue}"
        raise RaceError(f"{told}\nthe executed cells are in {executed}") from None
    except DeadKernelError:
        raise RaceError(f"{notebook}: its process died (out of memory?); see {executed}") from None
    # papermill's own notes are the same where a process was killed
    done.metadata.papermill["finished"] = inputs(notebook, parameters)
    atomic_write(finished, lambda file: nbformat.write(done, file))
    if executed != finished:
        executed.unlink()
    print(f"{what} done in {done.metadata.papermill['duration']:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RaceError, OSError) as error:
        sys.exit(f"error: {error}")
