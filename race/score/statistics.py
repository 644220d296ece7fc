"""Statistics on a table of predictions: intervals, groups, letters. Numbers only; no model is needed."""

import re

import numpy as np
import pandas as pd
from scipy.stats import chi2, fisher_exact, norm, rankdata, t

from race import LETTERS, LEVELS, RaceError

PROBABILITIES = [f"p_{letter}" for letter in LETTERS]
GROUP_COLUMNS = ["group", "questions", "correct", "accuracy", "ci_low", "ci_high"]
SEEN_COLUMNS = {"trained_on": "article_in_train", "selected_on": "article_in_validation"}  # of results: of predictions
FEW_ERRORS = 50  # wrong answers from which letters are tested


def _first(word: str) -> str:
    """The pattern of a text whose first question word is this one."""
    others = "|".join(sorted({"why", "how", "what", "which", "who", "whom", "whose"} - {word}))
    return rf"(?is)^(?:(?!\b(?:{others})\b).)*\b{word}\b"


# kind → (rule in words, pattern); the first rule that fits counts. When and where count last: they often begin a clause
# of a question that asks for something else.
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
    **{word: (f"its first question word is {word}", _first(word)) for word in ("why", "how", "what", "which")},
    "who, when, where": (
        "its first question word is who, whom or whose; or it has none but when or where",
        r"(?i)\b(who|whom|whose|when|where)\b",
    ),
    "other": ("everything else", ""),
}
KINDS = list(KIND_RULES)


def kind_of_question(question: str) -> str:
    """One of KINDS."""
    return next(kind for kind, (_, pattern) in KIND_RULES.items() if re.search(pattern, question))


def is_correct(predictions: pd.DataFrame) -> np.ndarray:
    """[N] whether each question is answered correctly."""
    return (predictions["answer"] == predictions["prediction"]).to_numpy(bool)


def letters_of(predictions: pd.DataFrame) -> list[str]:
    """The letters of the options, k of them."""
    return [name[-1] for name in predictions.filter(items=PROBABILITIES)]


def probabilities(predictions: pd.DataFrame) -> np.ndarray:
    """[N, k] of each option."""
    return predictions.filter(items=PROBABILITIES).to_numpy(float)


def confidence(predictions: pd.DataFrame) -> np.ndarray:
    """[N] the probability of the chosen option."""
    return probabilities(predictions).max(1)


def wilson(correct, questions, alpha: float = 0.05):
    """Wilson's interval of proportions at level 1 − alpha: (low, high), of numbers or of arrays."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(correct, questions, alpha, method="wilson")
    return np.clip(low, 0, 1), np.clip(high, 0, 1)


def by_passage(predictions: pd.DataFrame) -> dict:
    """The accuracy's 95 % interval with passages as clusters within levels, and what it follows from.

    passages; design_effect: variance of the accuracy with whole passages drawn (Cochran 1977, ch. 9 to 11) over that
    with single questions drawn, at least 1; passage_low and passage_high: Wilson's interval for questions /
    design_effect, with the t quantile for passages − levels. NaN: too few passages, or all answers right, or wrong.
    """
    correct, count = is_correct(predictions), len(predictions)
    rate, (passage, level) = correct.mean(), passages_within_levels(predictions["level"], predictions["example_id"])
    sizes, rights = np.bincount(passage), np.bincount(passage, correct)
    clusters, asked = np.bincount(level), np.bincount(level, sizes)
    found, freedom = {"passages": len(sizes)}, len(sizes) - len(clusters)
    if freedom < 1 or rate in (0, 1):
        return found | dict.fromkeys(["design_effect", "passage_low", "passage_high"], np.nan)
    mean = (np.bincount(level, rights) / asked)[level]  # the accuracy of each passage's level
    spread = np.bincount(level, (rights - sizes * mean) ** 2) * clusters / (clusters - 1)
    effect = max(1.0, float(spread.sum() / (count * rate * (1 - rate))))
    low, high = wilson(correct.sum() / effect, count / effect, 2 * norm.sf(t.ppf(0.975, freedom)))
    return found | {"design_effect": effect, "passage_low": float(low), "passage_high": float(high)}


def passages_within_levels(levels, example_ids) -> tuple[np.ndarray, np.ndarray]:
    """([N] the passage of each question, [passages] the level of each), as numbers from 0.

    All are of one level if a level has a single passage, which says nothing of how passages differ.
    """
    passage = pd.factorize(pd.MultiIndex.from_arrays([np.asarray(levels), np.asarray(example_ids)]))[0]
    level = pd.factorize(np.asarray(levels))[0][np.unique(passage, return_index=True)[1]]
    return passage, np.zeros_like(level) if (np.bincount(level) < 2).any() else level


def quoted_interval(row: pd.Series) -> tuple[float, float, str]:
    """(low, high, which) of the interval to quote for a row of results: by passage, or Wilson's where there is none."""
    which = ("passage", "by passage") if pd.notna(row.get("passage_low")) else ("ci", "Wilson")
    return row[f"{which[0]}_low"], row[f"{which[0]}_high"], which[1]


