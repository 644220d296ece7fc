"""Checkpoints compared on the same questions, and recipes over their seeds and questions. Numbers only."""

import functools
import itertools
import operator

import numpy as np
import pandas as pd
from scipy.stats import chi2, norm, t

from race import LETTERS, RaceError
from race.score import statistics
from race.score.statistics import PROBABILITIES, SEEN_COLUMNS, is_correct, not_new

QUESTION = ["level", "example_id", "question_index", "answer"]  # identifies a question, and its correct answer
PAIR_COLUMNS = ["first", "second", "questions", "both", "gained", "lost", "neither", "difference", "ci_low", "ci_high"]
PAIR_COLUMNS += ["p", "p_holm", "pairs"]
UNSEEN = chi2.ppf(0.95, 1)  # answers that differ, added to a variance as Wilson's interval does: none has the width 0
DIFFERENCE_COLUMNS = ["first", "second", "questions", "seeds", "difference", "ci_low", "ci_high", "low_90", "high_90"]
DIFFERENCE_COLUMNS += ["p", "p_holm", "freedom", "sd_first", "sd_second"]
LEAST_SEEDS = 3  # from which a difference is tested
POWER = 0.8  # share of comparisons that find a true difference, for which seeds are counted
# Of two runs on RACE, for planning: SD of a run's accuracy beside the questions', and the share of questions on which
# two seeds of a recipe, and two recipes, are not both right or both wrong.
SD, RUNS_DIFFER, RECIPES_DIFFER = 0.004, 0.16, 0.18
QUESTIONS_A_PASSAGE = 3.5


def paired_comparison(first: pd.DataFrame, second: pd.DataFrame) -> dict:
    """`second` against `first` on the same questions: counts, difference of accuracy, its 95 % interval and p.

    One t test, with passages as clusters within levels, as recipe_difference has it for questions; the interval is the
    test's. NaN where one was trained or selected on most of the articles, and where there are too few passages.
    """
    check_same_questions([first, second])
    before, after, questions = is_correct(first), is_correct(second), len(first)
    outcomes = {"both": before & after, "gained": ~before & after, "lost": before & ~after, "neither": ~before & ~after}
    found = {"questions": questions} | {name: int(outcome.sum()) for name, outcome in outcomes.items()}
    found |= {"difference": (found["gained"] - found["lost"]) / questions} | dict.fromkeys(PAIR_COLUMNS[8:11], np.nan)
    gains = after.astype(float) - before
    variance, clusters = _variance_of_questions(gains, first["example_id"], first["level"])
    if clusters < 1 or not_new(first) or not_new(second):
        return found
    error = (variance + UNSEEN / questions**2) ** 0.5
    low, high = found["difference"] + t.ppf([0.025, 0.975], clusters) * error
    p = 2 * t.sf(abs(found["difference"]) / error, clusters)
    return found | {"ci_low": max(-1.0, low), "ci_high": min(1.0, high), "p": float(p)}


