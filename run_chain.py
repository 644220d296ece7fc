"""Run the whole job headless: cache, three stages, both evaluations; executed notebooks stay in runs/NAME."""

import argparse
import contextlib
import logging
import signal
import sys
import time
from pathlib import Path

import psutil

from demo import STAGES as DEMO_STAGES
from generate_race_cache import main as generate_race_cache
from race_cache import read_manifest, splits_of

ROOT = Path(__file__).resolve().parent
STOPPED = 75  # exit status: ended by a signal, go on by running again (EX_TEMPFAIL of sysexits.h)
NOTEBOOKS = ("ex01", "ex02", "ex03", "eval_test_dataset_race", "eval_test_dataset_race_2")


def main(arguments: list[str] | None = None) -> int:
    """Run the chain "demo" or "race"; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("demo", "race"), help="the embedded default, or RACE with albert-base-v2")
    parser.add_argument("--source", help="source of the cache of 'race' (default ehovy/race)")
    parser.add_argument("--model", help="base model of 'race' (default albert-base-v2)")
    parser.add_argument("--limit-questions", type=int, help="a trial run on so many questions of each split")
    parser.add_argument("--fresh", action="store_true", help="train finished and begun stages again; they move aside")
    options = parser.parse_args(arguments)
    logging.getLogger("papermill").setLevel(logging.WARNING)
    demo, cache = options.name == "demo", ROOT / "cache" / options.name
    if status := prepare_cache(cache, demo, options.source, options.model):
        return status
    held = splits_of(read_manifest(cache))
    if missing := {"train", "validation"} - set(held):
        print(f"error: {cache} has no {' and no '.join(sorted(missing))} split; the stages need both", file=sys.stderr)
        return 1
    name = options.name if options.limit_questions is None else f"{options.name}-trial"  # kept apart from real results
    parameters = {
        "CACHE_DIR": f"cache/{options.name}",
        "CHECKPOINT_DIR": f"checkpoints/{name}",
        "RUN_DIR": f"runs/{name}",
        "LIMIT_QUESTIONS": options.limit_questions,
    }
    split = "test" if "test" in held else "validation"
    if split == "validation":
        print("this cache has no test split: the evaluations use validation, which also chose the checkpoints")
    for notebook in NOTEBOOKS:
        if notebook.startswith("eval"):
            own = {"SPLIT": split}
        else:
            own = {"FRESH": options.fresh} | (DEMO_STAGES[notebook] if demo else {})
        if status := run_notebook(notebook, parameters | own):
            return status
    print((ROOT / parameters["RUN_DIR"] / "results.csv").read_text())
    print(f"notebooks, figures and predictions: {parameters['RUN_DIR']}; checkpoints: {parameters['CHECKPOINT_DIR']}")
    return 0


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
    print(f"\n── {notebook}", flush=True)
    started = time.perf_counter()
    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        papermill.execute_notebook(
            ROOT / f"{notebook}.ipynb",
            executed,
            parameters,
            cwd=ROOT,
            progress_bar=False,
            stdout_file=sys.stdout,
            autosave_cell_every=30,
        )
    except papermill.exceptions.PapermillExecutionError as error:
        place = f"{notebook}, cell {error.exec_count}"
        sys.exit(f"error: {place}: {error.ename}: {error.evalue}\nwhat was executed is in {executed}")
    except DeadKernelError:
        print(f"── {notebook} was stopped: run this again to go on", flush=True)
        return STOPPED
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    print(f"── {notebook} done in {time.perf_counter() - started:.0f} s", flush=True)
    return 0


def pass_on(number: int, frame) -> None:
    """Let the notebook's process save its state and end; what else was running here ends with it."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("ipykernel" in part for part in child.cmdline()):
                child.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
