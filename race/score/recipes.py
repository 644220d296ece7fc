"""Recipes compared over seeds and questions: is one better, and how many seeds would it take to tell? Numbers only."""

import itertools

import numpy as np
import pandas as pd
from scipy.stats import chi2, norm, t

from race import RaceError
from race.score.statistics import holm, passages_within_levels

DIFFERENCE_COLUMNS = ["first", "second", "questions", "seeds_first", "seeds_second", "difference", "ci_low", "ci_high"]
DIFFERENCE_COLUMNS += ["low_90", "high_90", "p", "p_holm", "freedom", "sd_first", "sd_second", "same_base"]
CHOICES = ("chosen", "other rule", "last epoch")  # checkpoints of a run that are scored; the first one counts
POWER = 0.8  # share of comparisons that find a true difference, for which seeds are counted
# Of two runs on RACE, for planning: SD of a run's accuracy beside the questions', and the share of questions on which
# two seeds of a recipe, and two recipes, are not both right or both wrong.
SD, RUNS_DIFFER, RECIPES_DIFFER = 0.004, 0.16, 0.18
QUESTIONS_A_PASSAGE = 3.5


def recipe_difference(
    first: np.ndarray, second: np.ndarray, passages: np.ndarray, levels: np.ndarray, same_base: bool = False
) -> dict:
    """Accuracy of recipe `second` − of `first`, over seeds and questions: the keys of DIFFERENCE_COLUMNS.

    first, second: [seeds, questions] right (1) or wrong (0), on the same questions; passages, levels: [questions].
    same_base: run s of both has gone on from the same weights, so that the runs are compared seed by seed.
    The variance is that of the questions, with passages as clusters within levels, and that of the runs beyond what
    the questions explain; degrees of freedom after Satterthwaite: multi-reader multi-case analysis with runs as readers
    (Hillis 2014, Statistics in Medicine 33:330). One seed has no interval and no p: they are NaN.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    seeds, each = (len(first), len(second)), second.mean(0) - first.mean(0)
    found = {"questions": first.shape[1], "seeds_first": seeds[0], "seeds_second": seeds[1]}
    found |= {"difference": float(each.mean()), "same_base": same_base}
    found |= dict.fromkeys(["ci_low", "ci_high", "low_90", "high_90", "p", "freedom"], np.nan)
    found |= {"sd_first": _spread(first), "sd_second": _spread(second)}
    if same_base and seeds[0] != seeds[1]:
        raise RaceError(f"runs are compared seed by seed: {seeds[0]} and {seeds[1]} seeds were given")
    of_questions, clusters = _variance_of_questions(each, passages, levels)
    if min(seeds) < 2 or clusters < 1:
        return found
    runs = [_variance_of_runs(values) for values in ([second - first] if same_base else [first, second])]
    variance = of_questions + sum(max(0.0, total - explained) for total, explained, _ in runs)
    if variance == 0:  # right and wrong on the same questions, in every run
        return found
    freedom = (of_questions + sum(total for total, _, _ in runs)) ** 2
    freedom /= of_questions**2 / clusters + sum(total**2 / (count - 1) for total, _, count in runs)
    error = variance**0.5
    found |= {"p": float(2 * t.sf(abs(found["difference"]) / error, freedom)), "freedom": float(freedom)}
    for low, high, level in (("ci_low", "ci_high", 0.975), ("low_90", "high_90", 0.95)):
        reach = t.ppf(level, freedom) * error
        found |= {low: float(found["difference"] - reach), high: float(found["difference"] + reach)}
    return found


def _spread(correct: np.ndarray) -> float:
    """Sample standard deviation of the runs' accuracies."""
    return float(correct.mean(1).std(ddof=1)) if len(correct) > 1 else np.nan


def _variance_of_questions(each: np.ndarray, passages: np.ndarray, levels: np.ndarray) -> tuple[float, int]:
    """Variance of the mean of [questions] values with passages as clusters within levels, and its freedom."""
    passage, level = passages_within_levels(levels, passages)
    clusters, of_question = np.bincount(level), level[passage]
    mean = np.bincount(of_question, each) / np.bincount(of_question)
    sums = np.bincount(passage, each - mean[of_question])
    weights = np.divide(clusters, clusters - 1, out=np.zeros(len(clusters)), where=clusters > 1)
    return float((weights[level] * sums**2).sum() / len(each) ** 2), len(sums) - len(clusters)


