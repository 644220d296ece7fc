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
from typing import NamedTuple

from tqdm.auto import tqdm

SPLITS = ("train", "validation", "test")
LEVELS = ("middle", "high")
LABELS = {"A": 0, "B": 1, "C": 2, "D": 3}
SPLIT_OF_FOLDER = {
    "train": "train",
    "dev": "validation",
    "val": "validation",
    "validation": "validation",
    "test": "test",
}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SHOWN = 20


class Passage(NamedTuple):
    """One article with its questions; `level` is "middle", "high" or "" where the source does not say."""

    example_id: str
    level: str
    article: str
    questions: list[str]
    options: list[list[str]]  # [questions][4]
    labels: list[int]  # [questions], 0..3
    places: list[int]  # [questions], of each question in its record, from 0


class SourceError(ValueError):
    """A source that cannot be used: every problem found, the first 20 in full."""

    def __init__(self, source: str, problems: list[str]):
        shown = "\n".join(f"  {problem}" for problem in problems[:SHOWN])
        more = f"\n  … and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        hint = "\n  (--skip-bad goes on without what is bad, and lists it)" if len(problems) > 1 else ""
        super().__init__(f"{source}: {len(problems)} problem(s), nothing was written\n{shown}{more}{hint}")
        self.problems = problems


def read_source(source: str, skip_bad: bool = False) -> tuple[dict[str, list[Passage]], list[str]]:
    """Passages per split, in a fixed order, and a line for each thing left out; splits that a source lacks are absent.

    `source`: "demo", a folder or tar in the layout of RACE.tar.gz ({train,dev,test}/{middle,high}/*.txt) or of
    flat JSON files ({train,dev,test}/*.json), a folder of parquet files, or a hub id such as "ehovy/race".
    Raises SourceError with all problems at once; with `skip_bad` bad questions, and passages that are bad as a whole,
    are left out instead.
    """
    path = Path(source)
    if source == "demo":
        from demo.corpus import write_corpus

        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder))
            records = _records(_folder_files(Path(folder)), source)
    elif path.is_file():
        records = _records(_tar_files(path, source), source)
    elif path.is_dir() and not any(path.rglob("*.parquet")):
        records = _records(_folder_files(path), source)
    elif path.is_dir() or HUB_ID.fullmatch(source):
        records = _dataset_records(source)
    else:
        raise SourceError(source, ["no such folder, and not the form of a hub id (owner/name)"])
    return _checked(source, records, skip_bad)


def _checked(
    source: str, records: dict[str, list[tuple[str, object]]], skip_bad: bool
) -> tuple[dict[str, list[Passage]], list[str]]:
    """Turn (place, record) pairs into passages; a record may be a problem already (a string)."""
    passages: dict[str, list[Passage]] = {}
    problems, notes = [], []
    for split in SPLITS:
        seen: dict[tuple[str, str], str] = {}
        for place, record in records.get(split, []):
            found = [(None, record)] if isinstance(record, str) else record_problems(record)
            whole = any(question is None for question, _ in found)
            if not whole and (record["level"], record["id"]) in seen:
                found.append((None, f"id {record['id']!r} is taken by {seen[record['level'], record['id']]} already"))
                whole = True
            problems += [f"{place}: {problem}" for _, problem in found]
            if whole:
                continue
            seen[record["level"], record["id"]] = place
            bad = {question for question, _ in found}
            kept = [i for i in range(len(record["questions"])) if i not in bad]
            if not kept:
                notes += [] if bad else [f"{place}: a passage without questions, left out"]
                continue
            texts = ([record[name][i] for i in kept] for name in ("questions", "options"))
            labels = [LABELS[record["answers"][i]] for i in kept]
            passages.setdefault(split, []).append(
                Passage(record["id"], record["level"], record["article"], *texts, labels, kept)
            )
    if not passages and (skip_bad or not problems):
        problems.append(
            "no questions found; expected {train,dev,test}/{middle,high}/*.txt, {train,dev,test}/*.json or parquet"
        )
    if problems and not (skip_bad and passages):
        raise SourceError(source, problems)
    return passages, [*(f"{problem}; left out" for problem in problems), *notes]


def record_problems(record: object) -> list[tuple[int | None, str]]:
    """What is wrong with a RACE record (article, questions, options, answers, id): (question from 0 or None, text)."""
    if not isinstance(record, dict):
        return [(None, f"expected a JSON object, found {type(record).__name__}")]
    expected = {"article": str, "questions": list, "options": list, "answers": list, "id": str}
    problems = [
        f"'{key}' is missing" if key not in record else f"'{key}' is no {kind.__name__}"
        for key, kind in expected.items()
        if not isinstance(record.get(key), kind)
    ]
    problems += [f"unknown key {key!r}" for key in record if key not in {*expected, "level"}]
    if problems:
        return [(None, problem) for problem in problems]
    counts = {key: len(record[key]) for key in ("questions", "options", "answers")}
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"{key} ({count})" for key, count in counts.items())
        return [(None, f"unequal numbers of {numbers}")]
    problems = _text_problems("article", record["article"]) + _text_problems("id", record["id"])
    found: list[tuple[int | None, str]] = [(None, problem) for problem in problems]
    questions = zip(record["questions"], record["options"], record["answers"], strict=True)
    for i, (question, options, answer) in enumerate(questions):
        found += [(i, problem) for problem in _question_problems(f"question {i}", question, options, answer)]
    return found


