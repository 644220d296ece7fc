"""One style for all figures, readable on light and dark and without colour vision; figures of training and chain."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import EngFormatter, PercentFormatter

from race_files import write_whole

INK = "#808080"  # a grey that can be read on white and on black
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe and Ito's colour-blind safe palette
STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "race",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}
CHANCE_LOSS, CHANCE = np.log(4), 0.25


def save_figure(figure: Figure, run_dir: str | Path, name: str) -> Figure:
    """Keep a figure as PNG and SVG in `run_dir`/figures."""
    folder = Path(run_dir) / "figures"
    write_whole(folder / f"{name}.png", lambda file: figure.savefig(file, dpi=150, format="png"))
    write_whole(folder / f"{name}.svg", lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
    plt.close(figure)
    return figure


@plt.rc_context(STYLE)
def training_curves(log: pd.DataFrame, stage: str) -> Figure:
    """Loss, accuracy and learning rate over the optimizer steps of one stage, from its log (race_training.read_log)."""
    wanted = ["train_loss_step", "train_acc", "val_loss_epoch", "val_acc", "learning_rate"]
    log = log.reindex(columns=log.columns.union(wanted))  # before the first validation, some are not there yet
    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(11, 3.2), sharex=True)
    train, validation = log.dropna(subset="train_loss_step"), log.dropna(subset="val_loss_epoch")
    loss.plot(train["step"], train["train_loss_step"], color=BLUE, alpha=0.3, linewidth=0.8)
    smooth = train["train_loss_step"].ewm(span=max(2, len(train) // 20)).mean()
    loss.plot(train["step"], smooth, color=BLUE, label="training (smoothed)")
    loss.plot(validation["step"], validation["val_loss_epoch"], "o-", color=ORANGE, label="validation")
    loss.axhline(CHANCE_LOSS, color=INK, linestyle=":", linewidth=1)
    loss.annotate(
        "chance, ln 4", (1, CHANCE_LOSS), xycoords=loss.get_yaxis_transform(), ha="right", va="bottom", fontsize=8
    )
    validated = len(validation) > 0
    best = f"lowest validation loss {validation['val_loss_epoch'].min():.3f}" if validated else "not validated yet"
    loss.set(title=f"{stage}: {best}", xlabel="optimizer step", ylabel="cross-entropy (nats)")
    epochs = log.dropna(subset="train_acc")
    accuracy.plot(epochs["step"], epochs["train_acc"], "s--", color=BLUE, label="training")
    accuracy.plot(validation["step"], validation["val_acc"], "o-", color=ORANGE, label="validation")
    accuracy.axhline(CHANCE, color=INK, linestyle=":", linewidth=1)
    accuracy.annotate(
        "chance", (1, CHANCE), xycoords=accuracy.get_yaxis_transform(), ha="right", va="bottom", fontsize=8
    )
    best = f"best validation accuracy {validation['val_acc'].max():.1%}" if validated else "not validated yet"
    accuracy.set(title=f"{stage}: {best}", xlabel="optimizer step", ylabel="accuracy", ylim=(0, 1.03))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    rates = log.dropna(subset="learning_rate")
    rate.plot(rates["step"], rates["learning_rate"], color=GREEN)
    title = f"{stage}: learning rate {rates['learning_rate'].iloc[-1]:g}"
    rate.set(title=title, xlabel="optimizer step", ylabel="learning rate")
    rate.set_ylim(0, rates["learning_rate"].max() * 1.3)
    loss.legend(frameon=False, fontsize=8, loc="lower left")
    accuracy.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


@plt.rc_context(STYLE)
def comparison_figure(
    table: pd.DataFrame, reported: dict[str, float] | None = None, title: str | None = None
) -> Figure:
    """Accuracy of several checkpoints side by side (race_lineage.comparison); `reported`: other people's numbers."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    places = np.arange(len(table))
    for level, color, marker, shift in (("middle", GREEN, "^", -0.12), ("high", PURPLE, "v", 0.12)):
        if table[level].notna().any():
            axes.plot(places + shift, table[level].astype(float), marker, color=color, label=level)
    axes.errorbar(
        places, table["accuracy"], yerr=whiskers(table), fmt="o-", color=BLUE, capsize=4, label="all, 95 % interval"
    )
    reported = {place: (reported or {}).get(stage) for place, stage in zip(places, table["stage"], strict=True)}
    known = [(place, accuracy) for place, accuracy in reported.items() if accuracy is not None]
    if known:
        known_places, accuracies = zip(*known, strict=True)
        axes.plot(np.array(known_places) - 0.24, accuracies, "x", color=INK, label="reported by the original authors")
    axes.axhline(CHANCE, color=INK, linestyle=":", linewidth=1)
    axes.annotate("chance", (1, CHANCE), xycoords=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
    best = table.loc[table["accuracy"].idxmax()]
    labels = [f"{name}\n{accuracy:.1%}" for name, accuracy in zip(table["name"], table["accuracy"], strict=True)]
    axes.set_xticks(places, labels)
    axes.set_xlim(-0.6, len(table) - 0.4)
    title = title or f"{best['stage']} is right most often: {best['accuracy']:.1%}"
    axes.set(title=title, xlabel="checkpoint and its accuracy", ylabel="accuracy")
    shown = table[["accuracy", "ci_low", "ci_high", "middle", "high"]].astype(float).to_numpy()
    axes.set_ylim(min(CHANCE, np.nanmin(shown)) - 0.05, np.nanmax(shown) + 0.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@plt.rc_context(STYLE)
def differences_figure(pairs: pd.DataFrame, title: str) -> Figure:
    """Differences of accuracy in points with bootstrap intervals, one row a pair (race_comparison.compare_pairs)."""
    figure, axes = plt.subplots(figsize=(8, 1.3 + 0.42 * len(pairs)))
    places = np.arange(len(pairs))
    for place, row in zip(places, pairs.to_dict("records"), strict=True):
        middle, low, high = (100 * row[name] for name in ("difference", "ci_low", "ci_high"))
        color = BLUE if row["p_holm"] < 0.05 else ORANGE
        filled = {} if row["p_holm"] < 0.05 else {"markerfacecolor": "none"}
        axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=color, capsize=3, **filled)
        text = f"{middle:+.1f}, gained {row['gained']:,}, lost {row['lost']:,}"
        axes.annotate(text, (high, place), (7, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(
        places, [f"{second} − {first}" for first, second in zip(pairs["first"], pairs["second"], strict=True)]
    )
    axes.set(title=title, xlabel="difference of accuracy (percentage points), 95 % interval")
    axes.set_ylim(len(pairs) - 0.5, -0.7)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.35 * (right - left))  # room for the words
    return figure


@plt.rc_context(STYLE)
def lineage_figure(lineage: pd.DataFrame) -> Figure:
    """Where checkpoints come from (race_lineage.lineage_table): a box each, after its base."""
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
        if row["parent"] in column:
            start, label = (column[row["parent"]], -row_of[row["parent"]]), "✓ hash"
        else:
            start, label = (x - 1, y), ""
            if x == 1:
                _box(axes, 0, y, "base", [_wrapped(row["base"] if pd.notna(row["base"]) else "not remembered")], INK)
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
    """What a checkpoint remembers of its training, in lines; what it does not is left out."""
    lines = [f"learning rate {row['learning_rate']:g}"] if pd.notna(row["learning_rate"]) else []
    lines += [f"{row['epochs']:.0f} epoch{'s' if row['epochs'] > 1 else ''}"] if pd.notna(row["epochs"]) else []
    return lines + ([f"validation loss {row['val_loss']:.3f}"] if pd.notna(row["val_loss"]) else [])


def _wrapped(text: str, width: int = 22) -> str:
    return "\n".join(text[i : i + width] for i in range(0, len(text), width))


def _box(axes, x: float, y: float, title: str, lines: list[str], color: str) -> None:
    shape = FancyBboxPatch(
        (x - 0.36, y - 0.34), 0.72, 0.68, boxstyle="round,pad=0.02", facecolor="none", edgecolor=color
    )
    axes.add_patch(shape)
    axes.text(
        x, y + 0.2, title if len(title) < 25 else _wrapped(title), ha="center", va="center", weight="bold", fontsize=9
    )
    axes.text(x, y - 0.1, "\n".join(lines), ha="center", va="center", fontsize=8)


@plt.rc_context(STYLE)
def story_figure(story: pd.DataFrame) -> Figure:
    """Validation loss and accuracy over all stages, with their learning rates (race_lineage.learning_story)."""
    figure, (loss, accuracy) = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True)
    start, before = 0, None
    for stage, part in story.groupby("stage", sort=False):
        end, first, best = part["questions"].max(), part.iloc[0], part.loc[part["val_loss"].idxmin()]
        for axes, name, color in ((loss, "val_loss", ORANGE), (accuracy, "val_acc", BLUE)):
            axes.plot(part["questions"], part[name], "o-", color=color, markersize=4)
            axes.axvline(end, color=INK, linewidth=1, linestyle="--")
            axes.plot(best["questions"], best[name], "o", markersize=10, markerfacecolor="none", color=color)
            if before is not None:  # the weights that a stage goes on from
                ends = [before["questions"], first["questions"]], [before[name], first[name]]
                axes.plot(*ends, color=color, linewidth=1, linestyle=":")
        rate = np.format_float_scientific(part["learning_rate"].iloc[0], precision=2, trim="-", exp_digits=1)
        label = f"{stage}\nlr {rate}"
        place = ((start + end) / 2, 0.97)
        loss.annotate(label, place, xycoords=loss.get_xaxis_transform(), ha="center", va="top", fontsize=9)
        start, before = end, best
    first, last = story.iloc[0], story.loc[story["val_loss"].idxmin()]
    ends = f"{first['val_loss']:.3f} after the first epoch to {last['val_loss']:.3f} at its lowest, in {last['stage']}"
    loss.set(title=f"Validation loss goes from {ends}", ylabel="cross-entropy (nats)")
    low, high = loss.get_ylim()
    loss.set_ylim(low, high + 0.4 * (high - low))  # room for the names of the stages
    best = story.loc[story["val_acc"].idxmax()]
    accuracy.set(title=f"Validation accuracy is highest in {best['stage']}: {best['val_acc']:.1%}", ylabel="accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    accuracy.set_xlabel("questions trained on, all stages (ring: lowest loss of its stage; lr: learning rate)")
    accuracy.xaxis.set_major_formatter(EngFormatter(sep=""))
    accuracy.set_xlim(0, start * 1.02)
    return figure


def whiskers(table: pd.DataFrame) -> np.ndarray:
    """[2, N] how far the interval reaches below and above each accuracy."""
    reach = np.array([table["accuracy"] - table["ci_low"], table["ci_high"] - table["accuracy"]])
    return np.maximum(reach, 0)  # at 0 and 1 rounding may put an end a hair inside
