"""Every statistic against an independent computation, on predictions with known answers and on biased models."""

import itertools

import numpy as np
import pandas as pd
import pytest
from predictions import made, random_predictions
from scipy.special import softmax
from scipy.stats import chi2

from race import LETTERS
from race.score.statistics import (
    KIND_RULES,
    KINDS,
    PROBABILITIES,
    accuracy_by,
    at_temperature,
    calibration_error,
    confidence,
    confusion,
    coverage_curve,
    coverage_groups,
    fit_temperature,
    group_accuracies,
    hardest_group,
    kind_of_question,
    length_groups,
    letter_counts,
    letter_test,
    log_loss,
    longest_option_test,
    macro_accuracy,
    mcnemar,
    reliability,
    wilson,
)

# -------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize(("correct", "count"), [(7, 10), (0, 5), (5, 5), (3300, 4934)])
def test_wilson_is_the_closed_form(correct, count):
    z, p = 1.959963984540054, correct / count
    centre, half = p + z * z / (2 * count), z * np.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    expected = [(centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)]
    assert wilson(correct, count) == pytest.approx(expected, abs=1e-12)


def test_accuracy_by_group_counts_and_leaves_out_what_is_missing_or_empty():
    predictions = made("ABCDAB", "ABCAAC")
    table = accuracy_by(predictions, ["x", "y", "x", "x", None, "y"], ["x", "none", "y"])
    assert table[["group", "questions", "correct"]].to_numpy().tolist() == [["x", 3, 2], ["y", 2, 1]]
    assert table["accuracy"].tolist() == [2 / 3, 1 / 2]
    assert accuracy_by(predictions, [None] * 6).empty


def test_macro_accuracy_by_hand():
    """3 of 4 and 1 of 2: the mean of the two; the distances to Wilson's ends add up as squares."""
    predictions = made("ABCDAB", "ABCAAC", levels=["middle"] * 4 + ["high"] * 2)
    (low_m, high_m), (low_h, high_h) = wilson(3, 4), wilson(1, 2)
    below = np.hypot(0.75 - low_m, 0.5 - low_h) / 2
    above = np.hypot(high_m - 0.75, high_h - 0.5) / 2
    assert macro_accuracy(predictions) == pytest.approx((0.625, 0.625 - below, 0.625 + above))
    assert macro_accuracy(made("AB", "AB")) is None
    one_level = made("AB", "AA", levels=["high"] * 2)
    assert macro_accuracy(one_level) == pytest.approx((0.5, *wilson(1, 2)))


def test_confusion_of_one_class_only_and_of_a_mixed_one():
    table = confusion(made("AABD", "ABBC"))
    assert table.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert confusion(made("AA", "AA")).tolist() == [[2, 0, 0, 0]] + [[0] * 4] * 3


# -------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("Which of the following is NOT true?", "negated"),
        ("All of these are mentioned EXCEPT _ .", "negated"),  # before cloze
        ("Everybody came except who?", "negated"),
        ("Which sentence is not about the weather?", "negated"),
        ("Which of these isn't a fruit?", "negated"),
        ("What is NOT the main idea of the passage?", "negated"),  # before main idea
        ("Why did he not come?", "why"),  # a plain not outside which … not
        ("What is the best title for the passage?", "main idea or title"),
        ("The passage is mainly about _ .", "main idea or title"),  # before cloze
        ("What's the author's main purpose?", "main idea or title"),
        ("Tom went to _ .", "cloze"),
        ("Why _ ?", "cloze"),  # before why
        ("Why did she leave?", "why"),
        ("According to the text, how many were there?", "how"),
        ("What's his name?", "what"),
        ("When he came home, what did he see?", "what"),  # when and where count last
        ("In which town does she live?", "which"),
        ("Whose hat is it?", "who, when, where"),
        ("Who knows what to do?", "who, when, where"),
        ("Where is the station?", "who, when, where"),
        ("The writer wants to say that", "other"),
        ("They showed somewhat whiter notes", "other"),  # whole words only
    ],
)
def test_kind_of_question(question, kind):
    assert kind_of_question(question) == kind


