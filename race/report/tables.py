"""Tables for reading: scores, comparisons, where checkpoints come from, and other people's numbers."""

import pandas as pd

from race import LEVELS, RACE_QUESTIONS
from race.report.sentences import interval, percent, rate, signed
from race.score.results import RESULT_COLUMNS

REPORTED = {"e1": 0.671, "e2": 0.680, "e3": 0.720}  # the original authors' accuracies on RACE's test split, not ours
PUBLISHED = [  # published accuracies; ALBERT's authors call theirs dev set results (google-research/albert, issue 30)
    ("guessing", 0.25, "one of four options"),
    ("ALBERT v2 base", 0.668, "README of google-research/albert (dev set)"),
    ("ALBERT v2 large", 0.752, "README of google-research/albert (dev set)"),
    ("ALBERT v2 xlarge", 0.807, "README of google-research/albert (dev set)"),
    ("ALBERT v2 xxlarge", 0.868, "README of google-research/albert (dev set)"),
    ("RoBERTa large", 0.832, "Liu et al. 2019, arXiv:1907.11692"),
    ("human ceiling", 0.95, "Lai et al. 2017, arXiv:1704.04683"),
]
FORMATS = dict.fromkeys(["accuracy", *LEVELS, "calibration_error", "confidence"], percent)
FORMATS |= dict.fromkeys(["questions", "correct", "gained", "lost", "both", "neither"], "{:,}")
FORMATS |= {"log_loss": "{:.4f}", "val_loss": "{:.3f}", "learning_rate": rate, "epochs": "{:.0f}", "points": signed}
FORMATS |= dict.fromkeys(["p", "p (Holm)"], "{:.2g}")


def styled(table: pd.DataFrame):
    """A table as a notebook shows it: every column in its format, what is not known as a dash."""
    formats = {name: form for name, form in FORMATS.items() if name in table}
    return table.style.format(formats, na_rep="–").hide(axis="index")


def score_style(table: pd.DataFrame):
    """Accuracies by level or by group, the interval in one column."""
    columns = [name for name in ("grouping", "group", *RESULT_COLUMNS) if name in table]
    return styled(_one_interval(table[columns]))


def _one_interval(table: pd.DataFrame) -> pd.DataFrame:
    shown = table.drop(columns=["ci_low", "ci_high"])
    shown.insert(shown.columns.get_loc("accuracy") + 1, "95 % interval", [interval(row) for _, row in table.iterrows()])
    return shown


def lineage_table(checkpoints: list, names: list[str]) -> pd.DataFrame:
    """What each named checkpoint remembers, a row each; `parent`: which of the others its base is, by hash."""
    name_of = {checkpoint.sha256: name for checkpoint, name in zip(checkpoints, names, strict=True)}
    rows = [
        {
            "name": name,
            "stage": checkpoint.stage or checkpoint.label,
            "checkpoint": checkpoint.name,
            "base": checkpoint.base,
            "learning_rate": checkpoint.learning_rate,
            "epochs": None if checkpoint.epoch is None else checkpoint.epoch + 1,
            "val_loss": checkpoint.val_loss,
            "parent": name_of.get(checkpoint.base_sha256),
        }
        for checkpoint, name in zip(checkpoints, names, strict=True)
    ]
    return pd.DataFrame(rows)


def stages_behind(checkpoints: list) -> list[str]:
    """The stages that these checkpoints have gone through, as they remember them."""
    named = {stage for checkpoint in checkpoints for stage in (*checkpoint.chain, checkpoint.stage)}
    return sorted(named - {None, "unknown"})


def comparison_table(tables: list[pd.DataFrame], checkpoints: list, names: list[str]) -> pd.DataFrame:
    """One row a checkpoint: what it remembers, accuracy with interval, accuracy by level."""
    scores = []
    for table in tables:
        everything = table.iloc[0][["questions", "accuracy", "ci_low", "ci_high"]]
        levels = table.set_index("level")["accuracy"].reindex(LEVELS)
        scores.append({**everything, **levels})
    return lineage_table(checkpoints, names).drop(columns="parent").join(pd.DataFrame(scores))


def comparison_style(table: pd.DataFrame):
    """The comparison for reading."""
    return styled(_one_interval(table.drop(columns=["stage", "checkpoint", "questions"])))


def pairs_style(pairs: pd.DataFrame):
    """The paired comparisons for reading: differences in points, the interval in one column."""
    shown = pairs.rename(columns={"second": "checkpoint", "first": "against", "p_holm": "p (Holm)"})
    shown["points"] = 100 * pairs["difference"]
    ends = zip(100 * pairs["ci_low"], 100 * pairs["ci_high"], strict=True)
    shown["95 % interval"] = [f"{signed(low)} to {signed(high)}" for low, high in ends]
    names = ["checkpoint", "against", "gained", "lost", "both", "neither", "points", "95 % interval", "p", "p (Holm)"]
    return styled(shown[names])


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