def _question_problems(place: str, question: object, options: object, answer: object) -> list[str]:
    problems = _text_problems(place, question)
    if not isinstance(answer, str) or answer not in LABELS:
        problems.append(f"{place}: the answer is {answer!r}, not one of A, B, C, D")
    if not isinstance(options, list) or len(options) != len(LABELS):
        count = len(options) if isinstance(options, list) else "no list of"
        return [*problems, f"{place}: {count} options, not 4"]
    for letter, option in zip(LABELS, options, strict=True):
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


def _records(files: Iterator[tuple[str, bytes | str]], source: str) -> dict[str, list[tuple[str, object]]]:
    """Parse (path inside the source, content) pairs; a content of type str is a problem met on reading."""
    records: dict[str, list[tuple[str, object]]] = {}
    for name, content in tqdm(files, desc=f"reading {source}", unit=" passages", delay=2, leave=False):
        split, level = _split_and_level(name)
        record: object = content
        if isinstance(content, bytes):
            try:
                record = json.loads(content.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                record = f"not UTF-8 at byte {error.start}"
            except (ValueError, RecursionError) as error:
                record = f"not JSON ({error})"
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


def _folder_files(folder: Path) -> Iterator[tuple[str, bytes | str]]:
    names: list[tuple[str, str | None]] = []
    seen = set()

    def unreadable(error: OSError) -> None:
        place = Path(error.filename).relative_to(folder).as_posix()
        if _split_and_level(f"{place}/")[0] is not None:
            names.append((place, f"cannot be read ({error.strerror})"))

    for place, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        identity = os.stat(place).st_dev, os.stat(place).st_ino
        if identity in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(identity)
        relative = Path(place).relative_to(folder)
        names += [((relative / name).as_posix(), None) for name in [*files, *folders]]
    for name, problem in sorted(names, key=lambda pair: _natural(pair[0])):
        if problem is not None:
            yield _printable(name), problem
        elif _is_race_file(name):
            try:
                yield _printable(name), (folder / name).read_bytes()
            except OSError as error:
                yield _printable(name), f"cannot be read ({error.strerror})"


def _printable(name: str) -> str:
    """A file's name, with bytes that are not UTF-8 written as \\udcXX."""
    return name.encode("utf-8", "backslashreplace").decode()


class _WholeTar(tarfile.TarInfo):
    """A member whose header is damaged or missing is an error, and not the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError, tarfile.EmptyHeaderError) as error:
            raise tarfile.ReadError(f"damaged or cut off after {tar.offset:,} bytes: {error}") from error


def _tar_files(path: Path, source: str) -> Iterator[tuple[str, bytes]]:
    """Members are read in memory and never unpacked, so no path in them can lead anywhere."""
    try:
        with tarfile.open(path, tarinfo=_WholeTar) as tar:
            members = tqdm(tar, desc=f"unpacking {source}", unit=" files", delay=2, leave=False)
            chosen = (member for member in members if member.isfile() and _is_race_file(member.name))
            files = [(_printable(member.name), tar.extractfile(member).read()) for member in chosen]
            while tar.fileobj.read(1 << 20):  # to the end, where a packed archive has its checksum
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise SourceError(source, [f"not a folder, and not a tar file that can be read ({error})"]) from error
    yield from sorted(files, key=lambda file: _natural(file[0]))


def _dataset_records(source: str) -> dict[str, list[tuple[str, object]]]:
    """One row a question (example_id, article, answer, question, options), as in ehovy/race on the hub."""
    from datasets import get_dataset_config_names, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        configs = get_dataset_config_names(source)
        if len(configs) > 1 and "all" not in configs:
            raise SourceError(source, [f"has the configurations {', '.join(configs)}, but none named 'all'"])
        dataset = load_dataset(source, "all" if "all" in configs else configs[0])
    except SourceError:
        raise
    except (DatasetsError, OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SourceError(source, [f"cannot be loaded ({reason})"]) from error
    records: dict[str, list[tuple[str, object]]] = {}
    for name, rows in dataset.items():
        split = SPLIT_OF_FOLDER.get(name)
        columns = {"example_id", "article", "answer", "question", "options"}
        if split is None or columns - set(rows.column_names):
            missing = ", ".join(sorted(columns - set(rows.column_names))) or "a known name"
            records.setdefault("train", []).append((name, f"split {name!r} lacks {missing}"))
            continue
        passages: dict[tuple[str, str], dict] = {}
        for row in tqdm(rows, desc=f"reading {name}", unit=" questions", delay=2, leave=False):
            key = "" if row["example_id"] is None else str(row["example_id"]), row["article"]
            level = next((level for level in LEVELS if key[0].startswith(level)), "")
            passage = passages.setdefault(
                key, {"id": key[0], "level": level, "article": key[1], "questions": [], "options": [], "answers": []}
            )
            passage["questions"].append(row["question"])
            passage["options"].append(row["options"])
            passage["answers"].append(row["answer"])
        records[split] = [(f"{name}/{example_id}", record) for (example_id, _), record in passages.items()]
    return records
