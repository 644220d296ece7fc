"""Calibration on a table of predictions: confidence against accuracy, temperature. Numbers only."""

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import ttest_1samp

from race import LETTERS
from race.score import statistics
from race.score.statistics import PROBABILITIES, confidence, is_correct, with_accuracy

BINS = 10  # of equal width, for confidence
DRAWS = 2_000  # of the perfectly calibrated model
TEMPERATURES = 0.05, 20.0  # the range that is searched


def _bins(predictions: pd.DataFrame) -> np.ndarray:
    """[N] the number of each question's bin; a confidence on an edge belongs to the bin below."""
    return np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence(predictions))


def reliability(predictions: pd.DataFrame) -> pd.DataFrame:
    """Mean confidence, accuracy and its Wilson interval in BINS bins of equal width over (0, 1], if not empty."""
    edges, bins = np.linspace(0, 1, BINS + 1), _bins(predictions)
    counts = pd.Series(is_correct(predictions)).groupby(bins).agg(questions="size", correct="sum")
    counts["confidence"] = pd.Series(confidence(predictions)).groupby(bins).mean()
    return with_accuracy(counts.assign(low=edges[counts.index], high=edges[counts.index + 1]))


def calibration_error(predictions: pd.DataFrame) -> float:
    """Expected calibration error: |accuracy − mean confidence| of each bin, weighted by its questions."""
    table = reliability(predictions)
    return float((table["questions"] * (table["accuracy"] - table["confidence"]).abs()).sum() / len(predictions))


def calibration_floor(predictions: pd.DataFrame, seed: int = 0) -> dict:
    """What a model whose answers are correct with exactly its confidences would read: central 95 % of its errors."""
    sure, count, rng = confidence(predictions), len(predictions), np.random.default_rng(seed)
    member = np.eye(BINS)[_bins(predictions)]  # [N, BINS]
    right = rng.random((DRAWS, count)) < sure
    low, high = np.quantile(np.abs((right - sure) @ member).sum(1) / count, (0.025, 0.975))
    return {"floor_low": low, "floor_high": high}


def losses(predictions: pd.DataFrame) -> np.ndarray:
    """[N] the negative log-likelihood of each correct answer, in nats; a probability of 0 counts as 2e-16."""
    return -np.log(np.maximum(statistics.probabilities(predictions)[_answers(predictions)], np.finfo(float).eps))


def _answers(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The place of each correct answer in an array [N, k]."""
    return np.arange(len(predictions)), predictions["answer"].map(LETTERS.index).to_numpy()


def log_loss_change(before: pd.DataFrame, after: pd.DataFrame) -> tuple[float, float, float]:
    """Log loss of `after` − of `before`, two versions of the same predictions, with its 95 % interval (paired t)."""
    change = losses(after) - losses(before)
    if len(change) < 2 or np.ptp(change) == 0:
        return float(change.mean()), np.nan, np.nan
    interval = ttest_1samp(change, 0).confidence_interval(0.95)
    return float(change.mean()), float(interval.low), float(interval.high)


def fit_temperature(predictions: pd.DataFrame) -> float | None:
    """The temperature with the lowest log loss (Guo et al. 2017); None if there is none, the reason printed.

    Above 1: the model is too confident. Not by `losses`: probabilities cut off at 2e-16 have no slope to follow.
    """
    logits, answers, ends = _log_probabilities(predictions), _answers(predictions), np.log(TEMPERATURES)

    def loss(log_temperature: float) -> float:
        return -log_softmax(logits / np.exp(log_temperature), axis=1)[answers].mean()

    found = minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-8}).x
    if np.abs(found - ends).min() > 1e-3:
        return float(np.exp(found))
    print(f"no temperature is fitted: none within {TEMPERATURES} is best, as where all answers are correct")
    return None


def at_temperature(predictions: pd.DataFrame, temperature: float) -> pd.DataFrame:
    """The predictions with logits divided by `temperature`: other probabilities, the same answers."""
    changed = predictions.copy()
    columns = predictions.filter(items=PROBABILITIES).columns
    changed[columns] = np.exp(log_softmax(_log_probabilities(predictions) / temperature, axis=1))
    return changed


def _log_probabilities(predictions: pd.DataFrame) -> np.ndarray:
    return np.log(np.maximum(statistics.probabilities(predictions), np.finfo(float).tiny))


def calibration_table(versions: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row for each named table of predictions: mean loss, calibration error and its floor, confidence, accuracy."""
    rows = []
    for name, table in versions.items():
        errors = {"calibration_error": calibration_error(table)} | calibration_floor(table)
        means = {"confidence": confidence(table).mean(), "accuracy": is_correct(table).mean()}
        rows.append({"": name, "log_loss": losses(table).mean()} | errors | means)
    return pd.DataFrame(rows)
