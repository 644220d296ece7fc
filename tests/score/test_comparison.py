"""Checkpoints compared with brute force; recipes over seeds with simulated runs and with sums written out by hand."""

import itertools

import numpy as np
import pandas as pd
import pytest
from helpers import recipes_by_hand
from predictions import PROBABILITIES, made, random_predictions, two
from scipy.stats import binomtest, norm, t

from race import RaceError
from race.score import recipe_difference
from race.score.comparison import (
    SD,
    against_baseline,
    compare_pairs,
    compare_runs,
    ensemble,
    leads,
    measured_spread,
    paired_comparison,
    power,
    seeds_needed,
    shown_pairs,
)


def test_a_pair_by_hand():
    """Sums over passages, within levels; a question for each kind of difference that no question may have shown."""
    passages, levels = list("aabbbccddd"), ["high"] * 5 + ["middle"] * 5
    first = made("A" * 10, "AABABBABAB", levels=levels, example_id=passages)
    second = made("A" * 10, "ABAAABAAAB", levels=levels, example_id=passages)
    gains, variance = [0, -1, 1, 0, 1, 0, 0, 1, 0, 0], 0.0
    for level, names in (("high", "ab"), ("middle", "cd")):
        here = [gain for gain, own in zip(gains, levels, strict=True) if own == level]
        sums = {name: sum(g for g, own in zip(gains, passages, strict=True) if own == name) for name in names}
        sizes = {name: passages.count(name) for name in names}
        variance += 2 * sum((sums[name] - sizes[name] * sum(here) / len(here)) ** 2 for name in names) / 10**2
    row, error = paired_comparison(first, second), (variance + 3.841459 / 10**2) ** 0.5
    assert [row[name] for name in ("both", "gained", "lost", "neither")] == [4, 3, 1, 2] and row["difference"] == 0.2
    assert [row["ci_low"], row["ci_high"]] == [-1, 1] and 4.3 * error > 0.8  # cut off
    assert row["p"] == pytest.approx(2 * t.sf(0.2 / error, 2))


def test_interval_and_p_of_a_pair_never_contradict_each_other_and_no_width_is_zero():
    for gained, lost in itertools.product((0, 1, 5, 6, 7, 12, 20), repeat=2):
        row = paired_comparison(*two(50, gained, lost, 20))
        assert (row["ci_low"] <= 0 <= row["ci_high"]) == (row["p"] >= 0.05)
    alike = paired_comparison(*two(700, 0, 0, 412))
    assert alike["p"] == 1 and [-alike["ci_low"], alike["ci_high"]] == pytest.approx([3.84 / 1112] * 2, rel=0.01)


def test_a_pair_of_checkpoints_that_differ_by_passage():
    """300 passages of 4 questions, design effect of the differences 1.4: about 5 % false alarms, 95 % covered."""
    rng, found, effects = np.random.default_rng(0), [], []
    place = np.repeat(np.arange(300), 4)
    facts = pd.DataFrame({"example_id": place, "level": np.where(place < 200, "high", "middle"), "answer": "A"})
    facts = facts.assign(question_index=0, article_in_train=False, article_in_validation=False)
    for _ in range(400):
        shared = rng.normal(0, 0.6, (2, 300))[:, place] + rng.normal(0, 1, 1200)
        tables = [facts.assign(prediction=np.where(it + rng.normal(0, 0.7, 1200) > -0.7, "A", "B")) for it in shared]
        found.append(paired_comparison(*tables))
        gains = (tables[1]["prediction"] == "A").astype(int) - (tables[0]["prediction"] == "A").astype(int)
        effects.append(gains.groupby(place).sum().var() * 300 / (gains.var() * 1200))
    alarms, mcnemar = (np.mean([test(row) < 0.05 for row in found]) for test in (lambda row: row["p"], exact_mcnemar))
    assert 1.3 < np.mean(effects) < 1.6 and 0.03 <= alarms <= 0.07 < mcnemar


