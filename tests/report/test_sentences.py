"""What sentences say about numbers that were worked out by hand."""

import numpy as np
import pandas as pd
import pytest
from predictions import made, on_passages, random_predictions, two

from race.report import sentences
from race.score.calibration import at_temperature, calibration_table, log_loss, log_loss_change
from race.score.comparison import compare_pairs
from race.score.predictions import accuracy_table
from race.score.statistics import group_accuracies, macro_accuracy, wilson


def known(table: pd.DataFrame, train: bool | None, validation: bool | None) -> pd.DataFrame:
    """Predictions of a checkpoint that was trained, or chosen, on the articles of all these questions, or of none."""
    columns = {"article_in_train": train, "article_in_validation": validation}
    return table.assign(**{name: pd.array([value] * len(table), "boolean") for name, value in columns.items()})


def results(predictions: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """What headline gets: results with macro accuracy."""
    table = accuracy_table(predictions, "e1", "x.ckpt", split)
    macro = macro_accuracy(table[1:]) if len(table) > 1 else [None] * 3
    return table.assign(**dict(zip(("macro_accuracy", "macro_low", "macro_high"), macro, strict=True)))


def test_headline():
    predictions = known(made("ABCD" * 25, "AAAA" * 25, levels=["middle"] * 60 + ["high"] * 40), False, False)
    table = results(predictions)
    table[["passage_low", "passage_high"]] = np.nan  # as where there are too few passages
    low, high = (f"{100 * table[name][0]:.1f} %" for name in ("macro_low", "macro_high"))
    assert sentences.headline(table) == (
        "e1 answers 25 of 100 test questions correctly: accuracy 25.0 % (95 % interval 17.5 % to 34.3 %); "
        "chance, 25 %, is inside it. "
        f"Macro accuracy over the two levels: 25.0 % ({low} to {high}). "
        "No article of these questions was used to train or to choose e1."
    )
    text = sentences.headline(results(made("ABCD" * 25, "ABCD" * 25)))
    assert "accuracy 100.0 % (95 % interval 96.3 % to 100.0 %); chance, 25 %, is below it." in text
    assert "Macro" not in text  # no level is known
    assert ", by passage); chance, 25 %, is below it" in sentences.headline(results(on_passages(0, 0.1)))


@pytest.mark.parametrize(
    ("train", "validation", "said"),
    [
        (True, False, "e1 was trained on the articles of all these questions: nothing here is about new questions."),
        (False, True, "Validation on the articles of these questions chose e1: the accuracy is optimistic."),
        (False, False, "No article of these questions was used to train or to choose e1."),
        (None, None, "Whether articles of these questions were used to train or to choose e1 is not known."),
    ],
)
def test_headline_says_what_the_checkpoint_has_seen_whatever_the_split_is_called(train, validation, said):
    for split in ("train", "validation", "test"):
        text = sentences.headline(results(known(made("ABCD" * 5, "ABCA" * 5), train, validation), split))
        assert said in text
        assert ("chance" in text) == (train is not True)  # no comparison on what was learned


def test_some_articles_seen():
    predictions = known(made("ABCD", "ABCD"), False, False)
    predictions["article_in_train"] = pd.array([True, False, False, False], "boolean")
    predictions["article_in_validation"] = pd.array([True, True, False, False], "boolean")
    assert sentences.seen([accuracy_table(predictions, "e1", "x", "test")], ["e1"]) == (
        "e1 was trained on the articles of 1 of these 4 questions. "
        "2 of these 4 questions have an article of the validation split that chose e1."
    )
    predictions["article_in_train"] = pd.array([True, False, None, None], "boolean")
    table = accuracy_table(predictions, "e1", "x", "test")
    assert table.loc[0, ["trained_on", "not_known"]].tolist() == [1, 2]
    assert "articles of 1 of these 4 questions" in sentences.seen([table], ["e1"])
    assert "Of 2 questions it is not known" in sentences.seen([table], ["e1"])
    tables = [accuracy_table(known(made("A", "A"), False, False), name, "x", "test") for name in ("e1", "e2")]
    assert (
        sentences.seen(tables, ["e1", "e2"])
        == "No article of these questions was used to train or to choose e1 and e2."
    )


def test_questions_of_a_passage_are_alike():
    def said(predictions: pd.DataFrame) -> str:
        return sentences.alike(accuracy_table(predictions, "e1", "x", "test").iloc[0])

    assert "Quote the interval by passage, which is 1.35 times as wide as Wilson's" in said(on_passages(0, 0.3))
    assert said(on_passages(1, 0.0)).endswith("The interval by passage is hardly wider than Wilson's.")
    few = said(made("ABAB", "ABBA", example_id=list("aabb")))  # the quantile of t for two passages
    assert "design effect" in few and "times as wide" in few
    for none in (made("AB", "AB"), made("ABCD", "ABCD", example_id=list("aabb"))):
        assert "cannot be estimated here" in said(none)


def test_overlap():
    predictions = made("ABCD", "ABCA", truncated=[True, False, False, False])
    trained = predictions.assign(article_in_train=pd.array([True, False, False, False], dtype="boolean"))
    low, high = wilson(2, 3)
    assert sentences.overlap(trained) == (
        "Questions with a truncated sequence: 1 of 4. Questions whose article trained the checkpoint: 1; without them "
        f"the accuracy is 66.7 % (95 % interval {100 * low:.1f} % to {100 * high:.1f} %)."
    )
    none = predictions.assign(article_in_train=pd.array([False] * 4, dtype="boolean"))
    assert sentences.overlap(none).endswith("trained the checkpoint: 0.")
    unknown = predictions.assign(article_in_train=pd.array([pd.NA] * 4, dtype="boolean"))
    assert sentences.overlap(unknown).endswith("trained the checkpoint: 0; of 4 that is not known.")


def test_groups_are_named_only_where_they_differ_from_the_rest_of_their_level():
    alike = random_predictions(300)
    table = group_accuracies(alike)
    assert sentences.groups(table).startswith("No group differs significantly from the other questions of its level (F")
    assert sentences.groups_title(table) == "No group differs significantly from the rest of its level"
    answers = np.where((alike["kind"] == "why") & (alike["level"] == "high"), alike["answer"], alike["prediction"])
    table = group_accuracies(alike.assign(prediction=answers))  # right on every "why" of high
    row = table.query("grouping == 'kind of question' and group == 'why' and level == 'high'").iloc[0]
    text, title = sentences.groups(table), sentences.groups_title(table)
    assert text.startswith(
        "Easier than the other questions of its level: kind of question “why”, level high, "
        f"{row['questions']} questions, 100.0 % against {100 * row['rest']:.1f} % (+"
    )
    assert "Holm p < 0.001" in text and "Harder" not in text
    assert title.startswith("Easier than the rest of high: “why” (+")
    without = group_accuracies(alike.assign(prediction=answers, level=""))
    assert "level" not in sentences.groups(without).split("(")[0].replace("of its level", "")
    letter = pd.DataFrame(
        [["correct answer", "middle", "A", 50, 10, 0.2, 0.1, 0.3, 0.6, -0.4, 0.001, 0.001]], columns=table.columns
    )
    assert sentences.groups_title(letter) == "Harder than the rest of middle: “A” (−40.0 points, 50 questions)"
    one = group_accuracies(
        alike.assign(kind="what", article_tokens=9, truncated=False, answer="A", article_in_train=None)
    )
    assert sentences.groups(one).startswith("No grouping has two groups within a level")


def test_letters():
    always_a = sentences.letters(made("ABCD" * 100, "A" * 400))
    assert (
        "the difference is significant (Stuart–Maxwell test, χ² = 300.0, 3 degrees of freedom, p < 0.001)" in always_a
    )
    assert always_a.endswith("largest for A, chosen on 100.0 % and correct on 25.0 % of the questions.")
    assert sentences.letters(made("ABCD", "BCDA")) == "Each letter is chosen exactly as often as it is correct."
    tied = sentences.letters(made("ABAB", "ACAC"))
    assert "the difference is not significant" in tied and "largest for B, chosen on 0.0 % and " in tied
    assert tied.endswith(", and for C, chosen on 50.0 % and correct on 0.0 % of the questions.")
    assert sentences.letters(made("AA", "AA")).startswith("Every answer is correct")


def test_longest_option():
    longest = "ABCDABCDAB" * 10
    text = sentences.longest_option(made("ABCDAAAAAA" * 10, longest, longest_option=list(longest)))
    assert text.startswith(
        "On 100 questions with one longest option, it is chosen on 100.0 % and correct on 60.0 %: the difference is sig"
    )
    assert text.endswith("the difference is significant (exact McNemar test, p < 0.001).")
    fair = sentences.longest_option(made("ABBAC", "ABABA", longest_option=[*"AAAA", None]))
    assert "On 4 questions" in fair and "the difference is not significant" in fair
    assert fair.endswith("1 questions whose longest options are equally long are left out.")
    assert sentences.longest_option(made("A", "A", longest_option=[None])).startswith("No question has one longest")


def test_calibration():
    predictions = made("ABCD" * 25, "ABCA" * 25, 0.95)
    table = calibration_table({"as is": predictions})
    row = {name: f"{100 * table[name][0]:.1f}" for name in ("error_low", "error_high", "floor_low", "floor_high")}
    assert sentences.calibration(table, None) == (
        "Mean confidence is 95.0 %, accuracy 75.0 %. The expected calibration error is 20.0 points (95 % interval "
        f"{row['error_low']} to {row['error_high']}); a perfectly calibrated model with these confidences would read "
        f"{row['floor_low']} to {row['floor_high']} (95 % range): the error is above that range."
    )
    even = sentences.calibration(calibration_table({"as is": made("ABCD" * 25, "AAAA" * 25)}), None)
    assert "error is 0.0 points (95 % interval 0.0 to" in even and even.endswith("the error is not above that range.")


def test_a_temperature_helps_only_where_log_loss_does():
    predictions = made("ABCD" * 25, "ABCA" * 25, 0.95)

    def said(temperature: float) -> str:
        after = at_temperature(predictions, temperature)
        table = calibration_table({"before": predictions, "after": after})
        return sentences.calibration(table, temperature, log_loss_change(predictions, after))

    before, after = log_loss(predictions), log_loss(at_temperature(predictions, 2.0))
    assert f"At temperature 2.00, fitted on validation, log loss changes by −{before - after:.3f} (95 %" in said(2.0)
    assert said(2.0).endswith(f"from {before:.3f} to {after:.3f}: the temperature helps.")
    assert said(0.5).endswith("the temperature makes it worse.")
    few = made("ABCD", "ABCA", 0.8)
    change = log_loss_change(few, at_temperature(few, 1.3))
    assert change[1] < 0 < change[2]
    table = calibration_table({"before": few, "after": at_temperature(few, 1.3)})
    assert sentences.calibration(table, 1.3, change).endswith(": not significant.")


def test_paired():
    first, second = two(3000, 312, 288, 1334)
    row = compare_pairs({"e1": first, "e2": second}).iloc[0]
    low, high = (f"{100 * row[end]:+.1f}".replace("-", "−") for end in ("ci_low", "ci_high"))
    assert sentences.paired(row) == (
        "e2 is correct on 312 questions on which e1 is wrong, and wrong on 288 on which e1 is correct: "
        f"+0.5 points (95 % interval {low} to {high}); the difference is not significant "
        "(exact McNemar test, p = 0.35)."
    )
    margin = 1.96 * np.sqrt(600 / 4934 - (24 / 4934) ** 2) / np.sqrt(4934)  # of the normal approximation
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((24 / 4934 - margin, 24 / 4934 + margin), abs=5e-4)
    worse = compare_pairs(dict(zip(("a", "b"), two(10, 5, 40, 10), strict=True))).iloc[0]
    assert "−53.8 points" in sentences.paired(worse) and "; a is significantly better (" in sentences.paired(worse)
    same = compare_pairs(dict(zip(("a", "b"), two(5, 0, 0, 5), strict=True))).iloc[0]
    assert sentences.paired(same) == "b and a are correct on the same questions: there is no difference to test."


def verdicts(**predictions) -> tuple[str, str]:
    pairs = compare_pairs(predictions)
    return sentences.verdict(predictions, pairs), sentences.short_verdict(predictions, pairs)


def test_verdict_names_the_best_whatever_the_order():
    weak, strong = two(20, 30, 2, 20)
    for order in ({"weak": weak, "strong": strong}, {"strong": strong, "weak": weak}):
        verdict, short = verdicts(**order)
        assert verdict.startswith(
            "strong has the highest accuracy: 69.4 % of 72 questions. Against weak: +38.9 points (95 % interval +"
        )
        assert (
            verdict.endswith(", McNemar p < 0.001: significant.")
            and short == "strong is significantly better than weak"
        )
    assert verdicts(a=weak, b=weak, c=strong)[1] == "c is significantly better than a and b"


def test_interval_and_p_belong_together_and_significance_follows_holm():
    """0.05 > p of one pair, but not after the adjustment for three."""
    first, second = two(60, 14, 4, 22)
    verdict, short = verdicts(a=first, b=second, c=first)
    assert "McNemar p = 0.031; Holm p = 0.093: not significant." in verdict
    assert short == "b's lead over a and c is not significant"
    row = compare_pairs({"a": first, "b": second, "c": first}).iloc[0]
    assert row["ci_low"] > 0  # as p without the adjustment says
    assert "(exact McNemar test, p = 0.031; Holm p = 0.093)" in sentences.paired(row)


def test_on_training_questions_nothing_is_tested():
    weak, strong = (known(table, True, False) for table in two(20, 30, 2, 20))
    verdict, short = verdicts(weak=weak, strong=strong)
    assert verdict == (
        "strong has the highest accuracy: 69.4 % of 72 questions. Against weak: +38.9 points, not tested: most of "
        "these questions trained one of the two."
    )
    assert short == "strong is not tested against weak (training questions)"
    pair = compare_pairs({"weak": weak, "strong": strong}).iloc[0]
    assert sentences.paired(pair).endswith("+38.9 points; not tested: most of these questions trained one of the two.")
    verdict, short = verdicts(weak=weak, strong=known(strong, False, False), other=known(weak, False, False))
    assert short == "strong is significantly better than other; it is not tested against weak (training questions)"
    assert (
        "Against other: +38.9 points (95 % interval" in verdict and "Against weak: +38.9 points, not tested" in verdict
    )
    most = weak.assign(article_in_train=pd.array([True] * 71 + [False], "boolean"))
    assert verdicts(weak=most, strong=strong)[1] == "strong is not tested against weak (training questions)"


def test_verdict_of_ten_checkpoints_stays_short():
    weak, strong = two(20, 30, 2, 20)
    names = {f"checkpoint {number}": weak for number in range(9)}
    verdict, short = verdicts(**names, best=strong)
    assert short == "best is significantly better than 9 others"
    assert f"{short}. best against checkpoint 0: +38.9 points" in verdict and len(verdict) < 300


def test_verdict_of_one_checkpoint_claims_no_lead():
    weak, _ = two(20, 30, 2, 20)
    assert verdicts(alone=weak) == ("alone has an accuracy of 30.6 %.", "alone: accuracy 30.6 %")


def test_verdict_of_a_tie_names_both():
    first, second = two(10, 3, 2, 5)
    verdict, short = verdicts(a=first, b=second, c=second)
    assert verdict.startswith("b and c have the highest accuracy: 65.0 % of 20 questions. b against")
    assert (
        "b against c: 0.0 points (95 % interval 0.0 to 0.0), McNemar p = 1.00; Holm p = 1.00: not significant."
        in verdict
    )
    assert short == "b's lead over a is not significant; it is as accurate as c"


def test_scope_says_what_one_seed_cannot():
    lineage = pd.DataFrame({"name": ["e1", "e2"], "parent": [None, "e1"]})
    text = sentences.scope(lineage)
    assert (
        "Each checkpoint is one training run" in text and "this compares these checkpoints, not their recipes" in text
    )
    assert "does not mean equal" in text
    assert text.endswith("e2 continues from e1, so it has also trained longer.")
    assert sentences.scope(lineage[:1]) == ""
