"""Run the whole job headless: the cache, the stages, the evaluations. Executed notebooks are kept in runs/NAME."""

import argparse
import contextlib
import itertools
import json
import logging
import signal
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pandas as pd
import psutil

from generate_race_cache import main as generate_race_cache
from race import CHAIN, RACE_QUESTIONS, RaceError
from race.data import Cache, RaceDataModule
from race.files import atomic_write
from race.parameters import ROOT, Settings, check, parse_set, read, table
from race.recipes import BASELINE, Recipe, named_recipes, run_name
from race.report.sentences import over_seeds, planning
from race.score.predictions import RESULT_COLUMNS, write_json
from race.score.runs import Run, stages_over_seeds

STOPPED = 75  # exit status: ended by a signal, run again to resume (EX_TEMPFAIL of sysexits.h)
EVALUATIONS = ("eval_test_dataset_race", "eval_test_dataset_race_2")
COMPARISON = "compare_recipes"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
MADE_FROM = {"race": {"source": "ehovy/race", "model": "albert-base-v2"}, "demo": {"source": "demo", "model": "demo"}}
OF_A_RUN = {"CHECKPOINT_DIR", "RUN_DIR", "SEED", "RECIPES", "SEEDS", "RUNS"}  # of several runs each has its own
GONE = {
    "--fresh": "--fresh is gone: to train a stage again, move its files away or give other folders, with "
    "--set CHECKPOINT_DIR=… RUN_DIR=… (docs/resuming.md)",
    "--base-checkpoint": "--base-checkpoint is gone: give --set e2.BASE_CHECKPOINT=…, or that of e3",
    "--jobs": "--jobs is gone: start the command once for each seed, as --seeds 1 and --seeds 2, then with all of them",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the recipes of "demo" or "race", once or with each seed; returns the exit status."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    logging.getLogger("papermill").setLevel(logging.WARNING)
    folder = ROOT / parse_set(options.pairs).get("CACHE_DIR", f"cache/{options.name}")
    if options.difference is not None:
        known = Cache(folder).manifest["splits"]["test"]["questions"] if folder.exists() else RACE_QUESTIONS["test"]
        runs = len(options.seeds or [None]), max(1, len(options.recipes) - 1)
        print(planning(options.difference, min(known, options.limit_questions or known), *runs))
        return 0
    if status := prepare_cache(folder, options):
        return status
    split = "test" if "test" in Cache(folder).splits else "validation"
    if split == "validation":
        print("this cache has no test split: the evaluations use validation, which also chose the checkpoints")
    runs = {}
    for seed, recipe in itertools.product(options.seeds or [None], options.recipes):
        notebooks = plan(options, recipe, split, seed)
        run = notebooks[0][1]["RUN_DIR"]
        write_json(ROOT / run / "recipe.json", recipe.record())
        runs[run] = notebooks
    several = options.seeds or len(options.recipes) > 1
    failed = run_all({run: itertools.dropwhile(finished, runs[run]) if several else runs[run] for run in runs})
    if failed == {} and len(options.recipes) > 1:
        failed = run_all({COMPARISON: [comparison(options, split)]})
    elif failed is not None and len(options.recipes) == 1:
        failed |= report(options, [runs[run][-1][1] for run in runs if run not in failed])
    if failed:
        print("\n".join(["", "not finished:", *failed.values()]), file=sys.stderr)
    return STOPPED if failed is None else int(bool(failed))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; ends the process after --help or a usage error."""
    about = f"parameters that --set takes, those in capitals:\n\n{table()}"
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m race.chain", description=__doc__, epilog=about, formatter_class=layout)
    add = parser.add_argument
    add("name", choices=MADE_FROM, help="the embedded corpus, or RACE with albert-base-v2")
    add("--source", help="source of the cache (of 'race': ehovy/race)")
    add("--model", help="base model (of 'race': albert-base-v2)")
    add("--limit-questions", type=int, metavar="N", help="trial run on N random questions of each split")
    named = "chain (the default), constant, resets, step, linear, cosine, or a TOML file; several are compared"
    add("--recipe", nargs="+", action="extend", metavar="NAME", dest="recipes", help=named)
    add("--stages", nargs="*", choices=CHAIN, help="only these; none: the evaluations only")
    add("--seeds", nargs="+", type=int, help="run once with each seed, in folders NAME-seedN; skips finished notebooks")
    plan_only = "only say how many seeds and questions a true difference of so many points of accuracy takes"
    add("--difference", type=float, metavar="POINTS", help=plan_only)
    given = "parameters of the notebooks, such as MAX_EPOCHS=3; e3.MAX_EPOCHS=3 for one stage"
    add("--set", nargs="+", action="extend", default=[], dest="pairs", metavar="NAME=VALUE", help=given)
    for argument in arguments:
        if gone := GONE.get(argument.partition("=")[0]):
            parser.error(gone)
    options = parser.parse_args(arguments)
    try:
        _complete(options)
    except RaceError as error:
        parser.error(str(error))
    return options


def _complete(options: argparse.Namespace) -> None:
    """What follows from the options, such as recipes from their names; RaceError for what does not go together."""
    check(limit_questions=options.limit_questions, seeds=options.seeds, difference=options.difference)
    for stage in CHAIN:
        read(parse_set(options.pairs, stage))
    options.recipes = named_recipes(options.recipes or [BASELINE], options.name)
    for recipe in options.recipes:
        if missing := sorted(set(options.stages or ()) - recipe.stages.keys()):
            raise RaceError(f"--stages {' '.join(missing)}: recipe {recipe.name} has {', '.join(recipe.stages)} only")
    options.run = options.name + ("" if options.limit_questions is None else "-trial")  # apart from real results
    options.seeds = options.seeds and list(dict.fromkeys(options.seeds))
    own = OF_A_RUN if options.seeds or len(options.recipes) > 1 else set()
    if len(options.recipes) > 1:
        own = own.union(*(given for recipe in options.recipes for given in recipe.stages.values()))
    if taken := own & {pair.partition("=")[0].rpartition(".")[2] for pair in options.pairs}:
        what = "--seeds and the recipes set it for each run; recipes of your own go into a TOML file"
        raise RaceError(f"--set {', '.join(sorted(taken))}: {what}")


def prepare_cache(folder: Path, options: argparse.Namespace) -> int:
    """Make the cache, or verify one that was made before on a node with internet; returns the exit status."""
    asked = {"source": options.source, "model": options.model}
    if options.name == "demo" or not folder.exists():
        made_from = MADE_FROM[options.name] | {part: name for part, name in asked.items() if name}
        return generate_race_cache([*(f"--{part}={name}" for part, name in made_from.items()), f"--out={folder}"])
    for part, name in asked.items():
        if (made := Cache(folder).manifest[part]["name"]) != (name or made):
            print(f"error: {folder} was made from {part} {made}, not {name}; move it away", file=sys.stderr)
            return 1
    return generate_race_cache([f"--verify={folder}"])


def plan(options: argparse.Namespace, recipe: Recipe, split: str, seed: int | None = None) -> list[tuple[str, dict]]:
    """The notebooks of one run, in order, each with its parameters; of several recipes the stages only."""
    name = run_name(options.run, recipe.name, seed)
    own = {"CHECKPOINT_DIR": f"checkpoints/{name}", "RUN_DIR": f"runs/{name}"}
    own |= {} if seed is None else {"SEED": seed}
    stages = recipe.stages if options.stages is None else [stage for stage in CHAIN if stage in options.stages]
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
    import papermill

    known = papermill.inspect_notebook(Path(__file__).parents[1] / f"{notebook}.ipynb")
    given = {name: value for name, value in parse_set(options.pairs, stage).items() if name in known}
    return notebook, {"CACHE_DIR": f"cache/{options.name}", "LIMIT_QUESTIONS": options.limit_questions} | own | given


def finished(notebook: tuple[str, dict]) -> bool:
    """Whether a notebook was finished with these parameters, as run_notebook noted in it."""
    name, parameters = notebook
    try:
        executed = (ROOT / parameters["RUN_DIR"] / f"{name}.ipynb").read_text(encoding="utf-8")
        noted = json.loads(executed)["metadata"]["papermill"]
        same = noted["finished"] and noted["parameters"] == parameters
    except (FileNotFoundError, ValueError, KeyError):
        return False
    if same:
        print(f"── {parameters['RUN_DIR']}: {name} skipped, finished {noted['end_time']}", flush=True)
    return same


def report(options: argparse.Namespace, evaluated: list[dict]) -> dict[str, str]:
    """Print the results of one recipe, from the parameters of its runs' last notebook; {what: what failed}."""
    if evaluated and not options.seeds:
        folder = evaluated[0]["RUN_DIR"]
        print(pd.read_csv(ROOT / folder / "results.csv")[RESULT_COLUMNS].to_string(index=False))
        print(f"notebooks, figures and predictions: {folder}; checkpoints: {evaluated[0]['CHECKPOINT_DIR']}")
    elif evaluated:
        name = options.recipes[0].name
        runs = [Run(name, it["SEED"], str(ROOT / it["CHECKPOINT_DIR"]), str(ROOT / it["RUN_DIR"])) for it in evaluated]
        settings = Settings(evaluated[0] | {"SEED": 0, "RUN_DIR": f"runs/{run_name(options.run, name)}-over-seeds"})
        how, data = settings.scoring(), RaceDataModule(**settings.data())  # one sample of questions for all seeds
        try:
            split, out = how.pop("split"), ROOT / how.pop("run_dir")
            means, compared = stages_over_seeds(runs, data, split, **how)
        except RaceError as error:
            return {"over seeds": f"the results over seeds: {error}"}
        print(text := over_seeds(means, compared))
        found = {"verdict": text.splitlines(), "accuracies": means, "differences": compared}
        write_json(out / f"stages-{split}.json", found)
    return {}


def run_all(runs: dict[str, Iterable[tuple[str, dict]]]) -> dict[str, str] | None:
    """Run the notebooks of each run in their order; {run: what failed in it}, after which the other runs go on.

    None if a signal ended them: it is passed on to the notebook's process, which saves its state and ends.
    """
    received: list[int] = []
    failed: dict[str, str] = {}
    handlers = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in SIGNALS}
    try:
        with contextlib.chdir(ROOT), ThreadPoolExecutor(1) as worker:  # nbclient takes the main thread's signals over
            for run, notebook, parameters in [(run, *one) for run, notebooks in runs.items() for one in notebooks]:
                if received or run in failed:
                    continue
                work, told = worker.submit(run_notebook, notebook, parameters), set()
                while not wait([work], timeout=0.2).done:
                    if received:
                        _end_kernels(told)
                if (error := work.exception()) and not received:
                    failed[run] = f"{run}: {error if isinstance(error, RaceError) else repr(error)}"
                    print(f"error: {failed[run]}", file=sys.stderr)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        print("── stopped: run this again to resume", flush=True)
    return None if received else failed


def _end_kernels(told: set[psutil.Process]) -> None:
    """Send SIGTERM to notebooks' processes, but to none that was told before."""
    for kernel in set(psutil.Process().children()) - told:
        told.add(kernel)
        with contextlib.suppress(psutil.Error):  # one that has just ended
            kernel.terminate()


def run_notebook(notebook: str, parameters: dict) -> None:
    """Execute one notebook and print what it prints; raises RaceError if a cell fails, or its process is ended."""
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError

    executed = ROOT / parameters["RUN_DIR"] / f"{notebook}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    what = f"── {parameters['RUN_DIR']}: {notebook}"
    print(f"\n{what}", flush=True)
    started = time.perf_counter()
    try:
        done = papermill.execute_notebook(
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
    except DeadKernelError:
        raise RaceError(f"{notebook}: its process died (out of memory?); see {executed}") from None
    done.metadata.papermill["finished"] = True  # papermill's own notes are the same where a process was killed
    atomic_write(executed, lambda file: nbformat.write(done, file))
    print(f"{what} done in {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
