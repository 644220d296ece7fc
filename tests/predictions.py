"""Made-up predictions: of known letters and confidences, and of a model that guesses."""

import numpy as np
import pandas as pd

from race.score.statistics import KINDS

LETTERS = [*"ABCD"]
PROBABILITIES = [f"p_{letter}" for letter in LETTERS]


def made(answers: str, chosen: str, sure=None, levels=None, **columns) -> pd.DataFrame:
    """Predictions that choose these letters with these confidences (0.25: all options alike)."""
    count = len(answers)
    sure = np.broadcast_to(0.25 if sure is None else sure, count)
    probabilities = np.repeat((1 - sure)[:, None] / 3, 4, axis=1)
    probabilities[np.arange(count), [LETTERS.index(letter) for letter in chosen]] = sure
    table = pd.DataFrame({"example_id": "x", "question_index": range(count), "level": levels or [""] * count})
    table = table.assign(answer=list(answers), prediction=list(chosen))
    table[PROBABILITIES] = probabilities
    not_known = pd.array([pd.NA] * count, dtype="boolean")
    return table.assign(**({"article_in_train": not_known, "article_in_validation": not_known} | columns))


def random_predictions(count: int, seed: int = 0) -> pd.DataFrame:
    """A model that guesses, on made-up questions."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(4), count)
    table = made("".join(rng.choice(LETTERS, count)), "".join(np.take(LETTERS, probabilities.argmax(1))))
    table[PROBABILITIES] = probabilities
    table["level"] = rng.choice(["middle", "high"], count)
    facts = {
        "kind": rng.choice(KINDS, count),
        "article_tokens": rng.integers(50, 900, count),
        "truncated": rng.random(count) < 0.1,
        "article_in_train": pd.array(rng.random(count) < 0.02, dtype="boolean"),
        "article_in_validation": pd.array([False] * count, dtype="boolean"),
        "example_id": [f"{number // 3}" for number in range(count)],
    }
    return table.assign(**facts)


def on_passages(seed: int, icc: float, levels=((350, 0.72), (150, 0.77))) -> pd.DataFrame:
    """Predictions on passages of 2 to 5 questions, with intraclass correlation icc (beta-binomial).

    levels: passages and accuracy of high, then middle.
    """
    rng, parts = np.random.default_rng(seed), []
    for level, (passages, accuracy) in zip(("high", "middle"), levels, strict=True):
        sizes, scale = rng.integers(2, 6, passages), 1 / max(icc, 1e-9) - 1
        rates = np.repeat(rng.beta(accuracy * scale, (1 - accuracy) * scale, passages), sizes)
        correct = rng.random(len(rates)) < rates
        names = np.repeat([f"{level}{number}" for number in range(passages)], sizes)
        parts.append(pd.DataFrame({"example_id": names, "level": level, "prediction": np.where(correct, "A", "B")}))
    return pd.concat(parts, ignore_index=True).assign(answer="A", **dict.fromkeys(PROBABILITIES, 0.25))


def two(both: int, gained: int, lost: int, neither: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two models with so many questions of each outcome, each on an article of its own."""
    first = "A" * both + "B" * gained + "A" * lost + "B" * neither
    second = "A" * (both + gained) + "B" * (lost + neither)
    return tuple(made("A" * len(first), chosen, example_id=range(len(first))) for chosen in (first, second))