def _variance_of_runs(values: np.ndarray) -> tuple[float, float, int]:
    """Of the mean of [runs, questions] values: variance over runs, what questions alone make of it, number of runs."""
    runs, questions = values.shape
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    mean_square = (rest**2).sum() / ((runs - 1) * (questions - 1))
    return float(values.mean(1).var(ddof=1) / runs), float(mean_square / (runs * questions)), runs


def against_baseline(correct: dict[str, np.ndarray], facts: pd.DataFrame, same_base: set[str] = frozenset()):
    """A row for each recipe but the first, which they are compared with; p_holm: adjusted for all of them.

    correct: [seeds, questions] by recipe; facts: example_id and level of the questions; same_base: recipes whose runs
    have gone on from the same weights as the first one's, seed by seed.
    """
    (first, base), *others = correct.items()
    columns = facts["example_id"].to_numpy(), facts["level"].to_numpy()
    rows = [
        {"first": first, "second": name} | recipe_difference(base, runs, *columns, name in same_base)
        for name, runs in others
    ]
    table = pd.DataFrame(rows, columns=DIFFERENCE_COLUMNS)
    return table.assign(p_holm=holm(table["p"]))


def observed(correct: dict[str, np.ndarray]) -> dict:
    """What `power` assumes, as it was in these runs (as against_baseline): sd, runs_differ, recipes_differ.

    Means over the recipes, or over every two; NaN where there is one seed.
    """
    runs = [np.asarray(values, float) for values in correct.values()]
    several = [values for values in runs if len(values) > 1]
    variances = [max(0.0, len(values) * np.subtract(*_variance_of_runs(values)[:2])) for values in several]
    within = [np.abs(a - b).mean() for values in several for a, b in itertools.combinations(values, 2)]
    between = [np.abs(a - b).mean() for one, two in itertools.combinations(runs, 2) for a in one for b in two]
    found = {"sd": np.sqrt(np.mean(variances)) if several else np.nan}
    found |= {"runs_differ": np.mean(within) if several else np.nan, "recipes_differ": np.mean(between)}
    return {name: float(value) for name, value in found.items()}


def power(
    difference: float,
    seeds: int,
    questions: int,
    contrasts: int = 1,
    sd: float = SD,
    runs_differ: float = RUNS_DIFFER,
    recipes_differ: float = RECIPES_DIFFER,
    design_effect: float = 1.0,
) -> dict:
    """What a comparison of so many seeds a recipe will see of a true difference (a fraction, as accuracy is).

    Keys: seeds, questions, half_width (of the 95 % interval), power (share of comparisons that find it), power_holm
    (the same in the strictest step of Holm's adjustment for `contrasts`). sd: of a run's accuracy, beside the
    questions' share; runs_differ, recipes_differ: shares of questions on which two seeds of one recipe, and two
    recipes, are not both right or both wrong; design_effect: of passages, on the differences.
    """
    of_questions = design_effect * (max(0.0, recipes_differ - runs_differ) + runs_differ / seeds) / questions
    run = (sd**2 + runs_differ / 2 / questions) / seeds
    error = (of_questions + 2 * sd**2 / seeds) ** 0.5
    clusters = max(1.0, questions / QUESTIONS_A_PASSAGE - 1)
    freedom = (of_questions + 2 * run) ** 2 / (of_questions**2 / clusters + 2 * run**2 / (seeds - 1))

    place, count = abs(difference) / error, 2000
    spreads = np.sqrt(chi2.ppf((np.arange(count) + 0.5) / count, freedom) / freedom)  # of the estimated error

    def found(alpha: float) -> float:
        limits = t.ppf(1 - alpha / 2, freedom) * spreads  # scipy's noncentral t is NaN for large differences
        return float((norm.sf(limits - place) + norm.cdf(-limits - place)).mean())

    half = float(t.ppf(0.975, freedom) * error)
    powers = {"power": found(0.05), "power_holm": found(0.05 / contrasts)}
    return {"seeds": seeds, "questions": questions, "half_width": half} | powers


def seeds_needed(difference: float, questions: int, contrasts: int = 1, most: int = 100, **assumed) -> int | None:
    """The fewest seeds a recipe with which POWER is reached after Holm; None if `most` are too few. As `power`."""
    for seeds in range(2, most + 1):
        if power(difference, seeds, questions, contrasts, **assumed)["power_holm"] >= POWER:
            return seeds
    return None
