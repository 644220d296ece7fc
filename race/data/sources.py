"""Sources of questions: folders, archives, files, saved data sets and the hub become records with their places."""

import ast
import csv
import functools
import io
import json
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from race import COLUMNS, LETTERS, LEVELS, OPTIONS, SPLITS, RaceError
from race.demo.corpus import write_corpus

SPLIT_OF = {split: split for split in SPLITS} | dict.fromkeys(("dev", "val", "valid"), "validation")
SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
DIGITS = re.compile(r"(\d+)")  # 9.txt comes before 10.txt
HIDDEN = re.compile(r"(^|/)(\.[^./]|__MACOSX(/|$))")  # what editors and macOS leave in folders and archives is no data
WANTED = COLUMNS[:4]  # columns of a table
OPTION = re.compile(r"(?:option)?([a-h])|option(\d)")  # or a column for each option: A, option_b, Option1
OF_RACE = re.compile(rf"({'|'.join(LEVELS)})\d+\.txt")  # an id that says the level: high12.txt
Columns = tuple[tuple[str, tuple[str, ...]], ...]  # what stands for a column: ("options", ("end0", "end1"))
Files = list[tuple[str, Any]]  # name, and what it holds: bytes, a Path to read, or a table of the library `datasets`
Values = list[tuple[str, Any]]  # place, and what stands there: a record, a row, something else, or a RaceError


class Reading(NamedTuple):
    """How to read a source; numbering: answers are "letters", numbers from "0" or "1" on, or the option's "text"."""

    answers: bool = True  # are needed
    columns: Columns = ()
    numbering: str = "letters"
    options: int = OPTIONS  # of each question
    articles: bool = True


PLAIN = Reading()


def read_records(source: str, how: Reading) -> tuple[dict[str, Values], list[str], list[str]]:
    """(place, record) per split, in a fixed order, not checked; problems with places; a line if files are left out."""
    if source == "demo":
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder))
            return read_records(folder, how)
    chosen, notes = _one_data_set(_files(source), how.answers)
    records: dict[str, Values] = {}
    problems: list[str] = []
    names: dict[tuple, str] = {}  # of passages without id: the place where the article is met first
    for split, level, name, file in tqdm(chosen, desc="reading", unit=" files", delay=2, leave=False):
        values = attempt(_values, name, file, how)
        for place, value in [(name, values)] if isinstance(values, RaceError) else values:
            record = attempt(_record, value, level, how)
            if isinstance(record, RaceError):
                problems.append(f"{place}: {record}")
                continue
            if record.get("id") is None:
                article = str(record.get("article") or place) if how.answers else place
                record["id"] = names.setdefault((split, level, article), place)
            records.setdefault(split, []).append((place, record))
    return records, problems, notes


def attempt(read: Callable, *arguments: Any) -> Any:
    """What `read` returns; or a RaceError, whatever a parser raises at what is damaged, cut off or of another kind."""
    try:
        return read(*arguments)
    except RaceError as error:
        return error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return RaceError(f"cannot be read ({reason})").with_traceback(error.__traceback__)


def _files(source: str) -> Files:
    path = Path(source)
    if not path.exists() or any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        return _tables(source)
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return [(path.name, path)]
    found = _folder_files(path) if path.is_dir() else _archive_files(path)
    return [(name, file) for name, file in found if name.lower().endswith(SUFFIXES) and not HIDDEN.search(name)]


def _folder_files(folder: Path, above: str = "") -> Files:
    if above.count("/") > 20:
        raise RaceError(f"{above}: more than 20 folders deep; is one a link to a folder above?")
    found = []
    for entry in os.scandir(folder):
        if entry.is_dir() and not HIDDEN.match(entry.name):
            found += _folder_files(folder / entry.name, f"{above}{entry.name}/")
        elif not entry.is_dir():
            found.append((above + entry.name, folder / entry.name))
    return found


