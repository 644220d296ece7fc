"""The questions themselves, to read in a notebook: cards with article, options and probabilities, and filters.

The cards are plain <details> elements, which every viewer shows. A script adds the filters: where none is run, as in a
notebook that JupyterLab does not trust, the cards are there without styles and filters.
"""

import hashlib
import json
from html import escape

import numpy as np
import pandas as pd
from IPython.display import HTML

from race_data import RaceDataset
from race_statistics import KINDS, LETTERS, PROBABILITIES, confidence, is_right, share

MOST_BYTES = 1_500_000  # of embedded questions: a saved notebook stays small enough to open
SURENESS = {"under 50 %": (0.0, 0.5), "50 to 90 %": (0.5, 0.9), "90 % and more": (0.9, 1.01)}

CSS = """
.race-cards details {border-top: 1px solid #80808066; padding: .3em 0}
.race-cards summary, .race-head {display: flex; gap: 1em; align-items: baseline}
.race-cards summary {cursor: pointer} .race-head {opacity: .75; padding-bottom: .3em}
.race-cards .field {flex: none; width: 5em} .race-cards .kind {flex: none; width: 10.5em}
.race-cards .question {flex: auto}
.race-cards p {white-space: pre-line; max-width: 50em; margin: .6em 0}
.race-cards .option {display: flex; gap: .6em; align-items: baseline; max-width: 50em}
.race-cards .bar {flex: none; width: 8em} .race-cards .bar span {display: block; height: .7em}
.race-cards .number {flex: none; width: 4em; text-align: right}
.race-filters {display: flex; flex-wrap: wrap; gap: 1em; margin: .5em 0}
.race-filters select {color: inherit; background: transparent; border: 1px solid #808080}
.race-filters option {color: #000; background: #fff}
"""

HEAD = (
    '<div class="race-head"><span class="field">answer</span> <span class="field">confidence</span> '
    '<span class="field">level</span> <span class="kind">kind</span> <span class="question">question</span></div>'
)

SCRIPT = """
for (const root of document.querySelectorAll('[data-race-browser="NAME"]')) {
  const filters = root.querySelector(".race-filters"), cards = [...root.querySelectorAll("details")];
  const show = () => {
    const wanted = [...filters.querySelectorAll("select")].filter(select => select.value);
    let shown = 0;
    for (const card of cards) {
      const fits = wanted.every(select => card.dataset[select.name] === select.value);
      card.style.display = fits ? "" : "none";
      shown += fits;
    }
    filters.querySelector("output").textContent = `${shown} of ${cards.length} shown`;
  };
  filters.innerHTML = MENUS;
  filters.addEventListener("change", show);
  show();
}
"""


def confident_mistakes(predictions: pd.DataFrame, count: int = 10) -> np.ndarray:
    """The rows of the wrong answers with the highest confidence, highest first."""
    wrong = np.flatnonzero(~is_right(predictions))
    return wrong[np.argsort(-confidence(predictions)[wrong], kind="stable")][:count]


def mistake_cards(predictions: pd.DataFrame, dataset: RaceDataset, count: int = 10) -> HTML:
    """The most confident mistakes as cards; a click opens one. dataset: the questions behind the predictions."""
    rows = confident_mistakes(predictions, count)
    if not len(rows):
        return HTML("<p>No mistakes.</p>")
    cards = "".join(_card(predictions, dataset, int(row)) for row in rows)
    return HTML(f'<style>{CSS}</style><div class="race-cards">{HEAD}{cards}</div>')


def error_browser(
    predictions: pd.DataFrame, dataset: RaceDataset, mistakes: int = 150, right: int = 50, seed: int = 0
) -> HTML:
    """Questions to read, with filters: all mistakes or a sample of `mistakes`, and a sample of `right` right answers.

    Mistakes come first, the most confident first; then right answers, the least confident first. `dataset`: the
    questions behind the predictions, in the same order; raises ValueError where it is another.
    """
    rows = browsed_rows(predictions, mistakes, right, seed)
    cards, size = [], 0
    for row in rows:
        card = _card(predictions, dataset, int(row))
        size += len(card.encode())
        if size > MOST_BYTES:
            break
        cards.append(card)
    wrong = ~is_right(predictions)
    shown = int(wrong[rows[: len(cards)]].sum())
    good = f"{len(cards) - shown:,} of {int((~wrong).sum()):,} right answers"
    counts = f"{shown:,} of {int(wrong.sum()):,} mistakes and {good}, drawn at random where not all are here."
    name = hashlib.sha256("".join(cards).encode()).hexdigest()[:12]
    return HTML(
        f'<style>{CSS}</style><div class="race-cards" data-race-browser="{name}">'
        f'<p>{counts} A click opens one.</p><div class="race-filters"></div>{HEAD}'
        f'<div style="max-height: 36em; overflow-y: auto">{"".join(cards)}</div></div>'
        f"<script>{{{SCRIPT.replace('NAME', name).replace('MENUS', json.dumps(_menus(predictions)))}}}</script>"
    )


