"""One style for all figures, dark on white and readable without colour vision; figures of training and chain."""

import base64
import textwrap
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from race import LEVELS, MONITORS, OPTIONS
from race.files import atomic_write
from race.report.formats import RULES, SIGNIFICANT, percent, points, rate

INK, GREY = "#222222", "#767676"  # text, lines
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"  # Okabe and Ito's palette; a darker purple
MARKS = {"middle": (GREEN, "^"), "high": (PURPLE, "v"), "all": (BLUE, "o")}  # colour and marker of each level
LOOKS = list(zip((BLUE, ORANGE, GREEN, PURPLE, INK, GREY), "os^vDx", ("-", "--", "-.", ":", "-", "--"), strict=True))
WIDTH = 8.6  # inches of every figure
STYLE = Path(__file__).with_name("figures.mplstyle")


@plt.style.context(STYLE)
def save_figure(figure: Figure, run_dir: str | Path, name: str) -> HTML:
    """Keep a figure as PNG and SVG in `run_dir`/figures; returns the picture, its titles as alternative text."""
    folder = Path(run_dir) / "figures"
    atomic_write(folder / f"{name}.png", lambda file: figure.savefig(file, dpi=150, format="png"))
    atomic_write(folder / f"{name}.svg", lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
    plt.close(figure)
    titles = escape(" ".join(filter(None, [figure.get_suptitle(), *(axes.get_title("left") for axes in figure.axes)])))
    source = f"data:image/png;base64,{base64.b64encode((folder / f'{name}.png').read_bytes()).decode()}"
    return HTML(f'<img src="{source}" alt="{titles}" width="{100 * WIDTH:.0f}">')


def wrapped(text: str, inches: float, size: float = 9) -> str:
    """A text in lines of at most so many inches at this font size, broken at spaces and hyphens where it can be."""
    font = FontProperties(size=size)
    for characters in range(min(len(text), int(250 * inches / size)), 0, -1):
        lines = textwrap.wrap(text, characters)
        if all(text_to_path.get_text_width_height_descent(line, font, False)[0] < 72 * inches for line in lines):
            return "\n".join(lines)
    return text


def row_height(labels: list[str], least: float) -> float:
    """Inches of a row beside labels of one line or more."""
    return max(least, *(0.16 * label.count("\n") + 0.3 for label in labels))


def label_rows(axes, labels: list[str]) -> None:
    """A row for each label, from the top, with thin lines between."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_yticks(np.arange(1, len(labels)) - 0.5, minor=True)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", which="both", length=0)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="y", which="minor")


def row_figure(labels: list[str], least: float = 0.3) -> tuple:
    """A figure, and its axes with a row for each label."""
    figure, axes = plt.subplots(figsize=(WIDTH, 1.4 + row_height(labels, least) * len(labels)))
    label_rows(axes, labels)
    return figure, axes


def panels(*heights: float) -> list:
    """A figure, and its panels of these heights (inches) over one x axis."""
    shape = {"figsize": (WIDTH, 1.5 + sum(heights)), "sharex": True, "height_ratios": heights}
    figure, axes = plt.subplots(len(heights), 1, **shape)
    return [figure, *axes]


def finish(figure: Figure, *keys: Line2D | Patch, title: str | None = None, columns: int = 5) -> Figure:
    """The title from the figure's left edge, in as many lines as it needs, and the legend below everything else."""
    if title:
        figure.suptitle(wrapped(title, WIDTH - 0.3, 11), x=0.01, ha="left")
    figure.align_ylabels()
    figure.legend(handles=keys, loc="outside lower center", ncols=columns)
    return figure


def percent_axis(axis, label: str) -> None:
    """An axis of fractions, with marks "20 %", "40 %" …"""
    axis.set_label_text(label)
    axis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))


def accuracy_axis(axes, label: str, options: int, start: float = -0.02) -> None:
    """A horizontal axis from 0 to 100 % with a dotted line at chance; marks at its ends are whole."""
    axes.axvline(1 / options, color=GREY, linestyle=":", linewidth=1)
    axes.set_xlim(start, 1.02)
    percent_axis(axes.xaxis, label)


def whiskers(value, low, high) -> np.ndarray:
    """[2, N] how far intervals reach below and above the values."""
    return np.maximum([value - low, high - value], 0)  # at 0 and 1 rounding may put an end a hair inside


def marks(axes, look: tuple[str, str], places, *columns, fill=True, size=4.5, line=1.2) -> None:
    """Values at these heights with their intervals (columns: value, low, high); look: colour and marker."""
    value, low, high = (np.atleast_1d(np.asarray(column, float)) for column in columns)
    style = {"color": look[0], "markerfacecolor": look[0] if fill else "white", "markersize": size, "linewidth": line}
    axes.errorbar(value, places, xerr=whiskers(value, low, high), fmt=look[1], capsize=3, **style)


