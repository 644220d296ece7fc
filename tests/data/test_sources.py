"""Every form in which people have questions is read with the right ids, levels, options and labels, or refused."""

import contextlib
import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import datasets
import pytest
from helpers import RECORD, ROOT

from race import RaceError
from race.data.passages import read_source
from race.data.sources import Reading


def write(folder: Path, name: str, content) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def other(name: str) -> dict:
    return RECORD | {"id": name, "article": f"Tom has a dog. It sleeps in {name}."}


def row(number: int = 1, **columns) -> dict:
    """A question with the columns of ehovy/race."""
    row = {"example_id": f"high{number}.txt", "article": f"Ann has {number} hens.", "answer": "B"}
    return row | {"question": "What has Ann?", "options": ["A cat", "Hens", "A cow", "A dog"]} | columns


def without(row: dict, *columns: str) -> dict:
    return {key: value for key, value in row.items() if key not in columns}


def table(*rows: dict, mark: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=mark)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def parquet(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(list(rows)).to_parquet(path)


def packed(folder: Path, form: str) -> Path:
    path = folder.with_name(f"{folder.name}.{form}")
    if form == "zip":
        return Path(shutil.make_archive(str(folder), "zip", folder))
    with tarfile.open(path, f"w:{form.partition('.')[2]}") as archive:
        archive.add(folder, ".")
    return path


def refusal(source, *arguments) -> str:
    with pytest.raises(RaceError) as error:
        read_source(str(source), *arguments)
    return str(error.value)


def found(source, split: str = "train", **settings) -> list[tuple]:
    return [(p.example_id, p.level, p.labels) for p in read_source(str(source), **settings)[0][split]]


def test_folders_of_records(tmp_path):
    """In natural order; with the level of the folder or the id; without an id, with the name of the file."""
    for name in ("middle/1.txt", "high/10.txt", "high/9.txt"):
        write(tmp_path, f"RACE/dev/{name}", other(name.replace("/", "")))
    write(tmp_path, "RACE/train/a.json", RECORD)
    write(tmp_path, "RACE/train/highway.json", without(other(""), "id"))
    assert list(read_source(str(tmp_path))[0]) == ["train", "validation"]
    expected = [("high9.txt", "high"), ("high10.txt", "high"), ("middle1.txt", "middle")]
    assert [passage[:2] for passage in found(tmp_path, "validation")] == expected
    assert found(tmp_path) == [("middle1.txt", "middle", [1, 2]), ("highway.json", "", [1, 2])]


@pytest.mark.parametrize("form", ["tar", "tar.gz", "tar.bz2", "tar.xz", "zip"])
def test_an_archive_equals_its_folder_and_a_damaged_one_is_refused(tmp_path, form):
    """Cut off anywhere, with a changed bit or an empty block: never a smaller data set without a word."""
    rng = random.Random(0)
    for name in ("1", "2", "3"):
        write(tmp_path / "race", f"dev/{name}.json", other(name))
    path = packed(tmp_path / "race", form)
    content, whole = path.read_bytes(), read_source(str(tmp_path / "race"))
    assert read_source(str(path)) == whole
    for _ in range(60):
        path.write_bytes(content[: rng.randrange(len(content.rstrip(b"\0")) - 1)])
        assert path.name in refusal(path)
    for _ in range(300):
        place, changed = rng.randrange(len(content)), bytearray(content)
        if form == "tar":  # which has checksums of headers only
            changed[place - place % 512 :][:512] = bytes(512)
        else:
            changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with contextlib.suppress(RaceError):  # or, where a bit means nothing for what is read, the same passages
            assert read_source(str(path)) == whole


def test_a_zip_of_windows_and_links_in_a_tar(tmp_path):
    with zipfile.ZipFile(tmp_path / "race.zip", "w") as archive:
        archive.writestr("RACE\\test\\high\\1.txt", json.dumps(RECORD))
    assert found(tmp_path / "race.zip", "test") == [("middle1.txt", "high", [1, 2])]
    write(tmp_path, "race/dev/1.json", RECORD)
    os.link(tmp_path / "race" / "dev" / "1.json", tmp_path / "race" / "dev" / "2.json")
    assert "2 question(s) occur again" in read_source(str(packed(tmp_path / "race", "tar")))[1][0]
    with tarfile.open(tmp_path / "race.tar", "a") as archive:  # the same members once more
        archive.add(tmp_path / "race" / "dev", "./dev")
    assert "6 question(s) occur again" in read_source(str(tmp_path / "race.tar"))[1][0]
    (tmp_path / "race" / "dev" / "3.json").symlink_to("../../../etc/passwd.json")
    assert "passwd" in refusal(packed(tmp_path / "race", "tar"))


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    """A link to nowhere is a problem; folders that lead back to their parents, or are closed, are refused."""
    write(tmp_path, "elsewhere/1.txt", RECORD)
    train = tmp_path / "race" / "train"
    train.mkdir(parents=True)
    (train / "high").symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "race") == [("middle1.txt", "high", [1, 2])]
    (train / "nowhere.json").symlink_to(tmp_path / "absent")
    assert "train/nowhere.json: cannot be read (FileNotFoundError" in refusal(tmp_path / "race")
    (train / "nowhere.json").rename(train / os.fsdecode(b"caf\xe9.json"))
    assert read_source(str(tmp_path / "race"), skip_bad=True)[1][0].startswith("train/caf\\udce9.json: ")
    (train / "up").symlink_to(train)
    assert "train/up/up/up" in refusal(tmp_path / "race")
    monkeypatch.setattr(os, "scandir", lambda path: exec("raise PermissionError(13, 'denied', str(path))"))
    assert "PermissionError" in refusal(tmp_path / "race")


