"""Every sentence that says what was found."""

import pandas as pd

from race import CHANCE
from race.score import comparison, results, statistics
from race.written import SIGNIFICANT, listed, p_value, percent, signed, significance

NOT_TESTED = "not tested: most of these questions trained one of the two"
SHOWN = 3  # so many other checkpoints are named one by one


def interval(row, low: str = "ci_low", high: str = "ci_high") -> str:
    """The interval of a row as "73.3 % to 78.3 %"."""
    return f"{percent(row[low])} to {percent(row[high])}"


def quoted(row) -> str:
    """The interval of an accuracy that is to be quoted: by passage, or Wilson's where that is not known."""
    known = pd.notna(row.get("passage_low"))
    return f"{interval(row, 'passage_low', 'passage_high')}, by passage" if known else interval(row)


def points(row) -> str:
    """A difference of accuracies with its interval, if it has one: "+0.5 points (95 % interval −0.9 to +1.9)"."""
    difference, low, high = (signed(100 * row[name]) for name in ("difference", "ci_low", "ci_high"))
    return f"{difference} points" + ("" if pd.isna(row["ci_low"]) else f" (95 % interval {low} to {high})")


def origin(checkpoint) -> str:
    """What a checkpoint remembers: "stage e3, epoch 1 (from 0), trained from e2-….ckpt"; or that it is not known."""
    epoch = None if checkpoint.epoch is None else f"{checkpoint.epoch} (from 0)"
    facts = {"stage": checkpoint.stage, "epoch": epoch, "trained from": checkpoint.base}
    return ", ".join(f"{name} {'unknown' if value is None else value}" for name, value in facts.items())


def other_rule(checkpoint, other) -> str:
    """What the other rule of selection would have picked (stages.by_the_other_rule); "" if that is not known."""
    if other is None or None in (checkpoint.val_acc, other.val_acc):
        return ""
    own, instead = (f"loss {it.val_loss:.3f}, accuracy {percent(it.val_acc)}" for it in (checkpoint, other))
    text = f"\nvalidation: {own}; by validation {'loss' if checkpoint.monitor == 'val_acc' else 'accuracy'} "
    if other.sha256 == checkpoint.sha256:
        return f"{text}the best is the same checkpoint"
    return f"{text}the best would be epoch {other.epoch} ({instead})"


def headline(table: pd.DataFrame) -> str:
    """The result of one checkpoint: accuracy with interval, against chance, macro accuracy, and what it has seen."""
    row = table.iloc[0]
    which = row["split"] if row["level"] == "all" else f"{row['level']} {row['split']}"
    text = (
        f"{row['stage']} answers {row['correct']:,} of {row['questions']:,} {which} questions correctly: "
        f"accuracy {percent(row['accuracy'])} (95 % interval {quoted(row)})"
    )
    if not _mostly_trained(row):
        low, high = (row[f"{'passage' if pd.notna(row['passage_low']) else 'ci'}_{end}"] for end in ("low", "high"))
        where = "inside it" if low <= CHANCE <= high else "below it" if low > CHANCE else "above it"
        text += f"; chance, {100 * CHANCE:.0f} %, is {where}"
    if pd.notna(row.get("macro_accuracy")):
        text += f". Macro accuracy over the two levels: {percent(row['macro_accuracy'])} "
        text += f"({interval(row, 'macro_low', 'macro_high')})"
    return f"{text}. {seen([table], [row['stage']])}"


def _mostly_trained(row) -> bool:
    """Whether more than half of a row's questions are known to have an article that trained the checkpoint."""
    return bool(pd.notna(row["trained_on"]) and row["trained_on"] > row["questions"] / 2)


def seen(tables: list[pd.DataFrame], names: list[str]) -> str:
    """Which checkpoints were trained, or chosen, on the questions of these results (results.accuracy_table)."""
    said: dict[str, list[str]] = {}
    for table, name in zip(tables, names, strict=True):
        for words in _seen(table.iloc[0]):
            said.setdefault(words, []).append(name)
    return " ".join(
        words.format(who=listed(who), was="was" if len(who) == 1 else "were") for words, who in said.items()
    )