def exact_mcnemar(row: dict) -> float:
    return binomtest(row["gained"], max(1, row["gained"] + row["lost"])).pvalue


@pytest.mark.parametrize("column", ["article_in_train", "article_in_validation"])
def test_articles_of_training_and_selection_are_no_test(column):
    first, second = (table.assign(**{column: True}) for table in two(20, 30, 2, 20))
    row = paired_comparison(first, second)
    assert row["difference"] == 28 / 72 and np.isnan([row["p"], row["ci_low"]]).all()
    table = against_baseline({"a": np.eye(3, 72), "b": np.ones((3, 72))}, first)
    assert table["difference"][0] > 0.9 and table[["p", "p_holm", "ci_low"]].isna().all(axis=None)


def test_other_questions_are_refused():
    first, second = two(2, 1, 1, 0)
    with pytest.raises(RaceError, match="not on the same questions .* LIMIT_QUESTIONS and SEED"):
        paired_comparison(first, second[:3])
    with pytest.raises(RaceError, match="not on the same questions"):
        ensemble([first, second.assign(answer="B")])


def test_every_pair_once_with_adjusted_p():
    tables = {name: random_predictions(200, seed) for seed, name in enumerate("xyz")}
    tables = {name: table.assign(answer="A", level="") for name, table in tables.items()}
    pairs = compare_pairs(tables)
    assert pairs[["first", "second"]].agg("".join, axis=1).tolist() == ["xy", "xz", "yz"]
    p = np.sort(pairs["p"])
    stepped = np.maximum.accumulate([3 * p[0], 2 * p[1], p[2]]).clip(max=1)  # Holm 1979
    assert np.sort(pairs["p_holm"]) == pytest.approx(stepped)
    assert compare_pairs({"x": tables["x"]}).empty


def test_the_best_and_its_lead_whatever_the_order():
    weak, strong = two(20, 30, 2, 20)
    found = []
    for order in ({"weak": weak, "strong": strong}, {"strong": strong, "weak": weak}):
        best, table = leads(order, compare_pairs(order))
        (row,) = table.to_dict("records")
        assert (best, row["second"], row["first"], row["gained"], row["lost"]) == ("strong", "strong", "weak", 30, 2)
        assert row["difference"] == pytest.approx(28 / 72)
        found.append((row["ci_low"], row["ci_high"]))
    assert found[0] == pytest.approx(found[1], abs=0.02) and found[0][0] < 28 / 72 < found[0][1]
    equal = {"a": weak, "b": strong, "c": strong}
    best, table = leads(equal, compare_pairs(equal))
    assert best == "b" and table["first"].tolist() == ["a", "c"] and table["difference"].tolist()[1] == 0


def test_ensemble_is_the_mean_of_probabilities():
    """What one member has seen the ensemble has seen."""
    seen, open_ = (pd.array(column, "boolean") for column in ([True, False, None], [False, False, False]))
    first = made("ABA", "AAA", [0.5, 0.6, 0.4], article_in_train=seen)
    second = made("ABA", "BBA", [0.9, 0.9, 0.4], article_in_train=open_)
    together = ensemble([first, second])
    expected = (first[PROBABILITIES].to_numpy() + second[PROBABILITIES].to_numpy()) / 2
    np.testing.assert_allclose(together[PROBABILITIES], expected)
    assert together["prediction"].tolist() == ["B", "B", "A"] and first["prediction"].tolist() == ["A"] * 3
    assert together["article_in_train"].tolist() == [True, False, pd.NA]


def test_many_pairs_are_shown_for_the_best_only():
    weak, strong = two(20, 30, 2, 20)
    few = {str(number): weak for number in range(4)} | {"best": strong}
    assert len(shown_pairs(few, compare_pairs(few))) == 10
    many = few | {"more": weak}
    shown = shown_pairs(many, compare_pairs(many))
    assert len(shown) == 5 and set(shown["second"]) == {"best"}
    pair = {"best": strong, "other": weak}  # whatever their order
    assert shown_pairs(pair, compare_pairs(pair))[["first", "second"]].values.tolist() == [["other", "best"]]


