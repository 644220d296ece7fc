"""The comparison of recipes in words (race.score.recipes and race.score.runs have the numbers)."""

import pandas as pd

from race.score.recipes import POWER, RECIPES_DIFFER, RUNS_DIFFER, SD, power, seeds_needed
from race.written import SIGNIFICANT, listed, p_value, signed

RULES = {"val_loss_epoch": "validation loss", "val_acc": "validation accuracy"}
FEW = 1000  # questions, as an example of a smaller test


def planning(difference: float, questions: int, seeds: int, contrasts: int) -> str:
    """How many seeds and questions a true difference (in points) takes, and what these will see of it."""
    words = f"A true difference of {_points(difference)} is found in at least {100 * POWER:.0f} of 100 comparisons"
    text = f"{words}, after Holm's adjustment for {contrasts}, " if contrasts > 1 else f"{words} "
    for number, count in enumerate([questions, FEW] if questions > 2 * FEW else [questions]):
        wanted = seeds_needed(difference / 100, count, contrasts)
        many = f"with {wanted} seeds a recipe" if wanted else "with no number of seeds up to 100"
        text += f"{'; ' if number else ''}on {count:,} questions {many}"
    if seeds > 1:
        found = power(difference / 100, seeds, questions, contrasts)
        text += (
            f". With {seeds} seeds on {questions:,} questions it is found in {100 * found['power_holm']:.0f} of 100, "
            f"and an interval reaches about {100 * found['half_width']:.1f} points to either side"
        )
    text += ". This assumes that accuracies of a recipe's runs spread by "
    text += _spread({"sd": SD, "runs_differ": RUNS_DIFFER})
    return f"{text}two recipes on {100 * RECIPES_DIFFER:.0f} % of the questions."


def observed(found: dict) -> str:
    """What the planning assumes, as it was in these runs (race.score.recipes.observed)."""
    told = "" if pd.isna(found["sd"]) else f"accuracies of a recipe's runs spread by {_spread(found)}"
    return f"In these runs {told}two recipes differ on {100 * found['recipes_differ']:.0f} % of the questions."


def _spread(found: dict) -> str:
    text = f"{100 * found['sd']:.1f} points (standard deviation) beyond what single answers do by chance, "
    return f"{text}two seeds differ on {100 * found['runs_differ']:.0f} % and "


def _points(value: float) -> str:
    return f"{value:g} point{'' if value == 1 else 's'}"


def budget(table: pd.DataFrame) -> str:
    """Whether all recipes had the same (runs.budgets): the budget, the choice, the rule, the learning rates tried."""
    row, told, uneven = table.iloc[0], [], table[table["fewest_epochs"] < table["epochs"]]
    if (table["questions"] == row["questions"]).all():
        told.append(f"Each recipe was trained on {row['questions']:,} questions ({row['epochs']} epochs).")
    else:
        told.append(f"**The budgets differ**: {_each(table, 'questions', '{:,}')} questions were trained on.")
    if len(uneven):
        told.append(f"Some seeds of {listed(uneven['recipe'])} had fewer epochs than others.")
    for name in table["also"].iloc[0]:
        if len({str(also[name]) for also in table["also"]}) > 1:
            each = listed([f"{it['recipe']} {str(it['also'][name])[:12]}" for _, it in table.iterrows()])
            told.append(f"**They were trained with different {name.replace('_', ' ')}**: {each}.")
    if table["checkpoints"].nunique() > 1:
        told.append(f"They chose among different numbers of checkpoints: {_each(table, 'checkpoints')}.")
    if table["monitor"].nunique() > 1:
        told.append(f"They chose by different rules: {_each(table.replace({'monitor': RULES}), 'monitor')}.")
    if table["learning_rates_tried"].nunique(dropna=False) > 1:
        told.append(f"Learning rates tried: {_each(table.astype(object).fillna('unknown'), 'learning_rates_tried')}.")
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
    ends = zip(own["fewest_epochs"], own["epochs"], strict=True)
    epochs = " and ".join(
        dict.fromkeys(f"{most}" if most == fewest else f"{fewest} to {most}" for fewest, most in ends)
    )
    rules = " and ".join(dict.fromkeys(RULES[it] for it in own["monitor"]))
    found = f"{second} − {first} = {signed(100 * row['difference'])} points"
    if min(counts) < 2:
        return (
            f"One seed, {epochs} epochs, checkpoints by {rules}: {found} on these {row['questions']:,} questions. That "
            "is about these checkpoints. One seed cannot say how far another seed would be away, so it says nothing "
            "of the recipes."
        )
    paired = ", compared seed by seed (both go on from the same weights)" if row["same_base"] else ""
    text = f"Over {seeds}{paired}, {epochs} epochs, checkpoints by {rules}: {found}"
    if pd.isna(row["p"]):
        return f"{text}; not tested: the same answers in all runs, or questions of one passage only."
    low, high = (signed(100 * row[name]) for name in ("ci_low", "ci_high"))
    text += f" (95 % interval {low} to {high}, over seeds and questions; Holm {p_value(row['p_holm'])}): "
    if row["p_holm"] < SIGNIFICANT:
        text += f"{second} is {'better' if row['difference'] > 0 else 'worse'} than {first}"
    else:
        beyond = 100 * max(abs(row["ci_low"]), abs(row["ci_high"]))
        text += f"not significant; a difference beyond {beyond:.1f} points is unlikely"
    if max(abs(row["low_90"]), abs(row["high_90"])) <= margin / 100:
        alike = f"{second} is as good as {first} within" if row["p_holm"] >= SIGNIFICANT else "the difference is below"
        text += f"; {alike} {_points(margin)} (90 % interval)"
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
    return f"N{text[1:]}" if text.startswith("no significant") else text
