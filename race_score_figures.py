"""Figures of one checkpoint's scores: by group, by letter, by confidence, and of one typed question."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from race_figures import BLUE, CHANCE, INK, ORANGE, STYLE, whiskers
from race_statistics import BINS, LETTERS, coverage_groups, hardest_group, share


@plt.rc_context(STYLE)
def accuracy_figure(table: pd.DataFrame) -> Figure:
    """Accuracy by level with 95 % intervals, of one checkpoint (race_evaluation.accuracy_table)."""
    row = table.iloc[0]
    title = f"{row['stage']}: {row['accuracy']:.1%} right on {row['split']}"
    return _group_panels({"": table.rename(columns={"level": "group"})}, None, title)


@plt.rc_context(STYLE)
def groups_figure(tables: dict[str, pd.DataFrame], accuracy: float) -> Figure:
    """Accuracy with 95 % intervals by group, a panel for each grouping with more than one group.

    The title names the group with the lowest accuracy among those with FEW questions or more.
    """
    tables = {name: table for name, table in tables.items() if len(table) > 1} or tables
    hard = {name: group for name, table in tables.items() if (group := hardest_group(table)) is not None}
    title = "Where it fails"
    if hard:
        name = min(hard, key=lambda grouping: hard[grouping]["accuracy"])
        title = f"Right least often: {hard[name]['accuracy']:.1%} where {name} is “{hard[name]['group']}”"
    return _group_panels(tables, accuracy, title)


def _group_panels(tables: dict[str, pd.DataFrame], accuracy: float | None, title: str) -> Figure:
    rows = [len(table) + 0.6 for table in tables.values()]
    figure, panels = plt.subplots(
        len(tables),
        1,
        figsize=(8, 0.9 + 0.32 * sum(rows)),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": rows},
    )
    for axes, (name, table) in zip(panels[:, 0], tables.items(), strict=True):
        places = np.arange(len(table))
        axes.errorbar(table["accuracy"], places, xerr=whiskers(table), fmt="o", color=BLUE, capsize=3)
        labels = [f"{group} ({count:,})" for group, count in zip(table["group"], table["questions"], strict=True)]
        axes.set_yticks(places, labels)
        axes.set_ylim(len(table) - 0.4, -0.6)
        axes.set_title(name, fontsize=9)
        for place, value in zip(places, table["accuracy"], strict=True):
            at = axes.get_yaxis_transform()
            axes.annotate(f"{value:.1%}", (1.01, place), xycoords=at, va="center", fontsize=9, annotation_clip=False)
        axes.axvline(CHANCE, color=INK, linestyle=":", linewidth=1)
        if accuracy is not None:
            axes.axvline(accuracy, color=ORANGE, linewidth=1)
    last = panels[-1, 0]
    overall = "" if accuracy is None else f"; orange: all, {accuracy:.1%}"
    last.set_xlabel(f"accuracy, 95 % interval (in brackets: questions; dotted: chance{overall})")
    last.set_xlim(0, 1.02)
    last.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


@plt.rc_context(STYLE)
def confusion_figure(counts: pd.DataFrame) -> Figure:
    """Right answers against predictions as counts (race_statistics.confusion), and how often each letter comes."""
    figure, (axes, bars) = plt.subplots(1, 2, figsize=(8, 3.2), gridspec_kw={"width_ratios": (1, 1.4)})
    values = counts.to_numpy()
    axes.imshow(values / max(1, values.max()), cmap="Blues", vmin=0, vmax=1.4)
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 0.65 * values.max() else "black"
        axes.text(column, row, f"{value:,}", ha="center", va="center", color=color)
    axes.grid(False)
    axes.set_xticks(range(4), LETTERS)
    axes.set_yticks(range(4), LETTERS)
    axes.set(title="Questions, counted", xlabel="prediction", ylabel="right answer")
    right, chosen = (values.sum(axis) / max(1, values.sum()) for axis in (1, 0))
    places = np.arange(len(LETTERS))
    bars.bar(places - 0.2, right, 0.38, color=INK, label="right")
    bars.bar(places + 0.2, chosen, 0.38, color=BLUE, label="chosen")
    for place, value in [*zip(places - 0.2, right, strict=True), *zip(places + 0.2, chosen, strict=True)]:
        bars.annotate(f"{value:.1%}", (place, value), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    widest = int(np.abs(chosen - right).argmax())
    gap = f"{100 * (chosen - right)[widest]:+.1f}".replace("-", "−")
    bars.set_xticks(places, LETTERS)
    bars.set(
        title=f"Widest gap, chosen − right: {LETTERS[widest]}, {gap} points",
        xlabel="letter",
        ylabel="share of questions",
    )
    bars.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bars.margins(y=0.3)
    bars.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    return figure


@plt.rc_context(STYLE)
def confidence_figure(versions: dict[str, pd.DataFrame], errors: list[float], curve: pd.DataFrame) -> Figure:
    """Reliability diagram with the questions in each bin, and accuracy against coverage.

    versions: name → race_statistics.reliability, the first one as the model says it; errors: their calibration errors.
    """
    figure, axes = plt.subplot_mosaic(
        [["reliability", "coverage"], ["counts", "coverage"]], figsize=(8.6, 4.4), gridspec_kw={"height_ratios": (3, 1)}
    )
    diagram, counts, coverage = axes["reliability"], axes["counts"], axes["coverage"]
    diagram.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
    styles = zip(versions.items(), ((BLUE, "o-", -1), (ORANGE, "s--", 1)), strict=False)
    for (name, table), (color, marker, side) in styles:
        bars = {"yerr": whiskers(table), "capsize": 2, "linewidth": 1, "markersize": 4}
        diagram.errorbar(table["confidence"], table["accuracy"], fmt=marker, color=color, label=name, **bars)
        width = 0.4 / BINS
        counts.bar((table["low"] + table["high"]) / 2 + side * width / 2, table["questions"], width, color=color)
    error = f"{100 * errors[0]:.1f}" + (f" → {100 * errors[1]:.1f}" if len(errors) > 1 else "")
    diagram.set(
        title=f"Calibration error: {error} points", ylabel="accuracy, 95 % interval", xlim=(0, 1.02), ylim=(0, 1.03)
    )
    diagram.legend(frameon=False, fontsize=8, loc="upper left")
    diagram.tick_params(labelbottom=False)
    counts.set(xlabel=f"confidence (probability of the chosen option; {BINS} bins)", ylabel="questions", xlim=(0, 1.02))
    coverage.plot(curve["coverage"], curve["accuracy"], color=BLUE)
    half = coverage_groups(curve, (0.5,)).iloc[0]
    coverage.plot(half["questions"] / curve["questions"].iloc[-1], half["accuracy"], "o", color=BLUE)
    coverage.set(title=f"The surer half: {half['accuracy']:.1%} right", xlabel="coverage (share of questions answered)")
    coverage.set(ylabel="accuracy on those", xlim=(0, 1.02), ylim=(min(0.2, curve["accuracy"].min()), 1.03))
    coverage.axhline(CHANCE, color=INK, linestyle=":", linewidth=1)
    for ax, axis in ((diagram, "y"), (counts, "x"), (coverage, "x"), (coverage, "y")):
        getattr(ax, f"{axis}axis").set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


@plt.rc_context(STYLE)
def options_figure(answers: pd.DataFrame) -> Figure:
    """The probability of each option of one question (race_evaluation.answer_question)."""
    figure, axes = plt.subplots(figsize=(8, 2.4))
    chosen = answers["probability"].idxmax()
    colors = [BLUE if i == chosen else INK for i in answers.index]
    labels = [f"{row.letter}  {_short(row.option)}" for row in answers.itertuples()]
    axes.barh(np.arange(len(answers)), answers["probability"], color=colors)
    axes.set_yticks(np.arange(len(answers)), labels)
    for place, value in enumerate(answers["probability"]):
        axes.annotate(f"{value:.1%}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.axvline(CHANCE, color=INK, linestyle=":", linewidth=1)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    row = answers.loc[chosen]
    axes.set(
        title=f"The model chooses {row['letter']}, with {share(row['probability'])}",
        xlabel="probability (dotted: chance)",
    )
    axes.set_xlim(0, 1.08)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def _short(text: str, width: int = 60) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