ACCURACY = norm.ppf(0.7)  # two seeds of a recipe differ on 16 % of the questions, two recipes on 18 %
OF_PASSAGE, OF_QUESTION, OF_RECIPE, OF_SEED = 0.15, 0.645, 0.042, 0.163  # variances of what decides an answer; sum 1
OF_RUN = 0.012  # SD, in the same units


def simulate(rng, seeds: int, shift: float = 0.0, sd: float = OF_RUN, passages: int = 300, size: int = 4):
    """([2, seeds, questions] right or wrong, passages of the questions): runs that differ in seed and recipe.

    shift: of the second recipe, and sd: of the runs, both in units of what decides an answer.
    """
    place, questions = np.repeat(np.arange(passages), size), passages * size

    def normal(variance: float, *shape: int) -> np.ndarray:
        return rng.normal(0, variance**0.5, shape)

    value = ACCURACY + normal(OF_PASSAGE, passages)[place] + normal(OF_QUESTION, questions)
    value = value + normal(OF_RECIPE, 2, 1, questions) + normal(OF_SEED, 2, seeds, questions)
    value = value + sd * normal(1, 2, seeds, 1) + np.array([0, shift])[:, None, None]
    return value > 0, place


NEW = {"article_in_train": False, "article_in_validation": False}


def difference(correct, place) -> dict:
    return recipe_difference(*correct, place, np.zeros_like(place))


@pytest.mark.parametrize(("seeds", "most"), [(3, 0.08), (5, 0.07)])
@pytest.mark.parametrize("spread", [(0.0, 0.087), (0.087, 0.087)])  # 0 and 3 points
def test_false_alarms_of_seeds_that_spread_unlike(seeds, most, spread):
    """600 draws; where one recipe's seeds spread and the other's do not, and where both do."""
    rng = np.random.default_rng(seeds)
    alarms = [difference(*simulate(rng, seeds, sd=np.array(spread)[:, None, None]))["p"] < 0.05 for _ in range(600)]
    assert np.mean(alarms) <= most


@pytest.mark.parametrize(("seeds", "shift"), [(3, 0.09), (10, 0.035)])
def test_false_alarms_coverage_and_power(seeds, shift):
    """Few false alarms where nothing differs; intervals hold a true difference; power and width are those planned.

    The bounds allow for 200 draws, and for a method that is cautious on three seeds (2,500 draws: 97.8 % are held).
    """
    rng, draws = np.random.default_rng(seeds), 200
    null = [difference(*simulate(rng, seeds))["p"] < 0.05 for _ in range(draws)]
    assert 0.01 <= np.mean(null) <= 0.08
    true = norm.cdf(ACCURACY + shift) - norm.cdf(ACCURACY)
    found = pd.DataFrame([difference(*simulate(rng, seeds, shift)) for _ in range(draws)])
    assert 0.92 <= found["ci_low"].le(true).mul(found["ci_high"].ge(true)).mean() <= 0.995
    assert 0.85 <= found["low_90"].le(true).mul(found["high_90"].ge(true)).mean() <= 0.97
    assert OF_RUN * norm.pdf(ACCURACY) == pytest.approx(SD, abs=2e-4)  # simulated is what is planned with
    planned = power(true, seeds, 1200)
    assert found["p"].lt(0.05).mean() == pytest.approx(planned["power"], abs=0.08)
    assert (found["ci_high"] - found["ci_low"]).median() / 2 == pytest.approx(planned["half_width"], rel=0.12)


def test_numbers_are_those_of_the_procedure_by_hand():
    correct, place = simulate(np.random.default_rng(3), 3, 0.3, 0.2, passages=20)
    correct, levels = correct.astype(int), np.where(place < 8, "middle", "high")
    found = recipe_difference(*correct, place, levels)
    mean, variance, freedom = recipes_by_hand(*correct, place, levels)
    assert found["difference"] == pytest.approx(mean) and found["freedom"] == pytest.approx(freedom)
    assert found["ci_high"] - found["ci_low"] == pytest.approx(2 * t.ppf(0.975, freedom) * variance**0.5)
    assert found["p"] == pytest.approx(2 * t.sf(abs(mean) / variance**0.5, freedom))
    assert found["sd_second"] == pytest.approx(np.std(correct[1].mean(1), ddof=1))


