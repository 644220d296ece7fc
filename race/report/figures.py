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
from matplotlib.ticker import PercentFormatter

from race import CHANCE, LEVELS
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
    interval = ", 95 % interval" if pairs["ci_low"].notna().any() else ""
    axes.set_xlabel(f"difference of accuracy (percentage points){interval}\n{better}")
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
    also = f" ({row['schedule']})" if row.get("schedule", "constant") not in ("constant", None) else ""
    known = [f"learning rate {rate(row['learning_rate'])}{also}"] if pd.notna(row["learning_rate"]) else []
    known += [form.format(row[name]) for name, form in words.items() if pd.notna(row[name])]
    return ", ".join(known + ["base unknown"] * pd.isna(row["base"])) or "nothing known of its training"
