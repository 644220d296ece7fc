"""Tables for reading: scores, comparisons, where checkpoints come from, and other people's numbers."""

from pathlib import Path

import numpy as np
import pandas as pd

from race import CHAIN, LEVELS, RACE_QUESTIONS
from race.report.formats import interval, p_number, percent, points, rate, schedule
from race.report.sentences import BUDGET, RULES
from race.score.comparison import power
from race.score.statistics import quoted_interval

PUBLISHED = Path(__file__).with_name("published.csv")  # other people's accuracies on RACE, and what each of them is

NOT_SCORED = {"accuracy": np.nan, "ci_low": np.nan, "ci_high": np.nan}


def _decimals(digits: int):
    return lambda value: f"{value:.{digits}f}".replace("-", "−")


FORMATS = dict.fromkeys(["difference", "95 % interval"], points)
FORMATS |= dict.fromkeys(["epochs", "chosen_epoch"], _decimals(0)) | {"log_loss": _decimals(4)}
FORMATS |= {"val_loss": _decimals(3), "icc": _decimals(2), "design_effect": _decimals(2), "monitor": RULES.get}
FORMATS |= {"p": p_number, "p_holm": p_number, "learning_rate": rate, "schedule": schedule}
FORMATS |= dict.fromkeys(["sd", "half_width"], lambda value: f"{100 * value:.2f} points")
HEADINGS = {"passage": "95 % by passage", "ci": "95 % Wilson", "difference": "points", "p_holm": "Holm p"}
HEADINGS |= {"icc": "intraclass correlation", "val_loss": "validation loss"}
HEADINGS |= {"trained_on": "seen in training", "selected_on": "used for choosing"}


def styled(table: pd.DataFrame, columns: str | None = None, **headings: str):
    """A table as a notebook shows it: plain headings, numbers in their format, what is not known as a dash.

    columns: those to show, if they are there (None: all); "x" without such a column is the interval x_low to x_high.
    headings: beside HEADINGS. A format goes by the heading, or by the column.
    """
    shown = {}
    for name in table if columns is None else columns.split():
        heading = (HEADINGS | headings).get(name, name.replace("_", " "))
        form = FORMATS.get(heading) or FORMATS.get(name, _plain)
        if name in table:
            shown[heading] = [_cell(value, form) for value in table[name]]
        elif f"{name}_low" in table:
            ends = zip(table[f"{name}_low"], table[f"{name}_high"], strict=True)
            shown[heading] = [interval(low, high, form) for low, high in ends]
    return pd.DataFrame(shown).style.hide(axis="index")


def _cell(value, form) -> str:
    if isinstance(value, list):
        return ", ".join(_cell(item, form) for item in value)
    return "–" if pd.isna(value) else form(value)


def _plain(value) -> str:
    """Text as it is, a count with commas, a fraction in percent."""
    return value if isinstance(value, str) else percent(value) if isinstance(value, float) else f"{value:,}"


def score_style(table: pd.DataFrame):
    """Accuracies for reading, with both intervals where they are known."""
    columns = "stage checkpoint split level questions correct accuracy passage ci passages icc design_effect"
    return styled(table, f"{columns} trained_on selected_on not_known")


def calibration_style(table: pd.DataFrame):
    """calibration.calibration_table for reading."""
    shown = table.rename(columns={"": "probabilities", "floor": "mean_floor"})
    columns = "probabilities log_loss calibration_error error floor confidence accuracy"
    return styled(shown, columns, error="95 % of the error", floor="if perfectly calibrated")


def comparison_table(tables: list[pd.DataFrame], lineage: pd.DataFrame) -> pd.DataFrame:
    """One row a checkpoint: what it remembers (stages.lineage_table), its accuracy and that of each level.

    The ends of the intervals to quote: accuracy_low, accuracy_high, middle_low, middle_high, high_low, high_high.
    """
    scores = []
    for table in tables:
        rows, score = {"accuracy": table.iloc[0]} | {row["level"]: row for _, row in table.iterrows()}, {}
        for name in ("accuracy", *LEVELS):
            row = rows.get(name, NOT_SCORED)
            low, high, _ = quoted_interval(row)
            score |= {name: row["accuracy"], f"{name}_low": low, f"{name}_high": high}
        scores.append(score)
    return lineage.join(pd.DataFrame(scores))


def comparison_style(table: pd.DataFrame):
    """The comparison for reading."""
    shown = table.rename(columns={"accuracy_low": "ci_low", "accuracy_high": "ci_high", "recipe": "schedule"})
    columns = "name base learning_rate schedule epochs chosen_epoch val_loss accuracy ci middle high"
    return styled(shown, columns, epochs="epochs trained", chosen_epoch="chosen epoch (from 0)", ci="95 % to quote")


def pairs_style(pairs: pd.DataFrame):
    """Differences for reading, in points: of checkpoints (compare_pairs) or of recipes (against_baseline)."""
    columns = "second first gained lost both neither difference ci p p_holm"
    return styled(pairs, columns, ci="95 % interval", second="name", first="against")


def reported_accuracy(tables: list[pd.DataFrame]) -> dict[str, float]:
    """What the original authors report for each stage, if these are results on RACE's whole test split; else {}."""
    if any((table["split"][0], table["questions"][0]) != ("test", RACE_QUESTIONS["test"]) for table in tables):
        return {}
    accuracy = pd.read_csv(PUBLISHED, index_col="model")["accuracy"]
    return {stage: float(accuracy[f"original authors, {stage}"]) for stage in CHAIN}


def published_table(table: pd.DataFrame) -> pd.DataFrame:
    """Other people's accuracies beside this one, lowest first; empty unless this is RACE's whole test split."""
    published = pd.read_csv(PUBLISHED)
    if not reported_accuracy([table]):
        return published[:0]
    published.loc[len(published)] = f"this checkpoint ({table['stage'][0]})", table["accuracy"][0], "measured here"
    return published.sort_values("accuracy", ignore_index=True)


def planning_table(difference: float, questions: int, contrasts: int):
    """What several numbers of seeds see of a true difference (in points)."""
    table = pd.DataFrame([power(difference / 100, seeds, questions, contrasts) for seeds in (3, 5, 10, 20, 40)])
    return styled(table, half_width="95 % interval, ±", power="found", power_holm="found, after Holm")


def budgets_style(table: pd.DataFrame):
    """What each recipe had, for reading."""
    columns = "recipe stages learning_rate epochs questions checkpoints seeds monitor learning_rates_tried"
    return styled(table, columns, learning_rate="highest rate of each stage", **BUDGET)


def accuracies_style(table: pd.DataFrame):
    """runs.accuracies for reading."""
    return styled(table, "recipe accuracy each sd last_epoch", sd="standard deviation", each="of each seed")
