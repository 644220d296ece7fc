"""What sentences say about numbers that were worked out by hand: the numbers, the names and the verdict."""

import numpy as np
import pandas as pd
import pytest
from predictions import made, on_passages, random_predictions, two

from race.report import formats, sentences
from race.score.calibration import at_temperature, calibration_table, log_loss_change
from race.score.comparison import compare_pairs
from race.score.predictions import accuracy_table
from race.score.statistics import group_accuracies


def test_numbers_are_written_one_way():
    assert formats.percent(0.7589) == "75.9 %" and formats.interval(np.nan, 1.0) == "–"
    assert [formats.signed(value) for value in (24.19, -0.26, 0.04, -0.04)] == ["+24.2", "−0.3", "0.0", "0.0"]
    assert [formats.rate(value) for value in (2.5e-5, 0.00025, 2e-6, 0.01)] == ["2.5e-5", "2.5e-4", "2e-6", "1e-2"]
    expected = ["p < 0.001", "p = 0.0012", "p = 0.032", "p = 0.35", "p = 1.00", "p = 0.04996", "p = 0.05"]
    assert [formats.p_value(p) for p in (1e-9, 0.00123, 0.0321, 0.349, 1.0, 0.04996, 0.0502)] == expected
    recipe = {"schedule": "linear", "warmup": 1000, "max_grad_norm": 1.0}
    assert formats.schedule(recipe) == "linear, warm-up 1000, clipped at 1" and formats.schedule({}) == "constant"
    assert [formats.listed(names, 3) for names in ("a", "abc", "abcde")] == ["a", "a, b and c", "a, b, c and 2 more"]


def known(table: pd.DataFrame, train: bool | None, validation: bool | None) -> pd.DataFrame:
    """Predictions of a checkpoint that was trained, or chosen, on the articles of all these questions, or of none."""
    columns = {"article_in_train": train, "article_in_validation": validation}
    return table.assign(**{name: pd.array([value] * len(table), "boolean") for name, value in columns.items()})


def test_headline():
    table = accuracy_table(made("ABCD" * 25, "AAAA" * 25), "e1", "x.ckpt", "test")
    text = sentences.headline(table.assign(macro_accuracy=0.26, macro_low=0.2, macro_high=0.3))
    assert "25 of 100 test questions" in text and "accuracy 25.0 % (95 % interval 17.5 % to 34.3 %)" in text
    assert "chance (25 %) is inside the interval" in text and "26.0 % (20.0 % to 30.0 %)" in text
    text = sentences.headline(accuracy_table(known(on_passages(0, 0.1), False, False), "e1", "x.ckpt", "test"))
    assert (
        ", by passage); chance (25 %) is below the interval; middle: 7" in text
        and "; high: 7" in text
        and "Macro" not in text
    )


@pytest.mark.parametrize(
    ("train", "validation", "said"),
    [
        (True, False, "e1 was trained on the articles of all these questions"),
        (False, True, "e1 was selected on the articles of these questions"),
        (False, False, "e1 was neither trained nor selected"),
        (None, None, "is not known"),
    ],
)
def test_headline_says_what_the_checkpoint_has_seen(train, validation, said):
    predictions = known(made("ABCD" * 5, "ABCA" * 5), train, validation)
    text = sentences.headline(accuracy_table(predictions, "e1", "x.ckpt", "test"))
    assert said in text and ("chance" in text) == (train is not True)  # no comparison on what was learned


def test_some_articles_seen():
    counts = pd.DataFrame({"questions": 4, "trained_on": [1, 1, 0], "selected_on": [3, 3, 0], "not_known": [2, 2, 0]})
    first, second, third, fourth = sentences.seen([counts[:1], counts[1:2], counts[2:]], ["e1", "e2", "e3"]).split(". ")
    assert first == "e1 and e2 were trained on the articles of 1 of these 4 questions" and " of 3 of these" in second
    assert third.startswith("Of 2 questions it is not known") and fourth.startswith("e3 was neither")


def test_groups_are_named_only_where_they_differ_from_the_rest_of_their_level():
    alike = random_predictions(300)
    assert sentences.groups(group_accuracies(alike)).startswith("No group differs")
    answers = np.where((alike["kind"] == "why") & (alike["level"] == "high"), alike["answer"], alike["prediction"])
    right = alike.assign(prediction=answers)  # on every "why" of high
    text = sentences.groups(group_accuracies(right))
    assert text.startswith("Easier") and "“why” (high, +" in text and "Harder" not in text
    assert "“why” (+" in sentences.groups(group_accuracies(right.assign(level="")))
    one = alike.assign(kind="what", article_tokens=9, truncated=False, answer="A", article_in_train=None)
    assert "nothing to compare" in sentences.groups(group_accuracies(one))


