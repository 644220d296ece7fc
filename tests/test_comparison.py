"""Paired comparisons against brute force, and what they say in words."""

from math import comb

import numpy as np
import pandas as pd
import pytest
from test_statistics import made, random_predictions

from race_comparison import (
    compare_pairs,
    ensemble,
    holm,
    leads,
    paired_comparison,
    paired_sentence,
    pairs_style,
    short_verdict,
    verdict,
)
from race_statistics import PROBABILITIES


def two(both: int, gained: int, lost: int, neither: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two models with so many questions of each outcome."""
    first = "A" * both + "B" * gained + "A" * lost + "B" * neither
    second = "A" * (both + gained) + "B" * (lost + neither)
    return made("A" * len(first), first), made("A" * len(first), second)


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
    with pytest.raises(ValueError, match="not on the same questions .* LIMIT_QUESTIONS and SEED"):
        paired_comparison(first, second[:3])
    with pytest.raises(ValueError, match="not on the same questions"):
        ensemble([first, second.assign(answer="B")])
    with pytest.raises(ValueError, match="no questions"):
        paired_comparison(first[:0], second[:0])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]).tolist() == [1.0, 1.0] and holm([]).tolist() == []


def test_every_pair_once_with_adjusted_p():
    predictions = {name: random_predictions(200, seed) for seed, name in enumerate("xyz")}
    for table in predictions.values():
        table["answer"], table["level"] = predictions["x"]["answer"], predictions["x"]["level"]
    pairs = compare_pairs(predictions)
    assert list(zip(pairs["first"], pairs["second"], strict=True)) == [("x", "y"), ("x", "z"), ("y", "z")]
    assert (pairs["p_holm"] >= pairs["p"]).all() and (pairs["p_holm"] <= 1).all()
    assert compare_pairs({"x": predictions["x"]}).empty


def test_sentences_say_what_was_found():
    first, second = two(3000, 312, 288, 1334)
    row = compare_pairs({"e1": first, "e2": second}).iloc[0]
    low, high = (f"{100 * row[end]:.1f}".replace("-", "−") for end in ("ci_low", "ci_high"))
    assert paired_sentence(row) == (
        "e2 is right on 312 questions that e1 gets wrong, and wrong on 288 that e1 gets right: "
        f"+0.5 points (95 % {low} to {high}); that is no more than chance would give (McNemar p = 0.35)."
    )
    margin = 1.96 * np.sqrt(600 / 4934 - (24 / 4934) ** 2) / np.sqrt(4934)  # of the normal approximation
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((24 / 4934 - margin, 24 / 4934 + margin), abs=5e-4)
    worse = compare_pairs(dict(zip(("a", "b"), two(10, 5, 40, 10), strict=True))).iloc[0]
    assert "−53.8 points" in paired_sentence(worse) and "; a is better, by more than chance" in paired_sentence(worse)
    same = compare_pairs(dict(zip(("a", "b"), two(5, 0, 0, 5), strict=True))).iloc[0]
    assert paired_sentence(same) == "b and a are right on the same questions: no difference to test."


def test_verdict_names_the_best_whatever_the_order():
    weak, strong = two(20, 30, 2, 20)
    for order in ({"weak": weak, "strong": strong}, {"strong": strong, "weak": weak}):
        pairs = compare_pairs(order)
        best, [lead] = leads(order, pairs)
        assert (best, lead.over, lead.ahead, lead.sure) == ("strong", "weak", True, True)
        assert lead.points.startswith("+38.9 points (95 % ")
        assert verdict(order, pairs).startswith("strong is right most often: 69.4 %. Against weak: +38.9 points")
        assert short_verdict(order, pairs) == "strong leads weak by more than chance"
    alone = {"weak": weak}
    assert verdict(alone, compare_pairs(alone)) == "weak is right most often: 30.6 %."
    several = {"a": weak, "b": weak, "c": strong}
    assert short_verdict(several, compare_pairs(several)) == "c leads a and b by more than chance"
    first, second = two(10, 3, 2, 5)
    close = {"a": first, "b": second, "c": second}
    assert short_verdict(close, compare_pairs(close)) == "b leads a by no more than chance, is level with c"


def test_table_for_reading_counts_points():
    first, second = two(3000, 312, 288, 1334)
    html = pairs_style(compare_pairs({"e1": first, "e2": second})).to_html()
    assert ">+0.5<" in html and ">0.35<" in html and ">1,334<" in html


def test_ensemble_is_the_mean_of_probabilities():
    first, second = made("AB", "AA", [0.5, 0.6]), made("AB", "BB", [0.9, 0.9])
    together = ensemble([first, second])
    expected = (first[PROBABILITIES].to_numpy() + second[PROBABILITIES].to_numpy()) / 2
    np.testing.assert_allclose(together[PROBABILITIES], expected)
    assert together["prediction"].tolist() == ["B", "B"]
    assert first["prediction"].tolist() == ["A", "A"]  # untouched
