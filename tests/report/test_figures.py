"""What figures say, and what holds for each of them: text that can be read, in its place; also of extreme tables."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.legend import Legend
from matplotlib.text import Text
from predictions import made, random_predictions

from race.report import figures, score_figures, training_figures
from race.score.calibration import at_temperature, calibration_table, coverage_curve, reliability
from race.score.comparison import compare_pairs
from race.score.statistics import confusion

LONG = "a-checkpoint-of-another-project/with_a_long_name-epoch=12.ckpt"


def words(figure) -> str:
    """Every text of a drawn figure, without line breaks."""
    figure.canvas.draw()
    texts = [text.get_text() for text in figure.findobj(Text)]
    return "\n".join(text.replace("\n", " ") for text in texts if text)


def comparison(count: int, long: bool = False) -> pd.DataFrame:
    """A made-up tables.comparison_table of so many checkpoints."""
    names = [f"{LONG[:56]} {n:03}" if long else f"e{n + 1}" for n in range(count)]
    table = pd.DataFrame({"name": names, "stage": [f"e{n + 1}" for n in range(count)], "accuracy": 0.66})
    table["accuracy"] += 0.02 * np.arange(count)
    table = table.assign(questions=4934, middle=table["accuracy"] + 0.04, high=table["accuracy"] - 0.02)
    for name, column in {"ci": "accuracy", "passage": "accuracy", "middle": "middle", "high": "high"}.items():
        width = 0.013 if name == "ci" else 0.018
        table = table.assign(**{f"{name}_low": table[column] - width, f"{name}_high": table[column] + width})
    return table


def groups(levels=("middle", "high"), names=("why", "how", "main idea or title"), p_holm=0.2) -> pd.DataFrame:
    """A made-up statistics.group_accuracies: two groupings with several groups, one with a single group."""
    rows = itertools.product(("kind of question", "sequence", "article"), levels, names)
    table = pd.DataFrame(rows, columns=["grouping", "level", "group"])
    table = table[(table["grouping"] != "article") | (table["group"] == names[0])]
    table = table.assign(questions=1234, correct=0, p_holm=p_holm)
    table["correct"] += 600 + 100 * np.arange(len(table)) % 500
    table["accuracy"] = table["correct"] / table["questions"]
    return table.assign(ci_low=table["accuracy"] - 0.03, ci_high=table["accuracy"] + 0.03)


def accuracies(levels=("all", "middle", "high"), accuracy=0.75) -> pd.DataFrame:
    """A made-up results.accuracy_table."""
    table = pd.DataFrame({"level": levels, "stage": "e3", "checkpoint": "x.ckpt", "split": "test", "questions": 1436})
    table = table.assign(correct=(1436 * accuracy), accuracy=accuracy)
    ends = {f"{name}_low": max(accuracy - 0.03, 0) for name in ("ci", "passage")}
    return table.assign(**ends, **{f"{name}_high": min(accuracy + 0.03, 1) for name in ("ci", "passage")})


def chain(count: int, names=None, forest: bool = False) -> pd.DataFrame:
    """A made-up tables.lineage_table: checkpoints after one another, or all from one base."""
    names = names or [f"e{n + 1}" for n in range(count)]
    parents = [None, *names[:-1]]
    base = [parent if parent else "albert-base-v2" for parent in parents]
    if forest:
        parents, base = [None] * count, ["albert-base-v2"] * count
    table = pd.DataFrame({"name": names, "parent": parents, "base": base})
    return table.assign(learning_rate=2e-5, epochs=3, chosen_epoch=1, val_loss=0.812)


def story(lengths, names=None, **columns) -> pd.DataFrame:
    """A made-up logs.learning_story of stages of so many epochs."""
    rows, seen = [], 0
    for stage, epochs in enumerate(lengths):
        for epoch in range(epochs):
            seen += 87866
            stage_name = names[stage] if names else f"e{stage + 1}"
            rows.append((stage_name, epoch, seen, 1.2 - 0.01 * len(rows), 0.55 + 0.005 * len(rows), 2e-5))
    table = pd.DataFrame(rows, columns=["stage", "epoch", "questions", "val_loss", "val_acc", "learning_rate"])
    table["monitor"] = "val_loss_epoch"
    return table.assign(val_low=table["val_acc"] - 0.013, val_high=table["val_acc"] + 0.013).assign(**columns)


def log(losses, accuracies, steps: int = 200) -> pd.DataFrame:
    """A made-up logs.read_log with these validations."""
    step = np.arange(steps * max(1, len(losses)))
    noise = np.random.default_rng(0).normal(0, 0.1, len(step))
    table = pd.DataFrame({"step": step, "epoch": step // steps, "learning_rate": 2e-5})
    table["train_loss_step"] = 0.8 + 0.6 * np.exp(-step / steps) + noise
    ends = [{"epoch": n, "step": steps * (n + 1) - 1} for n in range(len(losses))]
    found = pd.DataFrame(ends).assign(val_loss_epoch=losses, val_acc=accuracies, train_acc=np.array(accuracies) - 0.05)
    return pd.concat([table, found], ignore_index=True)


def courses(recipes, seeds) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Made-up runs.courses of recipes of five epochs."""
    rows = [
        (recipe, seed, 5000 * (epoch + 1), 1.4 - 0.1 * epoch - 0.01 * number, 0.3 + 0.1 * epoch + 0.01 * (seed or 0))
        for number, recipe in enumerate(recipes)
        for seed in seeds
        for epoch in range(5)
    ]
    validated = pd.DataFrame(rows, columns=["recipe", "seed", "questions", "val_loss_epoch", "val_acc"])
    rates = validated[["recipe", "seed", "questions"]].assign(learning_rate=2.5e-4, stage="e1")
    return validated, rates


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
    return score_figures.confidence_figure(tables, calibration_table(versions), coverage_curve(predictions))


