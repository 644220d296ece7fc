"""Run the whole job headless: the cache, the stages, the evaluations. Executed notebooks are kept in runs/NAME."""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pandas as pd
import psutil

from generate_race_cache import main as generate_race_cache
from race import CHAIN, RACE_QUESTIONS, RaceError
from race.data.cache import read_manifest, splits_of
from race.files import atomic_write
from race.parameters import ROOT, parse_set, read
from race.recipes import BASELINE, Recipe, named_recipes, run_name
from race.report.recipes import planning
from race.score.results import RESULT_COLUMNS, write_json
from race.score.seeds import main as report_over_seeds

STOPPED = 75  # exit status: ended by a signal, run again to resume (EX_TEMPFAIL of sysexits.h)
EVALUATIONS = ("eval_test_dataset_race", "eval_test_dataset_race_2")
COMPARISON = "compare_recipes"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipes of "demo" or "race", once or with each seed; returns the exit status."""
    options = parse(arguments)
    logging.getLogger("papermill").setLevel(logging.WARNING)
    cache = ROOT / parse_set(options.pairs).get("CACHE_DIR", f"cache/{options.name}")
    if options.difference is not None:
        print(planned(options, cache))
        return 0
    if status := prepare_cache(cache, options):
        return status
    splits = splits_of(read_manifest(cache))
    if options.stages and (missing := {"train", "validation"} - set(splits)):
        print(f"error: {cache} has no {' and no '.join(sorted(missing))} split; the stages need both", file=sys.stderr)
        return 1
    if "test" not in splits:
        print("this cache has no test split: the evaluations use validation, which also chose the checkpoints")
    split = "test" if "test" in splits else "validation"
    runs = {}
    for seed in options.seeds or [None]:
        for recipe in options.recipes:
            notebooks = plan(options, recipe, split, seed)
            folder = notebooks[0][1]["RUN_DIR"]
            write_json(ROOT / folder / "recipe.json", recipe.record())
            again = options.fresh or not (options.seeds or len(options.recipes) > 1)
            runs[folder] = notebooks if again else unfinished(notebooks)
    failed = run_all(runs, options.jobs)
    if len(options.recipes) > 1 and failed == {}:
        failed = run_all({COMPARISON: [comparison(options, split)]})
    if failed is None:
        return STOPPED
    if len(options.recipes) == 1:
        failed |= report(options, runs, failed)
    if failed:
        print("\n".join(["", "not finished:", *failed.values()]), file=sys.stderr)
    return 1 if failed else 0


def report(options: argparse.Namespace, runs: dict, failed: dict[str, str]) -> dict[str, str]:
    """Print the results of one recipe: of its run, or over seeds; {what: what failed}."""
    if options.seeds:
        out = ROOT / "runs" / f"{_name(options, options.recipes[0])}-over-seeds" / "results.csv"
        if options.limit_questions is not None:
            print("a trial run: each seed has its own sample of questions, which adds to the spread")
        done = [str(ROOT / folder) for folder in runs if folder not in failed]
        if done and report_over_seeds([*done, *(["--out", str(out)] if len(runs) > 1 else [])]):
            return {"over seeds": "the results over seeds cannot be reported (above)"}
    elif not failed:
        ((folder, notebooks),) = runs.items()
        print(pd.read_csv(ROOT / folder / "results.csv")[RESULT_COLUMNS].to_string(index=False))
        print(f"notebooks, figures and predictions: {folder}; checkpoints: {notebooks[0][1]['CHECKPOINT_DIR']}")
    return {}


def planned(options: argparse.Namespace, cache: Path) -> str:
    """How many seeds and questions a difference needs, before anything is run."""
    known = read_manifest(cache)["splits"] if (cache / "manifest.json").exists() else {}
    questions = known.get("test", {}).get("questions") or RACE_QUESTIONS["test"]
    questions = min(questions, options.limit_questions or questions)
    return planning(options.difference, questions, len(options.seeds or [None]), max(1, len(options.recipes) - 1))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m race.chain", description=__doc__)
    add = parser.add_argument
    add("name", choices=("demo", "race"), help="the embedded corpus, or RACE with albert-base-v2")
    add("--source", help="source of the cache of 'race' (default ehovy/race)")
    add("--model", help="base model of 'race' (default albert-base-v2)")
    add("--limit-questions", type=int, metavar="N", help="trial run on N random questions of each split")
    named = "chain (the default), constant, resets, step, linear, cosine, or a TOML file; several are compared"
    add("--recipe", nargs="+", action="extend", metavar="NAME", dest="recipes", help=named)
    add("--stages", nargs="*", choices=CHAIN, default=list(CHAIN), help="only these; none: the evaluations only")
    add("--base-checkpoint", help="checkpoint from which the first of --stages starts (e2 or e3)")
    add("--seeds", nargs="+", type=int, help="run once with each seed, in folders NAME-seedN; skips finished runs")
    plan_only = "only say how many seeds and questions a true difference of so many points of accuracy takes"
    add("--difference", type=float, metavar="POINTS", help=plan_only)
    add("--jobs", type=int, default=1, metavar="N", help="so many runs side by side, which share the CPU's cores")
    again = "train the stages again from their start, once (--fresh 2: once more); old files move to earlier/"
    add("--fresh", nargs="?", const=1, default=0, type=int, metavar="N", help=again)
    given = "parameters of the notebooks, such as MAX_EPOCHS=3; e3.MAX_EPOCHS=3 for one stage"
    add("--set", nargs="+", action="extend", default=[], dest="pairs", metavar="NAME=VALUE", help=given)
    options = parser.parse_args(arguments)
    try:
        for stage in CHAIN:
            read(parse_set(options.pairs, stage))
        named = parse_set(options.pairs)
        options.recipes = named_recipes(options.recipes or [BASELINE], options.name)
    except RaceError as error:
        parser.error(str(error))
    if options.name == "demo" and "CACHE_DIR" in named:
        parser.error("--set CACHE_DIR: the demo makes a cache of its own")
    several = options.seeds or len(options.recipes) > 1
    if several and (taken := {"CHECKPOINT_DIR", "RUN_DIR", "SEED", "RECIPES", "SEEDS", "RUNS"} & named.keys()):
        parser.error(f"--set {', '.join(sorted(taken))}: --seeds and several recipes set it for each run")
    own = {name for recipe in options.recipes for given in recipe.stages.values() for name in given}
    taken = own & {pair.partition("=")[0].rpartition(".")[2] for pair in options.pairs}
    if len(options.recipes) > 1 and taken:
        parser.error(f"--set {', '.join(sorted(taken))}: the recipes set it; write recipes of your own in a TOML file")
    if len(options.recipes) > 1 and (options.stages != list(CHAIN) or options.base_checkpoint):
        parser.error("--stages and --base-checkpoint go with one recipe")
    for recipe in options.recipes if options.stages != list(CHAIN) else ():
        if missing := [stage for stage in options.stages if stage not in recipe.stages]:
            parser.error(f"--stages {' '.join(missing)}: recipe {recipe.name} has {', '.join(recipe.stages)} only")
    if options.difference is not None and not options.difference > 0:
        parser.error(f"--difference {options.difference}: expected points of accuracy above 0")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: expected 1 or more")
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


def plan(options: argparse.Namespace, recipe: Recipe, split: str, seed: int | None = None) -> list[tuple[str, dict]]:
    """The notebooks of one run, in order, each with its parameters; of several recipes the stages only."""
    name = _name(options, recipe, seed)
    common = {
        "CACHE_DIR": f"cache/{options.name}",
        "CHECKPOINT_DIR": f"checkpoints/{name}",
        "RUN_DIR": f"runs/{name}",
        "LIMIT_QUESTIONS": options.limit_questions,
    }
    common |= {} if seed is None else {"SEED": seed}
    notebooks = []
    for stage in (stage for stage in options.stages if stage in recipe.stages):
        own = {"FRESH": options.fresh} | recipe.stages[stage]
        if options.base_checkpoint and stage == options.stages[0]:
            own |= {"BASE_CHECKPOINT": options.base_checkpoint}
        notebooks.append((CHAIN[stage], common | own, stage))
    if len(options.recipes) == 1:
        notebooks += [(notebook, common | {"SPLIT": split}, None) for notebook in EVALUATIONS]
    return [(notebook, parameters | _given(options, notebook, stage)) for notebook, parameters, stage in notebooks]


def _given(options: argparse.Namespace, notebook: str, stage: str | None) -> dict:
    """What --set says for a notebook: those of its parameters that are named."""
    import papermill

    known = papermill.inspect_notebook(Path(__file__).parents[1] / f"{notebook}.ipynb")
    return {name: value for name, value in parse_set(options.pairs, stage).items() if name in known}


def comparison(options: argparse.Namespace, split: str) -> tuple[str, dict]:
    """The notebook that compares all recipes of the command, with its parameters."""
    name, recipes = _name(options), [recipe.name for recipe in options.recipes]
    compared = "-".join([*recipes, f"{len(options.seeds)}-seeds"] if options.seeds else recipes)
    parameters = {
        "CACHE_DIR": f"cache/{options.name}",
        "CHECKPOINT_DIR": f"checkpoints/{name}",
        "RUNS": f"runs/{name}",
        "RUN_DIR": f"runs/{name}-recipes/{compared}",
        "RECIPES": recipes,
        "SEEDS": options.seeds,
        "LIMIT_QUESTIONS": options.limit_questions,
        "SPLIT": split,
    }
    return COMPARISON, parameters | _given(options, COMPARISON, None)


def _name(options: argparse.Namespace, recipe: Recipe | None = None, seed: int | None = None) -> str:
    """The name of a run's folders; a trial run is kept apart from real results."""
    name = options.name if options.limit_questions is None else f"{options.name}-trial"
    return run_name(name, recipe.name if recipe else BASELINE, seed)


