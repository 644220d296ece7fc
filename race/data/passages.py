"""RACE as passages: records are checked, and what is wrong is said with its place; each question is counted once."""

from collections import Counter
from typing import Any, NamedTuple

from race import LETTERS, OPTIONS, SPLITS, RaceError
from race.data.sources import is_missing, read_records

LABELS = {letter: label for label, letter in enumerate(LETTERS)}
LISTS = ("questions", "options", "answers")  # of a record
TEXT = "expected text that is not empty, without NUL and half surrogate pairs"
SHOWN = 20  # problems that a message lists


class Passage(NamedTuple):
    """One article with its questions; `level` is "middle", "high" or "" if the source does not say."""

    example_id: str
    level: str
    article: str
    questions: list[str]
    options: list[list[str]]  # [questions][4]
    labels: list[int]  # [questions], 0..3, or -1 where the answer is missing
    places: list[int]  # [questions], of each question in its record, from 0


def read_source(
    source: str, skip_bad: bool = False, answers: bool = True
) -> tuple[dict[str, list[Passage]], list[str]]:
    """Passages per split, in a fixed order, and a line for each thing left out; splits that a source lacks are absent.

    `source`: "demo", a folder, archive or file of RACE records or tables, or a hub id such as "ehovy/race".
    Raises RaceError with all problems at once; with `skip_bad`, bad questions, and passages that are bad as a whole,
    are left out instead. With `answers=False` answers may be missing, and a source that names no split is "test".
    """
    problems: list[str] = []
    passages: dict[str, list[Passage]] = {}
    try:
        records, lines = read_records(source, answers)
        for split in SPLITS:
            if found := _checked(split, records.get(split, []), answers, problems, lines):
                passages[split] = found
    except RaceError as error:
        problems.append(str(error))
    if not passages and (skip_bad or not problems):
        problems.append("no questions found")
    if problems and not (skip_bad and passages):
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        advice = ["(--skip-bad leaves out what is bad, and lists it)"] if len(problems) > 1 else []
        head = f"{source}: {len(problems)} problem(s), nothing was written"
        raise RaceError("\n  ".join([head, *problems[:SHOWN], *more, *advice]))
    return passages, [*lines, *(f"{problem}; left out" for problem in problems)]


def _checked(split: str, records: list, answers: bool, problems: list[str], lines: list[str]) -> list[Passage]:
    """The passages of a split; adds to `problems`, and to `lines` what is left out and no problem.

    Records with the same id, level and article, such as rows of a table, are one passage.
    """
    passages: dict[tuple, Passage] = {}
    ids: dict[tuple, tuple[str, str]] = {}  # (id, level) → article and place of the first record that has them
    firsts: dict[tuple, tuple[str, int]] = {}  # (article, question, *options) → place and label of the first
    numbers: Counter = Counter()  # of the questions of a passage so far, bad ones too
    repeats = 0
    for place, record in records:
        wrong = record_problems(record, answers)
        problems += [f"{_place(place, record, i)}: {problem}" for i, problem in wrong]
        bad = {i for i, _ in wrong}
        if None in bad:
            continue
        if not record["questions"]:
            lines.append(f"{place}: a passage without questions, left out")
        passage, kept = (record["id"], record["level"], record["article"]), []
        for i, (question, options, answer) in enumerate(zip(*(record[key] for key in LISTS), strict=True)):
            number, here, label = numbers[passage], _place(place, record, i), LABELS.get(answer, -1)
            numbers[passage] += 1
            if i in bad:
                continue
            first, first_label = firsts.setdefault((record["article"], question, *options), (here, label))
            if here == first:
                kept.append((question, options, label, number))
            elif label == first_label or -1 in (label, first_label):
                repeats += 1
            else:
                lines.append(f"{here}: the same as {first}, with another answer; left out")
        if not kept:
            continue
        article, first = ids.setdefault(passage[:2], (record["article"], place))
        if article != record["article"]:
            problems.append(f"{place}: id {record['id']!r} is used by {first} already")
            continue
        lists = passages.setdefault(passage, Passage(*passage, [], [], [], []))[3:]
        for values, more in zip(lists, zip(*kept, strict=True), strict=True):
            values.extend(more)
    if repeats:
        lines.append(f"{split}: {repeats:,} question(s) occur again and are counted once")
    return [*passages.values()]


def _place(place: str, record: Any, question: int | None) -> str:
    """Where a question is; the only one of a record, such as a row of a table, is where its record is."""
    return place if question is None or len(record["questions"]) == 1 else f"{place}, question {question}"


def record_problems(record: Any, answers: bool = True) -> list[tuple[int | None, str]]:
    """What is wrong with a RACE record (article, questions, options, answers, id): (question from 0 or None, text).

    Without `answers`, some may be missing.
    """
    if isinstance(record, RaceError):
        return [(None, str(record))]
    if not isinstance(record, dict):
        return [(None, f"expected a JSON object, found {type(record).__name__}")]
    found = {key: type(value).__name__ for key, value in record.items()}
    found |= {key: f"list of {len(record[key])}" for key in LISTS if found.get(key) == "list"}
    is_whole = found.get("article") == found.get("id") == "str" and {*found} <= {"article", "id", *LISTS, "level"}
    if not is_whole or len({found.get(key) for key in LISTS}) > 1 or found["questions"][:4] != "list":
        listed = ", ".join(f"{key!r} ({kind})" for key, kind in found.items())[:300]
        return [(None, f"expected article and id (str), and {', '.join(LISTS)} (lists of one length); found: {listed}")]
    problems: list[tuple[int | None, str]] = []
    texts = [(None, key, record[key]) for key in ("article", "id")]
    for i, (question, options, answer) in enumerate(zip(*(record[key] for key in LISTS), strict=True)):
        texts.append((i, "question", question))
        if isinstance(options, list) and len(options) == OPTIONS:
            texts += [(i, f"option {letter}", option) for letter, option in zip(LETTERS, options, strict=True)]
        else:
            problems.append((i, f"expected a list of {OPTIONS} options, found {options!r:.60}"))
        if answer not in LETTERS and (answers or not is_missing(answer)):
            problems.append((i, f"the answer is {answer!r:.60}, not one of {', '.join(LETTERS)}"))
    return problems + [(i, f"{key}: {TEXT}, found {text!r:.60}") for i, key, text in texts if not _is_text(text)]


def _is_text(text: Any) -> bool:
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        return False
    return text.isascii() or text == text.encode(errors="replace").decode()
