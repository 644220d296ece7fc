"""The questions themselves, to read in a notebook: cards with article, options and probabilities, and filters.

The cards are plain <details> elements. A script adds the filters, except in a notebook that JupyterLab does not trust.
"""

import hashlib
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import HTML

from race import LETTERS, RaceError
from race.report.formats import percent
from race.score.statistics import PROBABILITIES, confidence, is_correct

CONFIDENCES = {"under 50 %": 0.5, "50 to 90 %": 0.9, "90 % and more": np.inf}  # below what
COLORS = {"correct answer": "#009E73", "chosen": "#D55E00", "": "#808080"}  # of an option's bar
CSS, SCRIPT = (Path(__file__).with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
FIELDS = '<span class="field">{}</span> ' * 3 + '<span class="kind">{}</span> <span class="question">{}</span>'
HEAD = f'<div class="race-head">{FIELDS.format("answer", "confidence", "level", "kind", "question")}</div>'


def error_browser(predictions: pd.DataFrame, dataset) -> HTML:
    """Questions to read, with filters: all mistakes and correct answers, or a sample (`browsed_rows`).

    Mistakes come first, the surest first; then correct answers. Raises RaceError if `dataset` has other questions.
    """
    rows, is_good = browsed_rows(predictions), is_correct(predictions)
    cards = "".join(_card(predictions, dataset, int(row)) for row in rows)
    mistakes = f"{(~is_good[rows]).sum():,} of {(~is_good).sum():,} mistakes"
    correct = f"{is_good[rows].sum():,} of {is_good.sum():,} correct answers"
    name = hashlib.sha256(cards.encode()).hexdigest()[:12]
    script = SCRIPT.replace("NAME", name)
    return HTML(
        f'<style>{CSS}</style><div class="race-cards" data-race-browser="{name}"><p>{mistakes} and {correct} '
        f'(the ten most confident mistakes, others drawn). A click opens one.</p><div class="race-filters"></div>{HEAD}'
        f'<div style="max-height: 20em; overflow-y: auto">{cards}</div></div><script>{{{script}}}</script>'
    )


def browsed_rows(predictions: pd.DataFrame, mistakes: int = 150, correct: int = 50) -> np.ndarray:
    """The rows that the browser shows, in its order; the ten most confident mistakes are always among them."""
    rng, order = np.random.default_rng(0), np.argsort(-confidence(predictions), kind="stable")
    is_good = is_correct(predictions)[order]
    wrong, good = order[~is_good], order[is_good][::-1]
    others = np.sort(rng.permutation(wrong[10:].size)[: mistakes - 10]) + 10
    return np.concatenate([wrong[:10], wrong[others], good[np.sort(rng.permutation(good.size)[:correct])]])


def _card(predictions: pd.DataFrame, dataset, row: int) -> str:
    """One question as <details>; every text of the data is escaped."""
    answer, text = predictions.iloc[row], dataset.text(row)
    if (answer["example_id"], answer["question_index"]) != (text["example_id"], text["question_index"]):
        question = f"row {row} of the predictions, {answer['example_id']}, is {text['example_id']} in the dataset"
        raise RaceError(f"{question}: open it with their split, LIMIT_QUESTIONS and SEED")
    sure, is_good = answer.filter(items=PROBABILITIES).max(), answer["answer"] == answer["prediction"]
    data = {"answer": "correct" if is_good else "wrong", "level": answer["level"], "kind": answer["kind"]}
    data |= {"confidence": next(name for name, end in CONFIDENCES.items() if sure < end)}
    attributes = " ".join(f'data-{name}="{escape(value)}"' for name, value in data.items())
    chosen, correct = (escape(text["options"][LETTERS.index(answer[column])]) for column in ("prediction", "answer"))
    choice = "" if is_good else f"<br><small>chosen: “{chosen}”, correct: “{correct}”</small>"
    fields = f"{'✓' if is_good else '✗'} {data['answer']}", percent(sure), escape(data["level"]), escape(data["kind"])
    head = FIELDS.format(*fields, escape(text["question"]) + choice)
    options = ""
    for letter, option in zip(LETTERS, text["options"], strict=False):
        notes = ["correct answer"] * (letter == answer["answer"]) + ["chosen"] * (letter == answer["prediction"])
        words = f"{letter}. {escape(option)}" + (f" — <strong>{', '.join(notes)}</strong>" if notes else "")
        width, color = f"{100 * answer[f'p_{letter}']:.1f}%", COLORS[notes[0] if notes else ""]
        bar = f'<span class="bar"><span style="width: {width}; background: {color}"></span></span>'
        number = f'<span class="number">{percent(answer[f"p_{letter}"])}</span>'
        options += f'<div class="option">{bar} {number} <span>{words}</span></div>'
    place = f"<small>{escape(text['example_id'])}, question {text['question_index'] + 1}</small>"
    return f"<details {attributes}><summary>{head}</summary><p>{escape(text['article'])}</p>{options}{place}</details>"
