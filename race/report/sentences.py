"""Every sentence that says what was found, a function for each: of one checkpoint, of several, and of recipes."""

from collections.abc import Callable

import pandas as pd

from race.report.formats import SIGNIFICANT, interval, listed, p_value, percent, points, questions_of, signed
from race.score import comparison, statistics
from race.score.comparison import POWER, RECIPES_DIFFER, RUNS_DIFFER, SD, power, seeds_needed
from race.score.statistics import quoted_interval

SHOWN = 3  # so many others are named one by one
BUDGET = {"questions": "questions trained on", "fewest_epochs": "epochs of the shortest run", "monitor": "chosen by"}
BUDGET |= {"checkpoints": "checkpoints to choose from", "learning_rates_tried": "learning rates tried"}


def finding(row: pd.Series) -> str:
    """What was found of a difference by its p_holm: "better", "worse", "not significant" or "not tested"."""
    if pd.isna(row["p_holm"]):
        return "not tested"
    if row["p_holm"] >= SIGNIFICANT:
        return "not significant"
    return "better" if row["difference"] > 0 else "worse"


def by_finding(rows: pd.DataFrame, name: Callable[[pd.Series], str], words: dict[str, str]) -> str:
    """The names of rows behind words for what was found of them; others stay unsaid. The verdict of tables and titles.

    words: finding → text with {} for the names, in the order in which they are to be said.
    """
    named: dict[str, list[str]] = {}
    for _, row in rows.iterrows():
        named.setdefault(finding(row), []).append(name(row))
    return "; ".join(text.format(listed(named[found], SHOWN)) for found, text in words.items() if found in named)


def origin(checkpoint) -> str:
    """What a checkpoint remembers: "stage e3, epoch 1 (from 0), trained from e2-….ckpt"; or that it is not known."""
    epoch = None if checkpoint.epoch is None else f"{checkpoint.epoch} (from 0)"
    facts = {"stage": checkpoint.stage, "epoch": epoch, "trained from": checkpoint.base}
    return ", ".join(f"{name} {'unknown' if value is None else value}" for name, value in facts.items())


def headline(table: pd.DataFrame) -> str:
    """The result of one checkpoint: accuracy with interval, against chance, macro accuracy, and what it has seen.

    If it was trained on more than half of the articles, chance is no comparison.
    """
    row = table.iloc[0]
    low, high, how = quoted_interval(row)
    how = ", by passage" if how == "by passage" else ""
    text = f"{row['stage']} answers {row['correct']:,} of {questions_of(row)} correctly: "
    text += f"accuracy {percent(row['accuracy'])} (95 % interval {interval(low, high)}{how})"
    if pd.isna(row["trained_on"]) or row["trained_on"] <= row["questions"] / 2:
        chance = 1 / row["options"]
        where = "inside" if low <= chance <= high else "below" if low > chance else "above"
        text += f"; chance ({100 * chance:.3g} %) is {where} the interval"
    for _, level in table[1:].iterrows():
        ends = interval(*quoted_interval(level)[:2])
        text += f"; {level['level']}: {percent(level['accuracy'])} ({ends})"
    if pd.notna(row.get("macro_accuracy")):
        ends = interval(row["macro_low"], row["macro_high"])
        text += f". Macro accuracy over the two levels: {percent(row['macro_accuracy'])} ({ends})"
    return f"{text}. {seen([table], [row['stage']])}"


def seen(tables: list[pd.DataFrame], names: list[str]) -> str:
    """Which checkpoints were trained, or selected, on the questions of these results (accuracy_table)."""
    columns = ["questions", "trained_on", "selected_on", "not_known"]
    counts = pd.concat([table[columns].head(1) for table in tables]).fillna(0).astype(int).assign(name=names)
    alike = counts.groupby(columns, sort=False)["name"]
    return " ".join(_seen(listed(who), "were" if len(who) > 1 else "was", *numbers) for numbers, who in alike)


def _seen(who: str, was: str, questions: int, trained: int, chosen: int, unknown: int) -> str:
    text = []
    if trained == questions:
        text += [f"{who} {was} trained on the articles of all these questions: nothing here is about new questions."]
    elif trained:
        text += [f"{who} {was} trained on the articles of {trained:,} of these {questions:,} questions."]
    if chosen == questions:
        text += [f"{who} {was} selected on the articles of these questions: the accuracy is optimistic."]
    elif chosen:
        text += [f"{who} {was} selected on the articles of {chosen:,} of these {questions:,} questions."]
    if unknown:
        text += [f"Of {unknown:,} questions it is not known whether {who} {was} trained or selected on their article."]
    return " ".join(text) or f"{who} {was} neither trained nor selected on the articles of these questions."


