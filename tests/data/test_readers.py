"""Every form in which people have questions is read with the right ids, levels, options and labels, or refused."""

import contextlib
import csv
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bad_input import QUIET, TEXT
from test_sources import RECORD, write

from race import RaceError
from race.data.sources import read_source


def other(name: str) -> dict:
    """A record with this id, and an article that no other has."""
    return RECORD | {"id": name, "article": f"Tom has a dog. It sleeps in {name}."}


def row(number: int = 1, **columns) -> dict:
    """A question with the columns of ehovy/race."""
    row = {"example_id": f"high{number}.txt", "article": f"Ann has {number} hens.", "answer": "B"}
    return row | {"question": "What has Ann?", "options": ["A cat", "Hens", "A cow", "A dog"]} | columns


def without(row: dict, *columns: str) -> dict:
    return {key: value for key, value in row.items() if key not in columns}


def table(*rows: dict, mark: str = ",") -> bytes:
    """Rows as CSV; a list as its Python text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=mark)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def parquet(path: Path, *rows: dict) -> None:
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(list(rows)).to_parquet(path)


def packed(folder: Path, form: str) -> Path:
    """The folder itself, or an archive of what it holds, as `tar c .` and `zip -r` make it."""
    path = folder.with_name(f"{folder.name}.{form}")
    if form == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(folder))
    elif form != "folder":
        with tarfile.open(path, f"w:{form.partition('.')[2]}") as archive:
            archive.add(folder, ".")
    return folder if form == "folder" else path


def refusal(source, *arguments) -> str:
    with pytest.raises(RaceError) as error:
        read_source(str(source), *arguments)
    return str(error.value)


# -------------------------------------------------------------------------------------------- one data set, each once


def test_the_hubs_branch_of_converted_files(tmp_path):
    for name, rows in (("all", (row(1), row(2, example_id="middle2.txt"))), ("high", (row(1),))):
        parquet(tmp_path / name / "test" / "0000.parquet", *rows)
    splits, notes = read_source(str(tmp_path))
    assert [(p.example_id, p.level) for p in splits["test"]] == [("high1.txt", "high"), ("middle2.txt", "middle")]
    assert notes == ["several data sets lie side by side (all, high): only all is read"]


def test_records_side_by_side_are_a_question(tmp_path):
    write(tmp_path, "one/test/1.json", RECORD)
    write(tmp_path, "two/test/1.json", RECORD)
    assert "several data sets lie side by side (one, two): name the folder of one" in refusal(tmp_path)
    assert len(read_source(str(tmp_path / "two"))[0]["test"]) == 1


def test_within_a_record_and_across_forms_a_question_counts_once(tmp_path):
    """With other options, or in another split, it is another question."""
    twice = {key: [*RECORD[key], RECORD[key][0]] for key in ("questions", "options", "answers")}
    again = row(article=RECORD["article"], question="What has Tom?", options=RECORD["options"][0])
    write(tmp_path, "dev/1.json", RECORD | twice)
    write(tmp_path, "dev/2.json", RECORD | {"id": "new", "options": [["a", "b", "c", "d"]] * 2})
    write(tmp_path, "dev/3.csv", table(again))
    write(tmp_path, "test/1.json", RECORD)
    splits, notes = read_source(str(tmp_path))
    assert [(p.example_id, p.places) for p in splits["validation"]] == [("middle1.txt", [0, 1]), ("new", [0, 1])]
    assert len(splits["test"][0].questions) == 2
    assert notes == ["validation: 2 questions occur twice and are counted once"]


def test_of_two_answers_to_one_question_the_first_counts(tmp_path):
    write(tmp_path, "train.csv", table(row(), row(answer="C")))
    splits, notes = read_source(str(tmp_path))
    assert splits["train"][0].labels == [1]
    assert notes == ["train.csv, row 3: question: the same as train.csv, row 2, with another answer; left out"]


# -------------------------------------------------------------------------------------------- archives and paths


@pytest.mark.parametrize("form", ["tar", "tar.bz2", "tar.xz", "zip"])
def test_archives_equal_the_folder(tmp_path, form):
    for i in range(12):
        write(tmp_path / "race", f"RACE/dev/{'high' if i % 2 else 'middle'}/{i}.txt", other(str(i)))
    read = read_source(str(tmp_path / "race"))
    assert len(read[0]["validation"]) == 12 and read_source(str(packed(tmp_path / "race", form))) == read


def test_a_zip_of_windows_and_one_with_a_password(tmp_path):
    with zipfile.ZipFile(tmp_path / "race.zip", "w") as archive:
        archive.writestr("RACE\\test\\high\\1.txt", json.dumps(RECORD))
    assert read_source(str(tmp_path / "race.zip"))[0]["test"][0].level == "high"
    content = bytearray((tmp_path / "race.zip").read_bytes())
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(header) + flags] |= 1
    (tmp_path / "race.zip").write_bytes(content)
    assert "a zip file with a password or an unknown compression: unpack it" in refusal(tmp_path / "race.zip")


def test_every_damaged_zip_is_refused(tmp_path):
    """Cut off anywhere, or with a changed bit anywhere: never a smaller data set without a word."""
    rng = random.Random(0)
    for name in ("1", "2", "3"):
        write(tmp_path / "race", f"dev/{name}.json", other(name))
    path = packed(tmp_path / "race", "zip")
    content, whole = path.read_bytes(), read_source(str(path))
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(RaceError, match="race.zip"):
            read_source(str(path))
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with contextlib.suppress(RaceError):  # or, where a bit means nothing for what is read, the same passages
            assert read_source(str(path)) == whole


def test_links_in_a_tar_are_told(tmp_path):
    write(tmp_path, "race/dev/1.json", RECORD)
    os.link(tmp_path / "race" / "dev" / "1.json", tmp_path / "race" / "dev" / "2.json")
    assert ".json: a link inside an archive; pack the file itself" in refusal(packed(tmp_path / "race", "tar"))


@pytest.mark.parametrize("folder", ["a [1] b", "größe", "100% *?", "{x}"])
def test_paths_with_odd_characters(tmp_path, folder):
    from datasets import Dataset, DatasetDict

    source = tmp_path / folder
    parquet(source / "tables" / "test.parquet", row())
    write(source, "records/test/high/1.txt", RECORD)
    write(source, "test [a].csv", table(row()))
    DatasetDict(test=Dataset.from_list([row()])).save_to_disk(source / "saved")
    for name in ("tables", "records", "test [a].csv", "saved"):
        assert len(read_source(str(source / name))[0]["test"]) == 1
    for form in ("tar", "zip"):
        assert len(read_source(str(packed(source / "records", form)))[0]["test"]) == 1


@pytest.mark.parametrize("name", ["test.csv", "my-test_2.csv", "TEST (1).csv", "test-00000-of-00001.csv"])
def test_a_name_says_the_split(tmp_path, name):
    write(tmp_path, name, table(row()))
    assert list(read_source(str(tmp_path))[0]) == list(read_source(str(tmp_path / name))[0]) == ["test"]


@pytest.mark.parametrize("name", ["testimony.csv", "latest.csv", "train_test.csv", "questions.csv"])
def test_a_name_says_no_split(tmp_path, name):
    write(tmp_path, name, table(row()))
    for source in (tmp_path, tmp_path / name):
        assert "name folders or files train, dev (or validation, val) and test" in refusal(source)
        assert list(read_source(str(source), answers=False)[0]) == ["test"]
    write(tmp_path, "dev.csv", table(row()))
    splits, notes = read_source(str(tmp_path))
    assert list(splits) == ["validation"] and notes == [f"1 file(s) named after no split are left out: {name}"]


@pytest.mark.parametrize("source", ["questions.csv", "data/race.zip", "race.tar.gz"])
def test_a_file_that_is_not_there_is_no_hub_id(source):
    assert "no such folder or file" in refusal(source)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    write(tmp_path, "test.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "test.parquet: a Git LFS pointer in place of the file; run git lfs pull" in refusal(tmp_path)


# -------------------------------------------------------------------------------------------- lines and rows


@pytest.mark.parametrize("name", ["train/high/all.txt", "train/high/all.json", "train/high/all.jsonl", "train.jsonl"])
def test_a_record_a_line(tmp_path, name):
    lines = [other("high1.txt"), other("high2.txt"), without(other("none"), "id"), row(7)]
    write(tmp_path, name, b"\xef\xbb\xbf" + b"\r\n\n".join(json.dumps(line).encode() for line in lines) + b"\n")
    splits, _ = read_source(str(tmp_path))
    assert [p.example_id for p in splits["train"]] == ["high1.txt", "high2.txt", f"{name}, line 5", "high7.txt"]
    assert [len(p.questions) for p in splits["train"]] == [2, 2, 2, 1]
    assert [p.level for p in splits["train"]] == ["high", "high", "high" if "high" in name else "", "high"]


def test_problems_of_lines_come_together(tmp_path):
    records = [other("1"), RECORD | {"answers": "AB"}, row(1, options=["a"]), {"question": 1}]
    lines = [json.dumps(record).encode() for record in records]
    lines[1:1] = [b"{", b'{"article": "\xff"}']
    write(tmp_path, "train/high/all.txt", b"\n".join(lines))
    said = refusal(tmp_path).splitlines()
    assert said[0].endswith("5 problem(s), nothing was written")
    assert said[1].startswith("  train/high/all.txt, line 2: not JSON (")
    assert said[2] == "  train/high/all.txt, line 3: not UTF-8 at byte 13"
    assert said[3] == "  train/high/all.txt, line 4: 'answers' is not a list"
    assert said[4] == "  train/high/all.txt, line 5: question: 1 options, not 4"
    assert said[5].startswith("  train/high/all.txt, line 6: expected the columns article, question, options")


def test_a_list_of_records_and_rows(tmp_path):
    write(tmp_path, "dev/all.json", [RECORD, row(1), row(1, question="Who has hens?"), row(2)])
    found = [(p.example_id, len(p.questions)) for p in read_source(str(tmp_path))[0]["validation"]]
    assert found == [("middle1.txt", 2), ("high1.txt", 2), ("high2.txt", 1)]
    write(tmp_path, "dev/all.json", [RECORD, 7])
    assert "dev/all.json, item 2: expected a JSON object, found int" in refusal(tmp_path)


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
    found = read_source(str(tmp_path))[0]["validation"]
    assert [p.article for p in found] == articles and [p.example_id for p in found] == ["high1.txt", "high2.txt"]
    assert [(p.options, p.labels, p.level) for p in found] == [([OPTIONS], [3], "high")] * 2


def test_csv_without_ids_and_with_levels(tmp_path):
    """Rows of one article make a passage, named after the file and its first row."""
    rows = [row(1, level="Middle"), row(1, question="Who has hens?", level="Middle"), row(2, level="")]
    write(tmp_path, "train.csv", table(*(without(row, "example_id") for row in rows)))
    splits, _ = read_source(str(tmp_path / "train.csv"))
    assert [(p.example_id, p.level, p.places) for p in splits["train"]] == [
        ("train.csv, row 2", "middle", [0, 1]),
        ("train.csv, row 4", "", [0]),
    ]
    assert read_source(str(tmp_path))[0] == splits


def test_problems_of_rows_come_together(tmp_path):
    """Rows are counted as a spreadsheet shows them; empty ones are nothing."""
    rows = table(row(1), row(2, answer="E"), row(3, options="a, b"), row(4, article=""))
    write(tmp_path, "train.csv", rows + b'high5.txt,Ann\r\n\r\n,,,,\r\nhigh6.txt,"Ann"s,A,Who?,x\r\n')
    said = refusal(tmp_path).splitlines()
    assert said[1:5] == [
        "  train.csv, row 3: question: the answer is 'E', not one of A, B, C, D",
        "  train.csv, row 4: question: options are not a list",
        "  train.csv, row 5: article: empty",
        "  train.csv, row 6: 2 cells, but the header has 5",
    ]
    assert said[5].startswith("  train.csv, row 9: a quoted cell does not end as it should") and "5 problem" in said[0]


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.parquet"])
def test_a_table_without_the_columns_is_one_problem(tmp_path, name):
    rows = [{"example_id": "1", "text": "Ann has a hen.", "question": "Who?", "a": "x", "b": "y", "c": "z"}] * 2
    parquet(tmp_path / name, *rows) if name.endswith("parquet") else write(tmp_path, name, table(*rows))
    assert refusal(tmp_path).splitlines()[1:] == [
        f"  {name}: expected the columns article, question, options, answer (or A, B, C, D in place of options); "
        "found: example_id, text, question, a, b, c"
    ]


def test_five_options_in_columns_are_no_question_of_four(tmp_path):
    write(tmp_path, "train.csv", table(without(row(), "options") | dict.fromkeys("ABCDE", "x")))
    assert "expected the columns" in refusal(tmp_path)


def test_csv_of_another_encoding(tmp_path):
    write(tmp_path, "train.csv", table(row(article="A café.")).decode().encode("latin-1"))
    assert "train.csv: not UTF-8 at byte 59, in line 2; save it as CSV UTF-8" in refusal(tmp_path)


# -------------------------------------------------------------------------------------------- without answers


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("answer", [None, "", float("nan"), "absent"])
def test_questions_without_answers(tmp_path, suffix, answer):
    rows = [row(1, answer=answer), row(2, answer=answer), row(2, question="Who has hens?", answer=answer)]
    rows = [without(row, "answer") for row in rows] if answer == "absent" else rows
    path = tmp_path / f"questions.{suffix}"
    if suffix == "parquet":
        parquet(path, *rows)
    else:
        lines = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(table(*rows).replace(b"nan", b"") if suffix == "csv" else lines)
    splits, notes = read_source(str(path), answers=False)
    assert [(p.example_id, p.labels) for p in splits["test"]] == [("high1.txt", [-1]), ("high2.txt", [-1, -1])]
    assert notes == [] and list(splits) == ["test"]
    path = path.rename(path.with_name(f"train.{suffix}"))
    assert list(read_source(str(path), answers=False)[0]) == ["train"]
    assert f"train.{suffix}" in (said := refusal(path)) and "answer" in said


def test_records_without_answers(tmp_path):
    write(tmp_path, "high/1.txt", without(RECORD, "answers"))
    write(tmp_path, "2.json", other("2") | {"answers": [None, "D"]})
    write(tmp_path, "3.json", other("3") | {"answers": None})
    found = [(p.example_id, p.level, p.labels) for p in read_source(str(tmp_path), answers=False)[0]["test"]]
    assert sorted(found) == [("2", "", [-1, 3]), ("3", "", [-1, -1]), ("middle1.txt", "high", [-1, -1])]


# -------------------------------------------------------------------------------------------- the library `datasets`


def test_one_split_of_save_to_disk_is_named_after_its_folder(tmp_path):
    from datasets import Dataset

    rows = Dataset.from_list([row(1), row(2), row(2, question="Who has hens?")])
    rows.select([2, 0]).save_to_disk(tmp_path / "dev")
    assert [p.example_id for p in read_source(str(tmp_path / "dev"))[0]["validation"]] == ["high2.txt", "high1.txt"]
    (tmp_path / "dev").rename(tmp_path / "mine")
    assert "mine: the name of the split is none of train, validation, test" in refusal(tmp_path / "mine")
    assert list(read_source(str(tmp_path / "mine"), answers=False)[0]) == ["test"]


def test_a_part_in_the_local_cache_never_stands_for_the_whole(tmp_path):
    """Offline, with only the configuration `high` of ehovy/race in the cache."""
    from datasets import Dataset

    Dataset.from_list([row(1)]).save_to_disk(tmp_path / "saved")
    kept = tmp_path / "ehovy___race" / "high" / "0.0.0" / "0123456789abcdef"
    kept.mkdir(parents=True)
    (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(kept / "race-test.arrow")
    split = {"name": "test", "num_bytes": 1, "num_examples": 1, "dataset_name": "race"}
    info = json.loads((tmp_path / "saved" / "dataset_info.json").read_text())
    info |= {"config_name": "high", "dataset_name": "race", "builder_name": "parquet", "splits": {"test": split}}
    (kept / "dataset_info.json").write_text(json.dumps(info))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    code = "from race.data.sources import read_source; read_source('ehovy/race')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "ehovy/race: 1 problem(s)" in done.stderr and "'high'" in done.stderr


def hub(monkeypatch, configs: dict | Exception) -> None:
    """A hub with one data set, of these configurations; or with nothing but an error."""
    import datasets

    def load(source: str, name: str) -> dict:
        if isinstance(configs, Exception):
            raise configs
        if name not in configs:
            raise ValueError(f"BuilderConfig '{name}' not found")
        return {"test": datasets.Dataset.from_list([row(configs[name])])}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda source: list(configs))


@pytest.mark.parametrize(("configs", "found"), [({"high": 1, "all": 2}, "high2.txt"), ({"mine": 3}, "high3.txt")])
def test_all_or_the_only_configuration_is_taken(monkeypatch, configs, found):
    hub(monkeypatch, configs)
    assert read_source("somebody/race")[0]["test"][0].example_id == found


def test_several_configurations_are_a_question(monkeypatch):
    hub(monkeypatch, {"high": 1, "middle": 2})
    assert "it has several configurations (high, middle) and none named all" in refusal("somebody/race")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("Dataset scripts are no longer supported, but found race.py"), "it is a script"),
        (ConnectionError("Couldn't reach the hub"), "the Hugging Face hub is not reached"),
        (OSError("one line\nand another"), "OSError: one line and another"),
    ],
)
def test_what_the_hub_refuses_is_told_in_words(monkeypatch, error, words):
    hub(monkeypatch, error)
    assert "cannot be loaded: " in (said := refusal("somebody/race")) and words in said


# -------------------------------------------------------------------------------------------- anything at all

CELL = TEXT | st.sampled_from(['"', "'", ",", "\n", "\r", "B", "['a', 'b', 'c', 'd']", "[" * 5000])
COLUMN = st.sampled_from(["article", "question", "options", "answer", "A", "B", "C", "D", "id", "option_1", ""])


@QUIET
@given(
    cells=st.lists(st.dictionaries(COLUMN, CELL), max_size=4),
    text=st.text(st.sampled_from("ab,;\t\n\r\"'0\0"), max_size=40),
    skip=st.booleans(),
)
def test_any_table_is_read_or_refused(tmp_path, cells, text, skip):
    folder = tmp_path / os.urandom(8).hex()
    rows = [row(1) | {key: value for key, value in more.items() if key in row()} for more in cells]
    write(folder, "train.csv", table(row(2), *rows) + text.encode())
    write(folder, "train.jsonl", b"\n".join(json.dumps(line).encode() for line in [row(3), *cells]))
    try:
        splits, _ = read_source(str(folder), skip, answers=False)
    except RaceError as error:
        assert "problem(s), nothing was written" in str(error)
        return
    for passage in splits["train"]:
        assert passage.article.strip() and all(len(options) == 4 for options in passage.options)
        assert set(passage.labels) <= {-1, 0, 1, 2, 3}
