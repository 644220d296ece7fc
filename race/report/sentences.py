"""Every sentence that says what was found, and how numbers are written in sentences, tables and figures."""

import numpy as np
import pandas as pd

from race import CHANCE
from race.score import comparison, statistics
from race.score.statistics import SIGNIFICANT


def percent(value: float) -> str:
    """A fraction as "75.9 %"."""
    return f"{100 * value:.1f} %"


def interval(row, low: str = "ci_low", high: str = "ci_high") -> str:
    """The interval of a row as "73.3 % to 78.3 %"."""
    return f"{percent(row[low])} to {percent(row[high])}"


def signed(value: float) -> str:
    """A difference as "+24.2", "−0.3" or "0.0"."""
    text = f"{value:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def points(row) -> str:
    """A difference of accuracies with its interval: "+0.5 points (95 % interval −0.9 to +1.9)"."""
    difference, low, high = (signed(100 * row[name]) for name in ("difference", "ci_low", "ci_high"))
    return f"{difference} points (95 % interval {low} to {high})"


def p_value(p: float) -> str:
    """p as "p = 0.032" or "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def rate(learning_rate: float) -> str:
    """A learning rate as "2.5e-5"."""
    return np.format_float_scientific(learning_rate, precision=2, trim="-", exp_digits=1)


def significance(p: float) -> str:
    """ "significant" or "not significant"."""
    return "significant" if p < SIGNIFICANT else "not significant"


def listed(names) -> str:
    """Names as "a", "a and b", "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def origin(checkpoint) -> str:
    """What a checkpoint remembers: "stage e3, epoch 1, trained from e2-….ckpt"; or that it is not known."""
    facts = {"stage": checkpoint.stage, "epoch": checkpoint.epoch, "trained from": checkpoint.base}
    return ", ".join(f"{name} {'unknown' if value is None else value}" for name, value in facts.items())


def headline(table: pd.DataFrame) -> str:
    """The result of one checkpoint: accuracy with interval, against chance, and macro accuracy over the levels."""
    row = table.iloc[0]
    which = row["split"] if row["level"] == "all" else f"{row['level']} {row['split']}"
    p = statistics.above_chance(row["correct"], row["questions"])
    above = "significantly" if p < SIGNIFICANT else "not significantly"
    text = (
        f"{row['stage']} answers {row['correct']:,} of {row['questions']:,} {which} questions correctly: "
        f"accuracy {percent(row['accuracy'])} (95 % interval {interval(row)}), "
        f"{above} above chance ({100 * CHANCE:.0f} %; exact binomial test, {p_value(p)})."
    )
    if len(table) > 2:
        text += f" Macro accuracy over the two levels: {percent(row['macro_accuracy'])} "
        text += f"({interval(row, 'macro_low', 'macro_high')})."
    return text


def overlap(predictions: pd.DataFrame) -> str:
    """How many sequences are truncated and how many articles also occur in train, and accuracy without the latter."""
    truncated = int(predictions["truncated"].sum())
    text = f"Questions with a truncated sequence: {truncated:,} of {len(predictions):,}. "
    if predictions["article_in_train"].isna().any():
        return text + "Whether articles also occur in train is not known here."
    seen = predictions["article_in_train"].to_numpy(bool)
    text += f"Questions whose article also occurs in train: {int(seen.sum()):,}"
    if not seen.any() or seen.all():
        return f"{text}."
    row = statistics.accuracy_by(predictions[~seen], np.full((~seen).sum(), "all")).iloc[0]
    return f"{text}; without them the accuracy is {percent(row['accuracy'])} (95 % interval {interval(row)})."


def letters(predictions: pd.DataFrame) -> str:
    """Position bias: whether letters are chosen as often as they are correct."""
    statistic, freedom, p = statistics.letter_test(predictions)
    if freedom == 0:
        return "Every answer is correct, so there is no preference for a letter to test."
    table = statistics.letter_counts(predictions)
    row = table.loc[(table["chosen"] - table["right"]).abs().idxmax()]
    test = f"Stuart–Maxwell test, χ² = {statistic:.1f}, {freedom} degrees of freedom, {p_value(p)}"
    return (
        f"How often each letter is chosen and how often it is correct: the difference is {significance(p)} ({test}). "
        f"It is largest for {row['letter']}, chosen on {percent(row['chosen_share'])} of the questions and correct on "
        f"{percent(row['right_share'])}."
    )


