"""Figures of the course of training: of one stage, of all stages, and of several recipes."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from race import CHANCE, MONITORS
from race.report import figures
from race.report.figures import BLUE, GREEN, GREY, LOOKS, ORANGE, STYLE, WIDTH, key, wrapped
from race.report.formats import percent, rate

CHANCE_LINES = "chance (ln 4; 25 %)"
RULES = {"val_loss_epoch": "lowest validation loss", "val_acc": "highest validation accuracy"}


@plt.style.context(STYLE)
def training_curves(
    log: pd.DataFrame, stage: str, monitor: str = MONITORS[0], max_grad_norm: float | None = None
) -> Figure:
    """Loss, accuracy and learning rate over the optimizer steps of one stage (race.train.logs.read_log).

    monitor: which number picks the best checkpoint. The gradient's norm is drawn if it was logged, with max_grad_norm.
    """
    wanted = ["train_loss_step", "train_acc", "val_loss_epoch", "val_acc", "learning_rate"]
    log = log.reindex(columns=log.columns.union(wanted))  # before the first validation, some are not there yet
    heights = (2.2, 2.2, 0.8, 0.8) if "gradient_norm" in log else (2.2, 2.2, 0.8)
    shape = {"figsize": (WIDTH, 1.4 + sum(heights)), "sharex": True, "height_ratios": heights}
    figure, (loss, accuracy, *strips) = plt.subplots(len(heights), 1, **shape)
    train, validation = log.dropna(subset="train_loss_step"), log.dropna(subset="val_loss_epoch")
    epochs, rates = log.dropna(subset="train_acc"), log.dropna(subset="learning_rate")
    loss.plot(train["step"], train["train_loss_step"], color=GREY, linewidth=0.6)
    loss.plot(train["step"], train["train_loss_step"].ewm(span=max(2, len(train) // 20)).mean(), color=BLUE)
    accuracy.plot(epochs["step"], epochs["train_acc"], "s--", color=BLUE)
    _chance(loss, accuracy)
    for axes, name in ((loss, "val_loss_epoch"), (accuracy, "val_acc")):
        axes.plot(validation["step"], validation[name], "o-", color=ORANGE)
        if len(validation):
            chosen = _chosen(validation, monitor)
            _ring(axes, chosen["step"], chosen[name], ORANGE)
    titles = _found(validation, monitor) if len(validation) else ["not validated yet", "accuracy"]
    loss.set(title=wrapped(f"{stage}: {titles[0]}", WIDTH - 1.2, 10), ylabel="cross-entropy (nats)")
    accuracy.set(title=titles[1], ylabel="accuracy", ylim=(-0.03, 1.03))
    figures.percent_axis(accuracy.yaxis)
    top, end = rates["learning_rate"].max(), max(log["step"].max(), 1)
    upto = "" if (rates["learning_rate"] == top).all() else "up to "
    strips[-1].plot(rates["step"], rates["learning_rate"], color=GREEN)
    strips[-1].yaxis.set_major_formatter(_rate_label)
    strips[-1].set(title=f"learning rate {upto}{rate(top)}", yticks=(0, top), ylim=(0, 1.3 * top), ylabel="rate")
    strips[-1].set(xlabel="optimizer step", xlim=(-0.03 * end, 1.03 * end))
    strips[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    strips[-1].xaxis.set_major_formatter("{x:,.0f}")
    if len(strips) > 1:
        _gradient_norm(strips[0], log.dropna(subset="gradient_norm"), max_grad_norm)
    figure.align_ylabels()
    keys = key("training, each logged step", line="-"), key("training, smoothed", BLUE, line="-")
    keys += key("training (mean over the epoch)", BLUE, "s", "--"), key("validation", ORANGE, "o", "-")
    ring = key(RULES[monitor], ORANGE, "o", fill=False, size=10)
    return figures.finish(figure, *keys, ring, key(CHANCE_LINES, line=":"), columns=3)


def _gradient_norm(axes, log: pd.DataFrame, most: float | None) -> None:
    """The norm of each logged step's gradient, before it is clipped to `most`."""
    axes.plot(log["step"], log["gradient_norm"], color=GREY, linewidth=0.8)
    title = "gradient norm"
    if most is not None and np.isfinite(most):
        axes.axhline(most, color=ORANGE, linewidth=1)
        share = (log["gradient_norm"] > most).mean()
        title += f" before clipping to {most:g} (line): above it in {100 * share:.0f} % of the logged steps"
    drawn = log.loc[(log["gradient_norm"] > 0) & np.isfinite(log["gradient_norm"]), "gradient_norm"]
    axes.set(title=title, ylabel="norm", yscale="log", yticks=sorted({*drawn.agg(["min", "max"]).dropna()}))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:.2g}")