def test_from_one_seed_no_interval_and_from_two_no_verdict():
    correct, place = simulate(np.random.default_rng(4), 2)
    one = difference(correct[:, :1], place)
    assert one["difference"] == pytest.approx(correct[1, 0].mean() - correct[0, 0].mean())
    assert np.isnan([one[name] for name in ("ci_low", "low_90", "p", "sd_first")]).all()
    two = difference(correct, place)
    assert two["ci_low"] < two["difference"] < two["ci_high"] and np.isnan(two["p"])
    alike = difference(np.stack([correct[0], correct[0]]), place)
    assert alike["difference"] == 0 and np.isnan(alike["p"])


def test_recipes_against_the_first_one():
    (chain, linear), place = simulate(np.random.default_rng(6), 3, 0.2)
    facts = pd.DataFrame({"example_id": place, "level": ""}).assign(**NEW)
    table = against_baseline({"chain": chain, "linear": linear, "again": chain}, facts)
    assert table[["first", "second", "seeds"]].to_numpy().tolist() == [["chain", "linear", 3], ["chain", "again", 3]]
    assert table["p_holm"].iloc[0] == table["p"].iloc[0] and np.isnan(table["p_holm"].iloc[1])
    with pytest.raises(RaceError, match="3 and 2 seeds were given"):
        against_baseline({"chain": chain, "linear": linear[:2]}, facts)


def test_a_run_at_chance_is_named_and_left_out():
    (chain, linear), place = simulate(np.random.default_rng(6), 3, 0.2)
    failed, facts = linear.copy(), pd.DataFrame({"example_id": place, "level": ""}).assign(**NEW)
    facts[PROBABILITIES] = 0.25
    failed[1] = np.random.default_rng(0).random(len(place)) < 0.25
    correct = {"chain": chain, "linear": failed}
    found, none = compare_runs(correct, facts), compare_runs({"chain": chain, "linear": linear}, facts)
    assert found["failed"] == {"linear": [1]} and none["failed"] == {} and none["without_failed"].empty
    expected = against_baseline({"chain": chain[[0, 2]], "linear": linear[[0, 2]]}, facts)
    assert found["without_failed"].equals(expected)
    assert found["differences"].equals(against_baseline(correct, facts))


def test_the_spread_that_was_measured():
    runs = {"a": [[1, 1, 0, 0], [1, 0, 0, 0]], "b": [[1, 1, 1, 1], [0, 1, 1, 1]]}
    found = measured_spread(runs)
    assert found == {"sd": 0, "runs_differ": 0.25, "recipes_differ": 0.75}  # single answers explain the spread
    far = {"a": np.arange(100) < [[20], [80]]}
    assert measured_spread(far)["sd"] == pytest.approx((0.6**2 / 2 - 0.6 / 200) ** 0.5)
    assert np.isnan([*measured_spread({"a": [[1, 0]], "b": [[0, 0]]}).values()]).all()


def test_seeds_that_a_difference_needs():
    """On RACE's test split about ten seeds see one point; on a thousand questions no number does."""
    assert 7 <= seeds_needed(0.01, 4934) <= 10 and seeds_needed(0.01, 4934, contrasts=3) > seeds_needed(0.01, 4934)
    assert seeds_needed(0.01, 1000) is None and seeds_needed(0.05, 1000) <= 3
    grows = [power(points / 100, 3, 4934)["power"] for points in range(0, 100, 5)]
    assert np.all(np.diff(grows) >= 0) and 0.03 < grows[0] <= 0.05 and grows[-1] > 0.9
    assert power(0.01, 10, 4934)["half_width"] == pytest.approx(0.0064, abs=0.0003)
