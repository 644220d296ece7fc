"""What holds for each figure: text that can be read, in its place; also of extreme tables. What some of them say."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgba
from matplotlib.legend import Legend
from matplotlib.text import Text
from predictions import made, random_predictions

from race.report import figures, score_figures
from race.score.calibration import at_temperature, calibration_table, reliability
from race.score.comparison import compare_pairs
from race.score.statistics import confusion

LONG = "a-checkpoint-of-another-project/with_a_long_name-epoch=12.ckpt"
TITLE = "e3: 72.0 % of 4,934 questions correct; significantly better than e1 (+4.9 points)"
LONG_TITLE = f"{LONG} is significantly better than " + ", ".join(f"{LONG} {n}" for n in range(9))


def comparison(count: int, long: bool = False) -> pd.DataFrame:
    """A made-up tables.comparison_table of so many checkpoints."""
    stages = [f"e{n + 1}" for n in range(count)]
    names = [f"{LONG[:56]} {n:03}" for n in range(count)] if long else stages
    table = pd.DataFrame({"name": names, "stage": stages, "accuracy": 0.66 + 0.02 * np.arange(count)})
    for name, more in {"accuracy": 0, "middle": 0.04, "high": -0.02}.items():
        value = table["accuracy"] + more
        table = table.assign(**{f"{name}_low": value - 0.018, f"{name}_high": value + 0.018, name: value})
    return table


def groups(levels=("middle", "high"), names=("why", "how", "main idea or title"), p_holm=0.2) -> pd.DataFrame:
    """A made-up statistics.group_accuracies: two groupings with several groups, one with a single group."""
    rows = itertools.product(("kind of question", "sequence", "article"), levels, names)
    table = pd.DataFrame(rows, columns=["grouping", "level", "group"])
    table = table[(table["grouping"] != "article") | (table["group"] == names[0])]
    table = table.assign(questions=1234, correct=600 + 100 * np.arange(len(table)) % 500, p_holm=p_holm)
    table["accuracy"] = table["correct"] / table["questions"]
    return table.assign(ci_low=table["accuracy"] - 0.03, ci_high=table["accuracy"] + 0.03)


def accuracies(levels=("all", "middle", "high"), accuracy=0.75, stage="e3") -> pd.DataFrame:
    """A made-up accuracy table."""
    table = pd.DataFrame({"level": levels, "stage": stage, "split": "test", "questions": 1436, "accuracy": accuracy})
    return table.assign(options=4, passage_low=max(accuracy - 0.03, 0), passage_high=min(accuracy + 0.03, 1))


def story(lengths, name: str = "e", **columns) -> pd.DataFrame:
    """A made-up logs.learning_story of stages of so many epochs."""
    rows = [(f"{name}{stage + 1}", epoch) for stage, epochs in enumerate(lengths) for epoch in range(epochs)]
    table, done = pd.DataFrame(rows, columns=["stage", "epoch"]), np.arange(len(rows))
    table = table.assign(questions=87866 * (done + 1), val_loss=1.2 - 0.01 * done, val_acc=0.55 + 0.005 * done)
    table = table.assign(learning_rate=2e-5, monitor="val_loss_epoch")
    return table.assign(val_low=table["val_acc"] - 0.013, val_high=table["val_acc"] + 0.013).assign(**columns)


def log(losses, accuracies, steps: int = 200) -> pd.DataFrame:
    """A made-up logs.read_log with these validations."""
    step = np.arange(steps * len(losses))
    table = pd.DataFrame({"step": step, "epoch": step // steps, "learning_rate": 2e-5})
    table["train_loss_step"] = 0.8 + 0.6 * np.exp(-step / steps) + np.random.default_rng(0).normal(0, 0.1, len(step))
    ends = [{"epoch": n, "step": steps * (n + 1) - 1} for n in range(len(losses))]
    found = pd.DataFrame(ends).assign(val_loss_epoch=losses, val_acc=accuracies, train_acc=np.array(accuracies) - 0.05)
    return pd.concat([table, found], ignore_index=True)


def courses(recipes, seeds) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Made-up courses of recipes of five epochs."""
    rows = [
        (recipe, seed, 5000 * (epoch + 1), 1.4 - 0.1 * epoch - 0.01 * number, 0.3 + 0.1 * epoch + 0.01 * (seed or 0))
        for number, recipe in enumerate(recipes)
        for seed in seeds
        for epoch in range(5)
    ]
    validated = pd.DataFrame(rows, columns=["recipe", "seed", "questions", "val_loss_epoch", "val_acc"])
    return validated, validated[["recipe", "seed", "questions"]].assign(learning_rate=2.5e-4, stage="e1")