def longest_option(predictions: pd.DataFrame) -> str:
    """Length bias: whether the longest of the four options is chosen as often as it is correct."""
    chosen, correct, p = statistics.longest_option_test(predictions)
    found = f"chosen on {percent(chosen)} of the questions and correct on {percent(correct)}"
    return f"The longest option is {found}: the difference is {significance(p)} (exact McNemar test, {p_value(p)})."


def calibration(table: pd.DataFrame, temperature: float | None) -> str:
    """What calibration_table shows: confidence against accuracy, and what a fitted temperature changes."""
    row = table.iloc[0]
    text = f"Mean confidence is {percent(row['confidence'])}, accuracy {percent(row['accuracy'])}; "
    text += f"the expected calibration error is {100 * row['calibration_error']:.1f} points."
    if temperature is None:
        return text
    after = table.iloc[1]
    text += f" At temperature {temperature:.2f}, fitted on validation, log loss goes from {row['log_loss']:.3f} to "
    text += f"{after['log_loss']:.3f} and the calibration error to {100 * after['calibration_error']:.1f} points."
    at_end = min(abs(np.log(temperature / end)) for end in statistics.TEMPERATURES) < 1e-3
    return text + (" The temperature is at the end of the range searched: do not trust it." if at_end else "")


def paired(row: pd.Series) -> str:
    """One row of compare_pairs: who is correct where, the difference, and whether it is significant."""
    first, second, p = row["first"], row["second"], row["p_holm"]
    if row["gained"] == row["lost"] == 0:
        return f"{second} and {first} are correct on the same questions: there is no difference to test."
    better = second if row["difference"] > 0 else first
    finding = f"{better} is significantly better" if p < SIGNIFICANT else "the difference is not significant"
    return (
        f"{second} is correct on {row['gained']:,} questions on which {first} is wrong, and wrong on {row['lost']:,} "
        f"on which {first} is correct: {points(row)}; {finding} (exact McNemar test, {p_value(p)})."
    )


def verdict(predictions: dict[str, pd.DataFrame], pairs: pd.DataFrame) -> str:
    """Which has the highest accuracy, and how far it is ahead of each other one."""
    best, found = comparison.leads(predictions, pairs)
    equal = [best, *found.loc[found["difference"] == 0, "first"]]
    accuracy = percent(statistics.is_correct(predictions[best]).mean())
    if len(predictions) == 1:
        return f"{best} has an accuracy of {accuracy}."
    text = f"{listed(equal)} {'has' if len(equal) == 1 else 'have'} the highest accuracy: {accuracy}."
    for _, row in found.iterrows():
        against = f"{best} against {row['first']}" if len(equal) > 1 else f"Against {row['first']}"
        text += f" {against}: {points(row)}, {p_value(row['p_holm'])}, {significance(row['p_holm'])}."
    return text


def short_verdict(predictions: dict[str, pd.DataFrame], pairs: pd.DataFrame) -> str:
    """The verdict as a title: "e3 is significantly better than e1; its lead over e2 is not significant"."""
    best, found = comparison.leads(predictions, pairs)
    if found.empty:
        return f"{best}: accuracy {percent(statistics.is_correct(predictions[best]).mean())}"
    sure, level = found["p_holm"] < SIGNIFICANT, found["difference"] == 0
    groups = {
        "{who} is significantly better than {names}": found.loc[sure, "first"],
        "{whose} lead over {names} is not significant": found.loc[~sure & ~level, "first"],
        "{who} is as accurate as {names}": found.loc[level, "first"],
    }
    clauses = [(words, listed(names)) for words, names in groups.items() if len(names)]
    subjects = [{"who": best, "whose": f"{best}'s"}] + [{"who": "it", "whose": "its"}] * 2
    return "; ".join(words.format(names=names, **who) for (words, names), who in zip(clauses, subjects, strict=False))
