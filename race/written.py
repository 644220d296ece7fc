"""How numbers and names are written in sentences, tables, figures and reports."""

import numpy as np

SIGNIFICANT = 0.05  # a p-value below is called significant


def percent(value: float) -> str:
    """A fraction as "75.9 %"."""
    return f"{100 * value:.1f} %"


def signed(value: float) -> str:
    """A difference as "+24.2", "−0.3" or "0.0"."""
    text = f"{value:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def p_number(p: float) -> str:
    """p as "0.032", "< 0.001" or "–"; rounded, but never across the limit of what is called significant."""
    if np.isnan(p) or p < 0.001:
        return "–" if np.isnan(p) else "< 0.001"
    digits, text = 2, f"{p:.2g}" if p < 0.1 else f"{p:.2f}"
    while (float(text) < SIGNIFICANT) != (p < SIGNIFICANT):
        digits, text = digits + 1, f"{p:.{digits}g}"
    return text


def p_value(p: float) -> str:
    """p as "p = 0.032" or "p < 0.001"."""
    text = p_number(p)
    return f"p {text}" if text[0] == "<" else f"p = {text}"


def rate(learning_rate: float) -> str:
    """A learning rate as "2.5e-5"."""
    return np.format_float_scientific(learning_rate, precision=2, trim="-", exp_digits=1)


def schedule(recipe: dict) -> str:
    """The schedule of a stage's recipe as "constant", or "linear, warm-up 1000, clipped at 1"."""
    words = [recipe.get("schedule", "constant")]
    words += [f"warm-up {recipe['warmup']:g}"] if recipe.get("warmup") else []
    words += [f"clipped at {recipe['max_grad_norm']:g}"] if np.isfinite(recipe.get("max_grad_norm") or np.inf) else []
    return ", ".join(words)


def significance(p: float) -> str:
    """ "significant" or "not significant"."""
    return "significant" if p < SIGNIFICANT else "not significant"


def listed(names, most: int | None = None) -> str:
    """Names as "a", "a and b", "a, b and c"; more than `most` as "4 others"."""
    *first, last = names
    if most and len(first) >= most:
        return f"{len(first) + 1} others"
    return f"{', '.join(first)} and {last}" if first else last
