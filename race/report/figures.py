"""One style for all figures, readable on light and dark and without colour vision; figures of training and chain."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import EngFormatter, PercentFormatter

from race import CHANCE
from race.files import atomic_write
from race.report.sentences import percent, rate, signed
from race.score.statistics import SIGNIFICANT

INK = "#808080"  # a grey that can be read on white and on black
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe and Ito's colour-blind safe palette
STYLE = Path(__file__).with_name("figures.mplstyle")


def save_figure(figure: Figure, run_dir: str | Path, name: str) -> Figure:
    """Keep a figure as PNG and SVG in `run_dir`/figures."""
    folder = Path(run_dir) / "figures"
    atomic_write(folder / f"{name}.png", lambda file: figure.savefig(file, dpi=150, format="png"))
    atomic_write(folder / f"{name}.svg", lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
    plt.close(figure)
    return figure


def percent_axis(axis) -> None:
    """Label an axis of fractions as "20 %", "40 %" …"""
    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def chance_line(axes, height: float, words: str) -> None:
    """A dotted line across, with what it means at its right end."""
    axes.axhline(height, color=INK, linestyle=":", linewidth=1)
    axes.annotate(words, (1, height), xycoords=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)


def whiskers(table: pd.DataFrame) -> np.ndarray:
    """[2, N] how far the interval reaches below and above each accuracy."""
    reach = np.array([table["accuracy"] - table["ci_low"], table["ci_high"] - table["accuracy"]])
    return np.maximum(reach, 0)  # at 0 and 1 rounding may put an end a hair inside


@plt.style.context(STYLE)
def training_curves(log: pd.DataFrame, stage: str) -> Figure:
    """Loss, accuracy and learning rate over the optimizer steps of one stage (race.train.logs.read_log)."""
    wanted = ["train_loss_step", "train_acc", "val_loss_epoch", "val_acc", "learning_rate"]
    log = log.reindex(columns=log.columns.union(wanted))  # before the first validation, some are not there yet
    figure, (loss, accuracy, schedule) = plt.subplots(1, 3, figsize=(11, 3.2), sharex=True)
    train, validation = log.dropna(subset="train_loss_step"), log.dropna(subset="val_loss_epoch")
    epochs, rates = log.dropna(subset="train_acc"), log.dropna(subset="learning_rate")
    loss.plot(train["step"], train["train_loss_step"], color=BLUE, alpha=0.3, linewidth=0.8)
    smooth = train["train_loss_step"].ewm(span=max(2, len(train) // 20)).mean()
    loss.plot(train["step"], smooth, color=BLUE, label="training (smoothed)")
    loss.plot(validation["step"], validation["val_loss_epoch"], "o-", color=ORANGE, label="validation")
    chance_line(loss, -np.log(CHANCE), "chance, ln 4")
    accuracy.plot(epochs["step"], epochs["train_acc"], "s--", color=BLUE, label="training")
    accuracy.plot(validation["step"], validation["val_acc"], "o-", color=ORANGE, label="validation")
    chance_line(accuracy, CHANCE, "chance")
    schedule.plot(rates["step"], rates["learning_rate"], color=GREEN)
    found = ["not validated yet"] * 2
    if len(validation):
        found = [f"lowest validation loss {validation['val_loss_epoch'].min():.3f}"]
        found += [f"best validation accuracy {percent(validation['val_acc'].max())}"]
    loss.set(title=f"{stage}: {found[0]}", ylabel="cross-entropy (nats)")
    accuracy.set(title=f"{stage}: {found[1]}", ylabel="accuracy", ylim=(0, 1.03))
    percent_axis(accuracy.yaxis)
    schedule.set(title=f"{stage}: learning rate {rate(rates['learning_rate'].iloc[-1])}", ylabel="learning rate")
    schedule.set_ylim(0, rates["learning_rate"].max() * 1.3)
    schedule.yaxis.set_major_formatter(lambda value, _: rate(value) if value else "0")
    for axes in (loss, accuracy, schedule):
        axes.set_xlabel("optimizer step")
    loss.legend(loc="lower left")
    accuracy.legend(loc="upper left")
    return figure


@plt.style.context(STYLE)
def comparison_figure(table: pd.DataFrame, reported: dict[str, float], title: str) -> Figure:
    """Accuracy of checkpoints side by side (tables.comparison_table); reported: other people's numbers by stage."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    places = np.arange(len(table))
    for level, color, marker, shift in (("middle", GREEN, "^", -0.12), ("high", PURPLE, "v", 0.12)):
        if table[level].notna().any():
            axes.plot(places + shift, table[level].astype(float), marker, color=color, label=level)
    bars = {"yerr": whiskers(table), "capsize": 4}
    axes.errorbar(places, table["accuracy"], fmt="o-", color=BLUE, label="all, 95 % interval", **bars)
    theirs = table["stage"].map(reported).astype(float)
    if theirs.notna().any():
        axes.plot(places - 0.24, theirs, "x", color=INK, label="reported by the original authors")
    chance_line(axes, CHANCE, "chance")
    labels = [f"{name}\n{percent(accuracy)}" for name, accuracy in zip(table["name"], table["accuracy"], strict=True)]
    axes.set_xticks(places, labels)
    axes.set_xlim(-0.6, len(table) - 0.4)
    axes.set(title=title, xlabel="checkpoint and its accuracy", ylabel="accuracy")
    shown = table[["accuracy", "ci_low", "ci_high", "middle", "high"]].astype(float).to_numpy()
    axes.set_ylim(min(CHANCE, np.nanmin(shown)) - 0.05, np.nanmax(shown) + 0.05)
    percent_axis(axes.yaxis)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@plt.style.context(STYLE)