def _found(validation: pd.DataFrame, monitor: str) -> list[str]:
    """The lowest validation loss, and the validation accuracy of the chosen epoch and of the best one."""
    lowest, highest = (_chosen(validation, it) for it in MONITORS)
    loss = f"{RULES['val_loss_epoch']} {lowest['val_loss_epoch']:.3f}, at epoch {lowest['epoch']:.0f} (counted from 0)"
    best = f"at epoch {highest['epoch']:.0f}: {percent(highest['val_acc'])}"
    if monitor == "val_acc":
        return [loss, f"{RULES['val_acc']}, {best}"]
    own = f"validation accuracy at epoch {lowest['epoch']:.0f}: {percent(lowest['val_acc'])}"
    return [loss, f"{own}; highest, {best}" if highest["val_acc"] > lowest["val_acc"] else own]


def _rate_label(value: float, _) -> str:
    return rate(value) if value else "0"


def _chance(loss, accuracy) -> None:
    for axes, chance in ((loss, -np.log(CHANCE)), (accuracy, CHANCE)):
        axes.axhline(chance, color=GREY, linestyle=":")


def _chosen(validated: pd.DataFrame, monitor: str, loss: str = "val_loss_epoch") -> pd.Series:
    """The row of the epoch that a rule of selection (one of MONITORS) picks."""
    return validated.loc[validated["val_acc"].idxmax() if monitor == "val_acc" else validated[loss].idxmin()]


def _ring(axes, x: float, y: float, color: str) -> None:
    axes.plot(x, y, "o", markersize=11, markerfacecolor="none", color=color, clip_on=False)


