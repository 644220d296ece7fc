"""Calibration against independent computations: bins, log loss, temperature, coverage, and the spread of each."""

import numpy as np
import pandas as pd
import pytest
from predictions import made, random_predictions
from scipy.special import softmax
from sklearn import metrics
from statsmodels.stats.proportion import proportion_confint

from race import LETTERS, RaceError
from race.score.calibration import (
    at_temperature,
    calibration_error,
    calibration_spread,
    calibration_table,
    confidence,
    coverage_curve,
    coverage_groups,
    fit_temperature,
    log_loss,
    log_loss_change,
    reliability,
)
from race.score.statistics import PROBABILITIES, wilson


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
    table = random_predictions(300)
    theirs = metrics.log_loss(table["answer"], table[PROBABILITIES], labels=LETTERS)
    assert log_loss(table) == pytest.approx(theirs)


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
    found, _ = fit_temperature(predictions)
    assert found == pytest.approx(grid[int(np.argmin(losses))], abs=0.005) and abs(found - 2.5) < 0.1
    better = at_temperature(predictions, found)
    np.testing.assert_allclose(better[PROBABILITIES], softmax(2.5 * logits / found, axis=1), atol=1e-12)
    assert log_loss(better) == pytest.approx(min(losses), abs=1e-4)
    assert calibration_error(better) < calibration_error(predictions) / 3
    assert better["prediction"].equals(predictions["prediction"])
    assert (better[PROBABILITIES].to_numpy().argmax(1) == predictions[PROBABILITIES].to_numpy().argmax(1)).all()


@pytest.mark.parametrize(
    ("answers", "chosen", "sure", "why"),
    [
        ("ABCD", "ABCD", 0.6, "every answer on validation is correct"),
        ("ABCD", "BCDA", 0.6, "no answer on validation is correct"),
        ("AB", "AA", 1.0, "the probabilities 1 and three times 0"),
        ("AAAAA", "AAAAB", 0.2501, "the best one is not between 0.05 and 20"),
    ],
)
def test_no_temperature_and_why(answers, chosen, sure, why):
    temperature, sentence = fit_temperature(made(answers, chosen, sure))
    assert temperature is None and why in sentence


def test_one_question_that_is_nearly_sure_does_not_stop_the_temperature():
    predictions = sampled(np.random.default_rng(3), 300, 1.5)
    predictions.loc[0, PROBABILITIES] = [1.0, 1e-17, 1e-17, 1e-17]
    assert fit_temperature(predictions)[0] is not None


def test_log_loss_change_is_the_paired_t_interval():
    """Against the formula: mean ± t · s / √n of the differences of each question."""
    predictions = random_predictions(50)
    after = at_temperature(predictions, 2.0)
    at = np.arange(50), predictions["answer"].map(LETTERS.index).to_numpy()
    change = np.log(predictions[PROBABILITIES].to_numpy()[at]) - np.log(after[PROBABILITIES].to_numpy()[at])
    half = 2.009575 * change.std(ddof=1) / np.sqrt(50)  # t(0.975, 49)
    expected = change.mean(), change.mean() - half, change.mean() + half
    assert log_loss_change(predictions, after) == pytest.approx(expected, abs=1e-6)
    assert np.isnan(log_loss_change(predictions, predictions)[1])


def sampled(rng, count: int, sharpness: float) -> pd.DataFrame:
    """A model that says softmax(sharpness · z) where the answers are drawn from softmax(z)."""
    logits = rng.normal(0, 2, (count, 4))
    labels = (softmax(logits, axis=1).cumsum(1) > rng.random((count, 1))).argmax(1)
    return from_logits(sharpness * logits, labels)


def test_floor_is_what_a_calibrated_model_reads():
    """Against drawing models that are right with exactly their confidence, one by one."""
    rng = np.random.default_rng(1)
    predictions = sampled(rng, 400, 1.0)
    spread, errors = calibration_spread(predictions), []
    for _ in range(400):
        right = rng.random(400) < confidence(predictions)
        errors.append(calibration_error(predictions.assign(answer=np.where(right, predictions["prediction"], ""))))
    assert spread["floor"] == pytest.approx(np.mean(errors), abs=0.002)
    ends = spread["floor_low"], spread["floor_high"]
    assert ends == pytest.approx(np.quantile(errors, (0.025, 0.975)), abs=0.006)
    assert calibration_table({"x": predictions}).loc[0, ["floor", "error_low"]].tolist() == [spread["floor"], 0]


def test_interval_of_the_calibration_error_covers():
    """A model that is too sure: the interval has the error of very many questions in it about as often as it says."""
    rng = np.random.default_rng(2)
    true = calibration_error(sampled(rng, 200_000, 1.3))
    ends = [calibration_spread(sampled(rng, 600, 1.3)) for _ in range(150)]
    assert np.mean([it["error_low"] <= true <= it["error_high"] for it in ends]) >= 0.9
    assert true > np.median([it["floor_high"] for it in ends])  # and not because it is wide


def test_what_is_no_probability_is_refused():
    for bad in (np.nan, -0.1, 1.5, np.inf):
        with pytest.raises(RaceError, match="1 of 2 predictions have a probability outside 0 to 1, or NaN"):
            confidence(made("AB", "AB").assign(p_A=[0.25, bad]))


def test_coverage_has_the_wilson_band():
    curve = coverage_curve(random_predictions(300))
    band = proportion_confint(curve["correct"], curve["questions"], method="wilson")
    np.testing.assert_allclose(curve[["ci_low", "ci_high"]].T, band, atol=1e-12)


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
