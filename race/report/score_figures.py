"""Figures of one checkpoint's scores: by group, by letter, by confidence."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from race import LETTERS, OPTIONS
from race.report import figures
from race.report.figures import BLUE, GREY, LOOKS, MARKS, STYLE, WIDTH, chance_key, key, wrapped
from race.report.formats import SIGNIFICANT, percent, points, questions_of
from race.score.calibration import BINS
from race.score.statistics import quoted_interval

LINES = {"middle": "-", "high": "--", "all": "-"}  # at the accuracy of each level


@plt.style.context(STYLE)
def accuracy_figure(table: pd.DataFrame) -> Figure:
    """Accuracy by level with 95 % intervals, of one checkpoint (race.score's accuracy_table)."""
    labels = [f"{level} ({count:,})" for level, count in zip(table["level"], table["questions"], strict=True)]
    figure, axes = figures.row_figure(labels)
    for place, (_, row) in enumerate(table.iterrows()):
        figures.marks(axes, MARKS[row["level"]], [place], row["accuracy"], *quoted_interval(row)[:2])
        figures.beside(axes, place, percent(row["accuracy"]))
    row = table.iloc[0]
    figures.accuracy_axis(axes, "accuracy, 95 % interval (in brackets: questions)", row["options"])
    title = f"{row['stage']}: {percent(row['accuracy'])} of {questions_of(row)} correct"
    return figures.finish(figure, chance_key(row["options"]), title=title)


@plt.style.context(STYLE)
def groups_figure(table: pd.DataFrame, title: str, options: int = OPTIONS) -> Figure:
    """Accuracy by group and level (statistics.group_accuracies), a panel for each grouping with more than one group."""
    several = table.groupby("grouping")["group"].transform("nunique") > 1
    panels = dict(list((table[several] if several.any() else table).groupby("grouping", sort=False)))
    levels = [level for level in MARKS if (table["level"] == level).any()]
    counts = table.pivot(index=["grouping", "group"], columns="level", values="questions")[levels].fillna(0)
    texts = counts.map("{:,.0f}".format).agg(" + ".join, axis=1)
    rows = {name: list(part["group"].unique()) for name, part in panels.items()}
    labels = {name: [wrapped(f"{it} ({texts[name, it]})", 2.2) for it in groups] for name, groups in rows.items()}
    height = figures.row_height([label for part in labels.values() for label in part], 0.19 + 0.07 * len(levels))
    sizes = [len(groups) + 0.3 for groups in rows.values()]
    size, shape = (WIDTH, 1.4 + 0.3 * len(panels) + height * sum(sizes)), {"sharex": True, "squeeze": False}
    figure, drawn = plt.subplots(len(panels), figsize=size, height_ratios=sizes, **shape)
    for axes, (name, part) in zip(drawn[:, 0], panels.items(), strict=True):
        for number, (level, mine) in enumerate((level, part[part["level"] == level]) for level in levels):
            for _, row in mine.iterrows():
                place = rows[name].index(row["group"]) + 0.3 * (number - (len(levels) - 1) / 2)
                ends, fill = (row["ci_low"], row["ci_high"]), row["p_holm"] < SIGNIFICANT
                figures.marks(axes, MARKS[level], [place], row["accuracy"], *ends, fill=fill)
            if len(mine):
                own = mine["correct"].sum() / mine["questions"].sum()
                axes.axvline(own, color=MARKS[level][0], linewidth=1, linestyle=LINES[level])
        figures.label_rows(axes, labels[name])
        axes.set_title(wrapped(name, 5, 10))
        figures.accuracy_axis(axes, "", options)
    split = "" if levels == ["all"] else f", {' + '.join(levels)}"
    axes.set_xlabel(f"accuracy, 95 % Wilson interval, unadjusted (in brackets: questions{split})")
    keys = [key(f"{level} (line: the whole level)", *MARKS[level], LINES[level]) for level in levels]
    keys += [key("filled: differs significantly from the rest of its level", marker="o")]
    keys += [key("hollow: no significant difference, or not tested", marker="o", fill=False)]
    return figures.finish(figure, *keys, chance_key(options), title=title, columns=3)


@plt.style.context(STYLE)
def confusion_figure(counts: np.ndarray) -> Figure:
    """Correct answers against predictions as counts (race.score.statistics.confusion), and how often each letter is."""
    figure, (axes, bars) = plt.subplots(1, 2, figsize=(WIDTH, max(2.9, 1 + 0.45 * len(counts))), width_ratios=(1, 1.4))
    axes.imshow(counts / counts.max(), cmap="Blues", vmin=0, vmax=1.8)  # light enough for dark words
    for (row, column), value in np.ndenumerate(counts):
        axes.text(column, row, f"{value:,}", ha="center", va="center", fontsize=9)
    places, letters = np.arange(len(counts)), LETTERS[: len(counts)]
    axes.set(title="Number of questions", xlabel="prediction", ylabel="correct answer")
    axes.set(xticks=places, xticklabels=letters, yticks=places, yticklabels=letters)
    axes.grid(False)
    correct, chosen = counts.sum(1) / counts.sum(), counts.sum(0) / counts.sum()
    for side, values, fill, edge in ((-0.2, correct, "white", GREY), (0.2, chosen, BLUE, BLUE)):
        bars.barh(places + side, values, 0.34, color=fill, edgecolor=edge)
        for place, value in zip(places + side, values, strict=True):
            figures.beside(bars, place, percent(value))
    gaps = chosen - correct
    widest = abs(gaps).argmax()
    title = f"Largest difference, chosen − correct (points): {LETTERS[widest]} {points(gaps[widest])}"
    bars.set_title(wrapped(title if gaps.any() else "Chosen as often as correct, for every letter", 4.2, 10))
    figures.label_rows(bars, letters)
    bars.set_ylabel("letter")
    figures.percent_axis(bars.xaxis, "fraction of the questions")
    keys = Patch(facecolor="white", edgecolor=GREY, label="correct"), Patch(color=BLUE, label="chosen")
    return figures.finish(figure, *keys)


@plt.style.context(STYLE)
def confidence_figure(versions: dict, calibration: pd.DataFrame) -> Figure:
    """Reliability diagram, and the questions in each of its bins (race.score.calibration).

    versions: name → reliability, uncalibrated first; calibration: calibration_table.
    """
    figure, (diagram, counts) = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharex=True)
    diagram.plot([0, 1], [0, 1], color=GREY, linestyle="-.", linewidth=1)
    keys, width = [], 0.8 / BINS / len(versions)
    for place, (name, table) in enumerate(versions.items()):
        color, marker, line = LOOKS[place]
        reach = figures.whiskers(table["accuracy"], table["ci_low"], table["ci_high"])
        bars = {"yerr": reach, "capsize": 2, "linewidth": 1, "markersize": 4}
        diagram.errorbar(table["confidence"], table["accuracy"], fmt=marker + line, color=color, **bars)
        middle = (table["low"] + table["high"]) / 2 + (place - (len(versions) - 1) / 2) * width
        counts.bar(middle, table["questions"], width, facecolor="white" if place else color, edgecolor=color)
        keys.append(key(name, color, marker, line, size=4))
    row = calibration.iloc[0]
    error, low, high = (f"{100 * row[name]:.1f}" for name in ("calibration_error", "floor_low", "floor_high"))
    title = f"Calibration error, {next(iter(versions))}: {error} points (perfectly calibrated: {low} to {high})"
    diagram.set_title(wrapped(title, 3.2, 10))
    counts.set_title("Questions in each bin")
    counts.yaxis.set_major_formatter("{x:,.0f}")
    counts.yaxis.get_major_locator().set_params(integer=True)
    figures.percent_axis(diagram.yaxis, "accuracy, 95 % interval")
    for axes in (diagram, counts):
        figures.percent_axis(axes.xaxis, f"confidence in the chosen option ({BINS} bins)")
    diagram.set(xlim=(-0.02, 1.02), ylim=(-0.03, 1.03))
    return figures.finish(figure, *keys, key("perfectly calibrated", line="-."), columns=3)