def _seen(row) -> list[str]:
    """Sentences about one row of results, with {who} and {was}."""
    questions, unknown = row["questions"], int(row["not_known"])
    trained, chosen = (0 if pd.isna(row[name]) else int(row[name]) for name in ("trained_on", "selected_on"))
    if unknown == questions and not trained and not chosen:
        return ["Whether articles of these questions were used to train or to choose {who} is not known."]
    told = []
    if trained == questions:
        told += ["{who} {was} trained on the articles of all these questions: nothing here is about new questions."]
    elif trained:
        told += [f"{{who}} {{was}} trained on the articles of {trained:,} of these {questions:,} questions."]
    if chosen == questions:
        told += ["Validation on the articles of these questions chose {who}: the accuracy is optimistic."]
    elif chosen:
        told += [
            f"{chosen:,} of these {questions:,} questions have an article of the validation split that chose {{who}}."
        ]
    if unknown:
        told += [
            f"Of {unknown:,} questions it is not known whether their article was used to train or to choose {{who}}."
        ]
    return told or ["No article of these questions was used to train or to choose {who}."]


def alike(row) -> str:
    """How alike the questions of one passage are, and which interval follows from it."""
    if pd.isna(row["design_effect"]):
        return (
            "How alike the questions of one passage are cannot be estimated here (too few passages, or all answers "
            "correct, or all wrong): Wilson's interval takes every question as independent."
        )
    text = f"{row['questions']:,} questions on {row['passages']:,} passages: "
    if pd.notna(row["icc"]):
        text += f"intraclass correlation within a passage {row['icc']:.2f}, ".replace("-", "−")
    text += f"design effect {row['design_effect']:.2f} (at least 1)"
    wider = (row["passage_high"] - row["passage_low"]) / (row["ci_high"] - row["ci_low"])
    if wider < 1.05:
        return f"{text}. The interval by passage is hardly wider than Wilson's."
    return (
        f"{text}. Quote the interval by passage, which is {wider:.2f} times as wide as Wilson's: that one takes the "
        "questions of a passage as independent."
    )


def overlap(predictions: pd.DataFrame) -> str:
    """How many sequences are truncated, how many articles trained the checkpoint, and accuracy without the latter."""
    truncated = int(predictions["truncated"].sum())
    text = f"Questions with a truncated sequence: {truncated:,} of {len(predictions):,}. "
    trained = predictions["article_in_train"].fillna(False).to_numpy(bool)
    text += f"Questions whose article trained the checkpoint: {trained.sum():,}"
    if unknown := int(predictions["article_in_train"].isna().sum()):
        text += f"; of {unknown:,} that is not known"
    if not trained.any() or trained.all():
        return f"{text}."
    row = results.accuracy_table(predictions[~trained], "", "", "").iloc[0]
    return f"{text}; without them the accuracy is {percent(row['accuracy'])} (95 % interval {quoted(row)})."


def groups(table: pd.DataFrame) -> str:
    """Which groups of statistics.group_accuracies are harder or easier than the other questions of their level."""
    tests = int(table["p"].notna().sum())
    if not tests:
        return "No grouping has two groups within a level: there is nothing to compare."
    how = f"Fisher's exact test of each group against the rest; Holm's adjustment for {tests} tests"
    found = table[table["p_holm"] < SIGNIFICANT].sort_values("difference")
    if found.empty:
        return f"No group differs significantly from the other questions of its level ({how})."
    text = []
    for name, part in (("Harder", found[found["difference"] < 0]), ("Easier", found[found["difference"] > 0][::-1])):
        if len(part):
            text.append(
                f"{name} than the other questions of its level: {'; '.join(_group(row) for _, row in part.iterrows())}."
            )
    return f"{' '.join(text)} ({how}.)"


def _group(row) -> str:
    level = "" if row["level"] == "all" else f", level {row['level']}"
    return (
        f"{row['grouping']} “{row['group']}”{level}, {row['questions']:,} questions, "
        f"{percent(row['accuracy'])} against {percent(row['rest'])} ({signed(100 * row['difference'])} points, "
        f"Holm {p_value(row['p_holm'])})"
    )


