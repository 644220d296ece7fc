"""RACE as passages: what the readers found is checked, and told with its place; each question is counted once."""

from typing import NamedTuple

from race import LETTERS, OPTIONS, SPLITS, RaceError
from race.data.readers import FIELDS, Found, is_missing, read_records

LABELS = {letter: label for label, letter in enumerate(LETTERS)}
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
    try:
        records, notes = read_records(source, answers)
    except RaceError as error:
        raise _refusal(source, [str(error)]) from error
    passages: dict[str, list[Passage]] = {}
    problems, lines = [], []
    for split in SPLITS:
        checked = _Split(records.get(split, []), answers)
        problems += checked.problems
        lines += checked.lines
        if checked.passages:
            passages[split] = checked.passages
        if checked.repeats:
            counted = "question occurs twice and is" if checked.repeats == 1 else "questions occur twice and are"
            notes.append(f"{split}: {checked.repeats:,} {counted} counted once")
    if not passages and (skip_bad or not problems):
        problems.append("no questions found")
    if problems and not (skip_bad and passages):
        raise _refusal(source, problems)
    return passages, [*notes, *(f"{problem}; left out" for problem in problems), *lines]


def _refusal(source: str, problems: list[str]) -> RaceError:
    lines = [f"{source}: {len(problems)} problem(s), nothing was written", *problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"… and {len(problems) - SHOWN} more")
    if len(problems) > 1:
        lines.append("(--skip-bad leaves out what is bad, and lists it)")
    return RaceError("\n  ".join(lines))


class _Split:
    """The passages of one split, and what is wrong with its records."""

    def __init__(self, records: list[Found], answers: bool) -> None:
        self.passages: list[Passage] = []
        self.problems: list[str] = []
        self.lines: list[str] = []  # what is left out and no problem: passages without questions, questions in conflict
        self.repeats = 0
        self._ids: dict[tuple[str, str], str] = {}  # (level, id) → place
        self._firsts: dict[tuple, tuple[Found, int, int]] = {}  # (article, question, *options) → record, index, label
        for found in records:
            wrong = record_problems(found.record, answers)
            self.problems += [_told(found, *problem) for problem in wrong]
            bad = {question for question, _ in wrong}
            if None not in bad:
                self._add(found, bad)

    def _add(self, found: Found, bad: set[int | None]) -> None:
        record, count = found.record, len(found.record["questions"])
        labels = [LABELS.get(str(answer), -1) for answer in record.get("answers") or [None] * count]
        kept = [i for i in range(count) if i not in bad and self._is_new(found, i, labels[i])]
        if not count:
            self.lines.append(f"{found.place}: a passage without questions, left out")
        key = record["level"], record["id"]
        place = self._ids.setdefault(key, found.place) if kept or not count else found.place
        if place is not found.place:
            self.problems.append(f"{found.place}: id {record['id']!r} is used by {place} already")
        elif kept:
            questions, options = ([record[field][i] for i in kept] for field in ("questions", "options"))
            passage = record["id"], record["level"], record["article"], questions, options
            self.passages.append(Passage(*passage, [labels[i] for i in kept], kept))

    def _is_new(self, found: Found, i: int, label: int) -> bool:
        """False if the question occurred before, with the same article and options; then the first one counts."""
        question, options = found.record["questions"][i], found.record["options"][i]
        this = found, i, label
        first = self._firsts.setdefault((found.record["article"], question, *options), this)
        if first is this:
            return True
        if first[2] == label or -1 in (first[2], label):
            self.repeats += 1
        else:
            where = first[0].rows[first[1]] if first[0].rows else f"{first[0].place}, question {first[1]}"
            self.lines.append(_told(found, i, f"question {i}: the same as {where}, with another answer; left out"))
        return False


def _told(found: Found, question: int | None, problem: str) -> str:
    """A problem with its place; a question that is a row of its own needs no number."""
    if question is None or not found.rows:
        return f"{found.place}: {problem}"
    return f"{found.rows[question]}: {problem.replace(f'question {question}', 'question', 1)}"


def record_problems(record: object, answers: bool = True) -> list[tuple[int | None, str]]:
    """What is wrong with a RACE record (article, questions, options, answers, id): (question from 0 or None, text).

    Without `answers`, they may be missing.
    """
    if isinstance(record, RaceError):
        return [(None, str(record))]
    if not isinstance(record, dict):
        return [(None, f"expected a JSON object, found {type(record).__name__}")]
    if not answers and isinstance(record.get("questions"), list) and is_missing(record.get("answers") or None):
        record = record | {"answers": [None] * len(record["questions"])}
    expected = {"article": str, "questions": list, "options": list, "answers": list, "id": str}
    problems = [
        f"'{key}' is missing" if key not in record else f"'{key}' is not a {kind.__name__}"
        for key, kind in expected.items()
        if not isinstance(record.get(key), kind)
    ]
    problems += [f"unknown key {key!r}" for key in record if key not in {*expected, "level"}]
    if problems:
        return [(None, problem) for problem in problems]
    counts = {key: len(record[key]) for key in FIELDS}
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"{key} ({count})" for key, count in counts.items())
        return [(None, f"unequal numbers of {numbers}")]
    found = [(None, problem) for key in ("article", "id") for problem in _text_problems(key, record[key])]
    for i, question in enumerate(zip(*(record[key] for key in FIELDS), strict=True)):
        found += [(i, problem) for problem in _question_problems(f"question {i}", *question, answers)]
    return found


def _question_problems(place: str, question: object, options: object, answer: object, answers: bool) -> list[str]:
    problems = _text_problems(place, question)
    if (answers or not is_missing(answer)) and (not isinstance(answer, str) or answer not in LABELS):
        problems.append(f"{place}: the answer is {answer!r}, not one of {', '.join(LETTERS)}")
    if not isinstance(options, list) or len(options) != OPTIONS:
        count = f"{len(options)} options, not {OPTIONS}" if isinstance(options, list) else "options are not a list"
        return [*problems, f"{place}: {count}"]
    for letter, option in zip(LETTERS, options, strict=True):
        problems += _text_problems(f"{place}, option {letter}", option)
    return problems


def _text_problems(place: str, text: object) -> list[str]:
    if not isinstance(text, str):
        return [f"{place}: expected text, found {type(text).__name__}"]
    if not text.strip():
        return [f"{place}: empty"]
    if "\0" in text:
        return [f"{place}: holds a NUL character"]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return [f"{place}: holds half a surrogate pair at character {error.start}"]
    return []
