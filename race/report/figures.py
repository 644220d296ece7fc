"""One style for all figures, dark on white and readable without colour vision; figures of training and chain."""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from race import CHANCE, LEVELS, MONITORS
from race.files import atomic_write
from race.written import SIGNIFICANT, percent, rate, signed

INK, GREY = "#222222", "#767676"  # text, lines
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"  # Okabe and Ito's palette; a darker purple
MARKS = {"middle": (GREEN, "^"), "high": (PURPLE, "v"), "all": (BLUE, "o")}  # colour and marker of each level
WIDTH = 8.6  # inches of every figure
CHANCE_WORDS = f"chance ({100 * CHANCE:.0f} %)"
STYLE = Path(__file__).with_name("figures.mplstyle")


@plt.style.context(STYLE)
def save_figure(figure: Figure, run_dir: str | Path, name: str) -> Figure:
    """Keep a figure as PNG and SVG in `run_dir`/figures."""
    folder = Path(run_dir) / "figures"
    atomic_write(folder / f"{name}.png", lambda file: figure.savefig(file, dpi=150, format="png"))
    atomic_write(folder / f"{name}.svg", lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
    plt.close(figure)
    return figure


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


def row_figure(labels: list[str], least: float = 0.36) -> tuple:
    """A figure, and its axes with a row for each label."""
    figure, axes = plt.subplots(figsize=(WIDTH, 1.5 + row_height(labels, least) * len(labels)))
    label_rows(axes, labels)
    return figure, axes


def finish(figure: Figure, *keys: Line2D | Patch, title: str | None = None, columns: int = 5) -> Figure:
    """The title from the figure's left edge, in as many lines as it needs, and the legend below everything else."""
    if title:
        figure.suptitle(wrapped(title, WIDTH - 0.3, 11), x=0.01, ha="left")
    figure.legend(handles=keys, loc="outside lower center", ncols=columns)
    return figure


def percent_axis(axis) -> None:
    """Label an axis of fractions as "20 %", "40 %" …"""
    axis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))


def accuracy_axis(axes, label: str, start: float = -0.02) -> None:
    """A horizontal axis from 0 to 100 % with a dotted line at chance; marks at its ends are whole."""
    axes.axvline(CHANCE, color=GREY, linestyle=":", linewidth=1)
    axes.set(xlabel=label, xlim=(start, 1.02))
    percent_axis(axes.xaxis)