def groups_title(table: pd.DataFrame) -> str:
    """The largest significant differences as a title."""
    found = table[table["p_holm"] < SIGNIFICANT].sort_values("difference")
    if found.empty:
        return "No group differs significantly from the rest of its level"
    parts = []
    for word, row in (("harder", found.iloc[0]), ("easier", found.iloc[-1])):
        if (row["difference"] < 0) == (word == "harder"):
            size = f"{signed(100 * row['difference'])} points, {row['questions']:,} questions"
            rest = "the rest" if row["level"] == "all" else f"the rest of {row['level']}"
            parts.append(f"{word} than {rest}: “{row['group']}” ({size})")
    text = "; ".join(parts)
    return text[0].upper() + text[1:]


def letters(predictions: pd.DataFrame) -> str:
    """Position bias: whether letters are chosen as often as they are correct."""
    statistic, freedom, p = statistics.letter_test(predictions)
    if freedom == 0:
        return "Every answer is correct, so there is no preference for a letter to test."
    table = statistics.letter_counts(predictions)
    apart = (table["chosen"] - table["right"]).abs()
    if not apart.any():
        return "Each letter is chosen exactly as often as it is correct."
    degrees = f"{freedom} degree{'s' if freedom > 1 else ''} of freedom"
    test = f"Stuart–Maxwell test, χ² = {statistic:.1f}, {degrees}, {p_value(p)}"
    largest = [
        f"{row.letter}, chosen on {percent(row.chosen_share)} and correct on {percent(row.right_share)}"
        for row in table[apart == apart.max()].itertuples()
    ]
    return (
        f"How often each letter is chosen and how often it is correct: the difference is {significance(p)} ({test}). "
        f"It is largest for {', and for '.join(largest)} of the questions."
    )


def longest_option(predictions: pd.DataFrame) -> str:
    """Length bias: whether the longest of the four options is chosen as often as it is correct."""
    found = statistics.longest_option_test(predictions)
    left_out = f"{found['ties']:,} questions whose longest options are equally long are left out."
    if not found["questions"]:
        return f"No question has one longest option: {left_out}"
    text = (
        f"On {found['questions']:,} questions with one longest option, it is chosen on {percent(found['chosen'])} and "
    )
    text += f"correct on {percent(found['correct'])}: the difference is {significance(found['p'])} "
    return f"{text}(exact McNemar test, {p_value(found['p'])})." + (f" {left_out}" if found["ties"] else "")


def calibration(table: pd.DataFrame, temperature: float | None, change: tuple | None = None) -> str:
    """What calibration_table shows: confidence against accuracy, and whether a fitted temperature helps.

    change: calibration.log_loss_change on the split that is scored.
    """
    row = table.iloc[0]
    error, *spread = (
        f"{100 * row[name]:.1f}" for name in ("calibration_error", "error_low", "error_high", "floor_low", "floor_high")
    )
    above = row["calibration_error"] > row["floor_high"]
    text = (
        f"Mean confidence is {percent(row['confidence'])}, accuracy {percent(row['accuracy'])}. The expected "
        f"calibration error is {error} points (95 % interval {spread[0]} to {spread[1]}); a perfectly calibrated model "
        f"with these confidences would read {spread[2]} to {spread[3]} (95 % range): the error is "
        f"{'above' if above else 'not above'} that range."
    )
    if temperature is None or change is None:
        return text
    mean, low, high = change
    finding = "not tested" if pd.isna(low) else "not significant"
    finding = "the temperature helps" if high < 0 else "the temperature makes it worse" if low > 0 else finding
    ends = "" if pd.isna(low) else f" (95 % interval {_signed3(low)} to {_signed3(high)})"
    text += f" At temperature {temperature:.2f}, fitted on validation, log loss changes by {_signed3(mean)}{ends}, "
    return f"{text}from {row['log_loss']:.3f} to {table.iloc[1]['log_loss']:.3f}: {finding}."


