"""Statistics on a table of predictions: intervals, groups, letters, calibration. Numbers only; no model is needed."""

import re

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import binomtest, chi2, rankdata

from race import CHANCE, LETTERS, LEVELS

PROBABILITIES = [f"p_{letter}" for letter in LETTERS]
GROUP_COLUMNS = ["group", "questions", "correct", "accuracy", "ci_low", "ci_high"]
SIGNIFICANT = 0.05  # a p-value below is called significant
BINS = 10  # of equal width, for confidence
TEMPERATURES = 0.05, 20.0  # the range that is searched
COVERAGES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.2)  # fractions of the questions that are answered
FEW = 20  # questions; a group with fewer is shown, and never named as the hardest
# kind → (rule in words, pattern or None); the first rule that fits counts
KIND_RULES = {
    "negated": (
        "says NOT or Not, except, or which … not",
        r"\b(NOT|Not)\b|(?i:\bexcept\b)|(?i:\bwhich\b.*(\bnot\b|n['’]t\b))",
    ),
    "main idea or title": (
        "asks for a title, a main or general idea, topic or purpose, or what a text is mainly about",
        r"(?i)\b(title|headline|main (idea|point|topic|theme|purpose|subject)|(general|central) idea|topic of"
        r"|(mainly|mostly) (about|discuss\w*|talk\w*|tell\w*|deal\w*|concern\w*|focus\w*|introduc\w*|describ\w*)"
        r"|purpose of (the|this|writing)|(passage|text|article|story) is (about|mainly))\b",
    ),
    "cloze": ("has a blank, _", "_"),
    "why": ("its first question word is why", None),
    "how": ("its first question word is how", None),
    "what": ("its first question word is what", None),
    "which": ("its first question word is which", None),
    "who, when, where": ("its first question word is who, whom or whose; or it has none but when or where", None),
    "other": ("everything else", None),
}
KINDS = list(KIND_RULES)


def kind_of_question(question: str) -> str:
    """One of KINDS. When and where count last: they often begin a clause of a question that asks for something else."""
    for kind, (_, pattern) in KIND_RULES.items():
        if pattern and re.search(pattern, question):
            return kind
    asked = re.search(r"\b(why|how|what|which|who|whom|whose)\b", question.lower())
    if asked and asked[0] in KIND_RULES:
        return asked[0]
    return "who, when, where" if asked or re.search(r"\b(when|where)\b", question.lower()) else "other"


def is_correct(predictions: pd.DataFrame) -> np.ndarray:
    """[N] whether each question is answered correctly."""
    return (predictions["answer"] == predictions["prediction"]).to_numpy(bool)