def compare_pairs(predictions: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row for every two of the named predictions, later against earlier; p_holm: adjusted for all `pairs` of them."""
    rows = [
        {"first": first, "second": second} | paired_comparison(predictions[first], predictions[second])
        for first, second in itertools.combinations(predictions, 2)
    ]
    table = pd.DataFrame(rows, columns=PAIR_COLUMNS)
    return table.assign(p_holm=statistics.holm(table["p"]), pairs=len(rows))


def shown_pairs(predictions: dict[str, pd.DataFrame], pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs to draw and to tell: all; of two checkpoints, or more than ten pairs, the best against the others."""
    return pairs if 1 < len(pairs) <= 10 else leads(predictions, pairs)[1]


def leads(predictions: dict[str, pd.DataFrame], pairs: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """The name with the highest accuracy (the first of equals), and its pairs, each turned so that it is `second`."""
    best = max(predictions, key=lambda name: is_correct(predictions[name]).mean())
    change_places = {"first": "second", "gained": "lost", "ci_low": "ci_high"}
    turned = pairs.rename(columns=change_places | {new: old for old, new in change_places.items()})
    turned[["difference", "ci_low", "ci_high"]] *= -1
    both = pd.concat([pairs, turned]) if len(pairs) else pairs
    return best, both[both["second"] == best]


def ensemble(predictions: list[pd.DataFrame]) -> pd.DataFrame:
    """The predictions of the mean probabilities of several models on the same questions.

    An article that one of them was trained or chosen on counts so for the ensemble.
    """
    check_same_questions(predictions)
    mean = np.mean([statistics.probabilities(table) for table in predictions], axis=0)
    combined = predictions[0].assign(prediction=np.take(LETTERS, mean.argmax(1)))
    combined[PROBABILITIES[: mean.shape[1]]] = mean
    for column in SEEN_COLUMNS.values():
        combined[column] = functools.reduce(operator.or_, [table[column] for table in predictions])
    return combined


def check_same_questions(predictions: list[pd.DataFrame]) -> None:
    """Raise RaceError unless these are on the same questions, in one order, with the same correct answers."""
    first = predictions[0][QUESTION].reset_index(drop=True)
    for other in predictions[1:]:
        if not first.equals(other[QUESTION].reset_index(drop=True)):
            raise RaceError(
                f"the predictions are not on the same questions ({len(first):,} and {len(other):,}): "
                "score both with the same cache, split, LIMIT_QUESTIONS and SEED"
            )


def recipe_difference(first: np.ndarray, second: np.ndarray, passages: np.ndarray, levels: np.ndarray) -> dict:
    """Accuracy of recipe `second` − of `first`, over seeds and questions: the keys of DIFFERENCE_COLUMNS.

    first, second: [seeds, questions] right (1) or wrong (0), row s of both with one seed.
    The variance is that of the questions, with passages as clusters within levels, and that of the runs beyond what
    the questions explain; degrees of freedom after Satterthwaite: multi-reader multi-case analysis with runs as readers
    (Hillis 2014, Statistics in Medicine 33:330). One seed has no interval, and fewer than LEAST_SEEDS no p: NaN.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape != second.shape:
        raise RaceError(f"runs are compared seed by seed: {len(first)} and {len(second)} seeds were given")
    gains, (seeds, questions) = second - first, first.shape
    found = dict.fromkeys(DIFFERENCE_COLUMNS[5:], np.nan) | {"questions": questions, "seeds": seeds}
    found |= {"difference": float(gains.mean())}
    found |= {name: pd.Series(it.mean(1)).std() for name, it in (("sd_first", first), ("sd_second", second))}
    of_questions, clusters = _variance_of_questions(gains.mean(0), passages, levels)
    if seeds < 2 or clusters < 1:
        return found
    of_runs = gains.mean(1).var(ddof=1) / seeds
    rest = gains - gains.mean(1, keepdims=True) - gains.mean(0) + gains.mean()
    noise = (rest**2).sum() / ((seeds - 1) * (questions - 1)) / (seeds * questions)  # of single answers, in of_runs
    variance = of_questions + max(0.0, of_runs - noise)
    if variance == 0:  # right and wrong on the same questions, in every run
        return found
    freedom = variance**2 / (of_questions**2 / clusters + of_runs**2 / (seeds - 1))
    found["freedom"] = float(freedom)
    if seeds >= LEAST_SEEDS:
        found["p"] = float(2 * t.sf(abs(found["difference"]) / variance**0.5, freedom))
    for low, high, level in (("ci_low", "ci_high", 0.975), ("low_90", "high_90", 0.95)):
        reach = t.ppf(level, freedom) * variance**0.5
        found |= {low: float(found["difference"] - reach), high: float(found["difference"] + reach)}
    return found


def _variance_of_questions(each: np.ndarray, passages: np.ndarray, levels: np.ndarray) -> tuple[float, int]:
    """Variance of the mean of [questions] values with passages as clusters within levels, and its freedom."""
    passage, level = statistics.passages_within_levels(levels, passages)
    clusters, of_question = np.bincount(level), level[passage]
    mean = np.bincount(of_question, each) / np.bincount(of_question)
    sums = np.bincount(passage, each - mean[of_question])
    weights = np.divide(clusters, clusters - 1, out=np.zeros(len(clusters)), where=clusters > 1)
    return float((weights[level] * sums**2).sum() / len(each) ** 2), len(sums) - len(clusters)


def against_baseline(correct: dict[str, np.ndarray], facts: pd.DataFrame) -> pd.DataFrame:
    """A row for each recipe but the first, which they are compared with; p_holm: adjusted for all of them.

    correct: [seeds, questions] by recipe; facts: predictions of a run. On articles that chose them nothing is tested.
    """
    (first, base), *others = correct.items()
    columns = facts["example_id"], facts["level"]
    rows = [{"first": first, "second": name} | recipe_difference(base, runs, *columns) for name, runs in others]
    table = pd.DataFrame(rows, columns=DIFFERENCE_COLUMNS)
    if not_new(facts):
        table[["ci_low", "ci_high", "low_90", "high_90", "p"]] = np.nan
    return table.assign(p_holm=statistics.holm(table["p"]))


def at_chance(correct: dict[str, np.ndarray], facts: pd.DataFrame) -> dict[str, list[int]]:
    """The rows of each recipe's runs [seeds, questions] that do not answer more questions than by chance, if any.

    facts: predictions of a run, as against_baseline takes them.
    """
    found, chance = {}, 1 / len(statistics.letters_of(facts))
    for name, runs in correct.items():
        low, _ = statistics.wilson(np.asarray(runs).sum(1), np.shape(runs)[1])
        if rows := np.flatnonzero(low <= chance).tolist():
            found[name] = rows
    return found


def compare_runs(correct: dict[str, np.ndarray], facts: pd.DataFrame) -> dict:
    """differences: against_baseline; failed: at_chance; without_failed: differences without their seeds, or empty."""
    found = {"differences": against_baseline(correct, facts), "failed": at_chance(correct, facts)}
    failed = sorted({row for rows in found["failed"].values() for row in rows})
    others = {name: np.delete(runs, failed, 0) for name, runs in correct.items()}
    some = failed and len(next(iter(others.values())))
    return found | {"without_failed": against_baseline(others, facts) if some else found["differences"][:0]}


def measured_spread(correct: dict[str, np.ndarray]) -> dict:
    """Of the runs of recipes, [seeds, questions] each, what `power` assumes: sd, and what share of answers differs.

    runs_differ: of two seeds of a recipe; recipes_differ: of two recipes with different seeds; sd: of a recipe's
    accuracies (root of the mean variance), beyond what runs_differ explains. NaN of one seed, or one recipe.
    """
    runs = [np.asarray(it, bool) for it in correct.values()]
    seeds = [*itertools.permutations(range(min(map(len, runs))), 2)]
    own = [(it[a] != it[b]).mean() for it in runs for a, b in seeds]
    across = [(one[a] != other[b]).mean() for one, other in itertools.combinations(runs, 2) for a, b in seeds]
    found = {name: pd.Series(it).mean() for name, it in (("runs_differ", own), ("recipes_differ", across))}
    variance = np.mean([pd.Series(it.mean(1)).var() for it in runs])
    return found | {"sd": np.maximum(0.0, variance - found["runs_differ"] / 2 / runs[0].shape[1]) ** 0.5}


def power(difference: float, seeds: int, questions: int, contrasts: int = 1) -> dict:
    """What a comparison of so many seeds a recipe will see of a true difference (a fraction, as accuracy is).

    Keys: half_width (of the 95 % interval, median); power, the share of comparisons that find it; power_holm, the same
    in the strictest step of Holm's adjustment for `contrasts`.
    """
    of_questions = (RECIPES_DIFFER - RUNS_DIFFER + RUNS_DIFFER / seeds) / questions
    of_runs, noise = (2 * SD**2 + RUNS_DIFFER / questions) / seeds, RUNS_DIFFER / questions / seeds
    drawn = of_runs * chi2.ppf((np.arange(2000) + 0.5) / 2000, seeds - 1) / (seeds - 1)  # as its estimate spreads
    variance, clusters = of_questions + np.maximum(0.0, drawn - noise), max(1.0, questions / QUESTIONS_A_PASSAGE - 1)
    freedom = variance**2 / (of_questions**2 / clusters + drawn**2 / (seeds - 1))
    found, error = {}, (of_questions + of_runs - noise) ** 0.5
    for name, alpha in (("power", 0.05), ("power_holm", 0.05 / contrasts)):
        reach = t.ppf(1 - alpha / 2, freedom) * variance**0.5
        found.setdefault("half_width", float(np.median(reach)))
        found[name] = float((norm.sf((reach - difference) / error) + norm.cdf((-reach - difference) / error)).mean())
    return found


def seeds_needed(difference: float, questions: int, contrasts: int = 1) -> int | None:
    """The fewest seeds a recipe, up to 100, with which POWER is reached after Holm; None if there are none."""
    enough = (n for n in range(LEAST_SEEDS, 101) if power(difference, n, questions, contrasts)["power_holm"] >= POWER)
    return next(enough, None)
