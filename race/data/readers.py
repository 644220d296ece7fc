"""From any form of a source to records: folders, archives, files, saved data sets, the hub. Nothing is judged here."""

import ast
import csv
import functools
import io
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from race import HUB_ID, LEVELS, SPLITS, RaceError
from race.data.source_files import SPLIT_OF, SUFFIXES, Content, archive_files, chosen, folder_files
from race.demo.corpus import write_corpus

FIELDS = {"questions": "question", "options": "options", "answers": "answer"}  # lists in RACE's files → its columns
OPTION = re.compile(r"(?:option)?([a-h])|option(\d)")  # names of columns, without case and punctuation
WANTED = ("article", "question", "options", "answer")
Records = dict[str, list["Found"]]  # by split


class Found(NamedTuple):
    """A record with its place in the source; `rows`: the places of its questions, where each is a row of its own."""

    place: str
    record: Any  # of RACE's layout, with a "level"; or what stands there instead; or a RaceError met on reading
    rows: list[str] | None = None


class Value(NamedTuple):
    """What a file or table holds at one place: a record, a row, or something else."""

    split: str
    level: str  # as the folder says
    place: str
    content: Any
    several: bool = True  # such values in the file


def read_records(source: str, answers: bool) -> tuple[Records, list[str]]:
    """Records per split, in a fixed order, and a line for each thing left out; raises RaceError if it is no source."""
    path = Path(source)
    if source == "demo":
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder))
            return _of_files(folder_files(Path(folder)), source, answers)
    if (path / "dataset_dict.json").is_file() or all((path / f"{n}.json").is_file() for n in ("state", "dataset_info")):
        return _records(_table_values(_saved(path), answers)), []
    if path.is_dir():
        return _of_files(folder_files(path), source, answers)
    if path.exists():
        is_data = path.suffix.lower() in SUFFIXES
        return _of_files([(path.name, path)] if is_data else archive_files(path), source, answers)
    if not HUB_ID.fullmatch(source) or path.suffix.lower() in (*SUFFIXES, ".zip", ".tar", ".gz", ".xz", ".bz2"):
        raise RaceError("no such folder or file, and not the form of a hub id (owner/name)")
    return _records(_table_values(_from_hub(source), answers)), []


def _of_files(files: list[tuple[str, Content]], source: str, answers: bool) -> tuple[Records, list[str]]:
    taken, notes = chosen(files, answers)
    bar = tqdm(taken, desc=f"reading {source}", unit=" files", delay=2, leave=False)
    values = (
        Value(split, level, place, value, place != name)
        for split, level, name, content in bar
        for place, value in _values(name, _read(content), answers)
    )
    return _records(values), notes


def _table_values(tables: dict[str, Any], answers: bool) -> Iterator[Value]:
    """Rows of data sets of the library `datasets`, by the name of their split."""
    named = answers or any(name in SPLIT_OF for name in tables)
    for name, table in tables.items():
        split, names = SPLIT_OF.get(name) if named else "test", table.column_names
        if split is None:
            yield Value("train", "", name, RaceError(f"the name of the split is none of {', '.join(SPLITS)}"))
            continue
        batches = table.select_columns(_used(names)).with_format("arrow").iter(1000)
        rows = _table_rows(name, names, batches, answers)
        for place, row in tqdm(rows, desc=f"reading {name}", unit=" questions", delay=2, leave=False):
            yield Value(split, "", place, row)


def _records(values: Iterable[Value]) -> Records:
    """Complete the records with level and id, and put rows of one passage together."""
    records: Records = {}
    passages: dict[tuple, Found] = {}
    for value in values:
        found, content = records.setdefault(value.split, []), value.content
        if isinstance(content, dict) and "questions" not in content and "question" in _columns(tuple(content)):
            if problem := _missing(content, answers=False):
                found.append(Found(value.place, problem))
            else:
                _add_row(found, passages, value)
            continue
        if isinstance(content, dict):
            hint = content.get("id") if value.several else ""
            content["level"] = _level(value.level, content.get("level"), hint)
            content.setdefault("id", value.place if value.several else value.place.rpartition("/")[2])
        found.append(Found(value.place, content))
    return records