def options(probabilities, option: str = "the park") -> pd.DataFrame:
    return pd.DataFrame({"letter": list("ABCD"), "option": option, "probability": probabilities})


TITLE = "e3 is significantly better than e1; its lead over e2 is not significant"
LONG_TITLE = f"{LONG} is significantly better than " + ", ".join(f"{LONG} {n}" for n in range(9))
NONE = {"high": None, "high_low": None, "high_high": None}
ENDS = {"accuracy": 1.0, "passage_low": np.nan, "passage_high": np.nan, "ci_low": 0.9, "ci_high": 1.0}
DRAWN = {
    "training": lambda: training_figures.training_curves(log([1.0, 0.8, 0.9], [0.55, 0.66, 0.67]), "e1"),
    "training, one epoch": lambda: training_figures.training_curves(log([1.0], [0.55]), LONG),
    "training, no epoch": lambda: training_figures.training_curves(log([1.0], [0.55])[:150].dropna(axis=1), "e1"),
    "training, one step": lambda: training_figures.training_curves(log([9.0], [0.0], 1), "e1"),
    "comparison": lambda: figures.comparison_figure(comparison(3), {"e1": 0.671, "e3": 0.72}, TITLE),
    "comparison of 1": lambda: figures.comparison_figure(comparison(1).assign(**NONE), {}, "e1: 66.0 %"),
    "comparison of 10": lambda: figures.comparison_figure(comparison(10, True), {"e1": 0.671}, LONG_TITLE),
    "comparison at 1": lambda: figures.comparison_figure(comparison(3).assign(**ENDS, **NONE), {}, TITLE),
    "differences": lambda: figures.differences_figure(pairs(3), TITLE),
    "differences of 1": lambda: figures.differences_figure(pairs(1, 0.0, width=0), "as accurate"),
    "differences of 10": lambda: figures.differences_figure(pairs(10, 0.9, True, 0.1), LONG_TITLE),
    "lineage": lambda: figures.lineage_figure(chain(3)),
    "lineage of 1": lambda: figures.lineage_figure(chain(1, [LONG])),
    "lineage of 10": lambda: figures.lineage_figure(chain(10, [f"{LONG} {n}" for n in range(10)])),
    "lineage of 10 siblings": lambda: figures.lineage_figure(chain(10, forest=True)),
    "story": lambda: training_figures.story_figure(story((8, 12, 3))),
    "story, uneven": lambda: training_figures.story_figure(story((60, 1, 1), ["e1", LONG, "e3"])),
    "story, one epoch": lambda: training_figures.story_figure(story((1,), val_low=np.nan, val_high=np.nan)),
    "recipes": lambda: training_figures.courses_figure(
        *courses(["chain", "constant", "resets", "step", "linear"], [1, 2])
    ),
    "recipes, one seed": lambda: training_figures.courses_figure(*courses([LONG, *map(str, range(8))], [None])),
    "accuracy": lambda: score_figures.accuracy_figure(accuracies()),
    "accuracy, one level at 0": lambda: score_figures.accuracy_figure(accuracies(["high"], 0.0)),
    "accuracy at 1": lambda: score_figures.accuracy_figure(accuracies(accuracy=1.0).assign(stage=LONG)),
    "groups": lambda: score_figures.groups_figure(groups(), TITLE),
    "groups, all": lambda: score_figures.groups_figure(groups(["all"], p_holm=0.01), LONG_TITLE),
    "groups, long": lambda: score_figures.groups_figure(groups(names=[LONG, "why", *"abcdefg"], p_holm=np.nan), TITLE),
    "confusion": lambda: score_figures.confusion_figure(confusion(random_predictions(4934))),
    "confusion, A only": lambda: score_figures.confusion_figure(confusion(made("ABCD" * 500, "A" * 2000))),
    "confusion of 1": lambda: score_figures.confusion_figure(confusion(made("A", "A"))),
    "confidence": lambda: confidence(random_predictions(2000)),
    "confidence of 1": lambda: confidence(made("A", "A", [1.0]), ["as it is"]),
    "options": lambda: score_figures.options_figure(options([0.1, 0.6, 0.2, 0.1])),
    "options, long": lambda: score_figures.options_figure(options([0.0, 1.0, 0.0, 0.0], "W" * 80)),
}