def differences_figure(pairs: pd.DataFrame, title: str) -> Figure:
    """Differences of accuracy in points with bootstrap intervals, one row a pair (comparison.compare_pairs)."""
    figure, axes = plt.subplots(figsize=(8, 1.3 + 0.42 * len(pairs)))
    for place, (_, row) in enumerate(pairs.iterrows()):
        middle, low, high = (100 * row[name] for name in ("difference", "ci_low", "ci_high"))
        sure = row["p_holm"] < SIGNIFICANT
        color, fill = (BLUE, BLUE) if sure else (ORANGE, "none")
        ends = [[middle - low], [high - middle]]
        axes.errorbar(middle, place, xerr=ends, fmt="o", color=color, markerfacecolor=fill, capsize=3)
        text = f"{signed(middle)}, gained {row['gained']:,}, lost {row['lost']:,}"
        axes.annotate(text, (high, place), (7, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(pairs)), pairs["second"] + " − " + pairs["first"])
    axes.set(title=title, xlabel="difference of accuracy (percentage points), 95 % interval")
    axes.grid(axis="y", visible=False)  # it would run through the words
    axes.set_ylim(len(pairs) - 0.5, -0.7)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.35 * (right - left))  # room for the words
    return figure


@plt.style.context(STYLE)
def lineage_figure(lineage: pd.DataFrame) -> Figure:
    """Where checkpoints come from (tables.lineage_table): a box each, after its base."""
    parents = dict(zip(lineage["name"], lineage["parent"], strict=True))
    column, row_of, used = {}, {}, {}
    for name in lineage["name"]:
        column[name] = _depth(name, parents)
        row_of[name] = used[column[name]] = used.get(column[name], -1) + 1
    width, depth = max(column.values()) + 1, max(row_of.values()) + 1
    figure, axes = plt.subplots(figsize=(2.6 * width, 0.5 + 1.3 * depth))
    for row in lineage.to_dict("records"):
        x, y = column[row["name"]], -row_of[row["name"]]
        _box(axes, x, y, row["name"], _settings(row), BLUE)
        start, label = (x - 1, y), ""
        if row["parent"] in column:
            start, label = (column[row["parent"]], -row_of[row["parent"]]), "✓ hash"
        else:
            _box(axes, 0, y, "base", [_wrapped(row["base"] if pd.notna(row["base"]) else "unknown")], INK)
        arrow = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (x - 0.38, y), (start[0] + 0.38, start[1]), arrowprops=arrow)
        axes.text(x - 0.4, y + 0.05, label, ha="right", va="bottom", fontsize=7)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(-depth + 0.45, 0.55))
    axes.set_title(" → ".join(lineage["name"]) if len(column) == width - 1 else "Where these checkpoints come from")
    axes.axis("off")
    return figure


