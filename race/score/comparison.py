"""Paired comparisons: several tables of predictions on the same questions, two by two and combined. Numbers only."""

import functools
import itertools
import operator

import numpy as np
import pandas as pd

from race import RaceError
from race.score.statistics import (
    PROBABILITIES,
    SEEN_COLUMNS,
    holm,
    is_correct,
    mcnemar,
    most_probable,
    mostly_trained_on,
    probabilities_of,
)

QUESTION = ["level", "example_id", "question_index", "answer"]  # identifies a question, and its correct answer
OUTCOMES = ["both", "gained", "lost", "neither"]
PAIR_COLUMNS = ["first", "second", "questions", *OUTCOMES, "difference", "ci_low", "ci_high", "p", "p_holm", "pairs"]
RESAMPLES = 10_000
TURNED = {"first": "second", "gained": "lost", "ci_low": "ci_high"}  # what changes places if the two do


def paired_comparison(first: pd.DataFrame, second: pd.DataFrame, seed: int = 0) -> dict:
    """`second` against `first` on the same questions: counts, McNemar's p, and a 95 % bootstrap interval.

    Where most of the articles trained one of the two, neither p nor interval would be about new questions: both are
    NaN.
    difference = accuracy of second − of first. Questions are resampled in pairs. As only four outcomes exist, drawing
    their counts is the same, and a thousand times faster than scipy.stats.bootstrap, which draws every question.
    """
    _check_same_questions([first, second])
    before, after, questions = is_correct(first), is_correct(second), len(first)
    outcomes = before & after, ~before & after, before & ~after, ~before & ~after
    counts = dict(zip(OUTCOMES, (int(outcome.sum()) for outcome in outcomes), strict=True))
    fractions = np.array(list(counts.values())) / questions
    drawn = np.random.default_rng(seed).multinomial(questions, fractions, RESAMPLES)
    low, high = np.quantile((drawn[:, 1] - drawn[:, 2]) / questions, (0.025, 0.975))
    gained, lost = counts["gained"], counts["lost"]
    found = {"difference": (gained - lost) / questions, "ci_low": float(low), "ci_high": float(high)}
    found |= {"p": mcnemar(gained, lost)}
    if mostly_trained_on(first) or mostly_trained_on(second):
        found |= dict.fromkeys(["ci_low", "ci_high", "p"], np.nan)
    return {"questions": questions} | counts | found


def compare_pairs(predictions: dict[str, pd.DataFrame], seed: int = 0) -> pd.DataFrame:
    """A row for every two of the named predictions, later against earlier; p_holm: adjusted for all `pairs` of them."""
    rows = [
        {"first": first, "second": second} | paired_comparison(predictions[first], predictions[second], seed)
        for first, second in itertools.combinations(predictions, 2)
    ]
    table = pd.DataFrame(rows, columns=PAIR_COLUMNS)
    return table.assign(p_holm=holm(table["p"]), pairs=len(rows))


def shown_pairs(predictions: dict[str, pd.DataFrame], pairs: pd.DataFrame, most: int = 10) -> pd.DataFrame:
    """The pairs to draw and to tell: all, or those of the best checkpoint if there are more than `most`."""
    return pairs if len(pairs) <= most else leads(predictions, pairs)[1]


def leads(predictions: dict[str, pd.DataFrame], pairs: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """The name with the highest accuracy (the first of equals), and its pairs, each turned so that it is `second`."""
    best = max(predictions, key=lambda name: is_correct(predictions[name]).mean())
    turned = pairs.rename(columns=TURNED | {new: old for old, new in TURNED.items()})
    turned[["difference", "ci_low", "ci_high"]] *= -1
    both = pd.concat([pairs, turned]) if len(pairs) else pairs
    return best, both[both["second"] == best]


def ensemble(predictions: list[pd.DataFrame]) -> pd.DataFrame:
    """The predictions of the mean probabilities of several models on the same questions.

    An article that one of them was trained or chosen on counts so for the ensemble.
    """
    _check_same_questions(predictions)
    mean = np.mean([probabilities_of(table) for table in predictions], axis=0)
    combined = predictions[0].assign(prediction=most_probable(mean))
    combined[PROBABILITIES] = mean
    for column in SEEN_COLUMNS.values():
        if all(column in table for table in predictions):
            combined[column] = functools.reduce(operator.or_, [table[column] for table in predictions])
    return combined


def _check_same_questions(predictions: list[pd.DataFrame]) -> None:
    """The same questions, in the same order, with the same correct answers; at least one."""
    first = predictions[0][QUESTION].reset_index(drop=True)
    if not len(first):
        raise RaceError("no questions to compare on")
    for other in predictions[1:]:
        if not first.equals(other[QUESTION].reset_index(drop=True)):
            raise RaceError(
                f"the predictions are not on the same questions ({len(first):,} and {len(other):,}): "
                "score both with the same cache, split, LIMIT_QUESTIONS and SEED"
            )