def test_every_kind_has_a_rule_in_words():
    assert KINDS[-1] == "other" and all(rule for rule, _ in KIND_RULES.values())


def test_length_groups_are_even_and_keep_equal_lengths_together():
    groups, order = length_groups([5, 1, 3, 2, 4], 5)
    assert groups.tolist() == ["5", "1", "3", "2", "4"] and order == ["1", "2", "3", "4", "5"]
    groups, order = length_groups([10, 20, 30, 40], 2)
    assert groups.tolist() == ["10–20", "10–20", "30–40", "30–40"] and order == ["10–20", "30–40"]
    assert length_groups([7] * 9)[1] == ["7"]
    groups, _ = length_groups([1, 1, 1, 1, 2], 5)
    assert groups.tolist() == ["1"] * 4 + ["2"]


def test_group_accuracies_count_every_question_once():
    predictions = random_predictions(5000)
    tables = group_accuracies(predictions)
    assert list(tables) == ["kind of question", "article length (tokens)", "sequence", "correct answer", "article"]
    right = (predictions["answer"] == predictions["prediction"]).sum()
    for table in tables.values():
        assert (table["questions"].sum(), table["correct"].sum()) == (5000, right)
    cloze = predictions[predictions["kind"] == "cloze"]
    row = tables["kind of question"].set_index("group").loc["cloze"]
    assert (row["questions"], row["correct"]) == (len(cloze), (cloze["answer"] == cloze["prediction"]).sum())
    predictions["article_in_train"] = pd.array([pd.NA] * 5000, dtype="boolean")
    assert "article" not in group_accuracies(predictions)


def test_hardest_group_has_enough_questions():
    table = pd.DataFrame({"group": ["a", "b", "c"], "questions": [19, 20, 50], "accuracy": [0.0, 0.5, 0.6]})
    assert hardest_group(table)["group"] == "b"
    assert hardest_group(table[:2]) is None


# -------------------------------------------------------------------------------------------------- position and length


def test_a_model_that_always_says_a():
    """100 questions of each right letter: 25 % right, and every wrong answer an A in place of another letter."""
    predictions = made("ABCD" * 100, "A" * 400, 1.0)
    assert accuracy_by(predictions, ["all"] * 400)["accuracy"].tolist() == [0.25]
    assert confusion(predictions).tolist() == [[100, 0, 0, 0]] * 4
    assert letter_counts(predictions)["chosen_share"].tolist() == [1, 0, 0, 0]
    assert letter_counts(predictions)["right"].tolist() == [100] * 4
    # with one column filled, Stuart and Maxwell's statistic is the number of wrong answers
    assert letter_test(predictions) == pytest.approx((300, 3, chi2.sf(300, 3)))
    assert accuracy_by(predictions, predictions["answer"], LETTERS)["accuracy"].tolist() == [1, 0, 0, 0]
    assert calibration_error(predictions) == pytest.approx(0.75)  # wholly sure, right on a quarter


def test_a_model_that_takes_the_longest_option():
    longest = "ABCDABCDAB" * 10
    predictions = made("ABCDAAAAAA" * 10, longest, longest_option=list(longest))
    assert accuracy_by(predictions, ["all"] * 100)["accuracy"].tolist() == [0.6]  # A B C D A . . . A .
    assert longest_option_test(predictions) == pytest.approx((1.0, 0.6, 2 / 2**40))  # 40 gained, none lost
    fair = made("ABBA", "ABAB", longest_option=list("AAAA"))
    assert longest_option_test(fair) == (0.5, 0.5, 1.0)


