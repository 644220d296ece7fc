"""RACE sources: a hub id, a folder or tar of RACE files, or the demo, read into passages and checked."""

import json
import lzma
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from race import LETTERS, LEVELS, OPTIONS, SPLITS, RaceError
from race.demo.corpus import write_corpus

LABELS = {letter: label for label, letter in enumerate(LETTERS)}
SPLIT_OF_FOLDER = {split: split for split in SPLITS} | {"dev": "validation", "val": "validation"}
LAYOUTS = "{train,dev,test}/{middle,high}/*.txt, {train,dev,test}/*.json or parquet"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
COLUMNS = {"example_id", "article", "answer", "question", "options"}  # of RACE on the hub
FIELDS = {"questions": "question", "options": "options", "answers": "answer"}  # lists in RACE's files → its columns
SHOWN = 20  # problems that a message lists
Records = dict[str, list[tuple[str, Any]]]  # split → (place, record of RACE's layout, or a RaceError met on reading)


class Passage(NamedTuple):
    """One article with its questions; `level` is "middle", "high" or "" if the source does not say."""

    example_id: str
    level: str
    article: str
    questions: list[str]
    options: list[list[str]]  # [questions][4]
    labels: list[int]  # [questions], 0..3
    places: list[int]  # [questions], of each question in its record, from 0


def read_source(source: str, skip_bad: bool = False) -> tuple[dict[str, list[Passage]], list[str]]:
    """Passages per split, in a fixed order, and a line for each thing left out; splits that a source lacks are absent.

    `source`: "demo", a folder or tar in the layout of RACE.tar.gz ({train,dev,test}/{middle,high}/*.txt) or of
    flat JSON files ({train,dev,test}/*.json), a folder of parquet files, or a hub id such as "ehovy/race".
    Raises RaceError with all problems at once; with `skip_bad`, bad questions, and passages that are bad as a whole,
    are left out instead.
    """
    path = Path(source)
    if source == "demo":
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder))
            records = _records(_folder_files(Path(folder)), source)
    elif path.is_file():
        records = _records(_tar_files(path), source)
    elif path.is_dir() and not any(path.rglob("*.parquet")):
        records = _records(_folder_files(path), source)
    elif path.is_dir() or HUB_ID.fullmatch(source):
        records = _dataset_records(source)
    else:
        raise _refusal(source, ["no such folder, and not the form of a hub id (owner/name)"])
    return _checked(source, records, skip_bad)


def _refusal(source: str, problems: list[str]) -> RaceError:
    lines = [f"{source}: {len(problems)} problem(s), nothing was written", *problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"… and {len(problems) - SHOWN} more")
    if len(problems) > 1:
        lines.append("(--skip-bad leaves out what is bad, and lists it)")
    return RaceError("\n  ".join(lines))


def _checked(source: str, records: Records, skip_bad: bool) -> tuple[dict[str, list[Passage]], list[str]]:
    passages: dict[str, list[Passage]] = {}
    problems, notes = [], []
    for split in SPLITS:
        seen: dict[tuple[str, str], str] = {}
        for place, record in records.get(split, []):
            found = record_problems(record)
            whole = any(question is None for question, _ in found)
            if not whole and (record["level"], record["id"]) in seen:
                found += [(None, f"id {record['id']!r} is used by {seen[record['level'], record['id']]} already")]
                whole = True
            problems += [f"{place}: {problem}" for _, problem in found]
            if whole:
                continue
            seen[record["level"], record["id"]] = place
            bad = {question for question, _ in found}
            kept = [i for i in range(len(record["questions"])) if i not in bad]
            if kept:
                questions, options, answers = ([record[key][i] for i in kept] for key in FIELDS)
                passage = record["id"], record["level"], record["article"], questions, options
                passages.setdefault(split, []).append(Passage(*passage, [LABELS[answer] for answer in answers], kept))
            elif not bad:
                notes.append(f"{place}: a passage without questions, left out")
    if not passages and (skip_bad or not problems):
        problems.append(f"no questions found; expected {LAYOUTS}")
    if problems and not (skip_bad and passages):
        raise _refusal(source, problems)
    return passages, [*(f"{problem}; left out" for problem in problems), *notes]


def record_problems(record: object) -> list[tuple[int | None, str]]:
    """What is wrong with a RACE record (article, questions, options, answers, id): (question from 0 or None, text)."""
    if isinstance(record, RaceError):
        return [(None, str(record))]
    if not isinstance(record, dict):
        return [(None, f"expected a JSON object, found {type(record).__name__}")]
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
        found += [(i, problem) for problem in _question_problems(f"question {i}", *question)]
    return found


def _question_problems(place: str, question: object, options: object, answer: object) -> list[str]:
    problems = _text_problems(place, question)
    if not isinstance(answer, str) or answer not in LABELS:
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


