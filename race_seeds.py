"""The same chain trained with several seeds: mean, spread and interval of its accuracies.

python race_seeds.py runs/race-seed1 runs/race-seed2 runs/race-seed3
"""

import argparse
import re
import sys
from pathlib import Path

import pandas as pd
from scipy.stats import t

from race_files import write_whole

KEYS = ["stage", "split", "level"]
NEEDED = [*KEYS, "checkpoint", "questions", "accuracy"]
WHAT_IS_COVERED = (
    "The t interval covers the training seed: where the mean of many seeds would lie, on these same questions.\n"
    "The Wilson interval in each results.csv covers the questions: how this one model would do on others like them.\n"
    "Neither covers both."
)


class SeedError(ValueError):
    """Results of seeds that cannot be put together; the message lists everything that is wrong."""


def main(arguments: list[str] | None = None) -> int:
    """Print the table over seeds, and save it if asked; returns the exit status."""
    parser = argparse.ArgumentParser(description="Mean, standard deviation and 95 % t interval over training seeds.")
    parser.add_argument("runs", nargs="+", help="the run folder of each seed, which holds results.csv")
    parser.add_argument("--out", help="also save the table, as CSV")
    options = parser.parse_args(arguments)
    try:
        table = over_seeds(options.runs)
    except SeedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(table))
    if options.out:
        save(table, options.out)
        print(f"\nsaved as {options.out}")
    return 0


def over_seeds(runs: list[str | Path]) -> pd.DataFrame:
    """One row for each stage, split and level in the results.csv of these run folders, one folder a seed.

    Columns: stage, split, level, questions and questions_most (fewest and most of any seed), n (seeds), seeds, mean,
    std (sample, n − 1), ci_low, ci_high (95 % t interval; empty for one seed), lowest, highest. Raises SeedError.
    """
    tables, problems = [], []
    for run in map(Path, runs):
        try:
            tables.append(_read(run))
        except SeedError as error:
            problems.append(str(error))
    table = pd.concat(tables) if tables else pd.DataFrame(columns=[*NEEDED, "seed"])
    if twice := sorted({str(seed) for seed, several in _names(runs).items() if several > 1}):
        problems.append(f"two run folders of seed {', '.join(twice)}: name each seed once")
    for keys, group in table.groupby(KEYS, sort=False):
        if keys[2] == "all" and group["questions"].nunique() > 1:  # samples of one size may differ by level
            counts = ", ".join(f"{row.questions} (seed {row.seed})" for row in group.itertuples())
            problems.append(f"{' '.join(keys)}: the seeds answered different numbers of questions: {counts}")
    if problems:
        raise SeedError("\n".join(problems))
    return pd.DataFrame([dict(zip(KEYS, keys, strict=True)) | _row(group) for keys, group in _groups(table)])


def _read(run: Path) -> pd.DataFrame:
    """The results of one seed, with its name in the column seed."""
    path = run / "results.csv"
    try:
        table = pd.read_csv(path, keep_default_na=False)
    except FileNotFoundError as error:
        raise SeedError(f"{path}: not found; run the evaluation notebooks of this seed first") from error
    except ValueError as error:
        raise SeedError(f"{path}: cannot be read ({error})") from error
    if missing := [name for name in NEEDED if name not in table]:
        raise SeedError(f"{path} has no column {', '.join(missing)}")
    several = table.groupby(["stage", "split"])["checkpoint"].unique()
    if (several.str.len() > 1).any():
        (stage, split), names = next((key, names) for key, names in several.items() if len(names) > 1)
        raise SeedError(
            f"{path} has several checkpoints of {stage} on {split}; keep the rows of one: {', '.join(names)}"
        )
    return table.assign(seed=_name(run))


def _name(run: str | Path) -> str:
    """The seed in the name of a run folder such as race-seed3, or the whole name."""
    name = Path(run).resolve().name
    named = re.search(r"seed(\d+)$", name)
    return named[1] if named else name


def _names(runs) -> dict[str, int]:
    names = [_name(run) for run in runs]
    return {name: names.count(name) for name in names}


def _groups(table: pd.DataFrame):
    """Groups by stage, then in the order of the files."""
    return sorted(table.groupby(KEYS, sort=False), key=lambda keyed: keyed[0][0])


def _row(group: pd.DataFrame) -> dict:
    """Mean, sample standard deviation and t interval of one stage, split and level."""
    accuracy, n = group["accuracy"], len(group)
    mean, std = accuracy.mean(), accuracy.std(ddof=1)
    half = t.ppf(0.975, n - 1) * std / n**0.5 if n > 1 else float("nan")
    return {
        "questions": group["questions"].min(),
        "questions_most": group["questions"].max(),
        "n": n,
        "seeds": " ".join(group["seed"]),
        "mean": mean,
        "std": std,
        "ci_low": mean - half,
        "ci_high": mean + half,
        "lowest": accuracy.min(),
        "highest": accuracy.max(),
    }


def report(table: pd.DataFrame) -> str:
    """The table for reading, and what its interval covers."""
    lines = [
        "| stage | split | level | questions | seeds | mean | standard deviation | 95 % t interval |",
        "|---" * 8 + "|",
    ]
    for row in table.itertuples():
        spread = f"{100 * row.std:.2f} points" if row.n > 1 else "–"
        interval = f"{row.ci_low:.1%} – {row.ci_high:.1%}" if row.n > 1 else "none: one seed"
        asked = f"{row.questions:,}" + (f"–{row.questions_most:,}" if row.questions_most > row.questions else "")
        cells = [row.stage, row.split, row.level, asked, f"{row.n} ({row.seeds})", f"{row.mean:.1%}"]
        lines.append(f"| {' | '.join([*cells, spread, interval])} |")
    if table["n"].nunique() > 1:
        lines.append("\nNot every seed has every row: the seeds that a mean is made of stand beside it.")
    if (table["questions"] < table["questions_most"]).any():
        lines.append("\nThe seeds answered different questions: the spread holds the choice of questions too.")
    if (table["ci_low"] < 0).any() or (table["ci_high"] > 1).any():
        lines.append("\nAn interval beyond 0 or 100 %: so few seeds, so far apart, say next to nothing.")
    return "\n".join([*lines, "", WHAT_IS_COVERED])


def save(table: pd.DataFrame, path: str | Path) -> None:
    """Write the table as CSV, whole or not at all."""
    write_whole(path, lambda file: table.to_csv(file, index=False))


if __name__ == "__main__":
    sys.exit(main())