def test_letters():
    text = sentences.letters(made("ABCD" * 100, "A" * 400))
    assert "is significant (" in text and "χ² = 300.0" in text and "freedom: 3, p < 0.001" in text
    assert "not significant" in sentences.letters(made("ABCD" * 100, "BCDA" * 100))
    assert "not tested" in sentences.letters(made("ABAB", "ACAC"))


def test_calibration_and_a_temperature_that_helps_only_where_log_loss_does():
    predictions, few = made("ABCD" * 25, "ABCA" * 25, 0.95), made("ABCD", "ABCA", 0.8)

    def said(predictions: pd.DataFrame, temperature: float) -> str:
        after = at_temperature(predictions, temperature)
        table = calibration_table({"before": predictions, "after": after})
        return sentences.calibration(table, temperature, log_loss_change(predictions, after))

    text = said(predictions, 2.0)
    assert "95.0 %, accuracy 75.0 %" in text and "20.0 points, is above" in text and "the temperature helps" in text
    assert text.endswith(", and the calibration error is 3.4 points.")
    assert "makes it worse" in said(predictions, 0.5) and "not significant" in said(few, 1.3)
    even = sentences.calibration(calibration_table({"as is": made("ABCD" * 25, "AAAA" * 25)}))
    assert "0.0 points, is not above" in even and "temperature" not in even


def test_paired():
    row = compare_pairs(dict(zip(("e1", "e2"), two(3000, 312, 288, 1334), strict=True))).iloc[0]
    plain = sentences.paired(row, verdict=False)
    assert "(95 % interval by passage " in plain and "significant" not in plain and "p = " not in plain
    text = sentences.paired(row)
    assert text.startswith("e2 against e1: gained 312 questions, lost 288, +0.5 points") and "p = 0.33" in text
    assert text.endswith("not significant.") and "Holm" not in text  # of one pair there is nothing to adjust
    worse = sentences.paired(compare_pairs(dict(zip(("a", "b"), two(10, 5, 40, 10), strict=True))).iloc[0])
    assert "−53.8 points" in worse and worse.endswith("b is significantly worse.")


WEAK, STRONG = two(20, 30, 2, 20)
FIRST, SECOND = two(60, 14, 4, 22)  # 0.05 > p of one pair, but not after the adjustment for three


@pytest.mark.parametrize(
    ("predictions", "said"),
    [
        (
            {"weak": WEAK, "strong": STRONG},
            ["strong: 69.4 % of 72 high test questions correct; ", "significantly better than weak (38.9 points)"],
        ),
        ({"a": FIRST, "b": SECOND, "c": FIRST}, ["b: ", "; lead over a (10.0 points) and c (10.0 points) not sig"]),
        (
            {"a": WEAK, "b": STRONG, "c": STRONG},
            ["better than a (38.9 points); the same accuracy here as c (−5.4 to +5.4)"],
        ),
        ({"alone": WEAK}, ["alone: 30.6 % of 72 high test questions correct (95 % interval 20.9 % to 42.2 %)"]),
        ({f"e{n}": WEAK for n in range(9)} | {"best": STRONG}, ["e2 (38.9 points) and 6 more"]),
        ({"a": known(WEAK, True, False), "b": STRONG, "c": WEAK}, ["better than c (", "not tested against a ("]),
        ({"a": known(WEAK, False, True), "b": STRONG, "c": WEAK}, ["better than c (", "not tested against a ("]),
    ],
)
def test_verdict(predictions, said):
    predictions = {name: table.assign(level="high") for name, table in predictions.items()}
    results = [accuracy_table(table, "", "", "test")[1:] for table in predictions.values()]  # as of LEVEL
    text = sentences.verdict(predictions, compare_pairs(predictions), results)
    assert text.startswith(said[0]) or said[0] in text
    assert all(it in text for it in said) and ("significant" in text) == (len(predictions) > 1)


def test_scope_says_what_one_seed_cannot():
    lineage = pd.DataFrame({"name": ["e1", "e2"], "parent": [None, "e1"], "code": ["a", "a"]})
    assert "not their recipes" in sentences.scope(lineage) and "e2 continues from e1" in sentences.scope(lineage)
    assert sentences.scope(lineage[:1]) == ""


def row(**changed) -> pd.Series:
    """Ten seeds of two recipes; not significant."""
    values = {"first": "chain", "second": "cosine", "questions": 4934, "seeds": 10, "difference": 0.004}
    values |= {"ci_low": -0.002, "ci_high": 0.01, "low_90": -0.001, "high_90": 0.009, "p": 0.2, "p_holm": 0.4}
    return pd.Series(values | changed)


UNTESTED = {"p": np.nan, "p_holm": np.nan}