@plt.style.context(STYLE)
def story_figure(story: pd.DataFrame) -> Figure:
    """Validation loss and accuracy over all stages, with their learning rates (race.train.logs.learning_story)."""
    stages = dict(list(story.groupby("stage", sort=False)))
    labels = [wrapped(f"{stage}, {rate(part['learning_rate'].iloc[0])}", 1.6) for stage, part in stages.items()]
    strip, start, before = figures.row_height(labels, 0.3) * len(stages), 0, None
    shape = {"figsize": (WIDTH, 5.6 + strip), "sharex": True, "height_ratios": (strip, 2, 2)}
    figure, (spans, loss, accuracy) = plt.subplots(3, 1, **shape)
    for place, part in enumerate(stages.values()):
        end, first, best = part["questions"].max(), part.iloc[0], _chosen(part, part["monitor"].iloc[0], "val_loss")
        spans.barh(place, end - start, 0.5, start, color=GREY)
        for axes, name, color in ((loss, "val_loss", ORANGE), (accuracy, "val_acc", BLUE)):
            axes.plot(part["questions"], part[name], "o-", color=color, markersize=4)
            axes.axvline(end, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
            _ring(axes, best["questions"], best[name], color)
            if before is not None:  # the weights from which the next stage starts
                ends = [before["questions"], first["questions"]], [before[name], first[name]]
                axes.plot(*ends, color=color, linewidth=1, linestyle=":")
        start, before = end, best
    reach = figures.whiskers(*(story[name].astype(float) for name in ("val_acc", "val_low", "val_high")))
    accuracy.errorbar(story["questions"], story["val_acc"], yerr=reach, fmt="none", ecolor=BLUE, capsize=3)
    lowest, highest = story.loc[story["val_loss"].idxmin()], story.loc[story["val_acc"].idxmax()]
    when = [f"({row['stage']}, epoch {row['epoch']})" for row in (lowest, highest)]
    loss.set_title(wrapped(f"Lowest validation loss: {lowest['val_loss']:.3f} {when[0]}", 6, 10))
    accuracy.set_title(wrapped(f"Highest validation accuracy: {percent(highest['val_acc'])} {when[1]}", 6, 10))
    spans.set_title("Stages and their learning rates")
    figures.label_rows(spans, labels)
    loss.set(ylabel="cross-entropy (nats)", ymargin=0.12)
    known = ", 95 % interval" if story["val_low"].notna().any() else ""
    accuracy.set(ylabel=f"accuracy{known}\n(axis cut)", ymargin=0.12, xlim=(0, max(start, 1) * 1.03))
    accuracy.set_xlabel("questions trained on, all stages (epochs count from 0)")
    figures.percent_axis(accuracy.yaxis)
    accuracy.xaxis.set_major_formatter(EngFormatter(sep=""))
    keys = key("ring: chosen epoch of its stage", marker="o", fill=False, size=10), key("end of a stage", line="--")
    figure.align_ylabels()
    return figures.finish(figure, *keys, key("from the ring to the next stage's first epoch", line=":"))


@plt.style.context(STYLE)
def courses_figure(validated: pd.DataFrame, rates: pd.DataFrame) -> Figure:
    """Validation loss, accuracy and learning rate of each recipe over the questions trained on (runs.courses)."""
    shape = {"figsize": (WIDTH, 7.2), "sharex": True, "height_ratios": (2.2, 2.2, 1.2)}
    figure, (loss, accuracy, schedule) = plt.subplots(3, 1, **shape)
    keys, seeds = [], max(1, validated["seed"].nunique())
    for number, (recipe, part) in enumerate(validated.groupby("recipe", sort=False)):
        color, marker, _ = LOOKS[number % len(LOOKS)]
        line = LOOKS[(number + number // len(LOOKS)) % len(LOOKS)][2]
        for axes, name in ((loss, "val_loss_epoch"), (accuracy, "val_acc")):
            over = part.groupby("questions")[name].agg(["mean", "min", "max", "size"])
            over = over[over["size"] == part["seed"].nunique(dropna=False)]  # where all seeds have been
            axes.plot(over.index, over["mean"], color=color, marker=marker, linestyle=line, markersize=4.5)
            axes.fill_between(over.index, over["min"], over["max"], color=color, alpha=0.13, linewidth=0)
        own = rates[rates["recipe"] == recipe]
        own = own[own["seed"].isna() | (own["seed"] == own["seed"].min())]
        for _, stage in own.groupby("stage"):
            schedule.plot(stage["questions"], stage["learning_rate"], color=color, linestyle=line)
        keys.append(key(recipe, color, marker, line))
    _chance(loss, accuracy)
    band = f"mean of {seeds} seeds, band from the lowest to the highest" if seeds > 1 else "one seed"
    loss.set(title=f"Validation after each epoch: {band}", ylabel="cross-entropy (nats)\n(axis cut)")
    accuracy.set(ylabel="accuracy (axis cut)")
    figures.percent_axis(accuracy.yaxis)
    schedule.set(ylabel="learning rate", xlabel="questions trained on", ylim=(0, 1.15 * rates["learning_rate"].max()))
    schedule.yaxis.set_major_formatter(_rate_label)
    schedule.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.align_ylabels()
    return figures.finish(figure, *keys, key(CHANCE_LINES, line=":"), columns=4)
