"""The same chain trained with several seeds: means, and differences between stages, with what they say and do not.

python -m race.score.seeds runs/race-seed1 runs/race-seed2 runs/race-seed3
"""

import argparse
import itertools
import re
import sys
from pathlib import Path

import pandas as pd
from scipy.stats import t, ttest_1samp

from race import RaceError
from race.files import atomic_write
from race.score.results import RESULT_COLUMNS
from race.score.statistics import holm
from race.written import SIGNIFICANT, p_number, percent, signed, significance

KEYS = ["stage", "split", "level"]
NAMES = ["stage", "checkpoint", "split", "level"]  # cells that must not be empty
NUMBERS = {"questions": "a whole number from 1", "accuracy": "a number from 0 to 1"}
SHA256 = "checkpoint_sha256"
SAME = {"cache_sha256": "cache", "max_len": "MAX_LEN", "precision": "PRECISION"}  # of all that is compared
DIFFERENCE_COLUMNS = ["first", "second", "split", "level", "n", "seeds", "mean", "std", "ci_low", "ci_high", "p"]
DIFFERENCE_COLUMNS += ["p_holm", "lowest", "highest", "each_in_points"]
ALIKE = 1e-9  # differences that are nearer than this are equal: one question of a split is far more
WHAT_IS_COVERED = (
    "The t intervals and p cover the variation between training seeds, on these same questions: where the mean of\n"
    "many seeds would lie. (In a trial run each seed has its own sample of questions, which adds to the variation.)\n"
    "They assume that this variation is about normally distributed.\n"
    "The intervals in each results.csv (Wilson, or by passage) cover the sampling of questions, for that one model.\n"
    "Neither kind covers both. With one seed, a difference is about these checkpoints and not about the recipe."
)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables over seeds, and save them if asked; returns the exit status."""
    about = "Means over training seeds and differences between stages, with 95 % t intervals."
    parser = argparse.ArgumentParser(prog="python -m race.score.seeds", description=about)
    parser.add_argument("runs", nargs="+", help="the run folder of each seed, which holds results.csv")
    saved = "also save the means, as FILE.csv, and the differences beside it, as FILE-differences.csv"
    parser.add_argument("--out", metavar="FILE.csv", help=saved)
    options = parser.parse_args(arguments)
    try:
        table, pairs = over_seeds(options.runs), differences(options.runs)
    except RaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(table, pairs))
    if options.out:
        beside = Path(options.out).with_name(f"{Path(options.out).stem}-differences.csv")
        atomic_write(options.out, lambda file: table.to_csv(file, index=False))
        atomic_write(beside, lambda file: pairs.to_csv(file, index=False))
        print(f"\nsaved as {options.out} and {beside}")
    return 0


def over_seeds(runs: list[str | Path]) -> pd.DataFrame:
    """One row for each stage, split and level in the results.csv of these run folders, one folder a seed.

    Columns: stage, split, level, questions and questions_most (fewest and most of any seed), n (seeds), seeds, mean,
    std (sample, n − 1), ci_low, ci_high (95 % t interval), lowest, highest. The interval is empty for one seed, if all
    seeds are alike, and if it reaches beyond 0 or 1. Raises RaceError, with every problem of every folder.
    """
    groups = _read_all(runs).groupby(KEYS, sort=False)
    found = groups.agg(
        questions=("questions", "min"),
        questions_most=("questions", "max"),
        n=("seed", "size"),
        seeds=("seed", " ".join),
        mean=("accuracy", "mean"),
        std=("accuracy", "std"),
    )
    half = t.ppf(0.975, found["n"] - 1) * found["std"] / found["n"] ** 0.5
    low, high = found["mean"] - half, found["mean"] + half
    useful = (found["std"] > 0) & (low >= 0) & (high <= 1)
    found = found.assign(ci_low=low.where(useful), ci_high=high.where(useful))
    found = found.assign(lowest=groups["accuracy"].min(), highest=groups["accuracy"].max())
    return found.reset_index().sort_values("stage", kind="stable", ignore_index=True)


def differences(runs: list[str | Path]) -> pd.DataFrame:
    """One row for every two stages, split and level: accuracy of `second` − of `first`, over the seeds that have both.

    Columns: first, second (in sorted order), split, level, n (seeds), seeds, mean, std (sample, n − 1), ci_low, ci_high
    (95 % t interval), p (paired t test, which goes with that interval), p_holm (adjusted for those pairs of this split
    and level that have a p), lowest, highest, each_in_points (each seed's difference, in the order of seeds: "+0.5,
    −0.8"). Interval and p are empty for one seed and if all seeds are alike; the interval alone if it reaches beyond
    −1 or 1. Raises RaceError as over_seeds does.
    """
    rows = []
    for (split, level), group in _read_all(runs).groupby(["split", "level"], sort=False):
        by_seed = group.pivot(index="seed", columns="stage", values="accuracy").loc[group["seed"].unique()]
        for first, second in itertools.combinations(sorted(by_seed), 2):
            names = {"first": first, "second": second, "split": split, "level": level}
            rows.append(names | _paired((by_seed[second] - by_seed[first]).dropna()))
    table = pd.DataFrame(rows, columns=DIFFERENCE_COLUMNS)
    for _, group in table.groupby(["split", "level"]):
        table.loc[group.index, "p_holm"] = holm(group["p"])
    return table


def _paired(found: pd.Series) -> dict:
    """The columns of `differences` from n on, but p_holm, for one difference a seed."""
    lowest, highest = found.min(), found.max()
    row = {"n": len(found), "seeds": " ".join(found.index), "mean": found.mean(), "std": found.std()}
    row |= {"lowest": lowest, "highest": highest, "each_in_points": ", ".join(signed(100 * it) for it in found)}
    if len(found) < 2:
        return row
    if highest - lowest < ALIKE:
        return row | {"std": 0.0}
    test = ttest_1samp(found, 0)
    low, high = test.confidence_interval(0.95)
    interval = {"ci_low": low, "ci_high": high} if low >= -1 and high <= 1 else {}
    return row | interval | {"p": test.pvalue}


def _read_all(runs: list[str | Path]) -> pd.DataFrame:
    """The results of all seeds, with the columns run and seed; raises RaceError with all that is wrong."""
    tables, problems, folders = [], [] if runs else ["no run folder is named: name that of each seed"], {}
    for run in runs:
        folders.setdefault(_seed(run), []).append(str(run))
        try:
            tables.append(_read(Path(run)).assign(run=str(run), seed=_seed(run)))
        except RaceError as error:
            problems.append(str(error))
    if twice := {seed: named for seed, named in sorted(folders.items()) if len(named) > 1}:
        found = "; ".join(", ".join(named) for named in twice.values())
        problems.append(f"two run folders of seed {', '.join(twice)}: name each seed once ({found})")
    table = pd.concat(tables, ignore_index=True) if tables else None
    if tables:
        problems += [*_same_checkpoints(table), *_other_settings(table), *_other_questions(table)]
    if problems:
        raise RaceError("\n".join(problems))
    return table


def _read(run: Path) -> pd.DataFrame:
    """The results of one seed: RESULT_COLUMNS, SHA256 and SAME, the last two "" where the file has none."""
    path = run / "results.csv"
    again = "run the evaluation notebooks of this seed"
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except FileNotFoundError as error:
        raise RaceError(f"{path}: not found; {again} first") from error
    except (OSError, ValueError) as error:
        raise RaceError(f"{path}: cannot be read ({error}); {again} again") from error
    if missing := [name for name in RESULT_COLUMNS if name not in table]:
        raise RaceError(f"{path} has no column {', '.join(missing)}; {again} again")
    table = table[(table != "").any(axis=1)]  # without blank lines; the index still counts them
    if table.empty:
        raise RaceError(f"{path} has no rows; {again} again")
    numbers = table[list(NUMBERS)].apply(pd.to_numeric, errors="coerce")
    good = table[NAMES].apply(lambda column: column.str.strip() != "")
    good["questions"] = (numbers["questions"] >= 1) & (numbers["questions"] % 1 == 0)
    good["accuracy"] = numbers["accuracy"].between(0, 1)
    problems = []
    for (index, column), fits in good.stack().items():
        if not fits:
            cell = table.at[index, column].strip()
            wrong = f"{cell!r} is not {NUMBERS[column]}" if cell else "is empty"
            problems.append(f"{path}, row {index + 2}, column {column}: {wrong}; score this checkpoint again")
    if problems:
        raise RaceError("\n".join(problems))
    table = table.reindex(columns=[*RESULT_COLUMNS, SHA256, *SAME], fill_value="")
    table["questions"], table["accuracy"] = numbers["questions"].astype(int), numbers["accuracy"]
    table["max_len"] = table["max_len"].str.removesuffix(".0")  # so written where another row has none
    for (stage, split), group in table.groupby(["stage", "split"], sort=False):
        hashes = group[SHA256].str[:8]
        which = group["checkpoint"] + (" (" + hashes + ")").where(hashes != "", "")
        if group["checkpoint"].nunique() > 1 or hashes[hashes != ""].nunique() > 1:
            several = f"several checkpoints of {stage} on {split}"
            problems.append(f"{path} has {several}; keep the rows of one: {', '.join(which.unique())}")
        elif twice := sorted(set(group.loc[group["level"].duplicated(), "level"])):
            several = f"several rows of {stage} on {split} {', '.join(twice)}"
            problems.append(f"{path} has {several}; keep one of each")
    if problems:
        raise RaceError("\n".join(problems))
    return table


def _same_checkpoints(table: pd.DataFrame) -> list[str]:
    """A problem for all run folders of several seeds that have one checkpoint."""
    found = {}
    known = table[table[SHA256] != ""]
    for (stage, split, sha256), group in known.groupby(["stage", "split", SHA256], sort=False):
        if group["seed"].nunique() > 1:
            found.setdefault(" and ".join(group["run"].unique()), []).append(f"{stage} on {split} ({sha256[:8]})")
    what_to_do = "that is one seed, not several; score each seed's own checkpoint, or name one of these folders"
    return [f"{runs} have the same checkpoint of {', '.join(which)}: {what_to_do}" for runs, which in found.items()]


def _other_settings(table: pd.DataFrame) -> list[str]:
    """A problem for each of SAME that differs between seeds or stages; empty cells pass."""
    found = {}
    for name in SAME:
        for (split, level), group in table[table[name] != ""].groupby(["split", "level"], sort=False):
            values = group.groupby(name, sort=False)
            if len(values) > 1:
                differ = ", ".join(f"{value[:12]} ({_places(rows)})" for value, rows in values)
                found.setdefault((name, differ), []).append(f"{split} {level}")
    return [
        f"{', '.join(where)}: {name} differs: {differ}; score all of them with one {SAME[name]}"
        for (name, differ), where in found.items()
    ]


def _places(rows: pd.DataFrame) -> str:
    """Run folders and stages of rows: "runs/race-seed1: e1, e2; runs/race-seed2: e1"."""
    return "; ".join(f"{run}: {', '.join(stages)}" for run, stages in rows.groupby("run", sort=False)["stage"])


def _other_questions(table: pd.DataFrame) -> list[str]:
    """A problem where seeds, or stages of one seed, answered different numbers of questions."""
    problems, what_to_do = [], "score all of them with one LIMIT_QUESTIONS"
    for keys, group in table[table["level"] == "all"].groupby(KEYS, sort=False):  # a sample's levels may differ in size
        if group["questions"].nunique() > 1:
            counts = ", ".join(f"{row.questions} (seed {row.seed})" for row in group.itertuples())
            what = f"the seeds answered different numbers of questions: {counts}"
            problems.append(f"{' '.join(keys)}: {what}; {what_to_do}")
    for (run, split, level), group in table.groupby(["run", "split", "level"], sort=False):
        if group["questions"].nunique() > 1:
            counts = ", ".join(f"{row.questions} ({row.stage})" for row in group.itertuples())
            what = f"the stages answered different numbers of questions: {counts}"
            problems.append(f"{run}, {split} {level}: {what}; {what_to_do}")
    return problems


def _seed(run: str | Path) -> str:
    """The seed in the name of a run folder such as race-seed3, or the whole name."""
    name = Path(run).resolve().name
    named = re.search(r"seed(\d+)$", name)
    return named[1] if named else name


def report(table: pd.DataFrame, pairs: pd.DataFrame) -> str:
    """The tables of over_seeds and differences for reading, and what their intervals cover."""
    head = ["stage", "split", "level", "questions", "seeds", "mean", "standard deviation", "95 % t interval"]
    rows = []
    for row in table.itertuples():
        mean, low, high = (percent(value) for value in (row.mean, row.ci_low, row.ci_high))
        asked = f"{row.questions:,}" + (f"–{row.questions_most:,}" if row.questions_most > row.questions else "")
        interval = f"{low} to {high}" if pd.notna(row.ci_low) else f"none: {_why(row) or 'beyond 0 to 100 %'}"
        rows.append([row.stage, row.split, row.level, asked, _seeds(row), mean, _spread(row), interval])
    lines = _table(head, rows)
    if table["n"].nunique() > 1:
        lines.append("\nSome seeds lack some rows: the seeds of each mean stand in its row.")
    if (table["questions"] < table["questions_most"]).any():
        lines.append("\nThe seeds answered different questions: the spread includes the choice of questions.")
    lines += ["", *_report_differences(table, pairs)]
    if any("none: beyond" in line for line in lines):
        lines.append("\nAn interval that reaches beyond what is possible is not given: too few seeds for a useful one.")
    return "\n".join([*lines, "", WHAT_IS_COVERED])


def _report_differences(table: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    """The lines about differences between stages, in percentage points."""
    if pairs.empty:
        return ["No differences between stages: no split and level has two."]
    head = ["difference", "split", "level", "seeds", "mean", "standard deviation", "95 % t interval", "p", "Holm p"]
    rows, others, seeds = [], [], table.set_index(KEYS)["seeds"]
    for row in pairs.itertuples():
        name, why = f"{row.second} − {row.first}", _why(row)
        mean = f"{signed(100 * row.mean)} points" if row.n else "–"
        interval = f"{signed(100 * row.ci_low)} to {signed(100 * row.ci_high)}"
        if pd.isna(row.ci_low):
            interval = f"none: {why or 'beyond −100 to +100 points'}"
        tested = (
            [f"none: {why}", "–"] if why else [p_number(row.p), f"{p_number(row.p_holm)}: {significance(row.p_holm)}"]
        )
        cells = [name, row.split, row.level, _seeds(row), mean, _spread(row), interval, *tested]
        rows.append([*cells, row.each_in_points or "–"])
        for stage in (row.first, row.second):
            if seeds[stage, row.split, row.level] != row.seeds:
                own = f"the mean of {stage} is over {seeds[stage, row.split, row.level]}"
                others.append(f"- {name} on {row.split} {row.level} is over seeds {row.seeds or 'none'}, but {own}.")
    lines = ["Differences between stages, paired by seed, in percentage points:", ""]
    lines += _table([*head, "each seed"], rows)
    lines.append(
        "\np: paired t test, which goes with the interval. Holm p: adjusted for the pairs of a split and level;"
    )
    lines.append(f'"significant" means that it is below {SIGNIFICANT}.')
    if others:
        lines += ["\nOver other seeds than the means, and so not the difference of the two means above:", "", *others]
    return lines


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(cells)} |" for cells in rows)]


def _why(row) -> str:
    """Why a row can have neither interval nor p; "" if it can."""
    if row.n < 2:
        return "one seed" if row.n else "no seed has both"
    return "" if row.std else "all alike"


def _seeds(row) -> str:
    return f"{row.n} ({row.seeds})" if row.n else "0"


def _spread(row) -> str:
    return f"{100 * row.std:.2f} points" if row.n > 1 else "–"


if __name__ == "__main__":
    sys.exit(main())