def _depth(name: str, parents: dict[str, str | None]) -> int:
    """1 for a checkpoint whose base is not among the others, else one more than its base."""
    return 1 + _depth(parents[name], parents) if parents[name] in parents else 1


def _settings(row: dict) -> list[str]:
    """What a checkpoint remembers of its training, in lines; unknown things are left out."""
    lines = [f"learning rate {rate(row['learning_rate'])}"] if pd.notna(row["learning_rate"]) else []
    lines += [f"{row['epochs']:.0f} epoch{'s' if row['epochs'] > 1 else ''}"] if pd.notna(row["epochs"]) else []
    return lines + ([f"validation loss {row['val_loss']:.3f}"] if pd.notna(row["val_loss"]) else [])


def _wrapped(text: str, width: int = 24) -> str:
    return "\n".join(text[i : i + width] for i in range(0, len(text), width))


def _box(axes, x: float, y: float, title: str, lines: list[str], color: str) -> None:
    corner, style = (x - 0.36, y - 0.34), "round,pad=0.02"
    axes.add_patch(FancyBboxPatch(corner, 0.72, 0.68, boxstyle=style, facecolor="none", edgecolor=color))
    axes.text(x, y + 0.2, _wrapped(title), ha="center", va="center", weight="bold", fontsize=9)
    axes.text(x, y - 0.1, "\n".join(lines), ha="center", va="center", fontsize=8)


@plt.style.context(STYLE)
def story_figure(story: pd.DataFrame) -> Figure:
    """Validation loss and accuracy over all stages, with their learning rates (race.train.logs.learning_story)."""
    figure, (loss, accuracy) = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True)
    start, before = 0, None
    for stage, part in story.groupby("stage", sort=False):
        end, first, best = part["questions"].max(), part.iloc[0], part.loc[part["val_loss"].idxmin()]
        for axes, name, color in ((loss, "val_loss", ORANGE), (accuracy, "val_acc", BLUE)):
            axes.plot(part["questions"], part[name], "o-", color=color, markersize=4)
            axes.axvline(end, color=INK, linewidth=1, linestyle="--")
            axes.plot(best["questions"], best[name], "o", markersize=10, markerfacecolor="none", color=color)
            if before is not None:  # the weights from which the next stage starts
                ends = [before["questions"], first["questions"]], [before[name], first[name]]
                axes.plot(*ends, color=color, linewidth=1, linestyle=":")
        label, place = f"{stage}\nlr {rate(first['learning_rate'])}", ((start + end) / 2, 0.97)
        loss.annotate(label, place, xycoords=loss.get_xaxis_transform(), ha="center", va="top", fontsize=9)
        start, before = end, best
    lowest, highest = story.loc[story["val_loss"].idxmin()], story.loc[story["val_acc"].idxmax()]
    when = [f"({row['stage']}, epoch {row['epoch']})" for row in (lowest, highest)]
    loss.set(title=f"Lowest validation loss: {lowest['val_loss']:.3f} {when[0]}", ylabel="cross-entropy (nats)")
    low, high = loss.get_ylim()
    loss.set_ylim(low - 0.05 * (high - low), high + 0.4 * (high - low))  # room for rings and names of the stages
    accuracy.set_title(f"Highest validation accuracy: {percent(highest['val_acc'])} {when[1]}")
    accuracy.set(ylabel="accuracy", xlim=(0, start * 1.02))
    accuracy.set_xlabel("questions trained on, all stages (ring: lowest loss of its stage; lr: learning rate)")
    percent_axis(accuracy.yaxis)
    accuracy.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure
