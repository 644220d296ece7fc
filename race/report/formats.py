"""How numbers and names are written in sentences, tables, figures and reports."""

import numpy as np
import pandas as pd

SIGNIFICANT = 0.05  # a p-value below is called significant
RULES = {"val_loss_epoch": "lowest validation loss", "val_acc": "highest validation accuracy"}  # of MONITORS


def percent(value: float) -> str:
    """A fraction as "75.9 %"."""
    return f"{100 * value:.1f} %"


def signed(value: float, digits: int = 1) -> str:
    """A number as "+24.2", "−0.3" or "0.0"."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def points(difference: float) -> str:
    """A difference of two fractions in percentage points, as "+24.2"."""
    return signed(100 * difference)


def interval(low: float, high: float, form=percent) -> str:
    """The two ends as "73.3 % to 78.3 %"; a dash if they are not known."""
    return "–" if pd.isna(low) else f"{form(low)} to {form(high)}"


def questions_of(row: pd.Series) -> str:
    """Of which questions a row of results is: "431 high test questions"."""
    return f"{row['questions']:,} {'' if row['level'] == 'all' else row['level'] + ' '}{row['split']} questions"


def p_value(p: float) -> str:
    """p as "p = 0.032" or "p < 0.001"; rounded, but never across the limit of what is called significant."""
    if p < 0.001:
        return "p < 0.001"
    digits, text = 2, f"{p:.2g}" if p < 0.1 else f"{p:.2f}"
    while (float(text) < SIGNIFICANT) != (p < SIGNIFICANT):
        digits, text = digits + 1, f"{p:.{digits}g}"
    return f"p = {text}"


def rate(learning_rate: float) -> str:
    """A learning rate as "2.5e-5"."""
    return np.format_float_scientific(learning_rate, precision=2, trim="-", exp_digits=1) if learning_rate else "0"


def schedule(recipe: dict) -> str:
    """The schedule of a stage's recipe as "constant", or "linear, warm-up 1000, clipped at 1"."""
    warmup, norm = recipe.get("warmup"), recipe.get("max_grad_norm") or np.inf
    text = recipe.get("schedule", "constant") + (f", warm-up {warmup:g}" if warmup else "")
    return text + (f", clipped at {norm:g}" if np.isfinite(norm) else "")


def listed(names, most: int | None = None) -> str:
    """Names as "a", "a and b", "a, b and c"; of more than `most` the others as "a, b, c and 4 more"."""
    names = list(names)
    if most and len(names) > most:
        names[most:] = [f"{len(names) - most} more"]
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