def not_new(predictions: pd.DataFrame) -> bool:
    """Whether the checkpoint was trained, or selected, on more than half of the questions' articles, if it is known."""
    return any(predictions[column].fillna(False).mean() > 0.5 for column in SEEN_COLUMNS.values())


def with_accuracy(counts: pd.DataFrame) -> pd.DataFrame:
    """A table with questions and correct, and beside them accuracy, ci_low and ci_high (Wilson)."""
    low, high = wilson(counts["correct"], counts["questions"])
    return counts.assign(accuracy=counts["correct"] / counts["questions"], ci_low=low, ci_high=high)


def macro_accuracy(levels: pd.DataFrame) -> tuple[float, float, float]:
    """Mean of the levels' accuracies with its 95 % interval, from the rows of the levels in an accuracy table.

    The interval combines those that are quoted of the levels (Zou and Donner 2008, Statistics in Medicine 27:1693).
    """
    mean = float(levels["accuracy"].mean())
    ends = np.array([quoted_interval(row)[:2] for _, row in levels.iterrows()])
    below, above = np.sqrt(((ends - levels["accuracy"].to_numpy()[:, None]) ** 2).sum(0)) / len(levels)
    return mean, mean - float(below), mean + float(above)


def length_groups(tokens, count: int = 5) -> tuple[np.ndarray, list[str]]:
    """[N] names such as "101–200" of `count` groups of about equally many questions, and their order."""
    tokens = np.asarray(tokens)
    place = np.ceil(rankdata(tokens, "max") / len(tokens) * count - 1e-9)  # equal lengths stay together
    ends = pd.Series(tokens).groupby(place).agg(["min", "max"])
    names = [f"{low}–{high}" if low < high else f"{low}" for low, high in ends.to_numpy()]
    return np.array(names, dtype=object)[np.unique(place, return_inverse=True)[1]], names