def _signed3(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def paired(row: pd.Series) -> str:
    """One row of compare_pairs: who is correct where, the difference, and whether it is significant."""
    first, second = row["first"], row["second"]
    if row["gained"] == row["lost"] == 0:
        return f"{second} and {first} are correct on the same questions: there is no difference to test."
    better = second if row["difference"] > 0 else first
    tested = NOT_TESTED
    if pd.notna(row["p"]):
        finding = (
            "the difference is not significant" if row["p_holm"] >= SIGNIFICANT else f"{better} is significantly better"
        )
        tested = f"{finding} (exact McNemar test, {_both_p(row)})"
    return (
        f"{second} is correct on {row['gained']:,} questions on which {first} is wrong, and wrong on {row['lost']:,} "
        f"on which {first} is correct: {points(row)}; {tested}."
    )


def _both_p(row) -> str:
    """p of a pair, and Holm's, of several: "p = 0.03; Holm p = 0.09"."""
    return f"{p_value(row['p'])}; Holm {p_value(row['p_holm'])}" if row["pairs"] > 1 else p_value(row["p"])


def verdict(predictions: dict[str, pd.DataFrame], pairs: pd.DataFrame) -> str:
    """Which has the highest accuracy, and how far it is ahead of the others: of each, or of the next ones if many."""
    best, found = comparison.leads(predictions, pairs)
    equal = [best, *found.loc[found["difference"] == 0, "first"]]
    accuracy = percent(statistics.is_correct(predictions[best]).mean())
    if len(predictions) == 1:
        return f"{best} has an accuracy of {accuracy}."
    text = f"{listed(equal)} {'has' if len(equal) == 1 else 'have'} the highest accuracy: "
    text += f"{accuracy} of {len(predictions[best]):,} questions."
    nearest = found.sort_values("difference", kind="stable")
    if len(found) > SHOWN:
        nearest = nearest[nearest["difference"] > 0][:1]
        text += f" {short_verdict(predictions, pairs)}."
    for _, row in nearest.iterrows():
        against = (
            f"{best} against {row['first']}" if len(equal) > 1 or len(found) > SHOWN else f"Against {row['first']}"
        )
        tested = f"McNemar {_both_p(row)}: {significance(row['p_holm'])}" if pd.notna(row["p"]) else NOT_TESTED
        text += f" {against}: {points(row)}, {tested}."
    return text


def short_verdict(predictions: dict[str, pd.DataFrame], pairs: pd.DataFrame) -> str:
    """The verdict as a title: "e3 is significantly better than e1; its lead over e2 is not significant"."""
    best, found = comparison.leads(predictions, pairs)
    accuracy = percent(statistics.is_correct(predictions[best]).mean())
    if found.empty:
        return f"{best}: accuracy {accuracy}"
    sure, level, untested = found["p_holm"] < SIGNIFICANT, found["difference"] == 0, found["p"].isna()
    clauses = {
        "{who} is significantly better than {names}": found.loc[sure, "first"],
        "{whose} lead over {names} is not significant": found.loc[~sure & ~level & ~untested, "first"],
        "{who} is as accurate as {names}": found.loc[level & ~untested, "first"],
        "{who} is not tested against {names} (training questions)": found.loc[untested, "first"],
    }
    said = [(words, listed(names, SHOWN)) for words, names in clauses.items() if len(names)]
    subjects = [{"who": best, "whose": f"{best}'s"}] + [{"who": "it", "whose": "its"}] * 3
    return "; ".join(words.format(names=names, **who) for (words, names), who in zip(said, subjects, strict=False))


def scope(lineage: pd.DataFrame) -> str:
    """What a comparison of single checkpoints (tables.lineage_table) cannot say."""
    if len(lineage) < 2:
        return ""
    text = (
        "Each checkpoint is one training run, and the intervals reflect the sampling of "
        "questions only: this compares these checkpoints, not their recipes, which takes several seeds. Not "
        "significant does not mean equal: the interval shows which differences remain possible."
    )
    later = lineage[lineage["parent"].notna()]
    for row in later.itertuples():
        text += f" {row.name} continues from {row.parent}, so it has also trained longer."
    return text
