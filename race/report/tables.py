"""Tables for reading: scores, comparisons, where checkpoints come from, and other people's numbers."""

import numpy as np
import pandas as pd

from race import CHAIN, LEVELS, RACE_QUESTIONS
from race.report.recipes import RULES
from race.report.sentences import interval
from race.score.recipes import CHOICES, power
from race.score.results import PASSAGE_COLUMNS, RESULT_COLUMNS
from race.score.statistics import SEEN_COLUMNS
from race.train.stages import Stage, epochs_trained
from race.written import p_number, percent, rate, schedule, signed

REPORTED = {"e1": 0.671, "e2": 0.680, "e3": 0.720}  # the original authors' accuracies on RACE's test split, not ours
ALBERT = "README of google-research/albert; by its authors (issue 30) single run dev set results with early stopping"
PUBLISHED = [  # published accuracies on RACE, and what each is
    ("guessing", 0.25, "one of four options"),
    ("ALBERT v2 base", 0.668, ALBERT),
    ("ALBERT v2 large", 0.752, ALBERT),
    ("ALBERT v2 xlarge", 0.807, ALBERT),
    ("ALBERT v2 xxlarge", 0.868, ALBERT),
    ("RoBERTa large", 0.832, "test split; Liu et al. 2019, arXiv:1907.11692"),
    ("people on Mechanical Turk", 0.733, "answers of paid workers; Lai et al. 2017, arXiv:1704.04683"),
    ("valid questions", 0.945, "share with one clear answer, the ceiling for people; Lai et al. 2017"),
]
FORMATS = dict.fromkeys(["accuracy", *LEVELS, "rest", "calibration_error", "confidence", "threshold"], percent)
FORMATS |= dict.fromkeys(["questions", "correct", "gained", "lost", "both", "neither"], "{:,}")
FORMATS |= {"log_loss": "{:.4f}", "validation loss": "{:.3f}", "learning_rate": rate, "points": signed}
FORMATS |= dict.fromkeys(
    ["epochs trained", "chosen epoch (from 0)", "seen in training", "used for choosing"], "{:,.0f}"
)
FORMATS |= dict.fromkeys(["intraclass correlation", "design effect"], lambda value: f"{value:.2f}".replace("-", "−"))
FORMATS |= dict.fromkeys(["McNemar p", "Fisher p", "Holm p"], p_number)


def styled(table: pd.DataFrame):
    """A table as a notebook shows it: every column in its format, what is not known as a dash."""
    formats = {name.replace("_", " "): form for name, form in FORMATS.items() if name in table}
    shown = table.rename(columns=lambda name: name.replace("_", " "))
    return shown.style.format(formats, na_rep="–").hide(axis="index")


def score_style(table: pd.DataFrame):
    """Accuracies for reading, each interval in one column: Wilson's, and by passage where it is known."""
    columns = [
        name
        for name in ("group", *RESULT_COLUMNS, *PASSAGE_COLUMNS, *SEEN_COLUMNS, "not_known", "threshold")
        if name in table
    ]
    names = {"icc": "intraclass correlation", "design_effect": "design effect"}
    names |= {"trained_on": "seen in training", "selected_on": "used for choosing", "not_known": "not known"}
    return styled(_one_interval(table[columns]).rename(columns=names))


def groups_style(table: pd.DataFrame):
    """statistics.group_accuracies for reading."""
    shown = _one_interval(table).drop(columns="correct").rename(columns={"p": "Fisher p", "p_holm": "Holm p"})
    shown.insert(shown.columns.get_loc("difference"), "points", 100 * shown.pop("difference"))
    return styled(shown)


def calibration_style(table: pd.DataFrame):
    """calibration.calibration_table for reading."""
    shown = table.drop(columns=["floor"])
    for place, (name, low, high) in enumerate(
        [("95 % interval", "error_low", "error_high"), ("if perfectly calibrated", "floor_low", "floor_high")]
    ):
        shown.insert(3 + place, name, [interval(row, low, high) for _, row in table.iterrows()])
    return styled(shown.drop(columns=["error_low", "error_high", "floor_low", "floor_high"]))