def unfinished(notebooks: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The notebooks from the first one on that was not finished with its parameters, as run_notebook noted in it."""
    for number, (notebook, parameters) in enumerate(notebooks):
        try:
            path = ROOT / parameters["RUN_DIR"] / f"{notebook}.ipynb"
            noted = json.loads(path.read_text(encoding="utf-8"))["metadata"]["papermill"]
            if not noted["finished"] or noted["parameters"] != parameters:
                return notebooks[number:]
        except (FileNotFoundError, ValueError, KeyError):
            return notebooks[number:]
        print(f"── {parameters['RUN_DIR']}: {notebook} skipped, finished {noted['end_time']}", flush=True)
    return []


def run_all(runs: dict[str, list[tuple[str, dict]]], jobs: int = 1) -> dict[str, str] | None:
    """Run the notebooks of each run in their order, `jobs` runs side by side; {run: what failed in it}.

    None if a signal ended them: it is passed on to the notebooks' processes, which save their states and end.
    """
    received: list[int] = []
    told: set[int] = set()
    handlers = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in SIGNALS}
    threads = os.environ.get("OMP_NUM_THREADS")
    if jobs > 1 and threads is None:
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    try:
        with contextlib.chdir(ROOT), ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(_run_one, run, runs[run], received, jobs == 1): run for run in runs}
            waiting = set(futures)
            while waiting:
                waiting = wait(waiting, timeout=0.2).not_done
                if received:
                    _pass_on(told)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
    if received:
        print("── stopped: run this again to resume", flush=True)
        return None
    return {run: problem for future, run in futures.items() if (problem := future.result())}


def _run_one(run: str, notebooks: list[tuple[str, dict]], received: list[int], shown: bool) -> str | None:
    """What failed in a run, if anything; the notebooks of other runs go on all the same."""
    try:
        for notebook, parameters in notebooks:
            if not received:
                run_notebook(notebook, parameters, shown)
    except Exception as error:  # a kernel that does not start, a full disk
        problem = str(error) if isinstance(error, RaceError) else repr(error)
        if not received:
            print(f"error: {problem}", file=sys.stderr)
        return problem if problem.startswith(run) else f"{run}: {problem}"


def _pass_on(told: set[int]) -> None:
    """Send SIGTERM to the notebooks' processes that have not been told yet."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # one that has just ended
            if child.pid not in told and "ipykernel" in " ".join(child.cmdline()):
                told.add(child.pid)
                child.send_signal(signal.SIGTERM)


def run_notebook(notebook: str, parameters: dict, shown: bool = True) -> None:
    """Execute one notebook; shown: print what it prints, at once. Raises RaceError if a cell fails, or it is ended."""
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError

    executed = ROOT / parameters["RUN_DIR"] / f"{notebook}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    what = f"── {parameters['RUN_DIR']}: {notebook}"
    print(f"\n{what}" if shown else what, flush=True)
    started = time.perf_counter()
    try:
        done = papermill.execute_notebook(
            ROOT / f"{notebook}.ipynb",
            executed,
            parameters,
            cwd=ROOT,
            progress_bar=False,
            stdout_file=sys.stdout if shown else None,
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
