"""What sentences say about numbers that were worked out by hand."""

import numpy as np
import pandas as pd
import pytest
from predictions import made, two

from race.report import sentences
from race.score.comparison import compare_pairs
from race.score.results import accuracy_table, macro_accuracy
from race.score.statistics import at_temperature, calibration_table, fit_temperature, log_loss, wilson


def test_numbers_are_written_one_way():
    assert sentences.percent(0.7589) == "75.9 %" and sentences.percent(1) == "100.0 %"
    assert [sentences.signed(value) for value in (24.19, -0.26, 0.04, -0.04)] == ["+24.2", "−0.3", "0.0", "0.0"]
    assert [sentences.rate(value) for value in (2.5e-5, 0.00025, 2e-6, 0.01)] == ["2.5e-5", "2.5e-4", "2e-6", "1e-2"]
    written = ["p < 0.001", "p = 0.0012", "p = 0.032", "p = 0.35", "p = 1.00"]
    assert [sentences.p_value(p) for p in (1e-9, 0.00123, 0.0321, 0.349, 1.0)] == written
    assert [sentences.listed(names) for names in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]


def test_headline():
    predictions = made("ABCD" * 25, "AAAA" * 25, levels=["middle"] * 60 + ["high"] * 40)
    macro = dict(zip(("macro_accuracy", "macro_low", "macro_high"), macro_accuracy(predictions), strict=True))
    low, high = (f"{100 * macro[name]:.1f} %" for name in ("macro_low", "macro_high"))
    assert sentences.headline(accuracy_table(predictions, "e1", "x.ckpt", "test").assign(**macro)) == (
        "e1 answers 25 of 100 test questions correctly: accuracy 25.0 % (95 % interval 17.5 % to 34.3 %), "
        "not significantly above chance (25 %; exact binomial test, p = 0.54). "
        f"Macro accuracy over the two levels: 25.0 % ({low} to {high})."
    )
    text = sentences.headline(accuracy_table(made("ABCD" * 25, "ABCD" * 25), "e1", "x.ckpt", "test"))
    assert "accuracy 100.0 % (95 % interval 96.3 % to 100.0 %), significantly above chance" in text
    assert "Macro" not in text  # no level is known


def test_overlap():
    predictions = made("ABCD", "ABCA", truncated=[True, False, False, False])
    known = predictions.assign(article_in_train=pd.array([True, False, False, False], dtype="boolean"))
    low, high = wilson(2, 3)
    assert sentences.overlap(known) == (
        "Questions with a truncated sequence: 1 of 4. Questions whose article also occurs in train: 1; without them "
        f"the accuracy is 66.7 % (95 % interval {100 * low:.1f} % to {100 * high:.1f} %)."
    )
    none = predictions.assign(article_in_train=pd.array([False] * 4, dtype="boolean"))
    assert sentences.overlap(none).endswith("also occurs in train: 0.")
    unknown = predictions.assign(article_in_train=pd.array([pd.NA] * 4, dtype="boolean"))
    assert sentences.overlap(unknown).endswith("not known here.")


def test_letters():
    always_a = sentences.letters(made("ABCD" * 100, "A" * 400))
    assert (
        "the difference is significant (Stuart–Maxwell test, χ² = 300.0, 3 degrees of freedom, p < 0.001)" in always_a
    )
    assert always_a.endswith("largest for A, chosen on 100.0 % of the questions and correct on 25.0 %.")
    assert "the difference is not significant" in sentences.letters(made("ABCD", "BCDA"))
    assert sentences.letters(made("AA", "AA")).startswith("Every answer is correct")


def test_longest_option():
    longest = "ABCDABCDAB" * 10
    text = sentences.longest_option(made("ABCDAAAAAA" * 10, longest, longest_option=list(longest)))
    assert text.startswith("The longest option is chosen on 100.0 % of the questions and correct on 60.0 %")
    assert text.endswith("the difference is significant (exact McNemar test, p < 0.001).")
    fair = made("ABBA", "ABAB", longest_option=list("AAAA"))
    assert "the difference is not significant" in sentences.longest_option(fair)


def test_calibration():
    predictions = made("ABCD", "ABCA", 0.95)
    assert sentences.calibration(calibration_table({"as is": predictions}), None) == (
        "Mean confidence is 95.0 %, accuracy 75.0 %; the expected calibration error is 20.0 points."
    )
    versions = {"as is": predictions, "changed": at_temperature(predictions, 2.0)}
    text = sentences.calibration(calibration_table(versions), 2.0)
    before, after = (log_loss(table) for table in versions.values())
    assert f"At temperature 2.00, fitted on validation, log loss goes from {before:.3f} to {after:.3f}" in text


def test_a_temperature_at_the_end_of_its_range_is_said_to_be():
    for predictions in (made("ABCD", "ABCD", 0.6), made("ABCD", "BCDA", 0.6)):
        temperature = fit_temperature(predictions)
        table = calibration_table({"before": predictions, "after": at_temperature(predictions, temperature)})
        assert sentences.calibration(table, temperature).endswith("do not trust it.")


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
            "strong has the highest accuracy: 69.4 %. Against weak: +38.9 points (95 % interval +"
        )
        assert verdict.endswith(", p < 0.001, significant.") and short == "strong is significantly better than weak"
    assert verdicts(a=weak, b=weak, c=strong)[1] == "c is significantly better than a and b"


def test_verdict_of_one_checkpoint_claims_no_lead():
    weak, _ = two(20, 30, 2, 20)
    assert verdicts(alone=weak) == ("alone has an accuracy of 30.6 %.", "alone: accuracy 30.6 %")


def test_verdict_of_a_tie_names_both():
    first, second = two(10, 3, 2, 5)
    verdict, short = verdicts(a=first, b=second, c=second)
    assert verdict.startswith("b and c have the highest accuracy: 65.0 %. b against a: +5.0 points")
    assert "b against c: 0.0 points (95 % interval 0.0 to 0.0), p = 1.00, not significant." in verdict
    assert short == "b's lead over a is not significant; it is as accurate as c"