def _one_interval(table: pd.DataFrame) -> pd.DataFrame:
    """Each pair of ends as one column of words, after the accuracy."""
    shown = table.copy()
    place = shown.columns.get_loc("accuracy") + 1
    for name, ends in (("95 % by passage", ["passage_low", "passage_high"]), ("95 % Wilson", ["ci_low", "ci_high"])):
        if ends[0] in shown:
            words = [interval(row, *ends) if pd.notna(row[ends[0]]) else "–" for _, row in shown.iterrows()]
            shown = shown.drop(columns=ends)
            shown.insert(place, name, words)
    return shown


def lineage_table(checkpoints: list, names: list[str]) -> pd.DataFrame:
    """What each named checkpoint remembers, a row each.

    epochs: trained in its stage; chosen_epoch: its own, from 0; parent: which of the others its base is, by hash.
    """
    name_of = {checkpoint.sha256: name for checkpoint, name in zip(checkpoints, names, strict=True)}
    rows = [
        {
            "name": name,
            "stage": checkpoint.stage or checkpoint.label,
            "checkpoint": checkpoint.name,
            "base": checkpoint.base,
            "learning_rate": checkpoint.learning_rate,
            "schedule": schedule(checkpoint.lineage["recipe"]) if "recipe" in checkpoint.lineage else None,
            "epochs": epochs_trained(checkpoint),
            "chosen_epoch": checkpoint.epoch,
            "val_loss": checkpoint.val_loss,
            "parent": name_of.get(checkpoint.base_sha256),
        }
        for checkpoint, name in zip(checkpoints, names, strict=True)
    ]
    return pd.DataFrame(rows)


def stages_behind(checkpoints: list) -> dict[str, str]:
    """The stages that these checkpoints have gone through, as they remember them, each with its rule of selection."""
    named = {stage for checkpoint in checkpoints for stage in (*checkpoint.chain, checkpoint.stage)}
    rules = {checkpoint.stage: checkpoint.monitor for checkpoint in checkpoints}
    beside = checkpoints[-1].path.parent  # where those lie that are not named
    return {stage: rules.get(stage) or Stage(stage, beside).rule for stage in sorted(named & CHAIN.keys())}


def comparison_table(tables: list[pd.DataFrame], checkpoints: list, names: list[str]) -> pd.DataFrame:
    """One row a checkpoint: what it remembers, accuracy with both intervals, and of each level with that by passage.

    A level's ends: middle_low, middle_high, high_low, high_high.
    """
    scores = []
    for table in tables:
        row = table.iloc[0][["questions", "accuracy", "ci_low", "ci_high", "passage_low", "passage_high"]].to_dict()
        for level, found in table.set_index("level").reindex(LEVELS).iterrows():
            known = pd.notna(found["passage_low"])
            ends = ("passage_low", "passage_high") if known else ("ci_low", "ci_high")
            row |= {level: found["accuracy"], f"{level}_low": found[ends[0]], f"{level}_high": found[ends[1]]}
        scores.append(row)
    return lineage_table(checkpoints, names).drop(columns="parent").join(pd.DataFrame(scores))


def comparison_style(table: pd.DataFrame):
    """The comparison for reading."""
    ends = [f"{level}_{end}" for level in LEVELS for end in ("low", "high")]
    shown = _one_interval(table.drop(columns=["stage", "checkpoint", "questions", *ends]))
    return styled(
        shown.rename(
            columns={"epochs": "epochs trained", "chosen_epoch": "chosen epoch (from 0)", "val_loss": "validation loss"}
        )
    )


