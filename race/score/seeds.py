"""The same chain trained with several seeds: mean, spread and interval of its accuracies.

python -m race.score.seeds runs/race-seed1 runs/race-seed2 runs/race-seed3
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
from scipy.stats import t

from race import RaceError
from race.files import atomic_write
from race.score.results import RESULT_COLUMNS

KEYS = ["stage", "split", "level"]
WHAT_IS_COVERED = (
    "The t interval covers the training seed: where the mean of many seeds would lie, on these same questions.\n"
    "The Wilson interval in each results.csv covers the sampling of the questions, for this one model.\n"
    "Neither covers both sources of variation."
)


def main(arguments: list[str] | None = None) -> int:
    """Print the table over seeds, and save it if asked; returns the exit status."""
    about = "Mean, standard deviation and 95 % t interval over training seeds."
    parser = argparse.ArgumentParser(prog="python -m race.score.seeds", description=about)
    parser.add_argument("runs", nargs="+", help="the run folder of each seed, which holds results.csv")
    parser.add_argument("--out", help="also save the table, as CSV")
    options = parser.parse_args(arguments)
    try:
        table = over_seeds(options.runs)
    except RaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(table))
    if options.out:
        atomic_write(options.out, lambda file: table.to_csv(file, index=False))
        print(f"\nsaved as {options.out}")
    return 0


def over_seeds(runs: list[str | Path]) -> pd.DataFrame:
    """One row for each stage, split and level in the results.csv of these run folders, one folder a seed.

    Columns: stage, split, level, questions and questions_most (fewest and most of any seed), n (seeds), seeds, mean,
    std (sample, n − 1), ci_low, ci_high (95 % t interval; empty for one seed), lowest, highest. Raises RaceError.
    """
    tables, problems = [], []
    for run in map(Path, runs):
        try:
            tables.append(_read(run))
        except RaceError as error:
            problems.append(str(error))
    table = pd.concat(tables) if tables else pd.DataFrame(columns=[*RESULT_COLUMNS, "seed"])
    if twice := sorted(seed for seed, count in Counter(map(_seed, runs)).items() if count > 1):
        problems.append(f"two run folders of seed {', '.join(twice)}: name each seed once")
    groups = table.groupby(KEYS, sort=False)
    for keys, group in groups:
        if keys[2] == "all" and group["questions"].nunique() > 1:  # samples of one size may differ by level
            counts = ", ".join(f"{row.questions} (seed {row.seed})" for row in group.itertuples())
            problems.append(f"{' '.join(keys)}: the seeds answered different numbers of questions: {counts}")
    if problems:
        raise RaceError("\n".join(problems))
    found = groups.agg(
        questions=("questions", "min"),
        questions_most=("questions", "max"),
        n=("seed", "size"),
        seeds=("seed", " ".join),
        mean=("accuracy", "mean"),
        std=("accuracy", "std"),
    )
    half = t.ppf(0.975, found["n"] - 1) * groups["accuracy"].sem()  # not t.interval: NaN if all seeds agree
    found = found.assign(ci_low=found["mean"] - half, ci_high=found["mean"] + half)
    found = found.assign(lowest=groups["accuracy"].min(), highest=groups["accuracy"].max())
    return found.reset_index().sort_values("stage", kind="stable", ignore_index=True)


def _read(run: Path) -> pd.DataFrame:
    """The results of one seed, with its name in the column seed."""
    path = run / "results.csv"
    try:
        table = pd.read_csv(path, keep_default_na=False)
    except FileNotFoundError as error:
        raise RaceError(f"{path}: not found; run the evaluation notebooks of this seed first") from error
    except ValueError as error:
        raise RaceError(f"{path}: cannot be read ({error})") from error
    if missing := [name for name in RESULT_COLUMNS if name not in table]:
        raise RaceError(f"{path} has no column {', '.join(missing)}")
    for (stage, split), names in table.groupby(["stage", "split"])["checkpoint"].unique().items():
        if len(names) > 1:
            several = f"several checkpoints of {stage} on {split}"
            raise RaceError(f"{path} has {several}; keep the rows of one: {', '.join(names)}")
    return table.assign(seed=_seed(run))


def _seed(run: str | Path) -> str:
    """The seed in the name of a run folder such as race-seed3, or the whole name."""
    name = Path(run).resolve().name
    named = re.search(r"seed(\d+)$", name)
    return named[1] if named else name


def report(table: pd.DataFrame) -> str:
    """The table for reading, and what its interval covers."""
    head = ["stage", "split", "level", "questions", "seeds", "mean", "standard deviation", "95 % t interval"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in table.itertuples():
        mean, low, high = (f"{100 * value:.1f} %" for value in (row.mean, row.ci_low, row.ci_high))
        spread = [f"{100 * row.std:.2f} points", f"{low} to {high}"] if row.n > 1 else ["–", "none: one seed"]
        asked = f"{row.questions:,}" + (f"–{row.questions_most:,}" if row.questions_most > row.questions else "")
        cells = [row.stage, row.split, row.level, asked, f"{row.n} ({row.seeds})", mean, *spread]
        lines.append(f"| {' | '.join(cells)} |")
    if table["n"].nunique() > 1:
        lines.append("\nSome seeds lack some rows: the seeds of each mean stand in its row.")
    if (table["questions"] < table["questions_most"]).any():
        lines.append("\nThe seeds answered different questions: the spread includes the choice of questions.")
    if (table["ci_low"] < 0).any() or (table["ci_high"] > 1).any():
        lines.append("\nAn interval reaches beyond 0 or 100 %: too few seeds for a useful interval.")
    return "\n".join([*lines, "", WHAT_IS_COVERED])


if __name__ == "__main__":
    sys.exit(main())
