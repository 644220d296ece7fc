"""One style for all figures, dark on white and readable without colour vision; figures of training and chain."""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import PercentFormatter

from race import CHANCE, LEVELS
from race.files import atomic_write
from race.report.formats import SIGNIFICANT, percent, points

INK, GREY = "#222222", "#767676"  # text, lines
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"  # Okabe and Ito's palette; a darker purple
MARKS = {"middle": (GREEN, "^"), "high": (PURPLE, "v"), "all": (BLUE, "o")}  # colour and marker of each level
LOOKS = list(zip((BLUE, ORANGE, GREEN, PURPLE, INK, GREY), "os^vDx", ("-", "--", "-.", ":", "-", "--"), strict=True))
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


@plt.style.context(STYLE)
def comparison_figure(table: pd.DataFrame, reported: dict[str, float], title: str) -> Figure:
    """Accuracy of checkpoints, a row each (tables.comparison_table); reported: other people's numbers by stage."""
    table = table.rename(columns={"accuracy": "all", "accuracy_low": "all_low", "accuracy_high": "all_high"})
    theirs, levels = table["stage"].map(reported).astype(float), [it for it in LEVELS if table[it].notna().any()]
    drawn, keys = ["all", *(["reported"] if theirs.notna().any() else []), *levels], []
    figure, axes = row_figure([wrapped(name, 2.4) for name in table["name"]], 0.2 + 0.14 * len(drawn))
    for number, level in enumerate(drawn):
        places = np.arange(len(table)) + 0.2 * (number - (len(drawn) - 1) / 2)
        if level == "reported":
            axes.plot(theirs, places, "x", color=INK)
            keys.append(key("reported by the original authors", INK, "x"))
        else:
            marks(axes, MARKS[level], places, *(table[level + end] for end in ("", "_low", "_high")))
            keys.append(key(level, *MARKS[level]))
    for place, accuracy in enumerate(table["all"]):
        beside(axes, place - 0.1 * (len(drawn) - 1), percent(accuracy))  # level with its mark
    accuracy_axis(axes, "accuracy, 95 % interval by passage (at the right: all questions)")
    return finish(figure, *keys, key(CHANCE_WORDS, line=":"), title=title)


@plt.style.context(STYLE)
def differences_figure(pairs: pd.DataFrame, title: str) -> Figure:
    """Differences of accuracy in points with intervals, a row a pair: of checkpoints (compare_pairs) or of recipes."""
    names = zip(pairs["second"], pairs["first"], strict=True)
    both = [(second, "\n" if len(second + first) > 24 else " ", first) for second, first in names]
    figure, axes = row_figure([f"{wrapped(second, 2.4)}{gap}− {wrapped(first, 2.2)}" for second, gap, first in both])
    sure, keys = pairs["p_holm"] < SIGNIFICANT, []
    filled, hollow = f"filled: significant (Holm p < {SIGNIFICANT})", "hollow: not significant, or not tested"
    for rows, color, words in ((sure, BLUE, filled), (~sure, ORANGE, hollow)):
        if rows.any():
            columns = (100 * pairs.loc[rows, name] for name in ("difference", "ci_low", "ci_high"))
            marks(axes, (color, "o"), np.flatnonzero(rows), *columns, fill=color == BLUE, size=6, line=1.5)
            keys.append(key(words, color, "o", fill=color == BLUE))
    for place, (_, row) in enumerate(pairs.iterrows()):
        counts = f", gained {row['gained']:,}, lost {row['lost']:,}" if "gained" in row else ""
        beside(axes, place, f"{points(row['difference'])}{counts}")
    axes.axvline(0, color=GREY, linewidth=1)
    known = ", 95 % interval" if pairs["ci_low"].notna().any() else ""
    better = "right of 0: the one named first is more accurate"
    axes.set_xlabel(f"difference of accuracy (percentage points){known}\n{better}")
    reach = 110 * np.nanmax(pairs[["difference", "ci_low", "ci_high"]].abs().to_numpy()) or 1
    axes.set_xlim(-reach, reach)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.6g}".replace("-", "−") if value else "0")
    return finish(figure, *keys, title=title)
