"""Tables for reading: scores, comparisons, recipes, and other people's numbers."""

from pathlib import Path

import pandas as pd

from race import CHAIN, RACE_QUESTIONS
from race.report.formats import RULES, interval, percent, rate, schedule
from race.score.statistics import quoted_interval

PUBLISHED = Path(__file__).with_name("published.csv")  # other people's accuracies on RACE, and what each of them is
# What `styled` shows of each table: columns, a heading where the name does not do; x_low is the interval up to x_high.
SCORES = "level, questions, correct, accuracy, passage_low: 95 % interval by passage, "
SCORES += "trained_on: seen in training, selected_on: used for choosing, not_known"
CHECKPOINTS = "name, base, learning_rate, recipe: schedule, epochs: epochs trained, chosen_epoch: its epoch (from 0)"
CHECKPOINTS += ", val_loss: validation loss, accuracy, accuracy_low: 95 % interval, middle, high"
TOTALS = "recipe, learning_rate: highest rate of each stage, epochs, questions: questions trained on, "
TOTALS += "choices: checkpoints to choose from, monitor: chosen by, learning_rates_tried: rates tried"
ACCURACIES = "recipe, accuracy, each: of each seed, sd: standard deviation, at_chance: runs at chance, "
ACCURACIES += "last_epoch: accuracy after its last epoch"
FORMATS = {"schedule": schedule, "chosen by": RULES.get, "validation loss": "{:.3f}".format}
FORMATS |= dict.fromkeys(["epochs trained", "its epoch (from 0)"], "{:.0f}".format)
FORMATS |= dict.fromkeys(["learning rate", "highest rate of each stage"], rate)
FORMATS |= {"standard deviation": lambda value: f"{100 * value:.2f} points"}


def styled(table: pd.DataFrame, columns: str):
    """A table as a notebook shows it: those of `columns` that it has; what is not known is a dash."""
    shown = {}
    for name, _, heading in (column.partition(": ") for column in columns.split(", ")):
        heading = heading or name.replace("_", " ")
        form = FORMATS.get(heading, _plain)
        if name in table and name.endswith("_low"):
            ends = zip(table[name], table[name.replace("_low", "_high")], strict=True)
            shown[heading] = [interval(low, high, form).replace(" ", "\xa0") for low, high in ends]
        elif name in table:
            shown[heading] = [_cell(value, form) for value in table[name]]
    return pd.DataFrame(shown).style.hide(axis="index")


def _cell(value, form) -> str:
    if isinstance(value, list):
        return ", ".join(_cell(item, form) for item in value)
    text = "–" if pd.isna(value) else form(value)
    return text.replace(" ", "\xa0") if isinstance(value, float) else text  # "76.9 %" is not broken


def _plain(value) -> str:
    return value if isinstance(value, str) else percent(value) if isinstance(value, float) else f"{value:,}"


def comparison_table(tables: list[pd.DataFrame], lineage: pd.DataFrame) -> pd.DataFrame:
    """One row a checkpoint: what it remembers (stages.lineage_table), its accuracy and that of each level.

    The ends of the intervals to quote: accuracy_low, accuracy_high, middle_low and so on.
    """
    scores = []
    for table in tables:
        scores.append({})
        for name, (_, row) in zip(["accuracy", *table["level"][1:]], table.iterrows(), strict=True):
            low, high, _ = quoted_interval(row)
            scores[-1] |= {name: row["accuracy"], f"{name}_low": low, f"{name}_high": high}
    return lineage.join(pd.DataFrame(scores))


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