@pytest.fixture(scope="module", params=DRAWN)
def figure(request):
    """Each of the figures, drawn."""
    drawn = DRAWN[request.param]()
    drawn.canvas.draw()
    return drawn


@pytest.fixture(autouse=True)
def closed():
    """No figure stays open in pyplot."""
    yield
    plt.close("all")


def luminance(color) -> float:
    """Relative luminance of WCAG 2."""
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot(channels, [0.2126, 0.7152, 0.0722]))


def contrast(one, other) -> float:
    darker, lighter = sorted([luminance(one), luminance(other)])
    return (lighter + 0.05) / (darker + 0.05)


def shown(figure) -> list:
    """The texts that a reader sees: (text, its place), without tick labels beyond the ends of their axis."""
    axes_of = {
        label: (axes, axis) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in ticks(axis)
    }
    texts = []
    for text in figure.findobj(Text):
        if not text.get_visible() or not text.get_text():
            continue
        place = text.get_window_extent()
        if text in axes_of:
            axes, axis = axes_of[text]
            if not axes.axison or text not in in_view(axis):
                continue
        texts.append((text, place))
    return texts


def ticks(axis) -> list:
    return [label for tick in axis.get_major_ticks() for label in (tick.label1, tick.label2)]


def in_view(axis) -> list:
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low - 1e-9 <= tick.get_loc() <= high + 1e-9]


def test_text_is_large_and_dark_enough_on_white(figure):
    assert figure.get_figwidth() <= 8.6
    for part in (figure, *figure.axes):
        assert to_rgba(part.get_facecolor()) == (1, 1, 1, 1)
    for text, _ in shown(figure):
        assert text.get_fontsize() >= 8 and text.get_alpha() in (None, 1), text
        assert contrast(text.get_color(), "white") >= 4.5, text


def test_words_stand_apart_within_the_figure(figure):
    places = shown(figure)
    for text, place in places:
        inside = (place.x0, place.y0, figure.bbox.width - place.x1, figure.bbox.height - place.y1)
        assert min(inside) >= 0, f"{text} stands {-min(inside):.1f} pixels outside"
    for (one, place), (other, there) in itertools.combinations(places, 2):
        assert not place.padded(-0.5).overlaps(there.padded(-0.5)), f"{one} and {other}"


def test_no_grid_line_and_no_legend_where_it_could_cross_words(figure):
    for axes in figure.axes:
        grid = axes.axison and any(line.get_visible() for line in axes.get_xgridlines() + axes.get_ygridlines())
        for text in axes.texts:
            assert not grid or not text.get_window_extent().overlaps(axes.bbox), text
        for box in figure.findobj(Legend):
            assert not axes.axison or not box.get_window_extent().overlaps(axes.bbox)


def test_marks_can_be_seen_on_white():
    """WCAG asks for a contrast of 3 for marks."""
    for color in (figures.GREY, figures.BLUE, figures.ORANGE, figures.GREEN, figures.PURPLE):
        assert contrast(color, "white") >= 3


ROWS = [name for name in DRAWN if name.startswith(("comparison", "groups", "accuracy"))]


@pytest.mark.parametrize("figure", ROWS, indirect=True)
def test_no_line_joins_categories_and_no_axis_is_cut(figure):
    for axes in figure.axes:
        for line in axes.get_lines():
            x, y = (np.unique(np.asarray(values, float)) for values in line.get_data())
            assert line.get_linestyle() == "None" or min(len(x), len(y)) < 2
        low, high = axes.get_xlim()
        assert low <= 0 and high >= 1


def title(axes) -> str:
    return axes.get_title(loc="left").replace("\n", " ")


