"""Figures of one checkpoint's scores: by group, by letter, by confidence, and of one typed question."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from race import CHANCE, LETTERS
from race.report.figures import BLUE, INK, ORANGE, STYLE, percent_axis, whiskers
from race.report.sentences import percent, signed
from race.score.statistics import BINS, FEW, coverage_groups, hardest_group


@plt.style.context(STYLE)
def accuracy_figure(table: pd.DataFrame) -> Figure:
    """Accuracy by level with 95 % intervals, of one checkpoint (race.score.results.accuracy_table)."""
    row = table.iloc[0]
    title = f"{row['stage']}: {percent(row['accuracy'])} of the {row['split']} questions correct"
    return _group_panels({"": table.rename(columns={"level": "group"})}, None, title)


@plt.style.context(STYLE)
def groups_figure(tables: dict[str, pd.DataFrame], accuracy: float) -> Figure:
    """Accuracy with 95 % intervals by group, a panel for each grouping with more than one group.

    The title names the group with the lowest accuracy among those with FEW questions or more.
    """
    tables = {name: table for name, table in tables.items() if len(table) > 1} or tables
    hard = {name: group for name, table in tables.items() if (group := hardest_group(table)) is not None}
    title = "Accuracy by group"
    if hard:
        name = min(hard, key=lambda grouping: hard[grouping]["accuracy"])
        title = f"Lowest accuracy: {percent(hard[name]['accuracy'])}, {name} “{hard[name]['group']}”"
        if any((table["accuracy"] < hard[name]["accuracy"]).any() for table in tables.values()):
            title += f" (among groups of at least {FEW} questions)"
    return _group_panels(tables, accuracy, title)


def _group_panels(tables: dict[str, pd.DataFrame], accuracy: float | None, title: str) -> Figure:
    rows = [len(table) + 0.6 for table in tables.values()]
    size, heights = (8, 0.9 + 0.32 * sum(rows)), {"height_ratios": rows}
    figure, panels = plt.subplots(len(tables), figsize=size, sharex=True, squeeze=False, gridspec_kw=heights)
    for axes, (name, table) in zip(panels[:, 0], tables.items(), strict=True):
        places = np.arange(len(table))
        axes.errorbar(table["accuracy"], places, xerr=whiskers(table), fmt="o", color=BLUE, capsize=3)
        labels = [f"{group} ({count:,})" for group, count in zip(table["group"], table["questions"], strict=True)]
        axes.set_yticks(places, labels)
        axes.set_ylim(len(table) - 0.4, -0.6)
        axes.set_title(name, fontsize=9)
        for place, value in zip(places, table["accuracy"], strict=True):
            at = axes.get_yaxis_transform()
            axes.annotate(percent(value), (1.01, place), xycoords=at, va="center", fontsize=9, annotation_clip=False)
        axes.axvline(CHANCE, color=INK, linestyle=":", linewidth=1)
        if accuracy is not None:
            axes.axvline(accuracy, color=ORANGE, linewidth=1)
    last = panels[-1, 0]
    overall = "" if accuracy is None else f"; orange: all, {percent(accuracy)}"
    last.set_xlabel(f"accuracy, 95 % interval (in brackets: questions; dotted: chance{overall})")
    last.set_xlim(0, 1.02)
    percent_axis(last.xaxis)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


@plt.style.context(STYLE)
def confusion_figure(counts: np.ndarray) -> Figure:
    """Correct answers against predictions as counts (race.score.statistics.confusion), and how often each letter is."""
    figure, (axes, bars) = plt.subplots(1, 2, figsize=(8, 3.2), gridspec_kw={"width_ratios": (1, 1.4)})
    axes.imshow(counts / counts.max(), cmap="Blues", vmin=0, vmax=1.4)
    for (row, column), value in np.ndenumerate(counts):
        color = "white" if value > 0.65 * counts.max() else "black"
        axes.text(column, row, f"{value:,}", ha="center", va="center", color=color)
    axes.grid(False)
    places = np.arange(len(LETTERS))
    axes.set_xticks(places, LETTERS)
    axes.set_yticks(places, LETTERS)
    axes.set(title="Number of questions", xlabel="prediction", ylabel="correct answer")
    correct, chosen = (counts.sum(axis) / counts.sum() for axis in (1, 0))
    for side, values, color, label in ((-0.2, correct, INK, "correct"), (0.2, chosen, BLUE, "chosen")):
        drawn = bars.bar(places + side, values, 0.38, color=color, label=label)
        bars.bar_label(drawn, [percent(value) for value in values], padding=2, fontsize=6.5)
    widest = int(np.abs(chosen - correct).argmax())
    gap = signed(100 * (chosen - correct)[widest])
    bars.set_xticks(places, LETTERS)
    bars.set(title=f"Largest difference, chosen − correct: {LETTERS[widest]}, {gap} points")
    bars.set(xlabel="letter", ylabel="fraction of the questions")
    percent_axis(bars.yaxis)
    bars.margins(y=0.3)
    bars.legend(loc="upper right", ncols=2)
    return figure


@plt.style.context(STYLE)
def confidence_figure(versions: dict[str, pd.DataFrame], errors: list[float], curve: pd.DataFrame) -> Figure:
    """Reliability diagram with the questions in each bin, and accuracy against coverage.

    versions: name → race.score.statistics.reliability, uncalibrated first; errors: their calibration errors.
    """
    mosaic, heights = [["diagram", "coverage"], ["counts", "coverage"]], {"height_ratios": (3, 1)}
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(8.6, 4.4), gridspec_kw=heights)
    diagram, counts, coverage = (axes[name] for name in ("diagram", "counts", "coverage"))
    diagram.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
    styles = zip(versions.items(), ((BLUE, "o-", -1), (ORANGE, "s--", 1)), strict=False)
    for (name, table), (color, marker, side) in styles:
        bars = {"yerr": whiskers(table), "capsize": 2, "linewidth": 1, "markersize": 4}
        diagram.errorbar(table["confidence"], table["accuracy"], fmt=marker, color=color, label=name, **bars)
        width = 0.4 / BINS
        counts.bar((table["low"] + table["high"]) / 2 + side * width / 2, table["questions"], width, color=color)
    error = " → ".join(f"{100 * error:.1f}" for error in errors)
    diagram.set(title=f"Calibration error: {error} points", ylabel="accuracy, 95 % interval")
    diagram.set(xlim=(0, 1.02), ylim=(0, 1.03))
    diagram.legend(loc="upper left")
    diagram.tick_params(labelbottom=False)
    counts.set(xlabel=f"confidence (probability of the chosen option; {BINS} bins)", ylabel="questions", xlim=(0, 1.02))
    coverage.plot(curve["coverage"], curve["accuracy"], color=BLUE)
    half = coverage_groups(curve, (0.5,)).iloc[0]
    coverage.plot(half["questions"] / curve["questions"].iloc[-1], half["accuracy"], "o", color=BLUE)
    group = half["group"].capitalize()
    coverage.set(title=f"{group}: {percent(half['accuracy'])} correct", xlabel="coverage (fraction answered)")
    coverage.set(ylabel="accuracy on the answered questions")
    coverage.set(xlim=(0, 1.02), ylim=(min(0.2, curve["accuracy"].min()), 1.03))
    coverage.axhline(CHANCE, color=INK, linestyle=":", linewidth=1)
    for axis in (diagram.yaxis, counts.xaxis, coverage.xaxis, coverage.yaxis):
        percent_axis(axis)
    return figure


@plt.style.context(STYLE)
def options_figure(answers: pd.DataFrame) -> Figure:
    """The probability of each option of one question (race.score.predict.answer_question)."""
    figure, axes = plt.subplots(figsize=(8, 2.4))
    chosen, places = answers["probability"].idxmax(), np.arange(len(answers))
    bars = axes.barh(places, answers["probability"], color=[BLUE if i == chosen else INK for i in answers.index])
    axes.bar_label(bars, [percent(value) for value in answers["probability"]], padding=4, fontsize=9)
    labels = [f"{row.letter}  {row.option[:60]}{'…' if len(row.option) > 60 else ''}" for row in answers.itertuples()]
    axes.set_yticks(places, labels)
    axes.axvline(CHANCE, color=INK, linestyle=":", linewidth=1)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    row = answers.loc[chosen]
    axes.set_title(f"The model chooses {row['letter']}, with a probability of {percent(row['probability'])}")
    axes.set(xlabel="probability (dotted: chance)", xlim=(0, 1.08))
    percent_axis(axes.xaxis)
    return figure