def group_accuracies(predictions: pd.DataFrame, by: list[str] | None = None) -> pd.DataFrame:
    """Accuracy by what a question is like, within each level, and every group against the rest of its level.

    Columns: grouping, level ("middle", "high"; "all" if no level is known), GROUP_COLUMNS (Wilson intervals), rest
    (accuracy of the level's other questions), difference (to the rest), p (Fisher's exact test), p_holm (Holm's
    for all tests of the table). Groups of whole passages are tested with counts divided by the level's design effect;
    truncation is taken for one.
    The last four are NaN without other questions, and for the first of two groups. by: further columns to group by;
    raises RaceError for one that is not there.
    """
    lengths, order = length_groups(predictions["article_tokens"])
    cut = predictions["truncated"].map({True: "truncated", False: "not truncated"})
    seen = predictions["article_in_train"].astype(object).map({True: "also in train", False: "not in train"})
    groupings = {
        "kind of question": pd.Categorical(predictions["kind"], KINDS),
        "article length (tokens)": pd.Categorical(lengths, order),
        "sequence": pd.Categorical(cut, ["not truncated", "truncated"]),
        "correct answer": pd.Categorical(predictions["answer"], LETTERS),
    }
    if seen.notna().any():
        names = ["not in train", "also in train", "not known"]
        groupings["article"] = pd.Categorical(seen.fillna(names[-1]), names)
    if missing := sorted({*(by or ())} - {*predictions}):
        raise RaceError(f"GROUP_BY: no column {', '.join(missing)}: name it with --keep when the cache is made")
    groupings |= {name: pd.Categorical(predictions[name].replace("", "not known")) for name in by or ()}
    known = predictions["level"].isin(LEVELS).any()
    level = pd.Categorical(predictions["level"] if known else ["all"] * len(predictions), [*LEVELS, "all"])
    correct, counts = pd.Series(is_correct(predictions)), {}
    for name, group in groupings.items():
        counts[name] = correct.groupby([group, level], observed=True).agg(questions="size", correct="sum")
    table = with_accuracy(pd.concat(counts, names=["grouping", "group", "level"]).reset_index())
    of_level = table.groupby(["grouping", "level"], sort=False)
    others = of_level[["questions", "correct"]].transform("sum") - table[["questions", "correct"]]
    table["rest"] = others["correct"] / others["questions"].where(others["questions"] > 0)
    effects = {it: by_passage(predictions[level == it])["design_effect"] for it in table["level"].unique()}
    passage = passages_within_levels(predictions["level"], predictions["example_id"])[0]
    groups = {name: pd.Series(group.codes).groupby(passage).nunique() for name, group in groupings.items()}
    whole = [name for name, it in groups.items() if len(it) < len(passage) and (it.max() == 1 or name == "sequence")]
    effect = np.fmax(1.0, table["level"].map(effects).where(table["grouping"].isin(whole), 1.0).to_numpy(float))
    own = [table["correct"], table["questions"] - table["correct"]]
    cells = np.column_stack([*own, others["correct"], others["questions"] - others["correct"]]) / effect[:, None]
    tested = (others["questions"] > 0) & ~((of_level["group"].transform("size") == 2) & (of_level.cumcount() == 0))
    cells = np.rint(cells).astype(int).reshape(-1, 2, 2)
    p = [fisher_exact(it).pvalue if test else np.nan for it, test in zip(cells, tested, strict=True)]
    table = table.assign(difference=table["accuracy"] - table["rest"], p=p, p_holm=holm(p))
    return table[["grouping", "level", *GROUP_COLUMNS, "rest", "difference", "p", "p_holm"]]


def holm(p) -> np.ndarray:
    """p-values adjusted by Holm for their number; NaN stays NaN and does not count."""
    from statsmodels.stats.multitest import multipletests

    adjusted = np.array(p, dtype=float)
    if (tested := ~np.isnan(adjusted)).any():
        adjusted[tested] = multipletests(adjusted[tested], method="holm")[1]
    return adjusted


def confusion(predictions: pd.DataFrame) -> np.ndarray:
    """[k, k] counts: correct answers in rows, predictions in columns."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(predictions["answer"], predictions["prediction"], labels=letters_of(predictions))


def letter_test(predictions: pd.DataFrame) -> tuple[float, int, float]:
    """Are letters chosen as often as they are correct? Stuart and Maxwell's χ², its degrees of freedom, and p.

    p is NaN with fewer than FEW_ERRORS wrong answers. Paired (Maxwell 1970, British Journal of Psychiatry 116:651). Not
    statsmodels' SquareTable.homogeneity: NaN where a letter is in no wrong answer, and p = 0 for χ² beyond 80 or so.
    """
    counts = confusion(predictions).astype(float)
    difference = (counts.sum(0) - counts.sum(1))[:-1]
    covariance = (np.diag(counts.sum(0) + counts.sum(1)) - counts - counts.T)[:-1, :-1]
    freedom = int(np.linalg.matrix_rank(covariance))
    if freedom == 0:  # every answer is correct
        return 0.0, 0, 1.0
    statistic = float(difference @ np.linalg.pinv(covariance, hermitian=True) @ difference)
    few = (~is_correct(predictions)).sum() < FEW_ERRORS
    return statistic, freedom, np.nan if few else float(chi2.sf(statistic, freedom))