def wilson(correct: int, questions: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    interval = binomtest(int(correct), int(questions)).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


def above_chance(correct: int, questions: int) -> float:
    """p of the exact one-sided binomial test of an accuracy against chance."""
    return float(binomtest(int(correct), int(questions), CHANCE, alternative="greater").pvalue)


def mcnemar(gained: int, lost: int) -> float:
    """p of the exact two-sided McNemar test on the questions on which exactly one of two is correct."""
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def accuracy_by(predictions: pd.DataFrame, groups, order: list | None = None) -> pd.DataFrame:
    """GROUP_COLUMNS with Wilson intervals by group ([N] names, or missing); groups without questions are left out."""
    groups = pd.Series(np.asarray(groups, dtype=object))
    counts = pd.Series(is_correct(predictions)).groupby(groups).agg(["size", "sum"])
    if order is not None:
        counts = counts.loc[[group for group in order if group in counts.index]]
    rows = [[group, n, k, k / n, *wilson(k, n)] for group, n, k in counts.itertuples()]
    return pd.DataFrame(rows, columns=GROUP_COLUMNS)


def macro_accuracy(predictions: pd.DataFrame) -> tuple[float, float, float] | None:
    """Mean of the levels' accuracies with its 95 % interval, or None if no level is known.

    The interval combines the levels' Wilson intervals (Zou and Donner 2008, Statistics in Medicine 27:1693).
    """
    levels = accuracy_by(predictions, predictions["level"], list(LEVELS))
    if levels.empty:
        return None
    mean, count = float(levels["accuracy"].mean()), len(levels)
    below, above = (
        float(np.sqrt(((levels["accuracy"] - levels[end]) ** 2).sum())) / count for end in ("ci_low", "ci_high")
    )
    return mean, mean - below, mean + above


def length_groups(tokens, count: int = 5) -> tuple[np.ndarray, list[str]]:
    """[N] names such as "101–200" of `count` groups of about equally many questions, and their order."""
    tokens = np.asarray(tokens)
    place = np.ceil(rankdata(tokens, "max") / len(tokens) * count - 1e-9)  # equal lengths stay together
    ends = pd.Series(tokens).groupby(place).agg(["min", "max"])
    names = [f"{low}–{high}" if low < high else f"{low}" for low, high in ends.to_numpy()]
    return np.array(names, dtype=object)[np.unique(place, return_inverse=True)[1]], names


def group_accuracies(predictions: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Accuracy by what a question is like: {name of the grouping: table}."""
    lengths, order = length_groups(predictions["article_tokens"])
    truncated = predictions["truncated"].map({True: "truncated", False: "not truncated"})
    tables = {
        "kind of question": accuracy_by(predictions, predictions["kind"], KINDS),
        "article length (tokens)": accuracy_by(predictions, lengths, order),
        "sequence": accuracy_by(predictions, truncated, ["not truncated", "truncated"]),
        "correct answer": accuracy_by(predictions, predictions["answer"], LETTERS),
    }
    if predictions["article_in_train"].notna().any():
        seen = predictions["article_in_train"].map({True: "also in train", False: "not in train"})
        tables["article"] = accuracy_by(predictions, seen, ["not in train", "also in train"])
    return tables


def hardest_group(table: pd.DataFrame) -> pd.Series | None:
    """The group with the lowest accuracy among those with FEW questions or more, or None if there are not two."""
    enough = table[table["questions"] >= FEW]
    return enough.loc[enough["accuracy"].idxmin()] if len(enough) > 1 else None


def confusion(predictions: pd.DataFrame) -> np.ndarray:
    """[4, 4] counts: correct answers in rows, predictions in columns."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(predictions["answer"], predictions["prediction"], labels=LETTERS)


def letter_counts(predictions: pd.DataFrame) -> pd.DataFrame:
    """How often each letter is the correct one, and how often it is chosen: counts and fractions of all questions."""
    counts = confusion(predictions)
    table = pd.DataFrame({"letter": LETTERS, "right": counts.sum(1), "chosen": counts.sum(0)})
    return table.assign(**{f"{name}_share": table[name] / counts.sum() for name in ("right", "chosen")})


def letter_test(predictions: pd.DataFrame) -> tuple[float, int, float]:
    """Are letters chosen as often as they are correct? Stuart and Maxwell's χ², its degrees of freedom, and p.

    The choice and the correct answer belong to the same question: the test is paired (Maxwell 1970, British Journal of
    Psychiatry 116:651). Not statsmodels' SquareTable.homogeneity: it gives NaN if the covariance is singular, as it is
    where a letter is in no wrong answer, and a p of 0 for every χ² beyond 80 or so.
    """
    counts = confusion(predictions).astype(float)
    difference = (counts.sum(0) - counts.sum(1))[:-1]
    covariance = (np.diag(counts.sum(0) + counts.sum(1)) - counts - counts.T)[:-1, :-1]
    freedom = int(np.linalg.matrix_rank(covariance))
    if freedom == 0:  # every answer is correct
        return 0.0, 0, 1.0
    statistic = float(difference @ np.linalg.pinv(covariance, hermitian=True) @ difference)
    return statistic, freedom, float(chi2.sf(statistic, freedom))


def longest_option_test(predictions: pd.DataFrame) -> tuple[float, float, float]:
    """The longest option: how often it is chosen, how often it is correct (fractions), and McNemar's p of the two."""
    chosen = (predictions["prediction"] == predictions["longest_option"]).to_numpy(bool)
    correct = (predictions["answer"] == predictions["longest_option"]).to_numpy(bool)
    p = mcnemar(int((chosen & ~correct).sum()), int((correct & ~chosen).sum()))
    return float(chosen.mean()), float(correct.mean()), p


def confidence(predictions: pd.DataFrame) -> np.ndarray:
    """[N] the probability of the chosen option."""
    return predictions[PROBABILITIES].to_numpy().max(1)


def reliability(predictions: pd.DataFrame) -> pd.DataFrame:
    """Mean confidence, accuracy and its Wilson interval in BINS bins of equal width over (0, 1], if not empty.

    Not scikit-learn's calibration_curve: it does not count the questions in a bin, which the intervals need.
    """
    sure, edges = confidence(predictions), np.linspace(0, 1, BINS + 1)
    place = np.searchsorted(edges[1:-1], sure)  # a value on an edge belongs to the bin below
    table = accuracy_by(predictions, place)
    bins = table.pop("group").to_numpy(int)
    mean = pd.Series(sure).groupby(place).mean().to_numpy()
    return table.assign(low=edges[bins], high=edges[bins + 1], confidence=mean)


def calibration_error(predictions: pd.DataFrame) -> float:
    """Expected calibration error: |accuracy − mean confidence| of each bin, weighted by its questions."""
    table = reliability(predictions)
    return float((table["questions"] * (table["accuracy"] - table["confidence"]).abs()).sum() / len(predictions))


def log_loss(predictions: pd.DataFrame) -> float:
    """Mean negative log-likelihood of the correct answers, in nats; ln 4 = 1.386 is chance."""
    from sklearn import metrics

    return float(metrics.log_loss(predictions["answer"], y_proba=predictions[PROBABILITIES], labels=LETTERS))


def fit_temperature(predictions: pd.DataFrame) -> float:
    """The temperature in TEMPERATURES with the lowest log loss (Guo et al. 2017); above 1: the model is too confident.

    Not by `log_loss`: scikit-learn cuts probabilities off at 2e-16, where the search would find no slope.
    """
    logits = _log_probabilities(predictions)
    answers = np.arange(len(predictions)), predictions["answer"].map(LETTERS.index).to_numpy()

    def loss(log_temperature: float) -> float:
        return -log_softmax(logits / np.exp(log_temperature), axis=1)[answers].mean()

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-8})
    return float(np.exp(found.x))