def _archive_files(path: Path) -> Files:
    """Members are read in memory, never unpacked: a path in them cannot lead out of a folder."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            if any(b"PK\1\2" in member.comment + member.extra for member in archive.infolist()):
                raise zipfile.BadZipFile("a damaged length took in the entries that follow it")
            return [(member.filename.replace("\\", "/"), archive.read(member)) for member in archive.infolist()]
    with tarfile.open(path) as tar:
        opened = ((member.name, tar.extractfile(member)) for member in tar)
        files = [(name, file.read()) for name, file in opened if file]  # None: a folder or device
        tar.fileobj.seek(tar.offset)  # tarfile takes a damaged or missing header for the end, which is of zeros
        if not (end := tar.fileobj.read()) or end.strip(b"\0"):
            raise tarfile.ReadError("no end of the archive where one should be")
    return files


def _tables(source: str) -> Files:
    """Splits of a folder of save_to_disk, or of the hub: of "all" (by name: no part stands for it) or the only one."""
    from datasets import Dataset, get_dataset_config_names, load_dataset, load_from_disk

    if Path(source).exists():
        data = load_from_disk(source)
        if isinstance(data, Dataset):  # one split
            data = {str(data.split) if data.split in SPLIT_OF else Path(source).resolve().name: data}
        return list(data.items())
    try:
        return list(load_dataset(source, "all").items())
    except ValueError:
        names = get_dataset_config_names(source)
        if len(names) > 1:
            raise RaceError(f"no configuration all, but {', '.join(names)}: download one, name its folder") from None
        return list(load_dataset(source, *names).items())


def _one_data_set(files: Files, answers: bool) -> tuple[list[tuple[str, str, str, Any]], list[str]]:
    """(split, level, name, file) of the questions of one data set, and a line if others are left out."""
    files = sorted(files, key=lambda file: [int(part) if part.isdecimal() else part for part in DIGITS.split(file[0])])
    names = [name.encode("utf-8", "backslashreplace").decode() for name, _ in files]  # other bytes become \udcXX
    marked = [(*_marks(name), name, file) for name, (_, file) in zip(names, files, strict=True)]
    data_sets = sorted({data_set for data_set, split, *_ in marked if split})
    if not answers:  # questions that somebody wants answered, each of them: of no split
        return [("test", *file[2:]) for file in marked], []
    if not data_sets:
        raise RaceError("no questions found: expected files or folders that are named train, dev (or val) and test")
    if len(data_sets) > 1:  # such as all/, high/ and middle/ of the hub's repository: a question must not count twice
        listed = ", ".join(data_set or "the top folder" for data_set in data_sets)
        data_sets = [data_set for data_set in data_sets if data_set.rpartition("/")[2] == "all"]
        if len(data_sets) != 1:
            raise RaceError(f"several data sets lie side by side ({listed}): name the folder of one")
    kept = [file[1:] for file in marked if file[1] and file[0] == data_sets[0]]
    others = [file[3] for file in marked if not (file[1] and file[0] == data_sets[0])]
    note = f"{len(others)} file(s) of no split or of another data set are left out: {', '.join(others[:3])}"
    return kept, [note] if others else []


def _marks(name: str) -> tuple[str, str | None, str]:
    """What a path names: the data set (all that stands before the split), the split and the level."""
    *folders, file = name.split("/")
    at = next((i for i, folder in enumerate(folders) if folder.lower() in SPLIT_OF), len(folders))
    words = folders[at : at + 1] or re.findall(r"[^\W\d_]+", Path(file).stem)
    splits = {SPLIT_OF[word.lower()] for word in words if word.lower() in SPLIT_OF}
    level = next((folder.lower() for folder in reversed(folders) if folder.lower() in LEVELS), "")
    return "/".join(folders[:at]), splits.pop() if len(splits) == 1 else None, level


def _values(name: str, file: Any, how: Reading) -> Values:
    content, suffix = file.read_bytes() if isinstance(file, Path) else file, Path(name).suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _csv_rows(name, content.decode("utf-8-sig"), how)
    if suffix in (".txt", ".json", ".jsonl"):
        return _json_values(name, content, how.answers)
    if isinstance(content, bytes):
        table = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read()
        table.validate(full=True)
    else:
        table = content.with_format("arrow")[:]
    _columns(tuple(table.column_names), how)
    return [(f"{name}, row {number}", row) for number, row in enumerate(table.to_pylist(), 1)]


def _json_values(name: str, content: bytes, answers: bool) -> Values:
    """A record, a list of records, or a record a line."""
    value = attempt(json.loads, content)
    if isinstance(value, list) and value:
        return [(f"{name}, item {number}", item) for number, item in enumerate(value, 1)]
    if isinstance(value, dict) and answers:
        value.setdefault("id", name.rpartition("/")[2])
    if isinstance(value, RaceError):
        lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
        values = [(f"{name}, line {number}", attempt(json.loads, line)) for number, line in lines]
        if any(isinstance(line, dict) for _, line in values):
            return values
    return [(name, value)]


def _csv_rows(name: str, text: str, how: Reading) -> Values:
    """Rows are counted as a spreadsheet shows them: the header is row 1. Commas, semicolons or tabs."""
    csv.field_size_limit(2**31 - 1)
    mark = max(",;\t", key=text.split("\n", 1)[0].count)
    header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    _columns(tuple(header), how)
    wrong = RaceError(f"expected as many cells as the header has, {len(header)}")
    return [
        (f"{name}, row {number}", dict(zip(header, cells, strict=True)) if len(cells) == len(header) else wrong)
        for number, cells in enumerate(rows, 2)
        if any(cells)
    ]


@functools.lru_cache
def _columns(names: tuple[str, ...], how: Reading) -> dict[str, Callable[[dict], Any]]:
    """What takes the article, question, options, answer, level and id out of a row with these columns, or RaceError."""
    words = [re.sub(r"[\W_]", "", name.lower()) for name in names]  # without case and punctuation
    if twice := {w for w in words if words.count(w) > 1 and (w in COLUMNS or OPTION.fullmatch(w))}:
        raise RaceError(f"columns that occur twice: {', '.join(sorted(twice))}")
    plain = dict(zip(words, names, strict=True))
    columns = {key: [plain[key]] for key in COLUMNS if key in plain}
    if "exampleid" in plain:
        columns["id"] = [plain["exampleid"]]
    options = {match[1] or match[2]: name for word, name in plain.items() if (match := OPTION.fullmatch(word))}
    if len(options) > 1 and any(it.startswith("".join(sorted(options))) for it in ("abcdefgh", "01234567", "12345678")):
        columns.setdefault("options", [options[key] for key in sorted(options)])
    wanted = {key: given for key, given in how.columns if key != "answer" or how.answers or {*given} & {*names}}
    unknown = [it for given in wanted.values() for it in given if not {it, it.partition(".")[0]} & {*names}]
    columns |= wanted
    if unknown or not {*WANTED[: 4 if how.answers else 3]} <= columns.keys():
        found = f"found: {', '.join(map(repr, names))[:200] or 'none'}; --columns says what stands for them"
        expected = ", ".join(unknown) or f"{', '.join(WANTED)} (or A, B, C … in place of options)"
        raise RaceError(f"expected the columns {expected}; {found}")
    return {key: functools.partial(_cell, tuple(paths)) for key, paths in columns.items()}


def _cell(paths: tuple[str, ...], row: dict) -> Any:
    """What a row has under a name, or a list of what it has under several; "a.b" is b of a, or of each in a list a."""
    found = []
    for path in paths:
        value = row
        for part in [path] if path in row else path.split("."):
            value = [it[part] for it in value] if isinstance(value, list) else value[part]
        found.append(value)
    return found[0] if len(found) == 1 else found or ""


def _record(value: Any, level: str, how: Reading) -> dict:
    """A record or a row (a record of one question) with a level: that of the folder, or else its own, or its id's."""
    if isinstance(value, list) and [*map(type, value)] == [list, list, str]:  # DREAM's
        lists = {"questions": "question", "options": "choice", "answers": "answer"}
        lists = {name: [it.get(key) for it in value[1]] for name, key in lists.items()}
        value, how = {"article": "\n".join(value[0]), "id": value[2]} | lists, how._replace(numbering="text")
    if not isinstance(value, dict):
        raise value if isinstance(value, RaceError) else RaceError(f"expected an object, found {type(value).__name__}")
    own = {name: paths for name, paths in how.columns if name not in COLUMNS}
    if lost := [name for name in own if name not in value]:
        raise RaceError(f"--keep {', '.join(lost)}: it has only {', '.join(map(str, value))[:200]}")
    further = {name: _cell(paths, value) for name, paths in own.items()}
    value = {key: it for key, it in value.items() if "questions" not in value or (key,) not in own.values()}
    if "questions" not in value:
        row = {key: cell(value) for key, cell in _columns(tuple(value), how._replace(answers=False)).items()}
        lists = {"questions": [row["question"]], "options": [_listed(row["options"])], "answers": [row.get("answer")]}
        name = None if is_missing(row.get("id")) else str(row["id"])
        value = {"id": name, "level": row.get("level"), "article": row["article"]} | lists
    elif not how.answers and isinstance(value["questions"], list) and is_missing(value.get("answers") or None):
        value["answers"] = [None] * len(value["questions"])
    value["further"] = further
    of_column, of_id = str(value.get("level")).strip().lower(), OF_RACE.fullmatch(str(value.get("id")))
    value["level"] = level or (of_column if of_column in LEVELS else of_id[1] if of_id else "")
    if how.numbering != "letters":
        pairs = zip(value["answers"], value["options"], strict=True)
        value["answers"] = [_letter(answer, options, how.numbering) for answer, options in pairs]
    return value


def _letter(answer: Any, options: list, numbering: str) -> Any:
    """The letter of an answer that is a number, or the text of an option; anything else as it is."""
    if numbering == "text":
        found = [place for place, option in enumerate(options) if option == answer]
    else:
        found = [int(number) - int(numbering)] if (number := str(answer).removesuffix(".0")).isdecimal() else []
    return LETTERS[found[0]] if len(found) == 1 and 0 <= found[0] < len(LETTERS) else answer


def _listed(options: Any) -> Any:
    """The cells of several columns, or a list that a cell holds as text, JSON or Python; anything else as it is."""
    parsers = (json.loads, ast.literal_eval) if isinstance(options, str) else ()
    found = [options, *(attempt(parse, options) for parse in parsers)]
    return next((list(one) for one in found if isinstance(one, list | tuple)), options)


def is_missing(value: object) -> bool:
    """None, NaN (which is not equal to itself) and blank text, as tables have them for an empty cell."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())