@pytest.mark.parametrize("name", ["test.csv", "my-test_2.csv", "TEST (1).csv", "test-00000-of-00001.csv"])
def test_a_name_says_the_split(tmp_path, name):
    write(tmp_path, name, table(row()))
    assert found(tmp_path, "test") == found(tmp_path / name, "test") == [("high1.txt", "high", [1])]


@pytest.mark.parametrize("name", ["testimony.csv", "train_test.csv", "questions.csv"])
def test_a_name_says_no_split(tmp_path, name):
    write(tmp_path, name, table(row()))
    assert "train, dev (or val) and test" in refusal(tmp_path) and "train, dev" in refusal(tmp_path / name)
    assert found(tmp_path, "test", how=Reading(False)) == found(tmp_path / name, "test", how=Reading(False))
    write(tmp_path, "dev.csv", table(row()))
    splits, (note,) = read_source(str(tmp_path))
    assert list(splits) == ["validation"] and note.startswith("1 file(s) of no split") and note.endswith(name)


def test_what_editors_and_desktops_leave_is_no_data(tmp_path):
    write(tmp_path, "race/train/a.json", RECORD)
    left = ("train/.ipynb_checkpoints/a.json", "__MACOSX/train/a.json", ".git/train/a.json", "train/.hidden/b.json")
    for name in (*left, "train/._a.json", ".Trash/train/all.csv"):
        write(tmp_path, f"race/{name}", other("other"))
    for source in (tmp_path / "race", packed(tmp_path / "race", "tar"), packed(tmp_path / "race", "zip")):
        assert [passage[0] for passage in found(source)] == ["middle1.txt"]


def test_configurations_of_the_hub_side_by_side_are_not_added_up(tmp_path):
    """all/, high/ and middle/ as in the hub's repository, or as in its branch of converted files."""
    middle = row(2, example_id="middle2.txt")
    for name, rows in (("all", (row(1), middle)), ("middle", (middle,)), ("high", (row(1),))):
        parquet(tmp_path / name / "test-00000-of-00001.parquet", *rows)
    splits, (note,) = read_source(str(tmp_path))
    assert [(p.example_id, p.level) for p in splits["test"]] == [("high1.txt", "high"), ("middle2.txt", "middle")]
    assert "2 file(s)" in note and "high/test" in note
    shutil.rmtree(tmp_path / "all")
    assert "(high, middle)" in refusal(tmp_path)


def test_no_such_source_or_none_with_questions(tmp_path):
    for source in ("questions.csv", "data/race.zip", "/no/such/folder", "no such id!"):
        assert f"{source}: no such folder or file" in refusal(source)
    assert "no questions found" in refusal(tmp_path)
    write(tmp_path, "notes/readme.txt", b"hello")
    write(tmp_path, "file.tar", b"no tar at all")
    assert "no questions found" in refusal(tmp_path) and "file.tar: cannot be read" in refusal(tmp_path / "file.tar")


@pytest.mark.parametrize("name", ["train/high/all.txt", "train/high/all.json", "train/high/all.jsonl", "train.jsonl"])
def test_a_record_a_line(tmp_path, name):
    lines = [other("high1.txt"), other("high2.txt"), without(other("none"), "id"), row(7)]
    write(tmp_path, name, b"\xef\xbb\xbf" + b"\r\n\n".join(json.dumps(line).encode() for line in lines) + b"\n")
    level = "high" if "high" in name else ""
    expected = [("high1.txt", "high", [1, 2]), ("high2.txt", "high", [1, 2]), (f"{name}, line 5", level, [1, 2])]
    assert found(tmp_path) == [*expected, ("high7.txt", "high", [1])]


