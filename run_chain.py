"""Run the whole job headless: cache, three stages, both evaluations; executed notebooks stay in runs/NAME."""

import argparse
import logging
import sys
import time
from pathlib import Path

from demo import STAGES as DEMO_STAGES
from generate_race_cache import main as generate_race_cache

ROOT = Path(__file__).resolve().parent
NOTEBOOKS = ("ex01", "ex02", "ex03", "eval_test_dataset_race", "eval_test_dataset_race_2")


def main(arguments: list[str] | None = None) -> int:
    """Run the chain "demo" or "race"; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("demo", "race"), help="the embedded default, or RACE with albert-base-v2")
    parser.add_argument("--source", default="ehovy/race", help="source of the cache of 'race' (default ehovy/race)")
    parser.add_argument("--model", default="albert-base-v2", help="base model of 'race' (default albert-base-v2)")
    parser.add_argument("--limit-questions", type=int, help="a trial run on so many questions of each split")
    options = parser.parse_args(arguments)
    logging.getLogger("papermill").setLevel(logging.WARNING)
    demo, cache = options.name == "demo", ROOT / "cache" / options.name
    source = ["demo", "--force"] if demo else [options.source, "--model", options.model]
    made = not demo and (cache / "manifest.json").exists()  # on a node with internet, before
    if status := generate_race_cache(["--verify", str(cache)] if made else ["--out", str(cache), "--source", *source]):
        return status
    parameters = {
        "CACHE_DIR": f"cache/{options.name}",
        "CHECKPOINT_DIR": f"checkpoints/{options.name}",
        "RUN_DIR": f"runs/{options.name}",
        "LIMIT_QUESTIONS": options.limit_questions,
    }
    for notebook in NOTEBOOKS:
        run_notebook(notebook, parameters | (DEMO_STAGES.get(notebook, {}) if demo else {}))
    print((ROOT / parameters["RUN_DIR"] / "results.csv").read_text())
    print(f"notebooks, figures and predictions: {parameters['RUN_DIR']}; checkpoints: {parameters['CHECKPOINT_DIR']}")
    return 0


def run_notebook(notebook: str, parameters: dict) -> None:
    """Execute one notebook with these parameters; what it printed is shown as it comes, and saved as it goes."""
    import papermill

    executed = ROOT / parameters["RUN_DIR"] / f"{notebook}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    print(f"\n── {notebook}", flush=True)
    started = time.perf_counter()
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
    print(f"── {notebook} done in {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
