"""RACE as passages: records are checked, and what is wrong is said with its place; each question is counted once."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from race import LETTERS, OPTIONS, SPLITS, RaceError
from race.data.sources import PLAIN, Reading, attempt, is_missing, read_records

LABELS = {letter: label for label, letter in enumerate(LETTERS)}
LISTS = ("questions", "options", "answers")  # of a record


class Passage(NamedTuple):
    """One article with its questions; `level` is "middle", "high" or "" if the source does not say."""

    example_id: str
    level: str
    article: str
    questions: list[str]
    options: list[list[str]]  # [questions][k]
    labels: list[int]  # [questions], from 0, or -1 where the answer is missing
    further: list[dict]  # [questions], further columns of the source
    places: list[int]  # [questions], of each question in its record, from 0
    asked_at: list[str]  # [questions], where they stand in the source; "" if they are not to be answered


def read_source(source: str, skip_bad=False, how: Reading = PLAIN) -> tuple[dict[str, list[Passage]], list[str]]:
    """Passages per split, in a fixed order, and a line for each thing left out; splits that a source lacks are absent.

    Raises RaceError with all problems at once, unless `skip_bad`. Without `how.answers` they may be missing, and each
    record is a passage of "test", in order.
    """
    found = attempt(read_records, source, how)
    if isinstance(found, RaceError):
        here = "" if Path(source).exists() else "no such folder or file, and from the hub: "
        raise RaceError(f"{source}: {here}{found}") from found
    records, problems, lines = found
    how = _expected([record for of_split in records.values() for _, record in of_split], how)
    checked = {split: _checked(split, records.get(split, []), how, problems, lines) for split in SPLITS}
    passages = {split: passages for split, passages in checked.items() if passages}
    if not passages and (skip_bad or not problems):
        problems.append("no questions found")
    if problems and not (skip_bad and passages):
        lines = [f"{source}: {len(problems)} problem(s), nothing was written", *problems[:20]]
        raise RaceError("\n  ".join([*lines, "(--skip-bad leaves out what is bad, and lists all of it)"]))
    return passages, [*lines, *(f"{problem}; left out" for problem in problems)]


def _expected(records: list[dict], how: Reading) -> Reading:
    """Each question is to have as many options as most; without articles (--columns article=), they become empty."""
    lists = (record["options"] for record in records if isinstance(record.get("options"), list))
    sizes = Counter(len(options) for of_record in lists for options in of_record if isinstance(options, list))
    articles = ("article", ()) not in how.columns
    for record in () if articles else records:
        record["article"] = ""
    options = max(sizes, key=lambda size: (sizes[size], size == OPTIONS), default=OPTIONS)
    return how._replace(options=options, articles=articles)


def _checked(split: str, records: list, how: Reading, problems: list[str], lines: list[str]) -> list[Passage]:
    """The passages of a split; adds to `problems`, and to `lines` what is left out and no problem.

    Records with the same id, level and article, such as rows of a table, are one passage.
    """
    passages: dict[tuple, Passage] = {}
    ids: dict[tuple, tuple[str, str]] = {}  # (id, level) → article and place of the first record that has them
    starts: dict[tuple, int] = {}  # the place of a passage's next question
    firsts: dict[tuple, tuple[str, int]] = {}  # (article, question, *options) → place and label of the first
    repeats = 0
    for place, record in records:
        wrong = record_problems(record, how)
        problems += [f"{_place(place, record, i)}: {problem}" for i, problem in wrong]
        bad = {i for i, _ in wrong}
        if None in bad:
            continue
        if not record["questions"]:
            lines.append(f"{place}: a passage without questions, left out")
        passage, kept = (record["id"], record["level"], record["article"]), []
        start = starts.get(passage, 0)
        for i, (question, options, answer) in enumerate(zip(*(record[key] for key in LISTS), strict=True)):
            if i in bad:
                continue
            here, label, known = _place(place, record, i), LABELS.get(answer, -1), len(firsts)
            first, first_label = firsts.setdefault((record["article"], question, *options), (here, label))
            if len(firsts) > known or not how.answers:
                kept.append((question, options, label, _further(record, i), start + i, "" if how.answers else here))
            elif label == first_label:
                repeats += 1
            else:
                lines.append(f"{here}: the same as {first}, with another answer; left out")
        if not kept:
            continue
        article, first = ids.setdefault(passage[:2], (record["article"], place))
        if how.answers and article != record["article"]:
            problems.append(f"{place}: id {record['id']!r} is used by {first} already")
            continue
        starts[passage] = kept[-1][4] + 1
        new = Passage(*passage, *([] for _ in kept[0]))
        lists = passages.setdefault(passage if how.answers else (place,), new)[3:]
        for values, more in zip(lists, zip(*kept, strict=True), strict=True):
            values.extend(more)
    if repeats:
        lines.append(f"{split}: {repeats:,} question(s) occur again and are counted once")
    return [*passages.values()]


def _place(place: str, record: Any, question: int | None) -> str:
    """Where a question is; the only one of a record, such as a row of a table, is where its record is."""
    return place if question is None or len(record["questions"]) == 1 else f"{place}, question {question}"


def _further(record: dict, question: int) -> dict[str, str]:
    """The further columns of one question; of a list with a cell for each question, its own."""
    cells, count = record.get("further", {}), len(record["questions"])
    own = {key: it[question] if isinstance(it, list) and len(it) == count else it for key, it in cells.items()}
    return {key: "" if is_missing(it) else str(it) for key, it in own.items()}


def record_problems(record: dict, how: Reading = PLAIN) -> list[tuple[int | None, str]]:
    """What is wrong with a RACE record: (question from 0 or None, text); without `how.answers`, some may be missing."""
    sizes = {len(record[key]) if isinstance(record.get(key), list) else None for key in LISTS}
    if len(sizes) > 1 or None in sizes or not {*record} <= {"article", "id", "level", "further", *LISTS}:
        found = (f"{key!r} of {len(value)}" if isinstance(value, list) else repr(key) for key, value in record.items())
        expected = "article, id, and lists of one length: questions, options, answers"
        return [(None, f"expected {expected}; found: {', '.join(found)[:300]}")]
    problems: list[tuple[int | None, str]] = []
    texts = [(None, key, record.get(key)) for key in (["article"] if how.articles else []) + ["id"]]
    letters = LETTERS[: how.options]
    for i, (question, options, answer) in enumerate(zip(*(record[key] for key in LISTS), strict=True)):
        texts.append((i, "question", question))
        if isinstance(options, list) and len(options) == how.options and how.options in range(2, len(LETTERS) + 1):
            texts += [(i, f"option {letter}", option) for letter, option in zip(letters, options, strict=True)]
        else:
            expected = f"a list of {how.options} options (as most questions; 2 to {len(LETTERS)})"
            problems.append((i, f"expected {expected}, found {options!r:.60}"))
        if answer not in letters and (how.answers or not is_missing(answer)):
            problems.append((i, f"the answer is {answer!r:.60}, not one of {', '.join(letters)}"))
    expected = "expected text that is not empty, without NUL and half surrogate pairs"
    return problems + [(i, f"{key}: {expected}, found {text!r:.60}") for i, key, text in texts if not _is_text(text)]


def _is_text(text: Any) -> bool:
    is_whole = isinstance(text, str) and text == text.encode(errors="replace").decode()
    return is_whole and "\0" not in text and not is_missing(text)