def test_training_tells_the_chosen_epoch_from_the_most_accurate():
    figure = DRAWN["training"]()
    assert title(figure.axes[0]) == "e1: lowest validation loss 0.800, at epoch 1 (counted from 0)"
    assert title(figure.axes[1]) == "validation accuracy at epoch 1: 66.0 %; highest, at epoch 2: 67.0 %"
    text = words(figure)
    assert "training (mean over the epoch)" in text and "learning rate 2e-5" in text
    assert title(DRAWN["training, one epoch"]().axes[1]) == "validation accuracy at epoch 0: 55.0 %"
    assert title(DRAWN["training, no epoch"]().axes[0]) == "e1: not validated yet"


def test_training_rings_what_the_rule_picks_and_draws_the_gradient():
    table = log([1.0, 0.8, 0.9], [0.55, 0.66, 0.67]).assign(gradient_norm=2.0)
    table.loc[:99, "gradient_norm"] = 0.5
    table.loc[table["val_acc"].notna(), "gradient_norm"] = np.nan
    figure = training_figures.training_curves(table, "e1", "val_acc", 1.0)
    assert title(figure.axes[1]) == "highest validation accuracy, at epoch 2: 67.0 %"
    rings = [line.get_xydata().tolist() for line in figure.axes[1].get_lines() if line.get_markersize() == 11]
    assert rings == [[[599, 0.67]]] and "highest validation accuracy" in words(figure)
    assert "before clipping to 1 (line): above it in 83 % of the logged steps" in title(figure.axes[2])
    assert len(training_figures.training_curves(log([1.0], [0.55]), "e1").axes) == 3


def test_comparison_shows_other_peoples_numbers_and_levels_where_there_are_any():
    text = words(DRAWN["comparison"]())
    assert "reported by the original authors" in text and "66.0 %" in text and "middle" in text and "high" in text
    text = words(DRAWN["comparison of 1"]())
    assert "reported" not in text and "middle" in text and "high" not in text


def test_comparison_draws_the_interval_that_is_quoted():
    def ends(table):
        all_questions = figures.comparison_figure(table, {}, "").axes[0].containers[0]
        return [segment[:, 0] for segment in all_questions.lines[2][0].get_segments()]

    assert ends(comparison(1)) == [pytest.approx([0.642, 0.678])]
    assert ends(comparison(1).assign(passage_low=np.nan, passage_high=np.nan)) == [pytest.approx([0.647, 0.673])]


def test_differences_tell_chance_from_more():
    first = made("A" * 60, "A" * 20 + "B" * 40)
    second, third = made("A" * 60, "A" * 50 + "B" * 10), made("A" * 60, "A" * 49 + "B" * 11)
    figure = figures.differences_figure(compare_pairs({"one": first, "two": second, "three": third}), "who leads")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["two − one", "three − one", "three − two"]
    assert "+50.0, gained 30, lost 0" in words(figure) and "−1.7, gained 0, lost 1" in words(figure)
    marks = [container.lines[0] for container in axes.containers]
    assert [mark.get_color() for mark in marks] == [figures.BLUE, figures.BLUE, figures.ORANGE]
    assert [mark.get_markerfacecolor() for mark in marks] == [figures.BLUE, figures.BLUE, "white"]
    low, high = axes.get_xlim()
    assert low == -high


def test_lineage_in_any_order_and_without_memory():
    rows = [
        {"name": "e2", "parent": "e1", "base": "e1.ckpt", "epochs": 3, "chosen_epoch": 1, "val_loss": 0.8},
        {"name": "e1", "parent": None, "base": "albert-base-v2", "epochs": 1, "val_loss": 0.9},
        {"name": "x", "parent": None, "base": None},
    ]
    text = words(figures.lineage_figure(pd.DataFrame(rows).assign(learning_rate=[2e-5, 2e-5, None])))
    assert "epochs trained: 3" in text and "chosen: epoch 1 (from 0)" in text and "validation loss 0.800" in text
    assert text.count("albert-base-v2") == 1 and text.count("base unknown") == 1 and "nan" not in text
    assert "Where these checkpoints come from" in text and "e1.ckpt" not in text
    assert "e1 → e2 → e3" in words(DRAWN["lineage"]())


def test_recipes_have_a_line_each_and_a_band_over_seeds():
    figure = DRAWN["recipes"]()
    loss, accuracy, _schedule = figure.axes
    assert title(loss) == "Validation after each epoch: mean of 2 seeds, band from the lowest to the highest"
    assert len(loss.collections) == 5 and [len(axes.get_lines()) for axes in figure.axes] == [6, 6, 5]
    assert accuracy.get_lines()[0].get_ydata()[0] == pytest.approx(0.315)
    assert title(DRAWN["recipes, one seed"]().axes[0]) == "Validation after each epoch: one seed"


