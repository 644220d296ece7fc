"""Calibration against independent computations: bins, log loss, temperature, and the spread of each."""

import numpy as np
import pandas as pd
import pytest
from predictions import LETTERS, PROBABILITIES, made, random_predictions
from scipy.special import softmax
from sklearn import metrics

from race.score.calibration import (
    at_temperature,
    calibration_error,
    calibration_floor,
    calibration_table,
    fit_temperature,
    log_loss_change,
    losses,
    reliability,
)
from race.score.statistics import confidence


def test_reliability_by_hand():
    """0.5 lies on an edge and counts below it; bins without questions are not there."""
    predictions = made("AAAAA", "AAABB", [0.5, 0.95, 0.91, 0.99, 0.5])
    table = reliability(predictions)
    assert table[["questions", "correct"]].to_numpy().tolist() == [[2, 1], [3, 2]]
    assert table[["low", "high"]].to_numpy() == pytest.approx(np.array([[0.4, 0.5], [0.9, 1.0]]))
    assert table["confidence"].tolist() == pytest.approx([0.5, 0.95])
    assert calibration_error(predictions) == pytest.approx((2 * abs(0.5 - 0.5) + 3 * abs(2 / 3 - 0.95)) / 5)


def test_calibration_of_all_right_all_wrong_and_even_odds():
    errors = [calibration_error(made("ABCD", *it)) for it in (("ABCD", 1.0), ("BCDA", 1.0), ("AAAA", 0.25))]
    assert errors == [0, 1, 0]  # the last says 25 %, and is right on 25 %


def test_log_loss_and_zero_probabilities():
    assert losses(made("AB", "AA")).mean() == pytest.approx(np.log(4))
    assert np.isfinite(losses(made("B", "A", 1.0)).mean())
    table = random_predictions(300)
    theirs = metrics.log_loss(table["answer"], table[PROBABILITIES], labels=LETTERS)
    assert losses(table).mean() == pytest.approx(theirs)


def sampled(rng, count: int, sharpness: float) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """A model that says softmax(sharpness · z) where the answers are drawn from softmax(z); its logits, and labels."""
    logits = rng.normal(0, 1.5, (count, 4))
    labels = (softmax(logits, axis=1).cumsum(1) > rng.random((count, 1))).argmax(1)
    table = made("".join(np.take(LETTERS, labels)), "".join(np.take(LETTERS, logits.argmax(1))))
    table[PROBABILITIES] = softmax(sharpness * logits, axis=1)
    return table, sharpness * logits, labels


def test_temperature_is_found_again():
    """Of a model that says softmax(2.5 z): 2.5, as a grid search finds."""
    predictions, logits, labels = sampled(np.random.default_rng(0), 4000, 2.5)
    grid = np.arange(2.2, 2.8, 0.01)
    of_grid = [-np.log(softmax(logits / t, axis=1)[np.arange(4000), labels]).mean() for t in grid]
    found = fit_temperature(predictions)
    assert found == pytest.approx(grid[int(np.argmin(of_grid))], abs=0.01) and abs(found - 2.5) < 0.15
    better = at_temperature(predictions, found)
    np.testing.assert_allclose(better[PROBABILITIES], softmax(logits / found, axis=1), atol=1e-12)
    assert losses(better).mean() == pytest.approx(min(of_grid), abs=1e-4)
    assert calibration_error(better) < calibration_error(predictions) / 3
    assert better["prediction"].equals(predictions["prediction"])


@pytest.mark.parametrize("chosen", ["ABCD", "BCDA"])
def test_no_temperature_where_all_answers_are_correct_or_all_wrong(chosen, capsys):
    assert fit_temperature(made("ABCD", chosen, 0.6)) is None
    assert "no temperature is fitted" in capsys.readouterr().out


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


def test_floor_is_what_a_calibrated_model_reads():
    """Against drawing models that are right with exactly their confidence, one by one."""
    rng = np.random.default_rng(1)
    predictions, *_ = sampled(rng, 400, 1.0)
    floor, errors = calibration_floor(predictions), []
    for _ in range(150):
        right = rng.random(400) < confidence(predictions)
        errors.append(calibration_error(predictions.assign(answer=np.where(right, predictions["prediction"], ""))))
    ends = floor["floor_low"], floor["floor_high"]
    assert ends == pytest.approx(np.quantile(errors, (0.025, 0.975)), abs=0.008)
    assert calibration_table({"x": predictions}).loc[0, "floor_low"] == ends[0]
    too_sure, _ = sampled(rng, 400, 1.5)[:2]
    assert calibration_error(too_sure) > calibration_floor(too_sure)["floor_high"]