def _records(files: Iterator[tuple[str, bytes | RaceError]], source: str) -> Records:
    """Parse (path inside the source, content) pairs."""
    records: Records = {}
    for name, content in tqdm(files, desc=f"reading {source}", unit=" passages", delay=2, leave=False):
        name = name.encode("utf-8", "backslashreplace").decode()  # bytes that are not UTF-8 become \udcXX
        split, level = _split_and_level(name)
        record: Any
        try:
            record = json.loads(content.decode("utf-8-sig")) if isinstance(content, bytes) else content
        except UnicodeDecodeError as error:
            record = RaceError(f"not UTF-8 at byte {error.start}")
        except (ValueError, RecursionError) as error:
            record = RaceError(f"not JSON ({error})")
        if isinstance(record, dict):
            record["level"] = level
            record.setdefault("id", PurePosixPath(name).name)
        records.setdefault(split, []).append((name, record))
    return records


def _split_and_level(name: str) -> tuple[str | None, str]:
    folders = name.split("/")[:-1]
    for i, folder in enumerate(folders):
        if folder in SPLIT_OF_FOLDER:
            level = folders[i + 1] if i + 1 < len(folders) else ""
            return SPLIT_OF_FOLDER[folder], level if level in LEVELS else ""
    return None, ""


def _is_race_file(name: str) -> bool:
    """A .txt or .json inside a split folder; "._…" are leftovers of macOS archives."""
    file = name.rpartition("/")[2]
    return file.endswith((".txt", ".json")) and not file.startswith(".") and _split_and_level(name)[0] is not None


def _natural(name: str) -> list:
    """Sort key that puts 9.txt before 10.txt."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _folder_files(folder: Path) -> Iterator[tuple[str, bytes | RaceError]]:
    found: list[tuple[str, OSError | None]] = []
    seen = set()

    def unreadable(error: OSError) -> None:
        place = Path(error.filename).relative_to(folder).as_posix()
        if _split_and_level(f"{place}/")[0] is not None:
            found.append((place, error))

    for place, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        identity = os.stat(place).st_dev, os.stat(place).st_ino
        if identity in seen:  # a link to a parent folder
            folders.clear()
            continue
        seen.add(identity)
        names = (Path(place, name).relative_to(folder).as_posix() for name in [*files, *folders])
        found += [(name, None) for name in names if _is_race_file(name)]
    for name, error in sorted(found, key=lambda file: _natural(file[0])):
        try:
            if error:
                raise error
            content: bytes | RaceError = (folder / name).read_bytes()
        except OSError as problem:
            content = RaceError(f"cannot be read ({problem.strerror})")
        yield name, content


class _StrictTar(tarfile.TarInfo):
    """A damaged or missing header is an error; tarfile would take it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError, tarfile.EmptyHeaderError) as error:
            raise tarfile.ReadError(f"damaged or cut off after {tar.offset:,} bytes: {error}") from error


def _tar_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Members are read in memory, never unpacked: a path in them cannot lead out of a folder."""
    try:
        with tarfile.open(path, tarinfo=_StrictTar) as tar:
            members = tqdm(tar, desc=f"unpacking {path}", unit=" files", delay=2, leave=False)
            chosen = (member for member in members if member.isfile() and _is_race_file(member.name))
            files = [(member.name, tar.extractfile(member).read()) for member in chosen]
            while tar.fileobj.read(1 << 20):  # to the end, where a compressed archive has its checksum
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _refusal(str(path), [f"not a folder, and not a tar file that can be read ({error})"]) from error
    yield from sorted(files, key=lambda file: _natural(file[0]))


def _dataset_records(source: str) -> Records:
    """One row a question, as in ehovy/race on the hub."""
    from datasets import get_dataset_config_names, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        configs = get_dataset_config_names(source)
        dataset = load_dataset(source, "all" if len(configs) > 1 else configs[0])
    except (DatasetsError, OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise _refusal(source, [f"cannot be loaded ({reason})"]) from error
    records: Records = {}
    for name, rows in dataset.items():
        split, missing = SPLIT_OF_FOLDER.get(name), COLUMNS.difference(rows.column_names)
        if split is None or missing:
            wrong = f"has no column {', '.join(sorted(missing))}" if missing else "is not train, validation or test"
            problem = f"split {name!r} {wrong}"
            records.setdefault("train", []).append((name, RaceError(problem)))
            continue
        passages: dict[tuple[str, str], dict] = {}
        for row in tqdm(rows, desc=f"reading {name}", unit=" questions", delay=2, leave=False):
            example_id = "" if row["example_id"] is None else str(row["example_id"])
            level = next((level for level in LEVELS if example_id.startswith(level)), "")
            new = {"id": example_id, "level": level, "article": row["article"], **{key: [] for key in FIELDS}}
            passage = passages.setdefault((example_id, row["article"]), new)
            for key, column in FIELDS.items():
                passage[key].append(row[column])
        records[split] = [(f"{name}/{example_id}", record) for (example_id, _), record in passages.items()]
    return records
