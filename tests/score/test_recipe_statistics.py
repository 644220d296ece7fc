"""The test of recipes over seeds and questions, against simulated runs and against sums written out by hand."""

import numpy as np
import pandas as pd
import pytest
from helpers import recipes_by_hand
from scipy.stats import norm, t

from race import RaceError
from race.score.recipes import against_baseline, observed, power, recipe_difference, seeds_needed

ACCURACY = norm.ppf(0.7)  # two seeds of a recipe differ on 16 % of the questions, two recipes on 18 %
OF_PASSAGE, OF_QUESTION, OF_RECIPE, OF_SEED = 0.15, 0.645, 0.042, 0.163  # variances of what decides an answer; sum 1


def simulate(rng, seeds: int, shift: float = 0.0, sd: float = 0.012, passages: int = 300, size: int = 4):
    """([2, seeds, questions] right or wrong, passages of the questions): runs that differ in seed and recipe.

    shift: of the second recipe, and sd: of the runs, both in units of what decides an answer.
    """
    place, questions = np.repeat(np.arange(passages), size), passages * size

    def normal(variance: float, *shape: int) -> np.ndarray:
        return rng.normal(0, variance**0.5, shape)

    value = ACCURACY + normal(OF_PASSAGE, passages)[place] + normal(OF_QUESTION, questions)
    value = value + normal(OF_RECIPE, 2, 1, questions) + normal(OF_SEED, 2, seeds, questions)
    value = value + normal(sd**2, 2, seeds, 1) + np.array([0, shift])[:, None, None]
    return value > 0, place


def difference(correct, place, **settings) -> dict:
    return recipe_difference(*correct, place, np.full(len(place), "high"), **settings)


def test_simulated_runs_differ_as_runs_on_race_do():
    correct, _ = simulate(np.random.default_rng(0), 2, passages=20_000)
    assert correct.mean() == pytest.approx(0.7, abs=0.01)
    assert (correct[0, 0] != correct[0, 1]).mean() == pytest.approx(0.16, abs=0.01)
    assert (correct[0, 0] != correct[1, 0]).mean() == pytest.approx(0.18, abs=0.01)


def test_what_planning_assumes_can_be_observed():
    """Recovered from simulated runs whose spread is known; of single runs only the last one."""
    rng = np.random.default_rng(8)
    found = [observed(dict(enumerate(simulate(rng, 4, sd=0.06)[0]))) for _ in range(100)]
    assert np.mean([it["runs_differ"] for it in found]) == pytest.approx(0.16, abs=0.01)
    assert np.mean([it["recipes_differ"] for it in found]) == pytest.approx(0.18, abs=0.01)
    assert np.mean([it["sd"] for it in found]) == pytest.approx(0.06 * norm.pdf(ACCURACY), rel=0.15)
    alone = observed({"a": np.array([[1, 0, 1, 1]]), "b": np.array([[1, 1, 1, 1]])})
    assert np.isnan(alone["sd"]) and np.isnan(alone["runs_differ"]) and alone["recipes_differ"] == 0.25


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_false_alarms_and_coverage(seeds):
    """Where nothing differs 3 to 7 % are called significant; 93 to 97 % of the intervals hold the true difference."""
    rng, shift, draws = np.random.default_rng(seeds), 0.06, 1000
    null = [difference(*simulate(rng, seeds))["p"] < 0.05 for _ in range(draws)]
    assert 0.03 <= np.mean(null) <= 0.07
    true = norm.cdf(ACCURACY + shift) - norm.cdf(ACCURACY)
    found = [difference(*simulate(rng, seeds, shift)) for _ in range(draws)]
    assert 0.93 <= np.mean([it["ci_low"] <= true <= it["ci_high"] for it in found]) <= 0.97
    assert 0.86 <= np.mean([it["low_90"] <= true <= it["high_90"] for it in found]) <= 0.94


def test_false_alarms_of_runs_from_the_same_weights():
    """Compared seed by seed: what both runs of a seed have in common is in neither variance."""
    rng, alarms, widths = np.random.default_rng(1), [], []
    for _ in range(1000):
        correct, place = simulate(rng, 5, sd=0.05)
        shared = rng.random((1, *correct.shape[1:])) < 0.5  # half of the answers are those of the base
        correct = np.where(shared, correct[:1], correct)
        own, both = (difference(correct, place, same_base=paired) for paired in (False, True))
        alarms.append(both["p"] < 0.05)
        widths.append((both["ci_high"] - both["ci_low"]) / (own["ci_high"] - own["ci_low"]))
    assert 0.03 <= np.mean(alarms) <= 0.07 and np.mean(widths) < 0.95