def pairs(count: int, difference: float = 0.024, long: bool = False, width: float = 0.01) -> pd.DataFrame:
    """A made-up comparison.compare_pairs of so many rows; every second one is not significant."""
    names = [f"{LONG[:56]} {n:03}" if long else f"e{n}" for n in range(count + 1)]
    table = pd.DataFrame({"first": names[:-1], "second": names[1:], "gained": 1410, "lost": 398})
    table["difference"] = difference * (-1.0) ** np.arange(count)
    table["p_holm"] = np.where(np.arange(count) % 2, 0.3, 0.001)
    return table.assign(ci_low=table["difference"] - width, ci_high=table["difference"] + width)


def confidence(predictions: pd.DataFrame, names=("as it is", "at temperature 1.32")):
    versions = {name: at_temperature(predictions, 1 + place) for place, name in enumerate(names)}
    tables = {name: reliability(version) for name, version in versions.items()}
    return score_figures.confidence_figure(tables, calibration_table(versions))


ONE = {"accuracy": 1.0, "accuracy_low": 0.9, "accuracy_high": 1.0}
DRAWN = {
    "training": lambda: figures.training_curves(log([1.0, 0.8, 0.9], [0.55, 0.66, 0.67]), "e1"),
    "training, no epoch": lambda: figures.training_curves(log([1.0], [0.55])[:150].dropna(axis=1), "e1"),
    "training, one step": lambda: figures.training_curves(log([9.0], [0.0], 1), LONG),
    "training, by accuracy": lambda: figures.training_curves(log([1.0, 0.8, 0.9], [0.55, 0.66, 0.67]), "e1", "val_acc"),
    "comparison": lambda: figures.comparison_figure(comparison(3), {"e1": 0.671, "e3": 0.72}, TITLE),
    "comparison of 1": lambda: figures.comparison_figure(comparison(1)[["name", "stage"]].assign(**ONE), {}, "e1"),
    "comparison of 10": lambda: figures.comparison_figure(comparison(10, True), {"e1": 0.671}, LONG_TITLE),
    "differences": lambda: figures.differences_figure(pairs(3), TITLE),
    "differences, margin": lambda: figures.differences_figure(pairs(3).drop(columns="gained"), TITLE, 1.0),
    "differences of 1": lambda: figures.differences_figure(pairs(1, 0.0, width=0), "the same accuracy here"),
    "differences of 10": lambda: figures.differences_figure(pairs(10, 0.9, True, 0.1), LONG_TITLE),
    "story": lambda: figures.story_figure(story((8, 12, 3))),
    "story, uneven": lambda: figures.story_figure(story((60, 1, 1), LONG)),
    "story, one epoch": lambda: figures.story_figure(story((1,), val_low=np.nan, val_high=np.nan)),
    "recipes": lambda: figures.courses_figure(*courses(["chain", "constant", "step"], [1, 2])),
    "recipes, one seed": lambda: figures.courses_figure(*courses([LONG, *map(str, range(9))], [None])),
    "accuracy": lambda: score_figures.accuracy_figure(accuracies()),
    "accuracy at 0": lambda: score_figures.accuracy_figure(accuracies(["high"], 0.0, LONG)),
    "groups": lambda: score_figures.groups_figure(groups(), TITLE),
    "groups, long": lambda: score_figures.groups_figure(groups(names=[LONG, "why", *"abcdefg"], p_holm=np.nan), TITLE),
    "confusion": lambda: score_figures.confusion_figure(confusion(random_predictions(4934))),
    "confusion of 1": lambda: score_figures.confusion_figure(confusion(made("A", "A"))),
    "confidence": lambda: confidence(random_predictions(2000)),
    "confidence of 1": lambda: confidence(made("A", "A", [1.0]), ["as it is"]),
}


@pytest.fixture(autouse=True)
def closed():
    """No figure stays open in pyplot."""
    yield
    plt.close("all")