def browsed_rows(predictions: pd.DataFrame, mistakes: int, right: int, seed: int) -> np.ndarray:
    """The rows that the browser shows, in its order; the ten most confident mistakes are always among them."""
    rng, sure, correct = np.random.default_rng(seed), confidence(predictions), is_right(predictions)
    first = confident_mistakes(predictions)[:mistakes]
    others = np.setdiff1d(np.flatnonzero(~correct), first)
    drawn = rng.choice(others, min(len(others), mistakes - len(first)), replace=False)
    wrong = np.concatenate([first, drawn]).astype(int)
    good = np.flatnonzero(correct)
    good = rng.choice(good, min(len(good), right), replace=False).astype(int)
    wrong, good = wrong[np.argsort(-sure[wrong], kind="stable")], good[np.argsort(sure[good], kind="stable")]
    return np.concatenate([wrong, good])


def _menus(predictions: pd.DataFrame) -> str:
    """The filters; their words are this module's own, so none of them can end the script that holds them."""
    levels = [level for level in ("middle", "high") if (predictions["level"] == level).any()]
    kinds = [kind for kind in KINDS if (predictions["kind"] == kind).any()]
    choices = {"answer": ["wrong", "right"], "level": levels, "kind": kinds, "confidence": list(SURENESS)}
    menus = []
    for name, values in choices.items():
        options = "".join(f'<option value="{escape(value)}">{escape(value)}</option>' for value in values)
        menus.append(f'<label>{name} <select name="{name}"><option value="">all</option>{options}</select></label>')
    return f"{''.join(menus)}<output></output>"


def _card(predictions: pd.DataFrame, dataset: RaceDataset, row: int) -> str:
    """One question as <details>; every text of the data is escaped."""
    answer, text = predictions.iloc[row], dataset.text(row)
    if (answer["example_id"], answer["question_index"]) != (text["example_id"], text["question_index"]):
        raise ValueError(
            f"row {row} is question {answer['question_index']} of {answer['example_id']}, but the dataset has "
            f"{text['example_id']} there: open it with the split, LIMIT_QUESTIONS and SEED of the predictions"
        )
    probabilities = answer[PROBABILITIES].to_numpy(float)
    sure, right = probabilities.max(), answer["answer"] == answer["prediction"]
    verdict = "right" if right else "wrong"
    bin_name = next(name for name, (low, high) in SURENESS.items() if low <= sure < high)
    data = {"answer": verdict, "level": answer["level"], "kind": answer["kind"], "confidence": bin_name}
    attributes = " ".join(f'data-{name}="{escape(value)}"' for name, value in data.items())
    fields = ("field", f"{'✓' if right else '✗'} {verdict}"), ("field", share(sure)), ("field", answer["level"])
    fields += (("kind", answer["kind"]),)
    head = " ".join(f'<span class="{name}">{escape(content)}</span>' for name, content in fields)
    chosen, correct = (text["options"][LETTERS.index(answer[column])] for column in ("prediction", "answer"))
    choice = "" if right else f"<br><small>chosen: “{escape(chosen)}”, right: “{escape(correct)}”</small>"
    head += f' <span class="question">{escape(text["question"])}{choice}</span>'
    options = "".join(
        _option(letter, option, probability, letter == answer["answer"], letter == answer["prediction"])
        for letter, option, probability in zip(LETTERS, text["options"], probabilities, strict=True)
    )
    place = f"<small>{escape(text['example_id'])}, question {text['question_index'] + 1}</small>"
    return f"<details {attributes}><summary>{head}</summary><p>{escape(text['article'])}</p>{options}{place}</details>"


def _option(letter: str, option: str, probability: float, is_answer: bool, is_chosen: bool) -> str:
    color = "#009E73" if is_answer else "#D55E00" if is_chosen else "#808080"
    notes = [note for note, holds in (("right answer", is_answer), ("chosen", is_chosen)) if holds]
    words = f"{letter}. {escape(option)}" + (f" — <strong>{', '.join(notes)}</strong>" if notes else "")
    bar = f'<span class="bar"><span style="width: {100 * probability:.1f}%; background: {color}"></span></span>'
    return f'<div class="option">{bar} <span class="number">{share(probability)}</span> <span>{words}</span></div>'
