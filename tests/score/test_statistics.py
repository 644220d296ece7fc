"""Every statistic against an independent computation, on predictions with known answers and on biased models."""

import numpy as np
import pandas as pd
import pytest
from predictions import LETTERS, made, on_passages, random_predictions
from scipy.stats import chi2, hypergeom

from race.score.calibration import calibration_error
from race.score.predictions import accuracy_table
from race.score.statistics import (
    by_passage,
    confusion,
    group_accuracies,
    holm,
    is_correct,
    kind_of_question,
    length_groups,
    letter_test,
    macro_accuracy,
    quoted_interval,
    wilson,
)


def test_macro_accuracy_by_hand():
    """3 of 4 and 1 of 2: the mean of the two; the distances to Wilson's ends add up as squares."""
    table = accuracy_table(made("ABCDAB", "ABCAAC", levels=["middle"] * 4 + ["high"] * 2), "e1", "x", "test")
    (low_m, high_m), (low_h, high_h) = wilson(3, 4), wilson(1, 2)
    below = np.hypot(0.75 - low_m, 0.5 - low_h) / 2
    above = np.hypot(high_m - 0.75, high_h - 0.5) / 2
    assert macro_accuracy(table[1:]) == pytest.approx((0.625, 0.625 - below, 0.625 + above))
    assert macro_accuracy(table[2:]) == pytest.approx((0.5, *wilson(1, 2)))
    by_passage_too = table.assign(passage_low=table["ci_low"] - 0.1, passage_high=table["ci_high"])
    assert macro_accuracy(by_passage_too[1:])[1] < macro_accuracy(table[1:])[1]  # the interval that is quoted


def test_the_interval_to_quote():
    row = pd.Series({"ci_low": 0.1, "ci_high": 0.2, "passage_low": 0.05, "passage_high": 0.3})
    assert quoted_interval(row) == (0.05, 0.3, "by passage")
    assert quoted_interval(row.replace({0.05: np.nan})) == (0.1, 0.2, "Wilson")


def test_interval_by_passage_by_hand():
    """Two passages a level; each level's clusters around its own accuracy, k / (k − 1) times their squares."""
    rights = {"high": [[1, 1, 1], [0, 0, 1]], "middle": [[1, 1], [1, 0, 1]]}
    rows = [
        {"level": level, "example_id": f"{level}{number}", "answer": "A", "prediction": "A" if right else "B"}
        for level, passages in rights.items()
        for number, answers in enumerate(passages)
        for right in answers
    ]
    found, variance = by_passage(pd.DataFrame(rows)), 0.0
    for passages in rights.values():
        mean = np.mean(np.concatenate(passages))
        variance += 2 * sum((sum(answers) - len(answers) * mean) ** 2 for answers in passages) / 11**2
    effect = variance / ((8 / 11) * (3 / 11) / 11)
    assert found["passages"] == 4 and found["design_effect"] == pytest.approx(effect) and effect > 1
    z, n = 4.302653, 11 / effect  # t(0.975, 2), effective questions
    centre, half = 8 / 11 + z * z / (2 * n), z * np.sqrt((8 / 11) * (3 / 11) / n + z * z / (4 * n * n))
    expected = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    assert (found["passage_low"], found["passage_high"]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("icc", [0.0, 0.3])
def test_interval_by_passage_covers(icc):
    """Passages like RACE's, in two levels: 95 % of the intervals by passage have the accuracy in them."""
    covered, by_question = [], []
    for seed in range(200):
        predictions = on_passages(seed, icc)
        found, share = by_passage(predictions), (predictions["level"] == "high").mean()
        true = 0.72 * share + 0.77 * (1 - share)
        covered.append(found["passage_low"] <= true <= found["passage_high"])
        low, high = wilson(is_correct(predictions).sum(), len(predictions))
        by_question.append(low <= true <= high)
    assert 0.93 <= np.mean(covered) <= 0.97
    if icc == 0.3:
        assert np.mean(by_question) < 0.9


def test_interval_by_passage_at_the_edge():
    one = by_passage(made("ABCD", "ABCA"))
    right = by_passage(made("ABCD", "ABCD", example_id=list("aabb")))
    for found, passages in ((one, 1), (right, 2)):
        assert found.pop("passages") == passages and np.isnan([*found.values()]).all()
    single = by_passage(made("ABCD" * 5, "ABCA" * 5, example_id=range(20)))  # a question a passage
    assert single["design_effect"] == pytest.approx(20 / 19)
    few = by_passage(made("ABCD", "ABCA", levels=["middle"] * 3 + ["high"], example_id=list("aabc")))
    assert few["passages"] == 3 and 0 < few["passage_low"] < few["passage_high"] < 1  # levels together


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("Which of the following is NOT true?", "negated"),
        ("Everybody came except _ .", "negated"),  # before cloze
        ("Which sentence is not about the weather?", "negated"),
        ("What is NOT the main idea of the passage?", "negated"),  # before main idea
        ("Why did he not come?", "why"),  # a plain not outside which … not
        ("The passage is mainly about _ .", "main idea or title"),  # before cloze
        ("Tom went to _ .", "cloze"),
        ("Why _ ?", "cloze"),  # before why
        ("Why did she leave?", "why"),
        ("According to the text, how many were there?", "how"),
        ("When he came home, what did he see?", "what"),  # when and where count last
        ("In which town does she live?", "which"),
        ("Where is the station?", "who, when, where"),
        ("They showed somewhat whiter notes", "other"),  # whole words only
    ],
)
def test_kind_of_question(question, kind):
    assert kind_of_question(question) == kind


