"""The comparison of recipes in words, tables and figures (race.score.runs and race.score.recipes have the numbers)."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from race import CHANCE
from race.report.figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, STYLE, WIDTH, finish, key, percent_axis
from race.report.tables import styled
from race.score.recipes import POWER, RECIPES_DIFFER, RUNS_DIFFER, SD, power, seeds_needed
from race.score.runs import CHOICES
from race.written import SIGNIFICANT, listed, p_value, percent, rate, signed

RULES = {"val_loss_epoch": "validation loss", "val_acc": "validation accuracy"}
LOOKS = [
    (BLUE, "o", "-"),
    (ORANGE, "s", "--"),
    (GREEN, "^", "-."),
    (PURPLE, "v", ":"),
    (INK, "D", "-"),
    (GREY, "x", "--"),
]
FEW = 1000  # questions, as an example of a smaller test


def planning(difference: float, questions: int, seeds: int, contrasts: int) -> str:
    """How many seeds and questions a true difference (in points) takes, and what these will see of it."""
    words = f"A true difference of {difference:.1f} points is found in {100 * POWER:.0f} of 100 comparisons"
    text = f"{words}, after Holm's adjustment for {contrasts}, " if contrasts > 1 else f"{words} "
    for number, count in enumerate(dict.fromkeys([questions, FEW])):
        wanted = seeds_needed(difference / 100, count, contrasts)
        many = f"with {wanted} seeds a recipe" if wanted else "with no number of seeds up to 100"
        text += f"{'; ' if number else ''}on {count:,} questions {many}"
    if seeds > 1:
        found = power(difference / 100, seeds, questions, contrasts)
        text += (
            f". With {seeds} seeds on {questions:,} questions it is found in {100 * found['power_holm']:.0f} of 100, "
            f"and an interval reaches about {100 * found['half_width']:.1f} points to either side"
        )
    return (
        f"{text}. This assumes that seeds alone spread a recipe's accuracy by {100 * SD:.1f} points (standard "
        f"deviation), that two seeds differ on {100 * RUNS_DIFFER:.0f} % of the questions, and two recipes on "
        f"{100 * RECIPES_DIFFER:.0f} %."
    )


def planning_table(difference: float, questions: int, contrasts: int):
    """What several numbers of seeds see of a true difference (in points)."""
    rows = [power(difference / 100, seeds, questions, contrasts) for seeds in (2, 3, 5, 10, 20, 40)]
    table = pd.DataFrame(rows)
    table["95 % interval, ± points"] = (100 * table.pop("half_width")).map("{:.1f}".format)
    for name, words in (("power", "found"), ("power_holm", "found, after Holm")):
        table[words] = table.pop(name).map(percent)
    return styled(table)


def budget(table: pd.DataFrame) -> str:
    """Whether all recipes had the same (runs.budgets): the budget, the choice, the rule, the learning rates tried."""
    row, told = table.iloc[0], []
    if (table["questions"] == row["questions"]).all():
        told.append(f"Each recipe was trained on {row['questions']:,} questions ({row['epochs']} epochs).")
    else:
        told.append(f"**The budgets differ**: {_each(table, 'questions', '{:,}')} questions were trained on.")
    if table["checkpoints"].nunique() > 1:
        told.append(f"They chose among different numbers of checkpoints: {_each(table, 'checkpoints')}.")
    if table["monitor"].nunique() > 1:
        told.append(f"They chose by different rules: {_each(table.replace({'monitor': RULES}), 'monitor')}.")
    if table["learning_rates_tried"].nunique(dropna=False) > 1:
        told.append(f"Learning rates tried: {_each(table.fillna('unknown'), 'learning_rates_tried')}.")
    return " ".join(told)


def _each(table: pd.DataFrame, column: str, form: str = "{}") -> str:
    return listed([f"{row['recipe']} {form.format(row[column])}" for _, row in table.iterrows()])


def scope(source: str, split: str) -> str:
    """What a comparison on this source and split cannot say."""
    text = "The demo's corpus is a toy: nothing of this is about RACE. " if source == "demo" else ""
    if split == "validation":
        text += "The same split chose the checkpoints: all accuracies are optimistic."
    return text.strip()


def difference(row: pd.Series, had: pd.DataFrame, margin: float) -> str:
    """What was found of one recipe against the first one, and no more; margin: points that would matter."""
    second, first = row["second"], row["first"]
    own = had.set_index("recipe").loc[[first, second]]
    counts = row["seeds_first"], row["seeds_second"]
    seeds = f"{counts[0]} seeds each" if counts[0] == counts[1] else f"{counts[0]} and {counts[1]} seeds"
    epochs = " and ".join(str(it) for it in dict.fromkeys(own["epochs"]))
    rules = " and ".join(dict.fromkeys(RULES[it] for it in own["monitor"]))
    found = f"{second} − {first} = {signed(100 * row['difference'])} points"
    if min(counts) < 2:
        return (
            f"One seed, {epochs} epochs, checkpoints by {rules}: {found} on these {row['questions']:,} questions. That "
            "is about these checkpoints. One seed cannot say how far another seed would be away, so it says nothing "
            "of the recipes."
        )
    paired = ", seed by seed from the same weights" if row["same_base"] else ""
    text = f"Over {seeds}{paired}, {epochs} epochs, checkpoints by {rules}: {found}"
    if pd.isna(row["p"]):
        return f"{text}; there is no variation to test it against."
    low, high = (signed(100 * row[name]) for name in ("ci_low", "ci_high"))
    text += f" (95 % interval {low} to {high}, over seeds and questions; Holm {p_value(row['p_holm'])}): "
    if row["p_holm"] < SIGNIFICANT:
        text += f"{second} is {'better' if row['difference'] > 0 else 'worse'} than {first}"
    else:
        beyond = 100 * max(abs(row["ci_low"]), abs(row["ci_high"]))
        text += f"not significant; a difference beyond {beyond:.1f} points is unlikely"
    if max(abs(row["low_90"]), abs(row["high_90"])) <= margin / 100:
        text += f". {second} is as good as {first} within {margin:.1f} points (90 % interval)"
    spread = " and ".join(f"{100 * row[name]:.1f}" for name in ("sd_first", "sd_second"))
    return f"{text}. Standard deviation over seeds: {spread} points."


def title(table: pd.DataFrame) -> str:
    """Which recipes are better or worse than the first one."""
    first = table["first"].iloc[0]
    if table["p"].isna().all():
        return f"Differences to {first}; nothing could be tested"
    sure = table[table["p_holm"] < SIGNIFICANT]
    parts = []
    for word, part in (("better", sure[sure["difference"] > 0]), ("worse", sure[sure["difference"] < 0])):
        if len(part):
            parts.append(f"{listed(part['second'])} {'is' if len(part) == 1 else 'are'} {word} than {first}")
    if len(sure) < len(table):
        others = table.loc[~table.index.isin(sure.index), "second"]
        parts.append(f"no significant difference to {first}: {listed(others)}")
    text = "; ".join(parts)
    return text[0].upper() + text[1:]


def budget_style(table: pd.DataFrame):
    """What each recipe had, for reading."""
    shown = table.assign(
        learning_rate=[", ".join(map(rate, rates)) for rates in table["learning_rate"]],
        monitor=table["monitor"].map(RULES),
    )
    names = {"learning_rate": "highest rate of each stage", "questions": "questions trained on"}
    names |= {"checkpoints": "checkpoints to choose from", "monitor": "chosen by"}
    shown["questions"] = shown["questions"].map("{:,}".format)
    return styled(shown.rename(columns=names))


def accuracy_style(table: pd.DataFrame):
    """runs.accuracies for reading."""
    shown = table.assign(
        each=[", ".join(percent(it) for it in each) for each in table["each"]],
        sd=["–" if pd.isna(it) else f"{100 * it:.2f} points" for it in table["sd"]],
        **{choice: table[choice].map(percent) for choice in CHOICES},
    )
    names = {"chosen": "chosen checkpoint", "other rule": "by the other rule", "sd": "standard deviation"}
    return styled(shown.rename(columns=names | {"each": "chosen, each seed"}))


def differences_style(table: pd.DataFrame):
    """runs.compare for reading, in points."""
    shown = pd.DataFrame({"checkpoints": table["choice"], "recipe": table["second"], "against": table["first"]})
    shown["points"] = 100 * table["difference"]
    for name, ends in (("95 % interval", ("ci_low", "ci_high")), ("90 % interval", ("low_90", "high_90"))):
        pairs = zip(*(100 * table[end] for end in ends), strict=True)
        shown[name] = ["–" if np.isnan(low) else f"{signed(low)} to {signed(high)}" for low, high in pairs]
    shown["p"] = ["–" if np.isnan(p) else p_value(p) for p in table["p"]]
    shown["Holm p"] = table["p_holm"]
    shown["degrees of freedom"] = ["–" if np.isnan(it) else f"{it:.0f}" for it in table["freedom"]]
    return styled(shown)


@plt.style.context(STYLE)
def courses_figure(validated: pd.DataFrame, rates: pd.DataFrame) -> Figure:
    """Validation loss, accuracy and learning rate of each recipe over the questions trained on (runs.courses)."""
    shape = {"figsize": (WIDTH, 7.2), "sharex": True, "height_ratios": (2.2, 2.2, 1.2)}
    figure, (loss, accuracy, schedule) = plt.subplots(3, 1, **shape)
    keys, seeds = [], max(1, validated["seed"].nunique())
    for number, (recipe, part) in enumerate(validated.groupby("recipe", sort=False)):
        color, marker, line = LOOKS[number % len(LOOKS)]
        for axes, name in ((loss, "val_loss_epoch"), (accuracy, "val_acc")):
            over = part.groupby("questions")[name].agg(["mean", "min", "max"])
            axes.plot(over.index, over["mean"], color=color, marker=marker, linestyle=line, markersize=4.5)
            axes.fill_between(over.index, over["min"], over["max"], color=color, alpha=0.13, linewidth=0)
        own = rates[rates["recipe"] == recipe]
        own = own[own["seed"].isna() | (own["seed"] == own["seed"].min())]
        for _, stage in own.groupby("stage"):
            schedule.plot(stage["questions"], stage["learning_rate"], color=color, linestyle=line)
        keys.append(key(recipe, color, marker, line))
    for axes, chance in ((loss, -np.log(CHANCE)), (accuracy, CHANCE)):
        axes.axhline(chance, color=GREY, linestyle=":", linewidth=1)
    band = f"mean of {seeds} seeds, band from the lowest to the highest" if seeds > 1 else "one seed"
    loss.set(title=f"Validation after each epoch: {band}", ylabel="cross-entropy (nats)\n(axis cut)")
    accuracy.set(ylabel="accuracy (axis cut)")
    percent_axis(accuracy.yaxis)
    schedule.set(ylabel="learning rate", xlabel="questions trained on", ylim=(0, 1.15 * rates["learning_rate"].max()))
    schedule.yaxis.set_major_formatter(lambda value, _: rate(value) if value else "0")
    schedule.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.align_ylabels()
    return finish(figure, *keys, key("chance (ln 4; 25 %)", line=":"), columns=4)