def _add_row(found: list[Found], passages: dict[tuple, Found], value: Value) -> None:
    row = {
        key: [value.content.get(name) for name in column] if isinstance(column, list) else value.content.get(column)
        for key, column in _columns(tuple(value.content)).items()
    }
    name = row.get("id")
    example_id = "" if is_missing(name) else str(name)
    level = _level(value.level, row.get("level"), example_id)
    text = row["article"] if isinstance(row["article"], str) else (value.place,)
    key = value.split, level, example_id, text  # without ids, rows belong together by their article
    if key not in passages:
        new = {"id": example_id or value.place, "level": level, "article": row["article"]}
        passages[key] = Found(value.place, new | {field: [] for field in FIELDS}, [])
        found.append(passages[key])
    row["options"] = _listed(row["options"])
    for field, column in FIELDS.items():
        passages[key].record[field].append(row.get(column))
    passages[key].rows.append(value.place)


def is_missing(value: object) -> bool:
    """None, NaN (which is not equal to itself) and blank text, as tables have them for an empty cell."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


# ------------------------------------------------------------------------------------------------ what is in a file


def _read(content: Content) -> bytes | RaceError:
    try:
        content = content.read_bytes() if isinstance(content, Path) else content
    except OSError as error:
        return RaceError(f"cannot be read ({error.strerror})")
    if isinstance(content, bytes) and content.startswith(b"version https://git-lfs"):
        return RaceError("a Git LFS pointer in place of the file; run git lfs pull where you cloned it")
    return content


def _values(name: str, content: bytes | RaceError, answers: bool) -> Iterator[tuple[str, Any]]:
    """(place, JSON value, row or RaceError), one or many."""
    if isinstance(content, RaceError):
        yield name.rstrip("/"), content
    elif name.lower().endswith(".parquet"):
        yield from _parquet_rows(name, content, answers)
    elif name.lower().endswith((".csv", ".tsv")):
        yield from _csv_rows(name, content, answers)
    else:
        yield from _json_values(name, content)


def _json_values(name: str, content: bytes) -> Iterator[tuple[str, Any]]:
    """A record, a list of records, or a record a line."""
    value = _json(content)
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        yield from ((f"{name}, item {number}", item) for number, item in enumerate(value, 1))
        return
    if isinstance(value, RaceError) and b"\n" in content:
        lines = [(number, _json(line)) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
        if any(isinstance(line, dict) for _, line in lines):
            yield from ((f"{name}, line {number}", line) for number, line in lines)
            return
    yield name, value


def _json(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RaceError(f"not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return RaceError(f"not JSON ({error})")


def _csv_rows(name: str, content: bytes, answers: bool) -> Iterator[tuple[str, Any]]:
    """Rows are counted as a spreadsheet shows them: the header is row 1."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield name, RaceError(f"not UTF-8 at byte {error.start}, in line {line}; save it as CSV UTF-8")
        return
    csv.field_size_limit(sys.maxsize)
    first = re.split(r"[\r\n]", text, maxsplit=1)[0]
    headers = [next(csv.reader([first], delimiter=mark), []) for mark in ",;\t"]
    header = max(headers, key=lambda names: len(_columns(tuple(names))))
    if problem := _missing(header, answers):
        yield name, problem
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=",;\t"[headers.index(header)], strict=True)
    for number in itertools.count(1):
        place = f"{name}, row {number}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, RaceError(f"a quoted cell does not end as it should ({error}); what it took in is lost")
            continue
        if number > 1 and len(cells) == len(header) and any(cells):
            yield place, dict(zip(header, cells, strict=True))
        elif number > 1 and any(cells):
            yield place, RaceError(f"{len(cells)} cells, but the header has {len(header)}")