def beside(axes, place: float, text: str) -> None:
    """Words right of the axes, in the row at this height."""
    at = axes.get_yaxis_transform()
    axes.annotate(text, (1, place), (6, 0), at, "offset points", va="center", fontsize=9, annotation_clip=False)


def key(label: str, color: str = GREY, marker: str = "", line: str = "", fill: bool = True, size=5.5) -> Line2D:
    """An entry of a legend."""
    face = color if fill else "white"
    return Line2D([], [], color=color, marker=marker, ls=line, label=label, markerfacecolor=face, markersize=size)


def chance_key(options: int, of_loss: str = "") -> Line2D:
    """The entry of the dotted lines at chance."""
    return key(f"chance ({of_loss}{100 / options:.3g} %)", line=":")


@plt.style.context(STYLE)
def comparison_figure(table: pd.DataFrame, reported: dict[str, float], title: str, options: int = OPTIONS) -> Figure:
    """Accuracy of checkpoints, a row each (tables.comparison_table); reported: other people's numbers by stage."""
    table = table.rename(columns=lambda name: name.replace("accuracy", "all"))
    theirs, keys = table["stage"].map(reported).astype(float), []
    levels = [level for level in LEVELS if level in table]
    drawn = ["all", "reported", *levels] if theirs.notna().any() else ["all", *levels]
    figure, axes = row_figure([wrapped(name, 2.4) for name in table["name"]], 0.16 + 0.12 * len(drawn))
    for number, level in enumerate(drawn):
        places = np.arange(len(table)) + 0.2 * (number - (len(drawn) - 1) / 2)
        if level == "reported":
            axes.plot(theirs, places, "x", color=INK)
            keys.append(key("reported by the original authors", INK, "x"))
        else:
            marks(axes, MARKS[level], places, *(table[level + end] for end in ("", "_low", "_high")))
            keys.append(key(level if levels else "measured", *MARKS[level]))
    for place, accuracy in enumerate(table["all"]):
        beside(axes, place - 0.1 * (len(drawn) - 1), percent(accuracy))  # level with its mark
    accuracy_axis(axes, f"accuracy, 95 % interval by passage{' (at the right: all levels)' if levels else ''}", options)
    return finish(figure, *keys, chance_key(options), title=title)


@plt.style.context(STYLE)
def differences_figure(pairs: pd.DataFrame, title: str, margin: float | None = None) -> Figure:
    """Differences of accuracy in points with intervals, a row a pair: of checkpoints (compare_pairs) or of recipes.

    margin: points that would matter, drawn as a band.
    """
    gaps = np.where((pairs["second"] + pairs["first"]).str.len() > 24, "\n", " ")
    names = zip(pairs["second"], gaps, pairs["first"], strict=True)
    figure, axes = row_figure([f"{wrapped(second, 2.4)}{gap}− {wrapped(first, 2.2)}" for second, gap, first in names])
    sure, keys = pairs["p_holm"] < SIGNIFICANT, []
    untested, filled = pairs["p_holm"].isna(), f"filled: significant (Holm p < {SIGNIFICANT})"
    found = {"not significant": ~sure & ~untested, "not tested": untested}
    hollow = "hollow: " + " or ".join(words for words, rows in found.items() if rows.any())
    for rows, color, words in ((sure, BLUE, filled), (~sure, ORANGE, hollow)):
        if rows.any():
            columns = (100 * pairs.loc[rows, name] for name in ("difference", "ci_low", "ci_high"))
            marks(axes, (color, "o"), np.flatnonzero(rows), *columns, fill=color == BLUE, size=6, line=1.5)
            keys.append(key(words, color, "o", fill=color == BLUE))
    for place, (_, row) in enumerate(pairs.iterrows()):
        counts = f", gained {row['gained']:,}, lost {row['lost']:,}" if "gained" in row else ""
        beside(axes, place, f"{points(row['difference'])}{counts}")
    axes.axvline(0, color=GREY, linewidth=1)
    if margin:
        axes.axvspan(-margin, margin, color=GREY, alpha=0.15, linewidth=0)
        keys.append(Patch(color=GREY, alpha=0.15, linewidth=0, label=f"±{margin:g} (DIFFERENCE)"))
    covers = "by passage" if "gained" in pairs else "over seeds and questions"
    known = f", 95 % interval {covers}" if pairs["ci_low"].notna().any() else ""
    better = "right of 0: the one named first is more accurate"
    axes.set_xlabel(f"difference of accuracy (percentage points){known}\n{better}")
    reach = 1.1 * max(margin or 0, 100 * np.nanmax(pairs[["difference", "ci_low", "ci_high"]].abs().to_numpy())) or 1
    axes.set_xlim(-reach, reach)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.6g}".replace("-", "−") if value else "0")
    return finish(figure, *keys, title=title)


