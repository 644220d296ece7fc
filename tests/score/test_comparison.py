"""Paired comparisons against brute force."""

from math import comb

import numpy as np
import pandas as pd
import pytest
from predictions import made, random_predictions, two

from race import RaceError
from race.score.comparison import compare_pairs, ensemble, leads, paired_comparison, shown_pairs
from race.score.statistics import PROBABILITIES


def test_outcomes_are_counted():
    row = paired_comparison(*two(4, 3, 2, 1))
    assert [row[name] for name in ("questions", "both", "gained", "lost", "neither")] == [10, 4, 3, 2, 1]
    assert row["difference"] == pytest.approx(0.1)
    swapped = paired_comparison(*reversed(two(4, 3, 2, 1)))
    assert (swapped["gained"], swapped["lost"], swapped["p"]) == (2, 3, row["p"])


def test_p_is_exact():
    """12 gained, 2 lost: twice the tail of a fair coin."""
    p = 2 * sum(comb(14, k) for k in range(3)) / 2**14
    assert paired_comparison(*two(50, 12, 2, 20))["p"] == pytest.approx(p)


def test_interval_is_that_of_questions_drawn_in_pairs():
    """Against resampling the questions one by one, as the bootstrap is defined."""
    first, second = two(150, 40, 20, 90)
    row = paired_comparison(first, second)
    difference = (second["prediction"] == "A").to_numpy(int) - (first["prediction"] == "A").to_numpy(int)
    drawn = np.random.default_rng(5).integers(0, 300, (6000, 300))
    low, high = np.quantile(difference[drawn].mean(1), (0.025, 0.975))
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high), abs=0.006)
    normal = 1.96 * np.sqrt((60 / 300 - (20 / 300) ** 2) / 300)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((20 / 300 - normal, 20 / 300 + normal), abs=0.006)
    assert paired_comparison(first, second) == row  # from a seed


def test_ties_all_right_and_all_wrong():
    for counts in ((5, 0, 0, 3), (4, 0, 0, 0), (0, 0, 0, 4)):
        row = paired_comparison(*two(*counts))
        assert (row["difference"], row["ci_low"], row["ci_high"], row["p"]) == (0, 0, 0, 1)
    row = paired_comparison(*two(0, 6, 0, 0))
    assert (row["difference"], row["ci_low"], row["ci_high"]) == (1, 1, 1) and row["p"] == pytest.approx(2 / 2**6)


def test_other_questions_are_refused():
    first, second = two(2, 1, 1, 0)
    with pytest.raises(RaceError, match="not on the same questions .* LIMIT_QUESTIONS and SEED"):
        paired_comparison(first, second[:3])
    with pytest.raises(RaceError, match="not on the same questions"):
        ensemble([first, second.assign(answer="B")])
    with pytest.raises(RaceError, match="no questions"):
        paired_comparison(first[:0], second[:0])


def test_every_pair_once_with_adjusted_p():
    predictions = {name: random_predictions(200, seed) for seed, name in enumerate("xyz")}
    for table in predictions.values():
        table["answer"], table["level"] = predictions["x"]["answer"], predictions["x"]["level"]
    pairs = compare_pairs(predictions)
    assert list(zip(pairs["first"], pairs["second"], strict=True)) == [("x", "y"), ("x", "z"), ("y", "z")]
    smallest, middle, largest = np.argsort(pairs["p"])
    p = pairs["p"].to_numpy()
    stepped = np.maximum.accumulate([3 * p[smallest], 2 * p[middle], p[largest]]).clip(max=1)  # Holm 1979
    assert pairs["p_holm"][[smallest, middle, largest]].tolist() == pytest.approx(stepped)
    assert compare_pairs({"x": predictions["x"]}).empty


def test_the_best_and_its_lead_whatever_the_order():
    weak, strong = two(20, 30, 2, 20)
    turned = compare_pairs({"weak": weak, "strong": strong}).iloc[0]
    for order in ({"weak": weak, "strong": strong}, {"strong": strong, "weak": weak}):
        best, found = leads(order, compare_pairs(order))
        (row,) = found.to_dict("records")
        assert (best, row["second"], row["first"], row["gained"], row["lost"]) == ("strong", "strong", "weak", 30, 2)
        assert row["difference"] == pytest.approx(28 / 72) and row["ci_low"] < row["difference"] < row["ci_high"]
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((turned["ci_low"], turned["ci_high"]), abs=0.02)
    assert leads({"weak": weak}, compare_pairs({"weak": weak}))[0] == "weak"
    best, found = leads({"a": weak, "b": strong, "c": strong}, compare_pairs({"a": weak, "b": strong, "c": strong}))
    assert best == "b" and found["first"].tolist() == ["a", "c"] and found["difference"].tolist()[1] == 0


def test_ensemble_is_the_mean_of_probabilities():
    first, second = made("AB", "AA", [0.5, 0.6]), made("AB", "BB", [0.9, 0.9])
    together = ensemble([first, second])
    expected = (first[PROBABILITIES].to_numpy() + second[PROBABILITIES].to_numpy()) / 2
    np.testing.assert_allclose(together[PROBABILITIES], expected)
    assert together["prediction"].tolist() == ["B", "B"]
    assert first["prediction"].tolist() == ["A", "A"]  # untouched


def test_a_tie_of_the_ensemble_is_broken_by_no_letter():
    first, second = made("A" * 400, "A" * 400, 0.7), made("A" * 400, "B" * 400, 0.7)
    chosen = ensemble([first, second])["prediction"].value_counts()
    assert 150 < chosen["A"] < 250 and chosen["A"] + chosen["B"] == 400


def test_what_one_member_has_seen_the_ensemble_has_seen():
    first, second = (made("AAA", "AAA", article_in_validation=[False] * 3) for _ in range(2))
    first["article_in_train"] = pd.array([True, False, None], "boolean")
    second["article_in_train"] = pd.array([False, False, False], "boolean")
    found = ensemble([first, second])["article_in_train"]
    assert found.tolist()[:2] == [True, False] and pd.isna(found[2])


def test_many_pairs_are_shown_for_the_best_only():
    weak, strong = two(20, 30, 2, 20)
    few = {"a": weak, "b": weak, "c": strong}
    assert len(shown_pairs(few, compare_pairs(few))) == 3
    many = {str(number): weak for number in range(9)} | {"best": strong}
    shown = shown_pairs(many, compare_pairs(many))
    assert len(shown) == 9 and set(shown["second"]) == {"best"}