def test_problems_of_lines_come_together(tmp_path):
    records = [other("1"), RECORD | {"answers": "AB"}, row(1, options=["a"]), {"question": 1}]
    lines = [json.dumps(record).encode() for record in records]
    lines[1:1] = [b"{", b'{"article": "\xff"}']
    write(tmp_path, "train/high/all.txt", b"\n".join(lines))
    said = refusal(tmp_path)
    assert "5 problem(s)" in said
    for line, word in ((2, "JSON"), (3, "utf-8"), (4, "'answers'"), (5, "4 options"), (6, "columns article")):
        assert any(f"all.txt, line {line}: " in problem and word in problem for problem in said.splitlines())


def test_a_list_of_records_and_rows(tmp_path):
    write(tmp_path, "dev/all.json", [RECORD, row(1), row(1, question="Who has hens?"), row(2)])
    expected = [("middle1.txt", "middle", [1, 2]), ("high1.txt", "high", [1, 1]), ("high2.txt", "high", [1])]
    assert found(tmp_path, "validation") == expected
    write(tmp_path, "dev/all.json", [RECORD, 7])
    assert "dev/all.json, item 2: " in refusal(tmp_path)


OPTIONS = ["NA", "None", "null", "007"]  # texts, whatever a reader of tables may think
SPELLED = {
    "JSON": {"options": json.dumps(OPTIONS)},
    "tuple": {"options": repr(tuple(OPTIONS))},
    "option_A": {f"option_{letter}": option for letter, option in zip("ABCD", OPTIONS, strict=True)},
    "Option1": {f"Option{number}": option for number, option in enumerate(OPTIONS, 1)},
    "option_0": {f"option_{number}": option for number, option in enumerate(OPTIONS)},
    "in another order": dict(zip("DCBA", OPTIONS[::-1], strict=True)),
}


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("spelled", SPELLED)
def test_csv_however_it_is_written(tmp_path, spelled, mark):
    articles = [f'Ann,\n"my"; aunt\r\nhas\t{number} hens.' for number in (1, 2)]
    rows = [without(row(i, answer="D", article=article), "options") for i, article in enumerate(articles, 1)]
    write(tmp_path, "dev.csv", b"\xef\xbb\xbf" + table(*(row | SPELLED[spelled] for row in rows), mark=mark))
    passages = read_source(str(tmp_path))[0]["validation"]
    assert [p.article for p in passages] == articles and [p.example_id for p in passages] == ["high1.txt", "high2.txt"]
    assert [(p.options, p.labels, p.level) for p in passages] == [([OPTIONS], [3], "high")] * 2


def test_csv_without_ids_and_with_levels(tmp_path):
    """Rows of one article make a passage, named after the file and its first row."""
    rows = [row(1, level="Middle"), row(1, question="Who has hens?", level="Middle"), row(2, level="")]
    write(tmp_path, "train.csv", table(*(without(row, "example_id") for row in rows)))
    passages = read_source(str(tmp_path / "train.csv"))[0]["train"]
    assert [(p.example_id, p.level, p.places) for p in passages] == [
        ("train.csv, row 2", "middle", [0, 1]),
        ("train.csv, row 4", "", [0]),
    ]


def test_levels_are_those_of_folders_columns_and_of_race_s_own_ids(tmp_path):
    ids = ["high_school_biology-1", "highway-code-3", "high12", "high3.txt.bak", "high3.txt", "middle45.txt"]
    columns = [{"level": "high school"}, {"level": "MIDDLE "}]
    rows = [row(i, example_id=name, level="") for i, name in enumerate(ids)]
    rows += [row(i + 10, example_id=f"high-{i}") | more for i, more in enumerate(columns)]
    write(tmp_path, "train.csv", table(*rows))
    assert [level for _, level, _ in found(tmp_path)] == ["", "", "", "", "high", "middle", "", "middle"]