def test_a_model_that_guesses():
    """No preference, no calibration beyond its own noise, and no group that differs: what guessing should look like."""
    predictions = random_predictions(4000, seed=1)
    counted = sum(a == b for a, b in zip(predictions["answer"], predictions["prediction"], strict=True))
    low, high = wilson(counted, 4000)
    assert low < 0.25 < high
    assert letter_test(predictions)[2] > 0.05
    curve = coverage_curve(predictions)
    assert abs(curve.query("questions == 2000")["accuracy"].item() - 0.25) < 0.03  # being sure does not help
    mean = predictions[PROBABILITIES].max(axis=1).mean()
    assert calibration_error(predictions) == pytest.approx(mean - counted / 4000, abs=0.02)


def test_letter_test_of_two_letters_is_mcnemars_chi_square():
    predictions = made("A" * 30 + "B" * 30, "A" * 10 + "B" * 20 + "B" * 23 + "A" * 7)
    statistic = (20 - 7) ** 2 / (20 + 7)
    assert letter_test(predictions) == pytest.approx((statistic, 1, chi2.sf(statistic, 1)))


def test_letter_test_against_permutations():
    """Under the hypothesis, choice and right answer of a question may be swapped: count how often it is as extreme."""
    rng = np.random.default_rng(3)
    answers, chosen = rng.choice(4, 200), rng.choice(4, 200, p=(0.35, 0.25, 0.2, 0.2))
    table = made("".join(np.take(LETTERS, answers)), "".join(np.take(LETTERS, chosen)))
    statistic, freedom, p = letter_test(table)
    assert freedom == 3
    difference = np.eye(4)[chosen] - np.eye(4)[answers]  # [200, 4]
    signs = rng.choice([-1, 1], (4000, 200))
    drawn = (signs @ difference)[:, :3]  # the covariance is the same for every swap
    inverse = np.linalg.inv(difference[:, :3].T @ difference[:, :3])
    observed = difference.sum(0)[:3] @ inverse @ difference.sum(0)[:3]
    assert observed == pytest.approx(statistic)
    as_extreme = ((drawn @ inverse) * drawn).sum(1) >= observed
    assert as_extreme.mean() == pytest.approx(p, abs=0.02)


def test_no_preference_where_every_answer_is_correct():
    assert letter_test(made("ABCD", "ABCD")) == (0.0, 0, 1.0)


def test_mcnemar_is_the_exact_binomial_sum():
    """Two-sided: all outcomes at most as likely as the observed one, among 2^n."""
    from math import comb

    for gained, lost in itertools.product(range(7), repeat=2):
        count = gained + lost
        likely = comb(count, gained)
        expected = sum(comb(count, k) for k in range(count + 1) if comb(count, k) <= likely) / 2**count
        assert mcnemar(gained, lost) == pytest.approx(expected)
    assert mcnemar(0, 0) == 1.0


# -------------------------------------------------------------------------------------------------- confidence


def test_reliability_by_hand():
    """0.5 lies on an edge and counts below it; bins without questions are not there."""
    predictions = made("AAAAA", "AAABB", [0.5, 0.95, 0.91, 0.99, 0.5])
    table = reliability(predictions)
    assert table[["questions", "correct"]].to_numpy().tolist() == [[2, 1], [3, 2]]
    assert table[["low", "high"]].to_numpy() == pytest.approx(np.array([[0.4, 0.5], [0.9, 1.0]]))
    assert table["confidence"].tolist() == pytest.approx([0.5, 0.95])
    assert calibration_error(predictions) == pytest.approx((2 * abs(0.5 - 0.5) + 3 * abs(2 / 3 - 0.95)) / 5)


def test_calibration_error_is_a_loop_over_the_questions():
    predictions = random_predictions(500)
    answers = zip(predictions["answer"], predictions["prediction"], predictions[PROBABILITIES].to_numpy(), strict=True)
    questions = [(max(row), answer == chosen) for answer, chosen, row in answers]
    gaps = 0.0
    for i in range(10):
        inside = [(sure, right) for sure, right in questions if i / 10 < sure <= (i + 1) / 10]
        gaps += abs(sum(sure for sure, _ in inside) - sum(right for _, right in inside))
    assert calibration_error(predictions) == pytest.approx(gaps / 500)


