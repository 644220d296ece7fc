"""Paired comparisons: several tables of predictions on the same questions, two by two and put together."""

import itertools
from typing import NamedTuple

import numpy as np
import pandas as pd

from race_statistics import LETTERS, PROBABILITIES, is_right, mcnemar, p_value, share

QUESTION = ["level", "example_id", "question_index", "answer"]  # names a question, and its right answer


def holm(p_values: list[float]) -> np.ndarray:
    """p-values adjusted for how many tests were made (Holm 1979)."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, stepped)
    return adjusted


def paired_comparison(first: pd.DataFrame, second: pd.DataFrame, resamples: int = 10_000, seed: int = 0) -> dict:
    """`second` against `first` on the same questions: counts, McNemar's p, and a 95 % bootstrap interval.

    difference = accuracy of second − of first. Questions are resampled in pairs; as only four outcomes exist (both
    right, gained, lost, neither), drawing their counts is the same. Raises ValueError where the questions differ.
    """
    _check_same_questions([first, second])
    before, after = is_right(first), is_right(second)
    outcomes = before & after, ~before & after, before & ~after, ~before & ~after
    both, gained, lost, neither = counts = [int(outcome.sum()) for outcome in outcomes]
    questions = len(first)
    drawn = np.random.default_rng(seed).multinomial(questions, np.array(counts) / questions, resamples)
    low, high = np.quantile((drawn[:, 1] - drawn[:, 2]) / questions, (0.025, 0.975))
    return {
        "questions": questions,
        "both": both,
        "gained": gained,
        "lost": lost,
        "neither": neither,
        "difference": (gained - lost) / questions,
        "ci_low": float(low),
        "ci_high": float(high),
        "p": mcnemar(gained, lost),
    }


def compare_pairs(predictions: dict[str, pd.DataFrame], resamples: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """A row for every two of the named predictions, later against earlier; p_holm is adjusted for their number."""
    pairs = list(itertools.combinations(predictions, 2))
    rows = [
        {
            "first": first,
            "second": second,
            **paired_comparison(predictions[first], predictions[second], resamples, seed),
        }
        for first, second in pairs
    ]
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"])) if rows else table


def paired_sentence(row: pd.Series) -> str:
    """One comparison in words: who is right where, the difference in points, and whether it is more than chance."""
    first, second = row["first"], row["second"]
    if row["gained"] == row["lost"] == 0:
        return f"{second} and {first} are right on the same questions: no difference to test."
    p = row.get("p_holm", row["p"])
    finding = (
        f"{second if row['difference'] > 0 else first} is better, by more than chance would give"
        if p < 0.05
        else "that is no more than chance would give"
    )
    return (
        f"{second} is right on {row['gained']:,} questions that {first} gets wrong, and wrong on {row['lost']:,} that "
        f"{first} gets right: {points(row)}; {finding} (McNemar {p_value(p)})."
    )


def points(row: pd.Series, sign: int = 1) -> str:
    """A difference of accuracies in percentage points with its interval: "+0.5 points (95 % −0.9 to 1.9)"."""
    ends = row[["difference", "ci_low", "ci_high"] if sign > 0 else ["difference", "ci_high", "ci_low"]]
    difference, low, high = (f"{round(100 * sign * end, 1) + 0:.1f}".replace("-", "−") for end in ends)
    return f"{'+' if sign * row['difference'] > 0 else ''}{difference} points (95 % {low} to {high})"


class Lead(NamedTuple):
    """How far the best model is ahead of another one."""

    over: str
    points: str  # with interval and p
    ahead: bool  # right on more questions, not on as many
    sure: bool  # by more than chance


def leads(predictions: dict[str, pd.DataFrame], pairs: pd.DataFrame) -> tuple[str, list[Lead]]:
    """The name that is right most often (the first of equals), and its lead over each other one."""
    best = max(predictions, key=lambda name: is_right(predictions[name]).mean())
    found = []
    for _, row in pairs.iterrows():
        if best in (row["first"], row["second"]):
            other, sign = (row["first"], 1) if row["second"] == best else (row["second"], -1)
            words = f"{points(row, sign)}, {p_value(row['p_holm'])}"
            found.append(Lead(other, words, row["gained"] != row["lost"], row["p_holm"] < 0.05))
    return best, found


def verdict(predictions: dict[str, pd.DataFrame], pairs: pd.DataFrame) -> str:
    """Which is better, by how much, and how sure that is, in words."""
    best, found = leads(predictions, pairs)
    text = f"{best} is right most often: {share(is_right(predictions[best]).mean())}."
    for lead in found:
        text += f" Against {lead.over}: {lead.points}, {'more' if lead.sure else 'no more'} than chance would give."
    return text


def short_verdict(predictions: dict[str, pd.DataFrame], pairs: pd.DataFrame) -> str:
    """The verdict as a title: who leads, and over whom by more than chance."""
    best, found = leads(predictions, pairs)
    groups = {
        "leads {} by more than chance": [lead.over for lead in found if lead.sure],
        "leads {} by no more than chance": [lead.over for lead in found if lead.ahead and not lead.sure],
        "is level with {}": [lead.over for lead in found if not lead.ahead],
    }
    parts = [words.format(" and ".join(names)) for words, names in groups.items() if names]
    return f"{best} {', '.join(parts)}" if parts else f"{best}, alone"


def pairs_style(pairs: pd.DataFrame):
    """The comparisons for reading: the difference in points, its interval in one column."""
    shown = pairs.rename(columns={"second": "checkpoint", "first": "against", "p_holm": "p (Holm)"})
    shown["points"] = 100 * pairs["difference"]
    ends = zip(100 * pairs["ci_low"], 100 * pairs["ci_high"], strict=True)
    shown["95 % interval"] = [f"{low:+.1f} to {high:+.1f}" for low, high in ends]
    names = ["checkpoint", "against", "gained", "lost", "both", "neither", "points", "95 % interval", "p", "p (Holm)"]
    formats = {"points": "{:+.1f}", "p": "{:.2g}", "p (Holm)": "{:.2g}"}
    formats |= dict.fromkeys(["gained", "lost", "both", "neither"], "{:,}")
    return shown[names].style.format(formats).hide(axis="index")


def ensemble(predictions: list[pd.DataFrame]) -> pd.DataFrame:
    """The predictions of the mean probabilities of several models on the same questions; raises ValueError."""
    _check_same_questions(predictions)
    mean = np.mean([table[PROBABILITIES].to_numpy() for table in predictions], axis=0)
    combined = predictions[0].copy()
    combined[PROBABILITIES] = mean
    combined["prediction"] = np.take(LETTERS, mean.argmax(1))
    return combined


def _check_same_questions(predictions: list[pd.DataFrame]) -> None:
    """The same questions, in the same order, with the same right answers; at least one."""
    first = predictions[0][QUESTION].reset_index(drop=True)
    if not len(first):
        raise ValueError("no questions to compare on")
    for other in predictions[1:]:
        if not first.equals(other[QUESTION].reset_index(drop=True)):
            raise ValueError(
                f"the predictions are not on the same questions ({len(first):,} and {len(other):,}): "
                "score both with the same cache, split, LIMIT_QUESTIONS and SEED"
            )