def shown(figure) -> list:
    """The texts that a reader sees: (text, its place), without tick labels beyond the ends of their axis."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                inside = low - 1e-9 <= tick.get_loc() <= high + 1e-9
                hidden |= {tick.label2} if inside else {tick.label1, tick.label2}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]
    return [(text, text.get_window_extent()) for text in texts]


@pytest.mark.parametrize("name", DRAWN)
def test_text_is_readable_and_stands_apart_within_the_figure(name):
    figure = DRAWN[name]()
    figure.canvas.draw()
    assert figure.get_figwidth() <= 8.6
    for part in (figure, *figure.axes):
        assert to_rgba(part.get_facecolor()) == (1, 1, 1, 1)
    places = shown(figure)
    for text, place in places:
        assert text.get_fontsize() >= 8 and text.get_alpha() in (None, 1), text
        assert to_hex(text.get_color()) == figures.INK, text
        inside = (place.x0, place.y0, figure.bbox.width - place.x1, figure.bbox.height - place.y1)
        assert min(inside) >= 0, f"{text} stands {-min(inside):.1f} pixels outside"
    for (one, place), (other, there) in itertools.combinations(places, 2):
        assert not place.padded(-0.5).overlaps(there.padded(-0.5)), f"{one} and {other}"
    for axes in figure.axes:
        grid = any(line.get_visible() for line in axes.get_xgridlines() + axes.get_ygridlines())
        for text in axes.texts:  # which a grid line would cross
            assert not grid or not text.get_window_extent().overlaps(axes.bbox), text
        for box in figure.findobj(Legend):
            assert not box.get_window_extent().overlaps(axes.bbox)
        if name.startswith(("comparison", "groups", "accuracy")):  # no line joins categories, and no axis is cut
            for line in axes.get_lines():
                x, y = (np.unique(np.asarray(values, float)) for values in line.get_data())
                assert line.get_linestyle() == "None" or min(len(x), len(y)) < 2
            assert axes.get_xlim()[0] <= 0 and axes.get_xlim()[1] >= 1


def words(figure) -> str:
    """Every text of a drawn figure, without line breaks."""
    figure.canvas.draw()
    return "\n".join(text.get_text().replace("\n", " ") for text in figure.findobj(Text) if text.get_text())


SAID = {  # a figure: what must be among its words
    "training": ["validation loss: 0.800 (e1, epoch 1)", "validation accuracy: 67.0 % (e1, epoch 2)", "rate 2e-5"],
    "training, no epoch": ["e1: not validated yet"],
    "comparison": ["reported by the original authors", "66.0 %", "middle", "high"],
    "differences": ["+2.4, gained 1,410, lost 398", "e1 − e0", "filled", "hollow"],
    "differences, margin": ["±1 (DIFFERENCE)", "over seeds and questions"],
    "story": ["e1, 2e-5", "0.980 (e3, epoch 2)", "66.0 % (e3, epoch 2)", "95 % interval", "axis cut"],
    "recipes": ["mean of 2 seeds"],
    "recipes, one seed": ["one seed"],
    "accuracy": ["e3: 75.0 % of 1,436 test questions correct", "middle (1,436)"],
    "accuracy at 0": [": 0.0 % of 1,436 high test questions correct"],
    "groups": ["why (1,234 + 1,234)", "questions, middle + high"],
    "confusion of 1": ["Chosen as often as correct"],
    "confidence of 1": ["Calibration error, as it is: 0.0 points"],
    "confusion": ["chosen − correct (points)"],
}


@pytest.mark.parametrize(("name", "said"), SAID.items(), ids=SAID)
def test_figures_say_what_is_found(name, said):
    text = words(DRAWN[name]())
    assert not [it for it in said if it not in text]


def test_what_is_not_known_is_not_said():
    assert "reported" not in words(DRAWN["comparison of 1"]()) and "interval" not in words(DRAWN["story, one epoch"]())
    assert "article" not in words(DRAWN["groups"]())  # a grouping with one group


def test_the_ring_is_around_what_the_rule_picks():
    for name, chosen in (("training", [399, 0.66]), ("training, by accuracy", [599, 0.67])):
        lines = DRAWN[name]().axes[1].get_lines()
        assert [line.get_xydata().tolist() for line in lines if line.get_markersize() == 11] == [[chosen]]


def test_filled_marks_are_significant_differences():
    one, two, three = (made("A" * 60, "A" * n + "B" * (60 - n), example_id=range(60)) for n in (20, 50, 49))
    axes = figures.differences_figure(compare_pairs({"one": one, "two": two, "three": three}), "").axes[0]
    marks = [container.lines[0] for container in axes.containers]
    assert [mark.get_markerfacecolor() for mark in marks] == [figures.BLUE, "white"]
    assert [mark.get_ydata().tolist() for mark in marks] == [[0, 1], [2]]
    panel = score_figures.groups_figure(groups().assign(p_holm=[0.01] * 3 + [np.nan] * 11), "").axes[0]
    fills = {mark.lines[0].get_marker(): mark.lines[0].get_markerfacecolor() for mark in panel.containers}
    assert fills == {"^": figures.GREEN, "v": "white"}


def test_recipes_have_a_column_each_with_a_band_over_seeds_and_the_first_recipe_behind():
    axes = DRAWN["recipes"]().axes
    assert [len(it.get_lines()) for it in axes] == [2, 3, 3, 2, 3, 3, 1, 2, 2]  # with the line at chance
    assert [len(it.collections) for it in axes[:3]] == [1, 2, 2]
    assert axes[3].get_lines()[0].get_ydata()[0] == pytest.approx(0.315)
    colors = [line.get_color() for line in axes[4].get_lines()]
    assert colors == [figures.GREY, figures.BLUE, figures.GREY]


def test_long_words_are_broken_at_the_width():
    assert figures.wrapped("a b", 1) == "a b" and figures.wrapped("", 1) == ""
    lines = figures.wrapped("W" * 40, 2, 10).split("\n")
    assert "".join(lines) == "W" * 40 and 13 <= len(lines[0]) <= 15