def pairs_style(pairs: pd.DataFrame):
    """The paired comparisons for reading: differences in points, the interval beside McNemar's p."""
    shown = pairs.rename(columns={"second": "checkpoint", "first": "against", "p": "McNemar p", "p_holm": "Holm p"})
    shown["points"] = 100 * pairs["difference"]
    ends = zip(100 * pairs["ci_low"], 100 * pairs["ci_high"], strict=True)
    shown["95 % bootstrap"] = ["–" if pd.isna(low) else f"{signed(low)} to {signed(high)}" for low, high in ends]
    names = ["checkpoint", "against", "gained", "lost", "both", "neither", "points", "95 % bootstrap", "McNemar p"]
    return styled(shown[[*names, "Holm p"]])


def reported_accuracy(tables: list[pd.DataFrame]) -> dict[str, float]:
    """What the original authors report for each stage, if these are results on RACE's whole test split; else {}."""
    whole = all((table["split"][0], table["questions"][0]) == ("test", RACE_QUESTIONS["test"]) for table in tables)
    return REPORTED if whole else {}


def published_table(table: pd.DataFrame) -> pd.DataFrame:
    """Other people's accuracies beside this one, lowest first; empty unless this is RACE's whole test split."""
    reported = reported_accuracy([table])
    rows = [(f"original authors, {stage}", value, "reported by them") for stage, value in reported.items()]
    rows += [*PUBLISHED, (f"this checkpoint ({table['stage'][0]})", table["accuracy"][0], "measured here")]
    names = ["model", "accuracy", "source"]
    return pd.DataFrame(rows if reported else [], columns=names).sort_values("accuracy", ignore_index=True)


def planning_table(difference: float, questions: int, contrasts: int):
    """What several numbers of seeds see of a true difference (in points)."""
    rows = [power(difference / 100, seeds, questions, contrasts) for seeds in (2, 3, 5, 10, 20, 40)]
    table = pd.DataFrame(rows)
    table["95 % interval, ± points"] = (100 * table.pop("half_width")).map("{:.1f}".format)
    for name, words in (("power", "found"), ("power_holm", "found, after Holm")):
        table[words] = table.pop(name).map(percent)
    return styled(table)


def budgets_style(table: pd.DataFrame):
    """What each recipe had, for reading."""
    shown = table.assign(
        learning_rate=[", ".join(map(rate, rates)) for rates in table["learning_rate"]],
        monitor=table["monitor"].map(RULES),
    )
    names = {"learning_rate": "highest rate of each stage", "questions": "questions trained on"}
    names |= {"checkpoints": "checkpoints to choose from", "monitor": "chosen by"}
    shown = shown.drop(columns=["fewest_epochs", "also"])
    shown["questions"] = shown["questions"].map("{:,}".format)
    return styled(shown.rename(columns=names))


def accuracies_style(table: pd.DataFrame):
    """runs.accuracies for reading."""
    shown = table.assign(
        each=[", ".join(percent(it) for it in each) for each in table["each"]],
        sd=["–" if pd.isna(it) else f"{100 * it:.2f} points" for it in table["sd"]],
        **{choice: table[choice].map(percent) for choice in CHOICES},
    )
    names = {"chosen": "chosen checkpoint", "other rule": "by the other rule", "sd": "standard deviation"}
    return styled(shown.rename(columns=names | {"each": "chosen, each seed"}))


def recipes_style(table: pd.DataFrame):
    """runs.compare for reading, in points."""
    shown = pd.DataFrame({"checkpoints": table["choice"], "recipe": table["second"], "against": table["first"]})
    shown["points"] = 100 * table["difference"]
    for name, ends in (("95 % interval", ("ci_low", "ci_high")), ("90 % interval", ("low_90", "high_90"))):
        pairs = zip(*(100 * table[end] for end in ends), strict=True)
        shown[name] = ["–" if np.isnan(low) else f"{signed(low)} to {signed(high)}" for low, high in pairs]
    shown["p"] = table["p"].map(p_number)
    shown["Holm p"] = table["p_holm"]
    shown["degrees of freedom"] = ["–" if np.isnan(it) else f"{it:.0f}" for it in table["freedom"]]
    return styled(shown)
