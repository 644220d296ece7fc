"""The figures of the notebooks, in one style: readable on light and dark pages and without colour vision."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from race_evaluation import LETTERS

INK = "#808080"  # a grey that can be read on white and on black
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"  # Okabe and Ito's colour-blind safe palette
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
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=150)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
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
def accuracy_figure(table: pd.DataFrame) -> Figure:
    """Accuracy by level with 95 % intervals, of one checkpoint (race_evaluation.accuracy_table)."""
    figure, axes = plt.subplots(figsize=(5.2, 2.4))
    axes.errorbar(table["accuracy"], table["level"], xerr=_whiskers(table), fmt="o", color=BLUE, capsize=3)
    for row in table.itertuples():
        axes.annotate(
            f"{row.accuracy:.1%}",
            (row.accuracy, row.level),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    _chance_line(axes)
    axes.set(
        title=f"{table['stage'][0]}: {table['accuracy'][0]:.1%} right on {table['split'][0]}",
        xlabel="accuracy, 95 % interval",
    )
    axes.margins(y=0.35)
    axes.invert_yaxis()
    return figure


@plt.rc_context(STYLE)
def confusion_figure(counts: pd.DataFrame) -> Figure:
    """Right answers against predictions, as counts (race_evaluation.confusion)."""
    figure, axes = plt.subplots(figsize=(3.6, 3.2))
    values = counts.to_numpy()
    axes.imshow(values / max(1, values.max()), cmap="Blues", vmin=0, vmax=1.4)
    for (row, column), value in np.ndenumerate(values):
        axes.text(
            column,
            row,
            f"{value:,}",
            ha="center",
            va="center",
            color="white" if value > 0.65 * values.max() else "black",
        )
    axes.grid(False)
    axes.set_xticks(range(4), LETTERS)
    axes.set_yticks(range(4), LETTERS)
    axes.set(title="Where the answers go (counts)", xlabel="prediction", ylabel="right answer")
    return figure


@plt.rc_context(STYLE)
def comparison_figure(table: pd.DataFrame, reported: dict[str, float] | None = None) -> Figure:
    """Accuracy of several checkpoints side by side (race_evaluation.comparison); `reported`: other people's numbers."""
    figure, axes = plt.subplots(figsize=(7, 3.4))
    places = np.arange(len(table))
    for level, color, marker, shift in (("middle", GREEN, "^", -0.12), ("high", PURPLE, "v", 0.12)):
        if table[level].notna().any():
            axes.plot(places + shift, table[level], marker, color=color, label=level)
    axes.errorbar(
        places, table["accuracy"], yerr=_whiskers(table), fmt="o-", color=BLUE, capsize=4, label="all, 95 % interval"
    )
    reported = {place: (reported or {}).get(stage) for place, stage in zip(places, table["stage"], strict=True)}
    known = [(place, accuracy) for place, accuracy in reported.items() if accuracy is not None]
    if known:
        axes.plot(*zip(*known, strict=True), "x", color=INK, label="reported by the original authors")
    for place, accuracy in zip(places, table["accuracy"], strict=True):
        axes.annotate(
            f"{accuracy:.1%}", (place, accuracy), (0, 11), textcoords="offset points", ha="center", fontsize=9
        )
    axes.axhline(CHANCE, color=INK, linestyle=":", linewidth=1)
    axes.annotate("chance", (1, CHANCE), xycoords=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
    best = table.loc[table["accuracy"].idxmax()]
    axes.set_xticks(places, table["stage"])
    axes.margins(x=0.15)
    axes.set(
        title=f"{best['stage']} is right most often: {best['accuracy']:.1%}",
        xlabel="stage",
        ylabel="accuracy",
        ylim=(0, 1.03),
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _whiskers(table: pd.DataFrame) -> np.ndarray:
    return np.array([table["accuracy"] - table["ci_low"], table["ci_high"] - table["accuracy"]])


def _chance_line(axes) -> None:
    axes.axvline(CHANCE, color=INK, linestyle=":", linewidth=1)
    axes.annotate("chance", (CHANCE, 0.02), xycoords=axes.get_xaxis_transform(), ha="right", fontsize=8, rotation=90)
    axes.set_xlim(0, 1.03)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