def groups(table: pd.DataFrame) -> str:
    """Which groups of statistics.group_accuracies are harder or easier than the rest of their level, largest first."""
    if table["p"].isna().all():
        return "No grouping has two groups within a level: there is nothing to compare"

    def name(row: pd.Series) -> str:
        level = "" if row["level"] == "all" else f"{row['level']}, "
        return f"“{row['group']}” ({level}{points(row['difference'])} points)"

    words = {"worse": "Harder than the rest of its level: {}", "better": "Easier: {}"}
    largest = table.sort_values("difference", key=abs, ascending=False, kind="stable")
    return by_finding(largest, name, words) or "No group differs significantly from the rest of its level"


def letters(predictions: pd.DataFrame) -> str:
    """Position bias: whether letters are chosen as often as they are correct."""
    statistic, freedom, p = statistics.letter_test(predictions)
    if pd.isna(p):
        return "Whether letters are chosen as often as they are correct is not tested: too few wrong answers."
    test = f"Stuart–Maxwell test, χ² = {statistic:.1f}, degrees of freedom: {freedom}, {p_value(p)}"
    found = "significant" if p < SIGNIFICANT else "not significant"
    return f"How often each letter is chosen and how often it is correct: the difference is {found} ({test})."


def calibration(table: pd.DataFrame, temperature: float | None = None, change: tuple | None = None) -> str:
    """What calibration_table shows: confidence against accuracy, the calibration error, and what a temperature does.

    change: calibration.log_loss_change on the split that is scored.
    """
    row = table.iloc[0]
    error, low, high = (100 * row[name] for name in ("calibration_error", "floor_low", "floor_high"))
    text = (
        f"Mean confidence is {percent(row['confidence'])}, accuracy {percent(row['accuracy'])}. The expected "
        f"calibration error, {error:.1f} points, is {'above' if error > high else 'not above'} what a perfectly "
        f"calibrated model with these confidences would read ({low:.1f} to {high:.1f})."
    )
    if change is None:
        return text
    mean, low, high = change
    found = "the temperature helps" if high < 0 else "the temperature makes it worse" if low > 0 else "not significant"
    ends = "not tested" if pd.isna(low) else f"95 % interval {signed(low, 3)} to {signed(high, 3)}: {found}"
    text += f" At temperature {temperature:.2f}, fitted on validation, cross-entropy changes by {signed(mean, 3)}"
    return f"{text} ({ends}), and the calibration error is {100 * table.iloc[1]['calibration_error']:.1f} points."


def verdict(predictions: dict[str, pd.DataFrame], pairs: pd.DataFrame, results: list[pd.DataFrame]) -> str:
    """Which checkpoint has the highest accuracy, and what was found of its lead over the others; also a title.

    results: the accuracy_table of each of the predictions.
    """
    best, found = comparison.leads(predictions, pairs)
    row = dict(zip(predictions, results, strict=True))[best].iloc[0]
    text = f"{best}: {percent(row['accuracy'])} of {questions_of(row)} correct"
    if found.empty:
        text += f" (95 % interval {interval(*quoted_interval(row)[:2])})"
    level = found["difference"] == 0
    words = {"better": "significantly better than {}", "not significant": "lead over {} not significant"}
    words |= {"not tested": "not tested against {}"}
    lead = by_finding(found[~level], lambda row: f"{row['first']} ({100 * row['difference']:.1f} points)", words)
    ends = [f"{it['first']} ({interval(it['ci_low'], it['ci_high'], points)})" for _, it in found[level].iterrows()]
    return "; ".join(filter(None, [text, lead, f"the same accuracy here as {listed(ends, SHOWN)}" if ends else ""]))