@pytest.mark.parametrize(
    ("tokens", "count", "groups"),
    [
        ([5, 1, 3, 2, 4], 5, ["5", "1", "3", "2", "4"]),
        ([10, 20, 30, 40], 2, ["10–20", "10–20", "30–40", "30–40"]),
        ([1, 1, 1, 1, 2], 5, ["1", "1", "1", "1", "2"]),
    ],
)
def test_length_groups_are_even_and_keep_equal_lengths_together(tokens, count, groups):
    found, order = length_groups(tokens, count)
    assert found.tolist() == groups and order == sorted(set(groups))


def test_group_accuracies_count_every_question_of_a_level_once():
    predictions = random_predictions(1000)
    table = group_accuracies(predictions)
    groupings = ["kind of question", "article length (tokens)", "sequence", "correct answer", "article"]
    assert table["grouping"].unique().tolist() == groupings
    right = predictions["answer"] == predictions["prediction"]
    for (_, level), part in table.groupby(["grouping", "level"]):
        here = predictions["level"] == level
        assert (part["questions"].sum(), part["correct"].sum()) == (here.sum(), (right & here).sum())
    cloze = (predictions["kind"] == "cloze") & (predictions["level"] == "high")
    row = table.query("grouping == 'kind of question' and group == 'cloze' and level == 'high'").iloc[0]
    others = predictions["level"].eq("high") & ~cloze
    assert row["rest"] == pytest.approx(right[others].mean())
    assert row["difference"] == pytest.approx(right[cloze].mean() - right[others].mean())
    predictions["article_in_train"] = pd.array([pd.NA] * 1000, dtype="boolean")
    assert "article" not in set(group_accuracies(predictions)["grouping"])
    predictions["level"] = ""
    assert set(group_accuracies(predictions)["level"]) == {"all"}


def test_a_group_is_tested_against_the_rest_of_its_level():
    """Fisher's exact p by the hypergeometric sum, adjusted by Holm's steps over all groups of the table."""
    predictions = random_predictions(400, seed=3).assign(example_id=range(400), truncated=False)
    predictions["article_in_train"] = pd.array([pd.NA] * 400, dtype="boolean")
    table = group_accuracies(predictions)
    for row in table[table["grouping"].isin(["kind of question", "correct answer"])].itertuples():
        level = predictions[predictions["level"] == row.level]
        drawn = hypergeom(len(level), int(is_correct(level).sum()), row.questions)
        likely = drawn.pmf(np.arange(row.questions + 1))
        assert row.p == pytest.approx(likely[likely <= drawn.pmf(row.correct) * (1 + 1e-7)].sum(), rel=1e-6)
    tested = table[table["p"].notna()]
    assert set(table.loc[table["p"].isna(), "grouping"]) == {"sequence"}  # all are whole: no rest
    order, count = np.argsort(tested["p"], kind="stable"), len(tested)
    steps = np.maximum.accumulate(tested["p"].to_numpy()[order] * np.arange(count, 0, -1)).clip(max=1)
    np.testing.assert_allclose(tested["p_holm"].to_numpy()[order], steps)
    assert np.isnan(holm([0.01, np.nan, 0.04])[1]) and holm([0.01, np.nan, 0.04])[[0, 2]].tolist() == [0.02, 0.04]