@pytest.mark.parametrize(
    ("changed", "margin", "said"),
    [
        ({}, 0.5, "+0.4 points (95 % interval −0.2 to +1.0; 10 seeds, 4,934 questions; Holm p = 0.40)"),
        ({}, 0.5, ": not significant; 0.5 points remain possible."),
        ({"p_holm": 0.03}, 0.5, "cosine is better than chain."),
        ({"p_holm": 0.03, "difference": -0.01}, 0.5, "cosine is worse than chain."),
        ({}, 1.0, "; the difference is below 1 point (90 % interval)"),
        (UNTESTED | {"seeds": 2}, 1.0, "too few seeds for a verdict"),
        (UNTESTED | {"ci_low": np.nan}, 1.0, "; not tested: the runs were selected on these articles, or "),
        (UNTESTED | {"ci_low": -1.2, "seeds": 2}, 1.0, "questions); the runs differ too much for an interval."),
        (UNTESTED | {"seeds": 1, "ci_low": np.nan}, 1.0, "says nothing of another seed"),
    ],
)
def test_a_recipe_is_said_to_be_what_was_found_and_no_more(changed, margin, said):
    assert said in sentences.difference(row(**changed), margin)


def test_verdict_on_recipes():
    table = pd.DataFrame([row(), row(second="linear", p_holm=0.01), row(second="step", p_holm=0.02, difference=-0.02)])
    better, worse, level = sentences.recipes_verdict(table).split("; ")
    assert better == "Significantly better than chain: linear (+0.4 points)" and "worse" in worse and "step" in worse
    assert level == "not significant: cosine (+0.4 points)"
    assert sentences.recipes_verdict(table[:1].assign(p_holm=np.nan)).startswith("Not tested: cosine")
    none = pd.DataFrame([row(second=f"r{n}", difference=-n / 1000) for n in range(5)])
    assert sentences.recipes_verdict(none) == (
        "No recipe differs significantly from chain: r4 (−0.4 points), r3 (−0.3 points), r2 (−0.2 points) and 2 more"
    )


def test_runs_at_chance_are_named():
    text = sentences.failed_runs({"linear": [1], "step": [0, 1]}, [7, 8], 6)
    assert text.startswith("At chance: linear with seed 8, step with seed 7 and step with seed 8. ")
    assert (
        sentences.failed_runs({"a": [0], "b": [0]}, [None], 2) == "All runs are at chance: there is nothing to compare."
    )
    assert sentences.failed_runs({}, [1], 2) == ""
    assert sentences.failed_runs({"linear": [0]}, [None], 2) == "At chance: linear."
    means = pd.DataFrame({"recipe": "e1", "accuracy": 0.5, "each": [[0.25, 0.75]], "sd": 0.35, "at_chance": 1})
    compared = {"differences": pd.DataFrame([row()]), "failed": {"e1": [0]}, "without_failed": pd.DataFrame([row()])}
    first, told, failed, again, last = sentences.over_seeds(means, compared, [7, 8])
    assert "(25.0 %, 75.0 %; standard deviation 35.00 points; at chance: 1)" in first and "these learning rates" in last
    assert failed.endswith("; without the seeds of these runs:") and "e1 with seed 7" in failed and told == again


def test_a_margin_chosen_afterwards_is_told():
    assert sentences.margin(1.0, 1) == "" and "was 1 when the runs were started, and is 2:" in sentences.margin(2, 1.0)


def test_budgets_that_differ_are_told():
    had = pd.DataFrame({"recipe": ["chain", "linear"], "questions": 144, "epochs": 3, "fewest_epochs": 3})
    had = had.assign(
        checkpoints=3, monitor=[["val_loss_epoch"]] * 2, learning_rates_tried=1, also=[{"precision": "32"}, {}]
    )
    text = "Each run was trained for 3 epochs: 144 questions, with repetitions. **They differ in precision**."
    assert sentences.budget(had) == text and sentences.budget(had[:1]) == text[:67]
    assert sentences.budget(had.assign(questions=[144, 200])).startswith("**They differ in questions trained on and")


def test_planning_and_what_a_comparison_cannot_say():
    text = sentences.planning(1.0, 4934, 3, 4)
    assert "1 point on 4,934" in text and "seeds per recipe" in text and "With 3 seeds" in text
    assert "Not even 100 seeds per recipe find" in sentences.planning(0.1, 1000, 1, 1)
    text = sentences.measured({"sd": 0.004, "runs_differ": 0.15, "recipes_differ": 0.17})
    assert "Measured here: 0.4 points beyond" in text and "on 15 % of the questions, two recipes" in text
    assert sentences.measured({"sd": np.nan}) == "" == sentences.recipes_scope("ehovy/race", "test")