def paired(row: pd.Series, verdict: bool = True) -> str:
    """One row of compare_pairs: who is correct where, the difference, and, for a verdict, whether it is significant."""
    first, second, found = row["first"], row["second"], finding(row)
    told = f"{points(row['difference'])} points"
    if not verdict:
        told += f" (95 % interval by passage {interval(row['ci_low'], row['ci_high'], points)})"
    elif found == "not tested":
        told += "; not tested: one of the two was trained or selected on these articles, or they are too few"
    else:
        holm = f"; Holm {p_value(row['p_holm'])}" if row["pairs"] > 1 else ""
        ends = interval(row["ci_low"], row["ci_high"], points)
        told += f" (95 % interval by passage {ends}, {p_value(row['p'])}{holm}): "
        told += found if found == "not significant" else f"{second} is significantly {found}"
    return f"{second} against {first}: gained {row['gained']:,} questions, lost {row['lost']:,}, {told}."


def scope(lineage: pd.DataFrame) -> str:
    """What a comparison of single checkpoints (tables.lineage_table) cannot say."""
    if len(lineage) < 2:
        return ""
    text = "Each checkpoint is one training run: this compares these checkpoints, not their recipes, which takes "
    text += "several seeds. Not significant does not mean equal: the interval shows which differences remain possible."
    text += " They were trained with different code of the method." if lineage["code"].nunique() > 1 else ""
    for row in lineage[lineage["parent"].notna()].itertuples():
        text += f" {row.name} continues from {row.parent}, so it has also trained longer."
    return text


def recipes_verdict(table: pd.DataFrame) -> str:
    """What was found of each recipe against the first one, the largest differences first; also a title."""
    first = table["first"].iloc[0]
    words = {it: f"significantly {it} than {first}: {{}}" for it in ("better", "worse")}
    words |= {it: f"{it}: {{}}" for it in ("not significant", "not tested")}
    if set(table.apply(finding, axis=1)) == {"not significant"}:
        words["not significant"] = f"no recipe differs significantly from {first}: {{}}"
    largest = table.sort_values("difference", key=abs, ascending=False, kind="stable")
    text = by_finding(largest, lambda row: f"{row['second']} ({points(row['difference'])} points)", words)
    return text[0].upper() + text[1:]


def difference(row: pd.Series, margin: float) -> str:
    """What was found of one recipe, or stage, against another over seeds; margin: points that would matter."""
    found, (first, second) = finding(row), row[["first", "second"]]
    text = f"{second} − {first} = {points(row['difference'])} points"
    over = f"{row['seeds']} seed{'s' if row['seeds'] > 1 else ''}, {row['questions']:,} questions"
    if row["seeds"] == 1:
        return f"{text} ({over}). This is about these checkpoints, and says nothing of another seed."
    if pd.isna(row["ci_low"]):
        why = "the runs were selected on these articles, or have the same answers, or the articles are too few"
        return f"{text} ({over}); not tested: {why}."
    if row["ci_low"] < -1 or row["ci_high"] > 1:
        return f"{text} ({over}); the runs differ too much for an interval."
    text += f" (95 % interval {interval(row['ci_low'], row['ci_high'], points)}; {over}"
    if found == "not tested":
        return f"{text}); too few seeds for a verdict."
    text += f"; Holm {p_value(row['p_holm'])}): "
    text += found if found == "not significant" else f"{second} is {found} than {first}"
    if max(abs(row["low_90"]), abs(row["high_90"])) <= margin / 100:
        text += f"; the difference is below {_points(margin)} (90 % interval)"
    elif found == "not significant":
        text += f"; {_points(margin)} {'remains' if margin == 1 else 'remain'} possible"
    return f"{text}."


def over_seeds(means: pd.DataFrame, compared: dict, seeds: list[int]) -> list[str]:
    """How the stages of one recipe do over its seeds (runs.accuracies), each against the first (compare_runs)."""
    lines = []
    for row in means.itertuples():
        spread = f"; standard deviation {100 * row.sd:.2f} points" if len(row.each) > 1 else ""
        spread += f"; at chance: {row.at_chance}" if row.at_chance else ""
        lines.append(f"{row.recipe}: {percent(row.accuracy)} ({', '.join(map(percent, row.each))}{spread})")
    lines += verdict_on_runs(compared, seeds, 1.0)
    return [*lines, "For this training set and these learning rates: seeds vary order, dropout and a new head."]


def verdict_on_runs(compared: dict, seeds: list, margin: float) -> list[str]:
    """A sentence for each recipe against the first (compare_runs); which runs are at chance; the same without them."""
    tables, failed = (compared[name] for name in ("differences", "without_failed")), compared["failed"]
    told, again = ([difference(row, margin) for _, row in table.iterrows()] for table in tables)
    runs = (1 + len(told)) * len(seeds)
    return told + ([failed_runs(failed, seeds, runs), *again] if failed else [])