def test_story_marks_stages_and_their_rates():
    rows = [("e1", 1, 10, 1.2, 0.5, 2e-5), ("e1", 2, 20, 1.0, 0.6, 2e-5), ("e3", 1, 30, 0.9, 0.55, 2e-6)]
    table = pd.DataFrame(rows, columns=["stage", "epoch", "questions", "val_loss", "val_acc", "learning_rate"])
    table["monitor"] = "val_loss_epoch"
    figure = training_figures.story_figure(
        table.assign(val_low=table["val_acc"] - 0.1, val_high=table["val_acc"] + 0.1)
    )
    text = words(figure)
    assert "e1, 2e-5" in text and "e3, 2e-6" in text and "95 % interval" in text and "axis cut" in text
    assert "Lowest validation loss: 0.900 (e3, epoch 1)" in text
    assert "Highest validation accuracy: 60.0 % (e1, epoch 2)" in text
    borders = [line.get_xdata()[0] for line in figure.axes[1].get_lines() if line.get_linestyle() == "--"]
    assert borders == [20, 30]
    assert "interval" not in words(DRAWN["story, one epoch"]())


def test_accuracy_by_level():
    text = words(DRAWN["accuracy"]())
    assert "e3: 75.0 % of the test questions correct" in text and "middle (1,436)" in text
    assert "e3: 0.0 % of the high test questions correct" in words(DRAWN["accuracy, one level at 0"]())


def test_groups_show_levels_apart_and_leave_single_groups_out():
    figure = score_figures.groups_figure(groups().assign(p_holm=[0.01] * 3 + [np.nan] * 11), "kinds")
    text = words(figure)
    assert "why (1,234 + 1,234)" in text and "article" not in text and "questions, middle + high" in text
    first = {mark.lines[0].get_marker(): mark.lines[0].get_markerfacecolor() for mark in figure.axes[0].containers}
    assert first == {"^": figures.GREEN, "v": "white"}
    table = groups()
    own = table[(table["grouping"] == "sequence") & (table["level"] == "high")]
    lines = [line.get_xdata()[0] for line in figure.axes[1].get_lines() if line.get_linestyle() == "--"]
    assert lines == [pytest.approx(own["correct"].sum() / own["questions"].sum())]
    only = groups()[lambda table: table["grouping"] == "article"]
    assert "why (1,234 + 1,234)" in words(score_figures.groups_figure(only, "one group"))
    partial = groups()[1:]  # no middle questions in the first group
    assert "why (0 + 1,234)" in words(score_figures.groups_figure(partial, "kinds"))


@pytest.mark.parametrize(
    ("answers", "chosen", "expected"),
    [
        ("ABCD" * 5, "A" * 20, "Largest difference, chosen − correct (points): A +75.0"),
        ("AABB", "AAAA", "Largest difference, chosen − correct (points): A +50.0 and B −50.0"),
        ("ABCD", "DCBA", "Chosen as often as correct, for every letter"),
        ("A", "A", "Chosen as often as correct, for every letter"),
    ],
)
def test_confusion_names_the_largest_differences(answers, chosen, expected):
    assert title(score_figures.confusion_figure(confusion(made(answers, chosen))).axes[1]) == expected


def test_confidence_gives_error_floor_and_the_most_confident_half():
    predictions = made("AAAA", "AABB", [0.9, 0.8, 0.6, 0.5])
    row = calibration_table({"": predictions}).iloc[0]
    error, low, high = (f"{100 * row[name]:.1f}" for name in ("calibration_error", "floor_low", "floor_high"))
    text = words(confidence(predictions))
    assert f"Calibration error {error} points (perfectly calibrated: {low} to {high})" in text
    assert "Most confident 50 %: 100.0 % correct" in text and "at temperature 1.32" in text


def test_options_of_a_typed_question():
    text = words(score_figures.options_figure(options([0.1, 0.6, 0.2, 0.1], "a" * 80)))
    assert "The model chooses B, with a probability of 60.0 %" in text and "…" in text
    text = words(score_figures.options_figure(options([0.4, 0.1, 0.4, 0.1])))
    assert "A and C have the same highest probability: 40.0 %" in text and "chooses" not in text


def test_long_words_are_broken_at_the_width():
    assert figures.wrapped("a b", 1) == "a b" and figures.wrapped("", 1) == ""
    lines = figures.wrapped("W" * 40, 2, 10).split("\n")
    assert "".join(lines) == "W" * 40 and 13 <= len(lines[0]) <= 15
