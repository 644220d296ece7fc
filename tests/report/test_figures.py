"""What figures say: titles, labels and values that a reader takes from them, also where there is little to draw."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from predictions import made

from race.report import figures, score_figures
from race.score.comparison import compare_pairs
from race.score.results import accuracy_table
from race.score.statistics import calibration_error, confusion, coverage_curve, reliability


def words(figure) -> str:
    """Every text of a drawn figure."""
    figure.canvas.draw()
    texts = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return "\n".join(text for text in texts if text)


def group(name: str, questions: int, accuracy: float) -> dict:
    return {"group": name, "questions": questions, "accuracy": accuracy, "ci_low": 0.1, "ci_high": 0.9}


def test_groups_name_the_hardest_and_leave_single_groups_out():
    tables = {
        "kind of question": pd.DataFrame([group("why", 30, 0.4), group("how", 40, 0.7), group("other", 3, 0.0)]),
        "sequence": pd.DataFrame([group("whole", 73, 0.5)]),
    }
    figure = score_figures.groups_figure(tables, 0.55)
    assert figure.get_suptitle() == (
        "Lowest accuracy: 40.0 %, kind of question “why” (among groups of at least 20 questions)"  # “other” has 3
    )
    assert "among" not in score_figures.groups_figure({"kind": tables["kind of question"][:2]}, 0.55).get_suptitle()
    assert "why (30)" in words(figure) and "whole" not in words(figure) and "orange: all, 55.0 %" in words(figure)
    only = score_figures.groups_figure({"sequence": tables["sequence"]}, 0.5)
    assert only.get_suptitle() == "Accuracy by group" and "whole (73)" in words(only)


def test_confusion_names_the_largest_difference():
    text = words(score_figures.confusion_figure(confusion(made("ABCD" * 5, "A" * 20))))
    assert "Largest difference, chosen − correct: A, +75.0 points" in text and "100.0 %" in text
    assert "Largest difference" in words(score_figures.confusion_figure(confusion(made("A", "A"))))


def test_confidence_gives_both_errors_and_the_most_confident_half():
    predictions = made("AAAA", "AABB", [0.9, 0.8, 0.6, 0.5])
    errors = [calibration_error(predictions), 0.1]
    versions = {"as it is": reliability(predictions), "changed": reliability(predictions)}
    text = words(score_figures.confidence_figure(versions, errors, coverage_curve(predictions)))
    assert (
        f"Calibration error: {100 * errors[0]:.1f} → 10.0 points" in text
        and "Most confident 50 %: 100.0 % correct" in text
    )


def test_options_of_a_typed_question():
    answers = pd.DataFrame(
        {"letter": list("ABCD"), "option": ["a" * 80, "b", "c", "d"], "probability": [0.1, 0.6, 0.2, 0.1]}
    )
    text = words(score_figures.options_figure(answers))
    assert (
        "The model chooses B, with a probability of 60.0 %" in text and "a" * 60 + "…" in text and "a" * 61 not in text
    )


def test_differences_tell_chance_from_more():
    first = made("A" * 60, "A" * 20 + "B" * 40)
    second, third = made("A" * 60, "A" * 50 + "B" * 10), made("A" * 60, "A" * 49 + "B" * 11)
    pairs = compare_pairs({"one": first, "two": second, "three": third})
    figure = figures.differences_figure(pairs, "who leads")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["two − one", "three − one", "three − two"]
    assert "+50.0, gained 30, lost 0" in words(figure) and "−1.7, gained 0, lost 1" in words(figure)
    colors = [container.lines[0].get_color() for container in figure.axes[0].containers]
    assert colors == [figures.BLUE, figures.BLUE, figures.ORANGE]


def test_lineage_in_any_order_and_without_memory():
    rows = [
        {"name": "e2", "parent": "e1", "base": "e1.ckpt", "learning_rate": 2e-5, "epochs": 3, "val_loss": 0.8},
        {"name": "e1", "parent": None, "base": "albert-base-v2", "learning_rate": 2e-5, "epochs": 1, "val_loss": 0.9},
        {"name": "x", "parent": None, "base": None, "learning_rate": np.nan, "epochs": np.nan, "val_loss": np.nan},
    ]
    text = words(figures.lineage_figure(pd.DataFrame(rows)))
    assert text.count("✓ hash") == 1 and "3 epochs" in text and "1 epoch\n" in text and "validation loss 0.800" in text
    assert (
        text.count("albert-base-v2") == 1 and "unknown" in text and "learning rate 2e-5" in text and "nan" not in text
    )


def test_comparison_shows_other_peoples_numbers_where_there_are_any():
    columns = {"name": ["e1", "e2"], "stage": ["e1", "e2"], "accuracy": [0.6, 0.7], "ci_low": 0.5, "ci_high": 0.8}
    table = pd.DataFrame(columns | {"middle": [0.7, 0.8], "high": None})
    text = words(figures.comparison_figure(table, {"e1": 0.671, "e3": 0.72}, "which is better"))
    assert (
        "reported by the original authors" in text and "e2\n70.0 %" in text and "middle" in text and "high" not in text
    )
    assert "reported" not in words(figures.comparison_figure(table[:1], {}, "one"))


def test_accuracy_by_level():
    table = accuracy_table(made("ABCD", "ABCA", levels=["middle"] * 2 + ["high"] * 2), "e3", "x.ckpt", "test")
    text = words(score_figures.accuracy_figure(table))
    assert "e3: 75.0 % of the test questions correct" in text and "middle (2)" in text and "100.0 %" in text


def test_story_marks_stages_and_their_rates():
    rows = [("e1", 1, 10, 1.2, 0.5, 2e-5), ("e1", 2, 20, 1.0, 0.6, 2e-5), ("e3", 1, 30, 0.9, 0.55, 2e-6)]
    story = pd.DataFrame(rows, columns=["stage", "epoch", "questions", "val_loss", "val_acc", "learning_rate"])
    figure = figures.story_figure(story)
    text = words(figure)
    assert "e1\nlr 2e-5" in text and "e3\nlr 2e-6" in text
    assert "Lowest validation loss: 0.900 (e3, epoch 1)" in text
    assert "Highest validation accuracy: 60.0 % (e1, epoch 2)" in text
    borders = [line.get_xdata()[0] for line in figure.axes[0].get_lines() if line.get_linestyle() == "--"]
    assert borders == [20, 30]


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2."""
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot(channels, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("color", [figures.INK, figures.BLUE, figures.ORANGE, figures.GREEN])
def test_text_and_marks_can_be_seen_on_white_and_on_black(color):
    """WCAG asks for a contrast of 3 for large text and for marks."""
    assert 1.05 / (luminance(color) + 0.05) >= 3 and (luminance(color) + 0.05) / 0.05 >= 3