def test_two_groups_are_one_test_and_what_is_not_known_is_a_group_of_its_own():
    predictions = random_predictions(600)
    predictions["article_in_train"] = pd.array([True, False, None] * 200, dtype="boolean")
    table = group_accuracies(predictions).set_index(["grouping", "level", "group"])
    table = table.sort_index(level=[0, 1], sort_remaining=False)
    assert table.loc[("sequence", "high"), "p"].isna().tolist() == [True, False]
    article = table.loc[("article", "high")]
    assert article.index.tolist() == ["not in train", "also in train", "not known"]
    high = predictions[predictions["level"] == "high"]
    assert article["questions"].sum() == len(high) and article["p"].notna().all()
    others = is_correct(high)[high["article_in_train"].fillna(False).to_numpy() == False]  # noqa: E712
    assert article.loc["also in train", "rest"] == pytest.approx(others.mean())


def test_groups_of_whole_passages_are_rarely_named_where_passages_are_alike():
    """Lengths and genres are drawn by passage and change nothing; as independent, every third table would name one."""
    named = []
    for seed in range(10):
        predictions = on_passages(seed, 0.3, ((200, 0.72), (80, 0.77)))
        rng, passages = np.random.default_rng(seed), pd.factorize(predictions["example_id"])[0]
        tokens = rng.integers(50, 900, passages.max() + 1)[passages]
        facts = {"kind": "what", "article_tokens": tokens, "truncated": False, "genre": (tokens % 5).astype(str)}
        predictions = predictions.assign(**facts, article_in_train=pd.array([pd.NA] * len(predictions), "boolean"))
        table = group_accuracies(predictions, ["genre"])
        named.append((table.loc[table["grouping"].isin(["article length (tokens)", "genre"]), "p"] < 0.05).mean())
    assert np.mean(named) < 0.08


def test_a_model_that_always_says_a():
    """100 questions of each right letter: 25 % right, and every wrong answer an A in place of another letter."""
    predictions = made("ABCD" * 100, "A" * 400, 1.0)
    assert is_correct(predictions).mean() == 0.25
    assert confusion(predictions).tolist() == [[100, 0, 0, 0]] * 4
    # with one column filled, Stuart and Maxwell's statistic is the number of wrong answers
    assert letter_test(predictions) == pytest.approx((300, 3, chi2.sf(300, 3)))
    assert calibration_error(predictions) == pytest.approx(0.75)  # wholly sure, right on a quarter


def test_letters_are_not_tested_with_few_errors():
    """5 errors, all the same: χ² would say 0.025, all swaps of choice and correct answer 2 in 2^5."""
    statistic, freedom, p = letter_test(made("D" * 5 + "ABCD" * 5, "A" * 5 + "ABCD" * 5))
    assert (statistic, freedom) == (pytest.approx(5.0), 1) and np.isnan(p)


def test_letter_test_by_hand():
    """The sums of choice − right answer over questions, weighed by their products: what all swaps have in common."""
    rng = np.random.default_rng(3)
    answers, chosen = rng.choice(4, 200), rng.choice(4, 200, p=(0.35, 0.25, 0.2, 0.2))
    difference = (np.eye(4)[chosen] - np.eye(4)[answers])[:, :3]
    statistic = difference.sum(0) @ np.linalg.inv(difference.T @ difference) @ difference.sum(0)
    table = made("".join(np.take(LETTERS, answers)), "".join(np.take(LETTERS, chosen)))
    assert letter_test(table) == pytest.approx((statistic, 3, chi2.sf(statistic, 3)))