def test_calibration_of_all_right_all_wrong_and_even_odds():
    assert calibration_error(made("ABCD", "ABCD", 1.0)) == 0
    assert calibration_error(made("ABCD", "BCDA", 1.0)) == 1
    assert calibration_error(made("ABCD", "AAAA")) == 0  # says 25 %, is right on 25 %


def test_log_loss_and_zero_probabilities():
    assert log_loss(made("AB", "AA")) == pytest.approx(np.log(4))
    assert log_loss(made("AA", "AB", [0.7, 0.4])) == pytest.approx(-(np.log(0.7) + np.log(0.2)) / 2)
    assert np.isfinite(log_loss(made("B", "A", 1.0)))


def from_logits(logits: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    table = made("".join(np.take(LETTERS, labels)), "".join(np.take(LETTERS, logits.argmax(1))))
    table[PROBABILITIES] = softmax(logits, axis=1)
    return table


def test_temperature_is_found_again():
    """Labels drawn from softmax(z), and a model that says softmax(2.5 z): 2.5, as a grid search finds."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (8000, 4))
    labels = (softmax(logits, axis=1).cumsum(1) > rng.random((8000, 1))).argmax(1)
    predictions = from_logits(2.5 * logits, labels)
    grid = np.arange(2.2, 2.8, 0.005)
    losses = [-np.log(softmax(2.5 * logits / t, axis=1)[np.arange(8000), labels]).mean() for t in grid]
    found = fit_temperature(predictions)
    assert found == pytest.approx(grid[int(np.argmin(losses))], abs=0.005) and abs(found - 2.5) < 0.1
    better = at_temperature(predictions, found)
    np.testing.assert_allclose(better[PROBABILITIES], softmax(2.5 * logits / found, axis=1), atol=1e-12)
    assert log_loss(better) == pytest.approx(min(losses), abs=1e-4)
    assert calibration_error(better) < calibration_error(predictions) / 3
    assert better["prediction"].equals(predictions["prediction"])
    assert (better[PROBABILITIES].to_numpy().argmax(1) == predictions[PROBABILITIES].to_numpy().argmax(1)).all()


def test_temperature_at_the_end_of_its_range():
    all_right, all_wrong = made("ABCD", "ABCD", 0.6), made("ABCD", "BCDA", 0.6)
    for predictions, end in ((all_right, 0.05), (all_wrong, 20)):
        assert fit_temperature(predictions) == pytest.approx(end, rel=1e-3)
    assert np.isfinite(fit_temperature(made("AB", "BA", 1.0)))  # wholly sure and wrong


def test_coverage_by_hand_with_ties():
    """Two questions share a confidence: they are answered together, whatever their order."""
    for chosen in ("ABBA", "ABAB"):  # of the tied pair in the middle, one is right
        curve = coverage_curve(made("AAAA", chosen, [0.9, 0.6, 0.6, 0.5]))
        assert curve["coverage"].tolist() == [0.25, 0.75, 1.0] and curve["threshold"].tolist() == [0.9, 0.6, 0.5]
        right = [chosen[0] == "A", sum(letter == "A" for letter in chosen[:3]), sum(letter == "A" for letter in chosen)]
        assert curve["correct"].tolist() == right
    groups = coverage_groups(curve, (1.0, 0.5, 0.25))
    assert groups["group"].tolist() == ["most confident 100 %", "most confident 75 %", "most confident 25 %"]
    assert groups["questions"].tolist() == [4, 3, 1] and groups["correct"].tolist() == [2, 2, 1]
    assert (groups["ci_low"][1], groups["ci_high"][1]) == pytest.approx(wilson(2, 3))


def test_coverage_of_all_alike_is_one_point():
    curve = coverage_curve(made("ABCD", "AAAA"))
    assert curve[["coverage", "accuracy"]].to_numpy().tolist() == [[1.0, 0.25]]


def test_confidence_is_the_chosen_probability():
    assert confidence(made("AB", "BB", [0.7, 0.4])).tolist() == pytest.approx([0.7, 0.4])