def at_temperature(predictions: pd.DataFrame, temperature: float) -> pd.DataFrame:
    """The predictions with logits divided by `temperature`: other probabilities, the same answers."""
    changed = predictions.copy()
    changed[PROBABILITIES] = np.exp(log_softmax(_log_probabilities(predictions) / temperature, axis=1))
    return changed


def _log_probabilities(predictions: pd.DataFrame) -> np.ndarray:
    return np.log(np.maximum(predictions[PROBABILITIES].to_numpy(), np.finfo(float).tiny))


def calibration_table(versions: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Log loss, calibration error and mean confidence beside accuracy, a row for each named table of predictions."""
    rows = [
        [name, log_loss(table), calibration_error(table), confidence(table).mean(), is_correct(table).mean()]
        for name, table in versions.items()
    ]
    return pd.DataFrame(rows, columns=["", "log_loss", "calibration_error", "confidence", "accuracy"])


def coverage_curve(predictions: pd.DataFrame) -> pd.DataFrame:
    """Accuracy if only the most confident questions are answered: threshold, coverage (fraction answered), accuracy.

    Questions of the same confidence are answered together, so their order cannot flatter the curve.
    """
    by_confidence = pd.Series(is_correct(predictions)).groupby(-confidence(predictions))
    counts = by_confidence.agg(questions="size", correct="sum").cumsum().rename_axis("threshold").reset_index()
    rates = {"coverage": counts["questions"] / len(predictions), "accuracy": counts["correct"] / counts["questions"]}
    return counts.assign(threshold=-counts["threshold"], **rates)


def coverage_groups(curve: pd.DataFrame, coverages=COVERAGES) -> pd.DataFrame:
    """GROUP_COLUMNS and threshold if at least these fractions of the questions are answered, most confident first."""
    points = curve.iloc[np.searchsorted(curve["coverage"], np.array(coverages) - 1e-12)].reset_index(drop=True)
    ends = np.array([wilson(row.correct, row.questions) for row in points.itertuples()])
    names = [f"most confident {100 * coverage:.0f} %" for coverage in points["coverage"]]
    return points.assign(group=names, ci_low=ends[:, 0], ci_high=ends[:, 1])[[*GROUP_COLUMNS, "threshold"]]