def test_problems_of_rows_come_together(tmp_path):
    """Rows are counted as a spreadsheet shows them; empty ones are nothing."""
    rows = table(row(1), row(2, answer="E"), row(3, options="a, b"), row(4, article=""))
    write(tmp_path, "train.csv", rows + b"high5.txt,Ann\r\n\r\n,,,,\r\n")
    said = refusal(tmp_path)
    assert "4 problem(s)" in said
    for number, word in ((3, "the answer is 'E'"), (4, "expected a list of 4"), (5, "article: "), (6, "as many")):
        assert any(f"  train.csv, row {number}: " in line and word in line for line in said.splitlines())


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.parquet"])
def test_a_table_without_the_columns_is_one_problem(tmp_path, name):
    """Also where it has nine columns of options."""
    nine = without(row(), "options") | {f"option{number}": "x" for number in range(9)}
    for rows in ([{"example_id": "1", "question": "Who?", "a": "x", "b": "y", "c": "z"}] * 2, [nine] * 2):
        parquet(tmp_path / name, *rows) if name.endswith("parquet") else write(tmp_path, name, table(*rows))
        said = refusal(tmp_path)
        assert "1 problem(s)" in said and f"{name}: expected the columns article, question, options, answer" in said


@pytest.mark.parametrize(("header", "named"), [("Question,question", "question"), ("question,optionC", "optionc")])
def test_columns_that_occur_twice_are_refused(tmp_path, header, named):
    """Which is meant, nobody knows; others, such as empty ones, may."""
    (tmp_path / "train.csv").write_text(f"article,{header},A,B,optionC,D,answer,,\nAnn sings.,Who?,x,a,b,c,d,A,,\n")
    assert f"train.csv: columns that occur twice: {named}" in refusal(tmp_path)


def test_parquet_and_saved_folders_as_the_hub_has_them(corpus, tmp_path):
    from_files, _ = read_source(str(corpus))
    saved = {}
    for split, passages in from_files.items():
        rows = [
            {"example_id": p.example_id, "article": p.article, "answer": "ABCD"[label], "question": q, "options": o}
            for p in passages
            for q, o, label in zip(p.questions, p.options, p.labels, strict=True)
        ]
        saved[split] = datasets.Dataset.from_list(rows)
        parquet(tmp_path / "files" / f"{split}-00000-of-00001.parquet", *rows)
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    assert read_source(str(tmp_path / "files"))[0] == read_source(str(tmp_path / "saved"))[0] == from_files
    (tmp_path / "saved" / "test" / "state.json").write_text("{")
    assert "saved: cannot be read" in refusal(tmp_path / "saved")


def test_one_split_of_save_to_disk_is_named_after_its_folder(tmp_path):
    data = datasets.Dataset.from_list([row(1), row(2), row(2, question="Who has hens?")])
    data.select([2, 0]).save_to_disk(tmp_path / "dev")
    assert [passage[0] for passage in found(tmp_path / "dev", "validation")] == ["high2.txt", "high1.txt"]
    (tmp_path / "dev").rename(tmp_path / "mine")
    assert "train, dev (or val) and test" in refusal(tmp_path / "mine")


@pytest.mark.parametrize("config", ["all", "high"])
def test_the_hub_offline(tmp_path, config):
    """As on a compute node after a download: "all" is read; a part of it never stands for the whole."""
    datasets.Dataset.from_list([row(1)]).save_to_disk(tmp_path / "saved")
    kept = tmp_path / "ehovy___race" / config / "0.0.0" / "0123456789abcdef"
    kept.mkdir(parents=True)
    (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(kept / "race-test.arrow")
    split = {"name": "test", "num_bytes": 1, "num_examples": 1, "dataset_name": "race"}
    info = json.loads((tmp_path / "saved" / "dataset_info.json").read_text())
    info |= {"config_name": config, "dataset_name": "race", "builder_name": "parquet", "splits": {"test": split}}
    (kept / "dataset_info.json").write_text(json.dumps(info))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    code = "from race.data.passages import read_source; print(read_source('ehovy/race')[0]['test'][0].labels)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "[1]\n" if config == "all" else "ehovy/race: " in done.stderr and "'high'" in done.stderr


def test_all_or_the_only_configuration_of_the_hub_is_taken(monkeypatch):
    configs = {"high": 1, "all": 2}

    def load(source: str, name: str) -> dict:
        if name not in configs:
            raise ValueError(f"BuilderConfig '{name}' not found")
        return {"test": datasets.Dataset.from_list([row(configs[name])])}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda source: list(configs))
    assert found("somebody/race", "test") == [("high2.txt", "high", [1])]
    del configs["all"]
    assert found("somebody/race", "test") == [("high1.txt", "high", [1])]
    configs["middle"] = 3
    assert "but high, middle: download one" in refusal("somebody/race")