def _parquet_rows(name: str, content: bytes, answers: bool) -> Iterator[tuple[str, Any]]:
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        names = file.schema_arrow.names
        table = file.read(columns=_used(names))
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError):
        yield name, RaceError("not a parquet file that can be read, or damaged or cut off; fetch it again")
        return
    yield from _table_rows(name, names, table.to_batches(1000), answers)


def _table_rows(name: str, names: list[str], batches: Iterable, answers: bool) -> Iterator[tuple[str, Any]]:
    if problem := _missing(names, answers):
        yield name, problem
        return
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


# ------------------------------------------------------------------------------------------------ columns of tables


@functools.lru_cache
def _columns(names: tuple[str, ...]) -> dict[str, str | list[str]]:
    """Which columns hold what: RACE's name for it → a column, or the four that hold the options."""
    plain = {re.sub(r"[\W_]", "", name.lower()): name for name in names}
    columns: dict[str, Any] = {key: plain[key] for key in (*WANTED, "level", "id") if key in plain}
    if "exampleid" in plain:
        columns["id"] = plain["exampleid"]
    four = {match[1] or match[2]: name for word, name in plain.items() if (match := OPTION.fullmatch(word))}
    if "options" not in columns and "".join(sorted(four)) in ("abcd", "0123", "1234"):
        columns["options"] = [four[key] for key in sorted(four)]
    return columns


def _used(names: list[str]) -> list[str]:
    columns = _columns(tuple(names)).values()
    return [name for column in columns for name in (column if isinstance(column, list) else [column])]


def _missing(names: Iterable[str], answers: bool) -> RaceError | None:
    columns, wanted = _columns(tuple(names)), WANTED if answers else WANTED[:-1]
    if all(key in columns for key in wanted):
        return None
    found = ", ".join(names)[:200] or "none"
    return RaceError(f"expected the columns {', '.join(wanted)} (or A, B, C, D in place of options); found: {found}")


def _level(*hints: object) -> str:
    """The level with which a hint begins, such as "high" of high12.txt."""
    return next((level for hint in hints for level in LEVELS if str(hint or "").lower().startswith(level)), "")


def _listed(options: Any) -> Any:
    """A list that a cell holds as text, JSON or Python; anything else as it is."""
    for parse in (json.loads, ast.literal_eval) if isinstance(options, str) else ():
        try:
            parsed = parse(options)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(parsed, list | tuple):
            return list(parsed)
    return options


# ------------------------------------------------------------------------------------------------ saved and hub data


def _saved(path: Path) -> dict[str, Any]:
    """A folder that save_to_disk made, of one split or of several."""
    from datasets import Dataset, load_from_disk

    try:
        data = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise RaceError("a folder of save_to_disk that cannot be read, or damaged or cut off; save it again") from error
    if not isinstance(data, Dataset):
        return dict(data)
    names = [str(data.split), path.resolve().name]
    return {next((name for name in names if name in SPLIT_OF), names[-1]): data}


def _from_hub(source: str) -> dict[str, Any]:
    """The configuration "all", asked for first so that a copy in the local cache is found offline; or the only one."""
    from datasets import get_dataset_config_names, load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        try:
            return load_dataset(source, "all")
        except ValueError:
            names = get_dataset_config_names(source)
            if len(names) == 1:
                return load_dataset(source, names[0])
            several = f"it has several configurations ({', '.join(names)})"
            reason = f"{several} and none named all: download one, and name its folder"
    except RuntimeError:
        reason = "it is a script, which the library datasets no longer runs: download its files, and name their folder"
    except DatasetNotFoundError:
        reason = "there is no such data set on the Hugging Face hub, or it needs a login (hf auth login)"
    except ConnectionError:
        reason = "no such folder here; the Hugging Face hub is not reached, and it is not in its cache on this machine"
    except (DatasetsError, OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise RaceError(f"cannot be loaded: {reason}")