@pytest.mark.parametrize("seeds", [3, 10])
def test_the_power_that_is_planned_is_the_power_that_is_found(seeds):
    """As many comparisons find the difference as `power` says, and their intervals are as wide."""
    rng, shift, sd = np.random.default_rng(seeds), 0.09, 0.012
    found = [difference(*simulate(rng, seeds, shift, sd)) for _ in range(500)]
    slope = norm.pdf(ACCURACY)
    planned = power(norm.cdf(ACCURACY + shift) - norm.cdf(ACCURACY), seeds, 1200, sd=sd * slope)
    assert np.mean([it["p"] < 0.05 for it in found]) == pytest.approx(planned["power"], abs=0.06)
    half = np.mean([it["ci_high"] - it["ci_low"] for it in found]) / 2
    assert half == pytest.approx(planned["half_width"], rel=0.12)


def test_numbers_are_those_of_the_procedure_by_hand():
    correct, place = simulate(np.random.default_rng(3), 3, 0.3, 0.2, passages=20)
    correct, levels = correct.astype(int), np.where(place < 8, "middle", "high")
    found = recipe_difference(*correct, place, levels)
    mean, variance, freedom = recipes_by_hand(*correct, place, levels)
    assert found["difference"] == pytest.approx(mean) and found["freedom"] == pytest.approx(freedom)
    assert found["ci_high"] - found["ci_low"] == pytest.approx(2 * t.ppf(0.975, freedom) * variance**0.5)
    assert found["p"] == pytest.approx(2 * t.sf(abs(mean) / variance**0.5, freedom))
    assert found["sd_second"] == pytest.approx(np.std(correct[1].mean(1), ddof=1))


def test_one_seed_has_a_difference_and_no_interval():
    correct, place = simulate(np.random.default_rng(4), 1)
    found = difference(correct, place)
    assert found["difference"] == pytest.approx(correct[1].mean() - correct[0].mean())
    assert all(np.isnan(found[name]) for name in ("ci_low", "ci_high", "low_90", "high_90", "p", "sd_first"))
    mixed = recipe_difference(correct[0], np.repeat(correct[1], 2, 0), place, place * 0)
    assert np.isnan(mixed["p"]) and (mixed["seeds_first"], mixed["seeds_second"]) == (1, 2)


def test_runs_that_answer_alike_have_nothing_to_test():
    correct, place = simulate(np.random.default_rng(5), 2)
    same = np.repeat(correct[:1, :1], 2, 0).repeat(2, 1)
    assert np.isnan(difference(same, place)["p"]) and difference(same, place)["difference"] == 0


def test_recipes_against_the_first_one():
    rng = np.random.default_rng(6)
    (chain, linear), place = simulate(rng, 3, 0.2)
    facts = pd.DataFrame({"example_id": place, "level": ""})
    table = against_baseline({"chain": chain, "linear": linear, "again": chain}, facts, {"again"})
    assert table[["first", "second", "same_base"]].to_numpy().tolist() == [
        ["chain", "linear", False],
        ["chain", "again", True],
    ]
    assert table["p_holm"].iloc[0] == table["p"].iloc[0] and np.isnan(table["p_holm"].iloc[1])
    with pytest.raises(RaceError, match="3 and 2 seeds were given"):
        against_baseline({"chain": chain, "linear": linear[:2]}, facts, {"linear"})


def test_seeds_that_a_difference_needs():
    """On RACE's test split about ten seeds see one point; on a thousand questions no number does."""
    assert 7 <= seeds_needed(0.01, 4934) <= 10 and seeds_needed(0.01, 4934, contrasts=3) > seeds_needed(0.01, 4934)
    assert seeds_needed(0.01, 1000) is None and seeds_needed(0.05, 1000) <= 3
    for questions in (150, 1000, 4934):
        grows = [power(points / 100, 2, questions)["power"] for points in range(100)]
        assert np.all(np.diff(grows) >= 0) and grows[0] == pytest.approx(0.05, abs=0.002) and grows[-1] > 0.9
    assert power(0.01, 10, 4934)["half_width"] == pytest.approx(0.0064, abs=0.0003)