@plt.style.context(STYLE)
def training_curves(log: pd.DataFrame, stage: str, monitor: str = MONITORS[0], options: int = OPTIONS) -> Figure:
    """Loss, accuracy and rate over the optimizer steps of a stage (stages.read_log); monitor: what picks the best."""
    figure, loss, accuracy, schedule = panels(2.2, 2.2, 0.8)
    wanted = ["train_loss_step", "train_acc", "val_loss_epoch", "learning_rate", "val_acc"]
    log = log.reindex(columns=log.columns.union(wanted))  # before the first validation, some are not there yet
    train, epochs, validated, rates = (log.dropna(subset=name) for name in wanted[:4])
    loss.plot(train["step"], train["train_loss_step"], color=GREY, linewidth=0.6)
    loss.plot(train["step"], train["train_loss_step"].ewm(span=max(2, len(train) // 20)).mean(), color=BLUE)
    accuracy.plot(epochs["step"], epochs["train_acc"], "s--", color=BLUE)
    _chance(loss, accuracy, options)
    loss.set(title=f"{wrapped(stage, 5, 10)}: not validated yet", ylabel="loss (nats)")
    percent_axis(accuracy.yaxis, "accuracy")
    accuracy.set_ylim(-0.03, 1.03)
    if len(validated):
        for axes, name in ((loss, "val_loss_epoch"), (accuracy, "val_acc")):
            _validation(axes, validated, _chosen(validated, monitor), ["step", name], ORANGE)
        _best(loss, accuracy, validated.assign(stage=stage))
    top, end = rates["learning_rate"].max(), max(log["step"].max(), 1)
    upto = "" if (rates["learning_rate"] == top).all() else "of the logged steps up to "
    schedule.plot(rates["step"], rates["learning_rate"], color=GREEN)
    schedule.set(title=f"learning rate {upto}{rate(top)}", yticks=(0, top), ylim=(0, 1.3 * top), ylabel="rate")
    schedule.set(xlabel="optimizer step (epochs count from 0)", xlim=(-0.03 * end, 1.03 * end))
    schedule.yaxis.set_major_formatter(lambda value, _: rate(value))
    schedule.xaxis.set_major_locator(MaxNLocator(integer=True))
    schedule.xaxis.set_major_formatter("{x:,.0f}")
    keys = key("training, each logged step", line="-"), key("training, smoothed", BLUE, line="-")
    keys += key("training (mean over the epoch)", BLUE, "s", "--"), key("validation", ORANGE, "o", "-")
    ring = key(RULES[monitor], ORANGE, "o", fill=False, size=10)
    return finish(figure, *keys, ring, chance_key(options, f"ln {options}; "), columns=3)


def _chance(loss, accuracy, options: int) -> None:
    for axes, chance in ((loss, np.log(options)), (accuracy, 1 / options)):
        axes.axhline(chance, color=GREY, linestyle=":")


def _chosen(validated: pd.DataFrame, monitor: str) -> pd.Series:
    """The row of the epoch that a rule of selection (one of MONITORS) picks."""
    chosen = validated[monitor].agg("idxmax" if monitor == "val_acc" else "idxmin")
    return validated.loc[chosen]


def _validation(axes, validated: pd.DataFrame, chosen: pd.Series, columns: list[str], color: str) -> None:
    """A number after each epoch (columns: steps or questions, and its name), with a ring around the chosen epoch."""
    axes.plot(*(validated[name] for name in columns), "o-", color=color, markersize=5)
    axes.plot(*chosen[columns], "o", markersize=11, markerfacecolor="none", color=color, clip_on=False)


def _best(loss, accuracy, validated: pd.DataFrame) -> None:
    """The lowest loss and the highest accuracy of all epochs, as titles."""
    for axes, name, form in ((loss, "val_loss_epoch", "{:.3f}".format), (accuracy, "val_acc", percent)):
        best = _chosen(validated, name)
        text = f"{RULES[name].capitalize()}: {form(best[name])} ({best['stage']}, epoch {best['epoch']:.0f})"
        axes.set_title(wrapped(text, 6, 10))


@plt.style.context(STYLE)
def story_figure(story: pd.DataFrame) -> Figure:
    """Validation loss and accuracy over all stages, with their learning rates (race.score.runs.learning_story)."""
    story = story.rename(columns={"val_loss": "val_loss_epoch"})
    stages = dict(list(story.groupby("stage", sort=False)))
    labels = [wrapped(f"{stage}, {rate(part['learning_rate'].iloc[0])}", 1.6) for stage, part in stages.items()]
    figure, spans, loss, accuracy = panels(row_height(labels, 0.3) * len(stages), 1.3, 1.3)
    start, before = 0, None
    for place, part in enumerate(stages.values()):
        end, first, best = part["questions"].max(), part.iloc[0], _chosen(part, part["monitor"].iloc[0])
        spans.barh(place, end - start, 0.5, start, color=GREY)
        for axes, name, color in ((loss, "val_loss_epoch", ORANGE), (accuracy, "val_acc", BLUE)):
            _validation(axes, part, best, ["questions", name], color)
            axes.axvline(end, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
            if before is not None:  # the weights from which the next stage starts
                ends = [before["questions"], first["questions"]], [before[name], first[name]]
                axes.plot(*ends, color=color, linewidth=1, linestyle=":")
        start, before = end, best
    reach = whiskers(*(story[name].astype(float) for name in ("val_acc", "val_low", "val_high")))
    accuracy.errorbar(story["questions"], story["val_acc"], yerr=reach, fmt="none", ecolor=BLUE, capsize=3)
    _best(loss, accuracy, story)
    label_rows(spans, labels)
    spans.set_title("Stages and their learning rates")
    loss.set(ylabel="cross-entropy loss\n(nats; axis cut)", ymargin=0.12)
    known = ", 95 % interval" if story["val_low"].notna().any() else ""
    percent_axis(accuracy.yaxis, f"accuracy{known}\n(axis cut)")
    accuracy.set(ymargin=0.12, xlim=(0, max(start, 1) * 1.03))
    accuracy.set_xlabel("questions trained on, all stages (epochs count from 0)")
    accuracy.xaxis.set_major_formatter(EngFormatter(sep=""))
    keys = key("ring: chosen epoch of its stage", marker="o", fill=False, size=10), key("end of a stage", line="--")
    return finish(figure, *keys, key("from the ring to the next stage's first epoch", line=":"))


@plt.style.context(STYLE)
def courses_figure(validated: pd.DataFrame, rates: pd.DataFrame, options: int = OPTIONS) -> Figure:
    """Validation loss, accuracy and rate over the questions, a column for each recipe; the first is grey in others."""
    names, seeds = list(validated["recipe"].unique()), max(1, validated["seed"].nunique())
    blocks, across = -(-len(names) // 5), min(5, len(names))
    shape = {"sharex": True, "squeeze": False, "height_ratios": (1.1, 1.1, 0.6) * blocks}
    figure, drawn = plt.subplots(3 * blocks, across, figsize=(WIDTH, 0.8 + 3 * blocks), **shape)
    for (row, place), axes in np.ndenumerate(drawn):
        axes.sharey(drawn[row % 3, 0])
        axes.tick_params(labelleft=place == 0)
    columns = [drawn[block : block + 3, column] for block in range(0, 3 * blocks, 3) for column in range(across)]
    for axes in np.ravel(columns[len(names) :]):
        axes.set_axis_off()
    for column, recipe in zip(columns, names, strict=False):
        for name in dict.fromkeys([names[0], recipe]):
            color, line = (BLUE, "-") if name == recipe else (GREY, "--")
            part, rate_of = validated[validated["recipe"] == name], rates[rates["recipe"] == name]
            for axes, number in zip(column, ("val_loss_epoch", "val_acc"), strict=False):
                over = part.groupby("questions")[number].agg(["mean", "min", "max", "size"])
                over = over[over["size"] == part["seed"].nunique(dropna=False)]  # where all seeds have been
                axes.plot(over.index, over["mean"], color=color, marker="o", linestyle=line, markersize=3)
                axes.fill_between(over.index, over["min"], over["max"], color=color, alpha=0.13, linewidth=0)
            for _, stage in rate_of.drop_duplicates(["stage", "questions"]).groupby("stage"):
                column[2].plot(stage["questions"], stage["learning_rate"], color=color, linestyle=line)
        _chance(*column[:2], options)
        column[0].set_title(wrapped(recipe, 1.4, 10))
    band = f"mean of {seeds} seeds; band: lowest to highest" if seeds > 1 else "one seed"
    for loss, accuracy, schedule in columns[::across]:
        loss.set_ylabel("loss (nats)\n(axis cut)")
        percent_axis(accuracy.yaxis, "accuracy\n(axis cut)")
        schedule.set(ylabel="rate", ylim=(0, 1.15 * rates["learning_rate"].max()))
        schedule.yaxis.set_major_formatter(lambda value, _: rate(value))
    schedule.xaxis.set_major_formatter(EngFormatter(sep=""))
    drawn[-1, 0].set_xlabel("questions trained on", loc="left")
    title = "Cross-entropy loss and accuracy on validation after each epoch"
    keys = [key(f"the column's recipe ({band})", BLUE, "o", "-", size=3), key(names[0], GREY, "o", "--", size=3)]
    return finish(figure, *keys[: len(names)], chance_key(options, f"ln {options}; "), title=title)
