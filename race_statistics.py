"""Statistics on a table of predictions: intervals, groups, letters, confidence. No model is needed here."""

import re

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, chi2

from race_sources import LEVELS

LETTERS = list("ABCD")
PROBABILITIES = [f"p_{letter}" for letter in LETTERS]
GROUP_COLUMNS = ["group", "questions", "correct", "accuracy", "ci_low", "ci_high"]
BINS = 10  # of equal width, for confidence
TEMPERATURES = 0.05, 20.0  # the range that is searched
FEW = 20  # questions; a group with fewer is shown, and never named as the best or the worst

# kind of question -> (rule in words, pattern or None); the first rule that fits counts
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


# -------------------------------------------------------------------------------------------------- accuracy


def is_right(predictions: pd.DataFrame) -> np.ndarray:
    """[N] whether each question is answered rightly."""
    return (predictions["answer"] == predictions["prediction"]).to_numpy(bool)


def wilson(correct: int, questions: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion; (0, 1) where there are no questions."""
    if questions == 0:
        return 0.0, 1.0
    interval = binomtest(int(correct), int(questions)).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


def accuracy_by(predictions: pd.DataFrame, groups, order: list | None = None) -> pd.DataFrame:
    """Questions, correct, accuracy and Wilson interval by group ([N] names, or missing), empty groups absent."""
    right = pd.Series(is_right(predictions))
    groups = pd.Series(np.asarray(groups, dtype=object))
    rows = []
    for group in order if order is not None else sorted(groups.dropna().unique()):
        answers = right[(groups == group).to_numpy()]
        if len(answers):
            correct = int(answers.sum())
            rows.append([group, len(answers), correct, correct / len(answers), *wilson(correct, len(answers))])
    return pd.DataFrame(rows, columns=GROUP_COLUMNS)


def macro_accuracy(predictions: pd.DataFrame) -> tuple[float, float, float] | None:
    """Mean of the levels' accuracies with its 95 % interval, or None where no level is known.

    The interval puts the levels' Wilson intervals together (Zou and Donner 2008, Statistics in Medicine 27:1693).
    """
    levels = accuracy_by(predictions, predictions["level"], list(LEVELS))
    if levels.empty:
        return None
    mean, count = levels["accuracy"].mean(), len(levels)
    below, above = (
        float(np.sqrt(((levels["accuracy"] - levels[end]) ** 2).sum())) / count for end in ("ci_low", "ci_high")
    )
    return float(mean), mean - below, mean + above


def confusion(predictions: pd.DataFrame) -> pd.DataFrame:
    """[4, 4] counts: right answers in rows, predictions in columns."""
    table = pd.crosstab(predictions["answer"], predictions["prediction"])
    return table.reindex(index=LETTERS, columns=LETTERS, fill_value=0)


def length_groups(tokens, count: int = 5) -> tuple[np.ndarray, list[str]]:
    """[N] names such as "101–200" of `count` groups with about equally many questions each, and their order."""
    tokens = np.asarray(tokens)
    share = np.searchsorted(np.sort(tokens), tokens, side="right") / len(tokens)  # equal lengths stay together
    place, names = np.ceil(share * count - 1e-9), {}
    for group in np.unique(place):
        low, high = tokens[place == group].min(), tokens[place == group].max()
        names[group] = f"{low}–{high}" if low < high else f"{low}"
    return np.array([names[group] for group in place], dtype=object), list(names.values())


def group_accuracies(predictions: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Accuracy by what a question is like: {what the groups are: table}; needs the columns that `predict` adds."""
    lengths, order = length_groups(predictions["article_tokens"])
    truncated = predictions["truncated"].map({True: "truncated", False: "whole"})
    tables = {
        "kind of question": accuracy_by(predictions, predictions["kind"], KINDS),
        "article length (tokens)": accuracy_by(predictions, lengths, order),
        "sequence": accuracy_by(predictions, truncated, ["whole", "truncated"]),
        "right answer": accuracy_by(predictions, predictions["answer"], LETTERS),
    }
    if predictions["article_in_train"].notna().any():
        seen = predictions["article_in_train"].map({True: "also in train", False: "not in train"})
        tables["article"] = accuracy_by(predictions, seen, ["not in train", "also in train"])
    return tables


def overlap_sentence(predictions: pd.DataFrame) -> str:
    """How many sequences are truncated and how many articles also occur in train, and accuracy without the latter."""
    cut = int(predictions["truncated"].sum())
    text = f"{cut:,} of {len(predictions):,} questions have a truncated sequence. "
    if predictions["article_in_train"].isna().any():
        return text + "Whether articles also occur in train is not known here."
    seen = predictions["article_in_train"].to_numpy(bool)
    text += f"{int(seen.sum()):,} have an article that also occurs in train"
    if not seen.any() or seen.all():
        return f"{text}."
    row = accuracy_by(predictions[~seen], np.full((~seen).sum(), "all")).iloc[0]
    interval = f"{share(row['ci_low'])} to {share(row['ci_high'])}"
    return f"{text}; without them the accuracy is {share(row['accuracy'])} (95 % interval {interval})."


def hardest_group(table: pd.DataFrame) -> pd.Series | None:
    """The group with the lowest accuracy among those with FEW questions or more, or None."""
    enough = table[table["questions"] >= FEW]
    return enough.loc[enough["accuracy"].idxmin()] if len(enough) > 1 else None


# -------------------------------------------------------------------------------------------------- likings


def letter_counts(predictions: pd.DataFrame) -> pd.DataFrame:
    """How often each letter is right, and how often it is chosen: counts and shares of all questions."""
    counts = {
        name: predictions[column].value_counts().reindex(LETTERS, fill_value=0)
        for name, column in (("right", "answer"), ("chosen", "prediction"))
    }
    table = pd.DataFrame(counts)
    return table.assign(**{f"{name}_share": table[name] / max(1, len(predictions)) for name in counts})


def letter_test(predictions: pd.DataFrame) -> tuple[float, int, float]:
    """Are letters chosen as often as they are right? Stuart and Maxwell's χ², its degrees of freedom, and p.

    Choice and right answer belong to the same question, so only wrong answers tell: a test of two independent samples
    would see too little (Maxwell 1970, British Journal of Psychiatry 116:651).
    """
    counts = confusion(predictions).to_numpy(float)
    difference = (counts.sum(0) - counts.sum(1))[:-1]
    covariance = (np.diag(counts.sum(0) + counts.sum(1)) - counts - counts.T)[:-1, :-1]
    freedom = int(np.linalg.matrix_rank(covariance))
    if freedom == 0:  # every answer is right
        return 0.0, 0, 1.0
    statistic = float(difference @ np.linalg.pinv(covariance, hermitian=True) @ difference)
    return statistic, freedom, float(chi2.sf(statistic, freedom))


def letter_sentence(predictions: pd.DataFrame) -> str:
    """The finding of `letter_test` in words."""
    statistic, freedom, p = letter_test(predictions)
    table = letter_counts(predictions)
    letter = (table["chosen"] - table["right"]).abs().idxmax()
    chosen, right = table.loc[letter, ["chosen_share", "right_share"]]
    if freedom == 0:
        return "Every answer is right, so no letter is preferred."
    test = f"(Stuart–Maxwell χ² = {statistic:.1f}, {freedom} degrees of freedom, {p_value(p)})"
    where = f"{letter} is chosen on {share(chosen)} of the questions and right on {share(right)}"
    if p < 0.05:
        return f"The model's letters differ from the right ones by more than chance {test}: {where}."
    return f"No liking for a letter shows beyond chance {test}; the widest gap: {where}."


def longest_option_sentence(predictions: pd.DataFrame) -> str:
    """Whether the longest of the four options is chosen more often than it is right, in words (exact McNemar test)."""
    chosen = (predictions["prediction"] == predictions["longest_option"]).to_numpy(bool)
    right = (predictions["answer"] == predictions["longest_option"]).to_numpy(bool)
    p = mcnemar(int((chosen & ~right).sum()), int((right & ~chosen).sum()))
    finding = "more than chance would give" if p < 0.05 else "no more than chance would give"
    shares = f"chosen on {share(chosen.mean())} of the questions and right on {share(right.mean())}"
    return f"The longest option is {shares}: a difference {finding} (McNemar {p_value(p)})."


def mcnemar(gained: int, lost: int) -> float:
    """p of the exact two-sided McNemar test on the questions that just one of two models answers rightly."""
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def share(value: float) -> str:
    """A share as one writes it: "75.9 %"."""
    return f"{100 * value:.1f} %"


def p_value(p: float) -> str:
    """p as one writes it: "p = 0.032", "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


# -------------------------------------------------------------------------------------------------- confidence


def confidence(predictions: pd.DataFrame) -> np.ndarray:
    """[N] the probability of the chosen option."""
    return predictions[PROBABILITIES].to_numpy().max(1)


def reliability(predictions: pd.DataFrame, bins: int = BINS) -> pd.DataFrame:
    """Mean confidence, accuracy and its Wilson interval in `bins` bins of equal width over (0, 1], if not empty."""
    sure, right = confidence(predictions), is_right(predictions)
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], sure)  # a value on an edge belongs to the bin below
    rows = []
    for i in range(bins):
        inside = place == i
        count, correct = int(inside.sum()), int(right[inside].sum())
        if count:
            rows.append(
                [edges[i], edges[i + 1], count, correct, sure[inside].mean(), correct / count, *wilson(correct, count)]
            )
    names = ["low", "high", "questions", "correct", "confidence", "accuracy", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=names)


def calibration_error(predictions: pd.DataFrame, bins: int = BINS) -> float:
    """Expected calibration error: |accuracy − mean confidence| of each bin, weighted by its questions."""
    table = reliability(predictions, bins)
    return float((table["questions"] * (table["accuracy"] - table["confidence"]).abs()).sum() / len(predictions))


def log_loss(predictions: pd.DataFrame) -> float:
    """Mean negative log-likelihood of the right answers, in nats; ln 4 = 1.386 is chance."""
    return float(-_log_probabilities(predictions)[_right_places(predictions)].mean())


def fit_temperature(predictions: pd.DataFrame) -> float:
    """The temperature in TEMPERATURES with the lowest log loss (Guo et al. 2017); above 1: the model is too sure."""
    logits, right = _log_probabilities(predictions), _right_places(predictions)

    def loss(log_temperature: float) -> float:
        return -_log_softmax(logits / np.exp(log_temperature))[right].mean()

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-8})
    return float(np.exp(found.x))


def at_temperature(predictions: pd.DataFrame, temperature: float) -> pd.DataFrame:
    """The predictions with logits divided by `temperature`: other probabilities, the same answers."""
    changed = predictions.copy()
    changed[PROBABILITIES] = np.exp(_log_softmax(_log_probabilities(predictions) / temperature))
    return changed


def calibration_table(versions: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Log loss, calibration error and mean confidence beside accuracy, a row for each table of predictions."""
    rows = [
        [name, log_loss(table), calibration_error(table), confidence(table).mean(), is_right(table).mean()]
        for name, table in versions.items()
    ]
    return pd.DataFrame(rows, columns=["", "log_loss", "calibration_error", "confidence", "accuracy"])


def calibration_sentence(table: pd.DataFrame, temperature: float | None) -> str:
    """What `calibration_table` says: how far confidence is from accuracy, and what a fitted temperature changes."""
    row = table.iloc[0]
    text = f"The model is {share(row['confidence'])} sure on average and right on {share(row['accuracy'])}: "
    text += f"a calibration error of {100 * row['calibration_error']:.1f} points."
    if temperature is None:
        return text
    after = table.iloc[1]
    text += f" At temperature {temperature:.2f}, fitted on validation, log loss goes from {row['log_loss']:.3f} to "
    text += f"{after['log_loss']:.3f} and the calibration error to {100 * after['calibration_error']:.1f} points."
    at_end = min(abs(np.log(temperature / end)) for end in TEMPERATURES) < 1e-3
    return text + (" The temperature stands at the end of the range searched: do not trust it." if at_end else "")


def coverage_curve(predictions: pd.DataFrame) -> pd.DataFrame:
    """Answering only when sure: threshold of confidence, share of questions answered (coverage), accuracy on those.

    Questions of the same confidence are answered together, so ties cannot flatter the curve.
    """
    sure, right = confidence(predictions), is_right(predictions)
    order = np.argsort(-sure, kind="stable")
    sure, correct = sure[order], np.cumsum(right[order])
    last = np.flatnonzero(np.append(sure[1:] != sure[:-1], True))  # of each group of equal confidence
    answered = last + 1
    columns = {"threshold": sure[last], "coverage": answered / len(sure), "questions": answered}
    return pd.DataFrame(columns | {"correct": correct[last], "accuracy": correct[last] / answered})


def coverage_groups(curve: pd.DataFrame, shares=(1.0, 0.8, 0.6, 0.5, 0.4, 0.2)) -> pd.DataFrame:
    """Accuracy with Wilson interval where at least these shares of the questions are answered, the surest first."""
    rows = []
    for least in shares:
        point = curve.iloc[int((curve["coverage"] >= least - 1e-12).to_numpy().argmax())]
        count, correct = int(point["questions"]), int(point["correct"])
        group = f"surest {100 * point['coverage']:.0f} %"
        rows.append([group, count, correct, point["accuracy"], *wilson(correct, count), point["threshold"]])
    return pd.DataFrame(rows, columns=[*GROUP_COLUMNS, "threshold"])


def _log_probabilities(predictions: pd.DataFrame) -> np.ndarray:
    return np.log(np.maximum(predictions[PROBABILITIES].to_numpy(), np.finfo(float).tiny))


def _right_places(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(predictions)), predictions["answer"].map(LETTERS.index).to_numpy()


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))