def quoted(table: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """The ends of the intervals by passage; where there are too few passages, Wilson's."""
    return tuple(table[f"passage_{end}"].astype(float).fillna(table[f"ci_{end}"]) for end in ("low", "high"))


def whiskers(value: pd.Series, low: pd.Series, high: pd.Series) -> np.ndarray:
    """[2, N] how far intervals reach below and above the values."""
    return np.maximum([value - low, high - value], 0)  # at 0 and 1 rounding may put an end a hair inside


def level_marks(axes, level: str, places, *columns: pd.Series, fill: bool = True) -> None:
    """Accuracies of a level, at these heights, and the ends of their intervals."""
    accuracy, low, high = (column.astype(float) for column in columns)
    color, marker = MARKS[level]
    style = {"color": color, "markerfacecolor": color if fill else "white", "capsize": 3, "markersize": 4.5}
    axes.errorbar(accuracy, places, xerr=whiskers(accuracy, low, high), fmt=marker, linewidth=1.2, **style)


def beside(axes, place: float, text: str) -> None:
    """Words right of the axes, in the row at this height."""
    at = axes.get_yaxis_transform()
    axes.annotate(text, (1, place), (6, 0), at, "offset points", va="center", fontsize=9, annotation_clip=False)


def key(label: str, color: str = GREY, marker: str = "", line: str = "", fill: bool = True, size=5.5) -> Line2D:
    """An entry of a legend."""
    face = color if fill else "white"
    return Line2D([], [], color=color, marker=marker, ls=line, label=label, markerfacecolor=face, markersize=size)


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
    schedule = strips[-1]
    train, validation = log.dropna(subset="train_loss_step"), log.dropna(subset="val_loss_epoch")
    epochs, rates = log.dropna(subset="train_acc"), log.dropna(subset="learning_rate")
    loss.plot(train["step"], train["train_loss_step"], color=GREY, linewidth=0.6)
    loss.plot(train["step"], train["train_loss_step"].ewm(span=max(2, len(train) // 20)).mean(), color=BLUE)
    accuracy.plot(epochs["step"], epochs["train_acc"], "s--", color=BLUE)
    schedule.plot(rates["step"], rates["learning_rate"], color=GREEN)
    found, rule = [f"{stage}: not validated yet", "accuracy"], "lowest validation loss"
    for axes, name, chance in ((loss, "val_loss_epoch", -np.log(CHANCE)), (accuracy, "val_acc", CHANCE)):
        axes.axhline(chance, color=GREY, linestyle=":")
        axes.plot(validation["step"], validation[name], "o-", color=ORANGE)
    if len(validation):
        lowest, highest = (_chosen(validation, it) for it in MONITORS)
        whens = [f"at epoch {row['epoch']:.0f}" for row in (lowest, highest)]
        chosen, when = (highest, whens[1]) if monitor == "val_acc" else (lowest, whens[0])
        found[0] = f"{stage}: lowest validation loss {lowest['val_loss_epoch']:.3f}, {whens[0]} (counted from 0)"
        found[1] = f"validation accuracy {when}: {percent(chosen['val_acc'])}"
        if monitor == "val_acc":
            rule = "highest validation accuracy"
            found[1] = f"{rule}, {when}: {percent(highest['val_acc'])}"
        elif highest["val_acc"] > lowest["val_acc"]:
            found[1] += f"; highest, {whens[1]}: {percent(highest['val_acc'])}"
        _ring(loss, chosen["step"], chosen["val_loss_epoch"], ORANGE)
        _ring(accuracy, chosen["step"], chosen["val_acc"], ORANGE)
    loss.set(title=wrapped(found[0], WIDTH - 1.2, 10), ylabel="cross-entropy (nats)")
    accuracy.set(title=found[1], ylabel="accuracy", ylim=(-0.03, 1.03))
    percent_axis(accuracy.yaxis)
    top, end = rates["learning_rate"].max(), max(log["step"].max(), 1)
    upto = "" if (rates["learning_rate"] == top).all() else "up to "
    schedule.set(title=f"learning rate {upto}{rate(top)}", yticks=(0, top), ylim=(0, 1.3 * top))
    schedule.yaxis.set_major_formatter(lambda value, _: rate(value) if value else "0")
    schedule.set(xlabel="optimizer step", xlim=(-0.03 * end, 1.03 * end), ylabel="rate")
    schedule.xaxis.set_major_locator(MaxNLocator(integer=True))
    schedule.xaxis.set_major_formatter("{x:,.0f}")
    if len(strips) > 1:
        _gradient_norm(strips[0], log.dropna(subset="gradient_norm"), max_grad_norm)
    figure.align_ylabels()
    keys = key("training, each logged step", line="-"), key("training, smoothed", BLUE, line="-")
    keys += key("training (mean over the epoch)", BLUE, "s", "--"), key("validation", ORANGE, "o", "-")
    keys += key(rule, ORANGE, "o", fill=False, size=10), key("chance (ln 4; 25 %)", line=":")
    return finish(figure, *keys, columns=3)


def _gradient_norm(axes, log: pd.DataFrame, most: float | None) -> None:
    """The norm of each logged step's gradient, before it is clipped to `most`."""
    axes.plot(log["step"], log["gradient_norm"], color=GREY, linewidth=0.8)
    title = "gradient norm"
    if most is not None and np.isfinite(most):
        axes.axhline(most, color=ORANGE, linewidth=1)
        share = (log["gradient_norm"] > most).mean()
        title += f" before clipping to {most:g} (line): above it in {100 * share:.0f} % of the logged steps"
    axes.set(title=title, ylabel="norm", yscale="log")


def _chosen(validated: pd.DataFrame, monitor: str, loss: str = "val_loss_epoch") -> pd.Series:
    """The row of the epoch that a rule of selection (one of MONITORS) picks."""
    return validated.loc[validated["val_acc"].idxmax() if monitor == "val_acc" else validated[loss].idxmin()]


def _ring(axes, x: float, y: float, color: str) -> None:
    axes.plot(x, y, "o", markersize=11, markerfacecolor="none", color=color, clip_on=False)


@plt.style.context(STYLE)
def comparison_figure(table: pd.DataFrame, reported: dict[str, float], title: str) -> Figure:
    """Accuracy of checkpoints, a row each (tables.comparison_table); reported: other people's numbers by stage."""
    low, high = quoted(table)
    table = table.assign(all=table["accuracy"], all_low=low, all_high=high)
    theirs, levels = table["stage"].map(reported).astype(float), [it for it in LEVELS if table[it].notna().any()]
    drawn, keys = ["all", *(["reported"] if theirs.notna().any() else []), *levels], []
    figure, axes = row_figure([wrapped(name, 2.4) for name in table["name"]], 0.2 + 0.14 * len(drawn))
    for number, level in enumerate(drawn):
        places = np.arange(len(table)) + 0.2 * (number - (len(drawn) - 1) / 2)
        if level == "reported":
            axes.plot(theirs, places, "x", color=INK)
            keys.append(key("reported by the original authors", INK, "x"))
        else:
            level_marks(axes, level, places, *(table[level + end] for end in ("", "_low", "_high")))
            keys.append(key(level, *MARKS[level]))
    for place, accuracy in enumerate(table["accuracy"]):
        beside(axes, place - 0.1 * (len(drawn) - 1), percent(accuracy))  # level with its mark
    accuracy_axis(axes, "accuracy, 95 % interval by passage (at the right: all questions)")
    return finish(figure, *keys, key(CHANCE_WORDS, line=":"), title=title)


@plt.style.context(STYLE)
def differences_figure(pairs: pd.DataFrame, title: str) -> Figure:
    """Differences of accuracy in points with intervals, a row a pair (comparison.compare_pairs, score.recipes)."""
    names = zip(pairs["second"], pairs["first"], strict=True)
    both = [(second, "\n" if len(second + first) > 24 else " ", first) for second, first in names]
    figure, axes = row_figure([f"{wrapped(second, 2.4)}{gap}− {wrapped(first, 2.2)}" for second, gap, first in both])
    for place, (_, row) in enumerate(pairs.iterrows()):
        middle, low, high = (100 * row[name] for name in ("difference", "ci_low", "ci_high"))
        color, fill = (BLUE, BLUE) if row["p_holm"] < SIGNIFICANT else (ORANGE, "white")
        ends = np.maximum([[middle - low], [high - middle]], 0)
        axes.errorbar(middle, place, xerr=ends, fmt="o", color=color, markerfacecolor=fill, capsize=3)
        counts = f", gained {row['gained']:,}, lost {row['lost']:,}" if "gained" in row else ""
        beside(axes, place, f"{signed(middle)}{counts}")
    axes.axvline(0, color=GREY, linewidth=1)
    better = "right of 0: the one named first is more accurate"
    axes.set_xlabel(f"difference of accuracy (percentage points), 95 % interval\n{better}")
    reach = 110 * np.nanmax(pairs[["difference", "ci_low", "ci_high"]].abs().to_numpy()) or 1
    axes.set_xlim(-reach, reach)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.6g}".replace("-", "−") if value else "0")
    sure, keys = pairs["p_holm"] < SIGNIFICANT, []
    keys += [key(f"filled: significant (Holm p < {SIGNIFICANT})", BLUE, "o")] if sure.any() else []
    keys += [] if sure.all() else [key("hollow: not significant, or not tested", ORANGE, "o", fill=False)]
    return finish(figure, *keys, title=title)


@plt.style.context(STYLE)
def lineage_figure(lineage: pd.DataFrame) -> Figure:
    """Where checkpoints come from (tables.lineage_table): a box each in rows, below its base and further right."""
    rows, boxes = lineage.set_index("name").to_dict("index"), []  # boxes: (name, depth, place of its base)
    named = lineage["base"].map("base: {}".format, na_action="ignore")
    parents = lineage["parent"].where(lineage["parent"].isin(list(rows)), named)

    def add(name: str, depth: int, above: int | None) -> None:
        boxes.append((name, depth, above))
        here = len(boxes) - 1
        for child in lineage.loc[parents == name, "name"]:
            add(child, depth + 1, here)

    for root in parents.fillna(lineage["name"])[~parents.isin(list(rows))].unique():
        add(root, 0, None)
    chain = [name for name, *_ in boxes if name in rows]
    single = all(above == place - 1 for place, (_, _, above) in enumerate(boxes) if place)
    title = wrapped(" → ".join(chain) if single else "Where these checkpoints come from", WIDTH - 0.3, 11)
    figure = plt.figure(figsize=(WIDTH, 1))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))  # in inches, downwards
    axes.text(0.1, 0.1, title, va="top", fontsize=11)
    step, top, places = min(0.5, 2.6 / max(1, *(box[1] for box in boxes))), 0.42 + 0.21 * title.count("\n"), []
    for name, depth, above in boxes:
        left, color = 0.12 + step * depth, BLUE if name in rows else GREY
        shown, words = wrapped(name, 5), wrapped(_settings(rows[name]), 5.4, 8) if name in rows else ""
        below = top + 0.1 + 0.17 * (shown.count("\n") + 1)
        bottom = below + (0.04 + 0.15 * (words.count("\n") + 1) if words else 0)
        style = {"boxstyle": "round,pad=0.04", "facecolor": "none", "edgecolor": color}
        axes.add_patch(FancyBboxPatch((left, top), 5.7, bottom - top, **style))
        axes.text(left + 0.1, top + 0.04, shown, va="top", fontsize=9, weight="bold")
        axes.text(left + 0.1, below, words, va="top", fontsize=8)
        if above is not None:
            turn, middle, line = left - step / 2, (top + bottom) / 2, "-" if boxes[above][0] in rows else "--"
            axes.plot([turn, turn, left - 0.1], [places[above], middle, middle], line, color=GREY, linewidth=1)
            axes.plot(left - 0.1, middle, ">", color=GREY, markersize=5)
        places.append(bottom + 0.04)
        top = bottom + 0.24
    figure.set_figheight(top + 0.2)
    axes.set(xlim=(0, WIDTH), ylim=(top + 0.2, 0))
    axes.axis("off")
    keys = key("base found by its hash", line="-"), key("base known by name only", line="--")
    figure.legend(handles=keys, loc="lower left", ncols=2)
    return figure


def _settings(row: dict) -> str:
    """What a checkpoint remembers of its training; unknown things are left out, except that its base is unknown."""
    words = {"epochs": "epochs trained: {:.0f}", "chosen_epoch": "chosen: epoch {:.0f} (from 0)"}
    words |= {"val_loss": "validation loss {:.3f}"}
    known = [f"learning rate {rate(row['learning_rate'])}"] if pd.notna(row["learning_rate"]) else []
    known += [form.format(row[name]) for name, form in words.items() if pd.notna(row[name])]
    return ", ".join(known + ["base unknown"] * pd.isna(row["base"])) or "nothing known of its training"


@plt.style.context(STYLE)
def story_figure(story: pd.DataFrame) -> Figure:
    """Validation loss and accuracy over all stages, with their learning rates (race.train.logs.learning_story)."""
    stages = dict(list(story.groupby("stage", sort=False)))
    labels = [wrapped(f"{stage}, {rate(part['learning_rate'].iloc[0])}", 1.6) for stage, part in stages.items()]
    strip, start, before = row_height(labels, 0.3) * len(stages), 0, None
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
    reach = whiskers(*(story[name].astype(float) for name in ("val_acc", "val_low", "val_high")))
    accuracy.errorbar(story["questions"], story["val_acc"], yerr=reach, fmt="none", ecolor=BLUE, capsize=3)
    lowest, highest = story.loc[story["val_loss"].idxmin()], story.loc[story["val_acc"].idxmax()]
    when = [f"({row['stage']}, epoch {row['epoch']})" for row in (lowest, highest)]
    loss.set_title(wrapped(f"Lowest validation loss: {lowest['val_loss']:.3f} {when[0]}", 6, 10))
    accuracy.set_title(wrapped(f"Highest validation accuracy: {percent(highest['val_acc'])} {when[1]}", 6, 10))
    spans.set_title("Stages and their learning rates")
    label_rows(spans, labels)
    loss.set(ylabel="cross-entropy (nats)", ymargin=0.12)
    known = ", 95 % interval" if story["val_low"].notna().any() else ""
    accuracy.set(ylabel=f"accuracy{known}\n(axis cut)", ymargin=0.12, xlim=(0, max(start, 1) * 1.03))
    accuracy.set_xlabel("questions trained on, all stages (epochs count from 0)")
    percent_axis(accuracy.yaxis)
    accuracy.xaxis.set_major_formatter(EngFormatter(sep=""))
    keys = key("ring: chosen epoch of its stage", marker="o", fill=False, size=10), key("end of a stage", line="--")
    figure.align_ylabels()
    return finish(figure, *keys, key("from the ring to the next stage's first epoch", line=":"))