def failed_runs(failed: dict[str, list[int]], seeds: list[int], runs: int) -> str:
    """Which of so many runs are at chance (comparison.at_chance), and what that means; "" if none is."""
    of_seed = ["" if seed is None else f" with seed {seed}" for seed in seeds]
    named = [f"{name}{of_seed[row]}" for name, rows in failed.items() for row in rows]
    if not named:
        return ""
    if len(named) == runs:
        return "All runs are at chance: there is nothing to compare."
    if len(seeds) == 1:
        return f"At chance: {listed(named)}."
    text = f"At chance: {listed(named, SHOWN)}. An interval over so few seeds does not cover such failures"
    some = len({row for rows in failed.values() for row in rows}) < len(seeds)
    return f"{text}; without the seeds of these runs:" if some else f"{text}."


def budget(table: pd.DataFrame) -> str:
    """Whether all recipes had the same (runs.training_totals), and in what they differ."""
    row, settings = table.iloc[0], pd.DataFrame(list(table["also"]))
    had = table[[*BUDGET]].assign(monitor=table["monitor"].map(lambda rules: " ".join(sorted({*rules}))))
    had = had.rename(columns=BUDGET).join(settings.rename(columns=lambda name: name.replace("_", " ")))
    differ = [name for name, values in had.items() if values.nunique(dropna=False) > 1]
    same = f"Each run was trained for {row['epochs']} epochs: {row['questions']:,} questions, with repetitions."
    text = "" if BUDGET["questions"] in differ else same
    return f"{text} **They differ in {listed(differ)}**.".strip() if differ else text


def toy(source: str) -> str:
    """That results on the embedded corpus say nothing about RACE; "" for another source."""
    return "The demo's corpus is a toy: nothing of this is about RACE." if source == "demo" else ""


def recipes_scope(source: str, split: str) -> str:
    """What a comparison of recipes on this source and split cannot say."""
    optimistic = "The same split chose the checkpoints: all accuracies are optimistic." if split == "validation" else ""
    return f"{toy(source)} {optimistic} ".lstrip()


def planning(difference: float, questions: int, seeds: int, contrasts: int) -> str:
    """How many seeds a true difference (in points) takes on these questions, and what `seeds` will see of it."""
    wanted = seeds_needed(difference / 100, questions, contrasts)
    many = f"{wanted} seeds per recipe" if wanted else "Not even 100 seeds per recipe"
    text = f"{many} find a true difference of {_points(difference)} on {questions:,} questions in at least "
    text += f"{100 * POWER:.0f} of 100 comparisons (after Holm's adjustment for {contrasts}). "
    if seeds > 2:  # fewer give no verdict
        found = power(difference / 100, seeds, questions, contrasts)
        text += f"With {seeds} seeds it is found in {100 * found['power_holm']:.0f} of 100, and an interval reaches "
        text += f"about {100 * found['half_width']:.1f} points to either side. "
    text += "Fewer are found if an effect is one per passage, and a significant result of few seeds overstates it. "
    text += f"Assumed: a recipe's accuracies spread by {100 * SD:.1f} points (standard deviation) beyond what single "
    text += f"answers do by chance; two seeds differ on {100 * RUNS_DIFFER:.0f} % of the questions, two recipes on "
    return f"{text}{100 * RECIPES_DIFFER:.0f} %."


def margin(now: float, planned: float) -> str:
    """Whether the points that would matter are those of when the runs were started; "" if they are."""
    changed = f"DIFFERENCE was {planned:g} when the runs were started, and is {now:g}"
    return "" if now == planned else f"{changed}: chosen afterwards, it shows nothing."


def measured(spread: dict) -> str:
    """What was measured (comparison.measured_spread) of what planning assumes; "" with one seed."""
    if pd.isna(spread["sd"]):
        return ""
    text = f"Measured here: {100 * spread['sd']:.1f} points beyond what single answers do by chance; two seeds differ "
    text += f"on {100 * spread['runs_differ']:.0f} % of the questions"
    if pd.notna(spread["recipes_differ"]):
        text += f", two recipes with different seeds on {100 * spread['recipes_differ']:.0f} %"
    return f"{text}."


def _points(value: float) -> str:
    return f"{value:g} point{'' if value == 1 else 's'}"
