"""Every layout of RACE gives the same passages; whatever is wrong in a source is told at once, with its place."""

import json
import os
import shutil
import subprocess
import sys
import tarfile

import pandas as pd
import pytest
from helpers import RECORD, ROOT

from race import RaceError
from race.data.sources import read_source


def write(folder, name: str, content) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def test_race_folder_levels_and_labels(tmp_path):
    write(tmp_path, "RACE/dev/middle/1.txt", RECORD)
    write(tmp_path, "RACE/dev/high/10.txt", RECORD | {"id": "high10.txt", "article": "Tom has an old dog."})
    write(tmp_path, "RACE/dev/high/9.txt", RECORD | {"id": "high9.txt", "article": "Tom has a new dog."})
    splits, notes = read_source(str(tmp_path))
    assert list(splits) == ["validation"] and notes == []
    assert [(p.example_id, p.level) for p in splits["validation"]] == [
        ("high9.txt", "high"),
        ("high10.txt", "high"),
        ("middle1.txt", "middle"),
    ]
    assert splits["validation"][0].labels == [1, 2]


def test_flat_json_folder_has_no_levels(tmp_path):
    write(tmp_path, "train/a.json", RECORD)
    write(tmp_path, "test/b.json", {key: value for key, value in RECORD.items() if key != "id"})
    splits, _ = read_source(str(tmp_path))
    assert [(p.example_id, p.level) for p in splits["train"] + splits["test"]] == [("middle1.txt", ""), ("b.json", "")]


def test_tar_equals_folder(corpus, tmp_path):
    with tarfile.open(tmp_path / "RACE.tar.gz", "w:gz") as tar:
        tar.add(corpus, "RACE")
    assert read_source(str(tmp_path / "RACE.tar.gz")) == read_source(str(corpus))


def test_parquet_with_the_features_of_the_hub(corpus, tmp_path):
    """As a copy of the hub's files, in one folder."""
    import datasets

    from_files, _ = read_source(str(corpus))
    for split, passages in from_files.items():
        rows = [
            {
                "example_id": p.example_id,
                "article": p.article,
                "answer": "ABCD"[label],
                "question": question,
                "options": options,
            }
            for p in passages
            for question, options, label in zip(p.questions, p.options, p.labels, strict=True)
        ]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    from_parquet, _ = read_source(str(tmp_path))
    assert from_parquet == from_files


def test_a_passage_without_questions_is_left_out_and_noted(tmp_path):
    write(tmp_path, "train/a.json", RECORD)
    write(tmp_path, "train/b.json", RECORD | {"id": "b", "questions": [], "options": [], "answers": []})
    splits, notes = read_source(str(tmp_path))
    assert len(splits["train"]) == 1
    assert notes == ["train/b.json: a passage without questions, left out"]


BAD = {
    "not JSON": (b"{", "not JSON"),
    "no object": ([1], "expected a JSON object, found list"),
    "not UTF-8": (b'{"article": "\xff"}', "not UTF-8 at byte 13"),
    "no article": ({k: v for k, v in RECORD.items() if k != "article"}, "'article' is missing"),
    "article no text": (RECORD | {"article": 3}, "'article' is not a str"),
    "unequal": (RECORD | {"answers": ["A"]}, "questions (2), options (2), answers (1)"),
    "answer": (RECORD | {"answers": ["B", "E"]}, "question 1: the answer is 'E', not one of A, B, C, D"),
    "answer no text": (RECORD | {"answers": ["B", ["A"]]}, "question 1: the answer is ['A']"),
    "three options": (RECORD | {"options": [RECORD["options"][0], ["a", "b", "c"]]}, "question 1: 3 options, not 4"),
    "five options": (RECORD | {"options": [["a", "b", "c", "d", "e"], RECORD["options"][1]]}, "question 0: 5 options"),
    "empty option": (RECORD | {"options": [RECORD["options"][0], ["a", " ", "c", "d"]]}, "question 1, option B: empty"),
    "empty question": (RECORD | {"questions": ["", "Tom has _ ."]}, "question 0: empty"),
    "empty article": (RECORD | {"article": "\n"}, "article: empty"),
    "surrogate": (RECORD | {"article": "a\ud800b"}, "article: holds half a surrogate pair at character 1"),
    "NUL": (RECORD | {"article": "a\0b"}, "article: holds a NUL character"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named(case, tmp_path):
    content, message = BAD[case]
    write(tmp_path, "train/good.json", RECORD)
    write(tmp_path, "train/high/7.txt", content)
    with pytest.raises(RaceError) as error:
        read_source(str(tmp_path))
    first, problem = str(error.value).splitlines()
    assert first == f"{tmp_path}: 1 problem(s), nothing was written"
    assert problem.startswith("  train/high/7.txt: ") and message in problem


def test_all_problems_come_together_and_twenty_in_full(tmp_path):
    for i in range(25):
        write(tmp_path, f"train/{i}.json", RECORD | {"id": str(i), "answers": ["B", "x"]})
    with pytest.raises(RaceError) as error:
        read_source(str(tmp_path))
    assert str(error.value).count("the answer is 'x'") == 20
    assert "25 problem(s)" in str(error.value) and "… and 5 more" in str(error.value)


def test_same_id_twice_in_a_split(tmp_path):
    write(tmp_path, "train/a.json", RECORD)
    write(tmp_path, "train/b.json", RECORD | {"article": "Tom has a cow."})
    with pytest.raises(RaceError, match=r"train/b.json: id 'middle1.txt' is used by train/a.json"):
        read_source(str(tmp_path))


def asked(source, split: str = "train", **settings) -> list[tuple]:
    """(id, level, article, question, options, label) of every question."""
    passages = read_source(str(source), **settings)[0][split]
    return [
        (p.example_id, p.level, p.article, *question)
        for p in passages
        for question in zip(p.questions, p.options, p.labels, strict=True)
    ]


def rows(record: dict = RECORD, **more) -> pd.DataFrame:
    """A record as the hub has it: a row a question."""
    questions = zip(record["questions"], record["options"], record["answers"], strict=True)
    return pd.DataFrame(
        [
            {"example_id": record["id"], "article": record["article"], "answer": a, "question": q, "options": o} | more
            for q, o, a in questions
        ]
    )


EXPECTED = [
    ("middle1.txt", "middle", "Tom has a dog.", "What has Tom?", ["a cat", "a dog", "a cow", "a hen"], 1),
    ("middle1.txt", "middle", "Tom has a dog.", "Tom has _ .", ["a car", "a hat", "a dog", "a bag"], 2),
]


# -------------------------------------------------------------------------------------------- each question counts once


def test_configurations_of_the_hub_side_by_side_are_not_added_up(tmp_path):
    """all/, high/ and middle/ as in the hub's repository: each question once."""
    high = RECORD | {"id": "high2.txt", "article": "Ada has a hen."}
    for name, parts in (("all", (RECORD, high)), ("middle", (RECORD,)), ("high", (high,))):
        (tmp_path / name).mkdir()
        table = pd.concat([rows(part) for part in parts])
        table.to_parquet(tmp_path / name / "test-00000-of-00001.parquet", index=False)
    found = asked(tmp_path, "test")
    assert len(found) == 4 and {question[1] for question in found} == {"middle", "high"}
    assert "several data sets lie side by side (all, high, middle): only all is read" in read_source(str(tmp_path))[1]
    assert asked(tmp_path / "high", "test") == [question for question in found if question[1] == "high"]
    (tmp_path / "all" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(RaceError, match=r"several data sets lie side by side \(high, middle\): name the folder of one"):
        read_source(str(tmp_path))


def test_a_question_that_occurs_twice_counts_once(tmp_path):
    """Whatever the source: as a file of its own, as a line, with another id."""
    write(tmp_path, "train/1.txt", RECORD)
    write(tmp_path, "train/all.txt", f"{json.dumps(RECORD)}\n{json.dumps(RECORD | {'id': 'copy'})}\n".encode())
    splits, notes = read_source(str(tmp_path))
    assert [(p.example_id, len(p.questions)) for p in splits["train"]] == [("middle1.txt", 2)]
    assert notes == ["train: 4 questions occur twice and are counted once"]


def test_of_one_question_with_two_answers_the_first_counts_and_a_note_says_so(tmp_path):
    write(tmp_path, "train/a.json", RECORD)
    write(tmp_path, "train/b.json", RECORD | {"id": "b", "answers": ["B", "D"]})
    assert asked(tmp_path) == [("middle1.txt", "", *question[2:]) for question in EXPECTED]
    assert read_source(str(tmp_path))[1] == [
        "train: 1 question occurs twice and is counted once",
        "train/b.json: question 1: the same as train/a.json, question 1, with another answer; left out",
    ]


def test_what_editors_and_desktops_leave_is_no_data(tmp_path):
    write(tmp_path, "race/train/a.json", RECORD)
    other = RECORD | {"id": "other", "article": "Not this."}
    for left in (
        "train/.ipynb_checkpoints/a-checkpoint.json",
        "__MACOSX/train/a.json",
        ".git/train/a.json",
        "train/.hidden/b.json",
        "train/._a.json",
        ".Trash/train/all.csv",
    ):
        write(tmp_path, f"race/{left}", other)
    with tarfile.open(tmp_path / "race.tar", "w") as tar:
        tar.add(tmp_path / "race", "race")
    shutil.make_archive(str(tmp_path / "race"), "zip", tmp_path, "race")
    for source in ("race", "race.tar", "race.zip"):
        assert [question[0] for question in asked(tmp_path / source)] == ["middle1.txt"] * 2


# --------------------------------------------------------------------------------------------------------- every layout


@pytest.mark.parametrize("name", ["train.csv", "train/questions.csv", "my [1] data/train-00000-of-00001.csv"])
def test_csv_with_options_in_a_list_or_in_four_columns(name, tmp_path):
    """Read as text: an option that says NA, None or null is one."""
    record = RECORD | {"options": [["NA", "None", "null", '"a", b'], RECORD["options"][1]]}
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    expected = [(*EXPECTED[0][:4], record["options"][0], 1), EXPECTED[1]]
    table = rows(record)
    for form in (repr, json.dumps):
        table.assign(options=table["options"].map(form)).to_csv(tmp_path / name, index=False)
        assert asked(tmp_path) == expected
    for header, mark in ((list("ABCD"), ","), ([f"option_{i}" for i in range(4)], ";"), ([*"abcd"], "\t")):
        four = pd.DataFrame(table["options"].tolist(), columns=header)
        four = table.drop(columns="options").join(four)
        four.to_csv(tmp_path / name, index=False, sep=mark, encoding="utf-8-sig")
        assert asked(tmp_path) == expected
    problem = four.assign(**{header[2]: ["x", ""], "answer": ["E", "C"]})
    problem.to_csv(tmp_path / name, index=False)
    with pytest.raises(RaceError) as error:
        read_source(str(tmp_path))
    assert "row 2: question: the answer is 'E'" in str(error.value)
    assert "row 3: question, option C: empty" in str(error.value)
    four.drop(columns="article").to_csv(tmp_path / name, index=False)
    with pytest.raises(RaceError, match="expected the columns article, question, options, answer.*; found: example_id"):
        read_source(str(tmp_path))


def test_json_lines_of_records_or_of_rows(tmp_path):
    for name, lines in (
        ("train/high/all.txt", [RECORD | {"id": "1"}]),
        ("dev.jsonl", rows().to_dict("records")),
        ("test.json", rows().to_dict("records")),
    ):
        write(tmp_path, name, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    assert [question[:2] for question in asked(tmp_path)] == [("1", "high")] * 2
    assert asked(tmp_path, "validation") == asked(tmp_path, "test") == EXPECTED
    write(tmp_path, "train/high/all.txt", f"{json.dumps(RECORD)}\n{{\n".encode())
    with pytest.raises(RaceError, match=r"train/high/all.txt, line 2: not JSON"):
        read_source(str(tmp_path))


def test_zip_equals_folder_and_a_damaged_one_is_refused(corpus, tmp_path):
    path = shutil.make_archive(str(tmp_path / "RACE"), "zip", corpus)
    assert read_source(path) == read_source(str(corpus))
    content = (tmp_path / "RACE.zip").read_bytes()
    for damaged in (content[:-1000], content[: len(content) // 2], content[:9000] + b"\0" * 64 + content[9064:]):
        (tmp_path / "RACE.zip").write_bytes(damaged)
        with pytest.raises(RaceError, match="not a tar or zip file that can be read, or damaged or cut off"):
            read_source(path)


def test_folders_of_save_to_disk(tmp_path):
    import datasets

    split = datasets.Dataset.from_pandas(rows())
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    datasets.Dataset.from_pandas(rows(), split="validation").save_to_disk(tmp_path / "one")
    assert asked(tmp_path / "both") == asked(tmp_path / "both", "test") == EXPECTED
    assert asked(tmp_path / "one", "validation") == EXPECTED
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(RaceError, match="a folder of save_to_disk that cannot be read"):
        read_source(str(tmp_path / "one"))


WARM = """
import sys
from pathlib import Path
from datasets import load_dataset
from race.data.sources import read_source

home, source = Path(sys.argv[1]), sys.argv[2]
if source == "make":
    load_dataset("parquet", data_files={"test": str(home / "test.parquet")}, cache_dir=str(home / "made"))
    (made,) = [path for path in (home / "made" / "parquet").glob("*/*/*") if path.is_dir()]
    there = home / "cache" / "ehovy___race" / "all" / "0.0.0" / made.name
    there.parent.mkdir(parents=True)
    made.rename(there)
    for file in there.glob("parquet-*"):
        file.rename(there / file.name.replace("parquet-", "race-"))
    info = (there / "dataset_info.json").read_text()
    (there / "dataset_info.json").write_text(info.replace('"parquet"', '"race"').replace('"default"', '"all"'))
else:
    print(sum(len(passage.questions) for passage in read_source(source)[0]["test"]))
"""


def test_the_hubs_data_set_from_a_warm_cache_offline(tmp_path):
    """As on a compute node after a download on the login node; only its configuration "all" was ever asked for."""
    rows().to_parquet(tmp_path / "test.parquet", index=False)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for source in ("make", "ehovy/race"):
        command = [sys.executable, "-c", WARM, str(tmp_path), source]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"]


# ------------------------------------------------------------------------------------------------------ without answers


@pytest.mark.parametrize("answer", [None, ""])
def test_without_answers(answer, tmp_path):
    """Any file of questions will do, and needs no split in its name; to train or to score, an answer is missed."""
    table = rows().assign(answer=answer, options=[repr(options) for options in RECORD["options"]])
    table.to_csv(tmp_path / "mine.csv", index=False)
    found = asked(tmp_path / "mine.csv", "test", answers=False)
    assert [question[-1] for question in found] == [-1, -1] and [q[3] for q in found] == RECORD["questions"]
    with pytest.raises(RaceError, match="no folder or file is named after a split; name folders or files train"):
        read_source(str(tmp_path / "mine.csv"))
    (tmp_path / "mine.csv").rename(tmp_path / "train.csv")
    with pytest.raises(RaceError, match=r"train.csv, row 2: question: "):
        read_source(str(tmp_path / "train.csv"))


def test_answers_that_are_there_are_kept_or_refused(tmp_path):
    write(tmp_path, "mine.json", RECORD | {"answers": ["B", None]})
    assert [question[-1] for question in asked(tmp_path / "mine.json", "test", answers=False)] == [1, -1]
    write(tmp_path, "mine.json", RECORD | {"answers": ["X", None]})
    with pytest.raises(RaceError, match="question 0: the answer is 'X'"):
        read_source(str(tmp_path / "mine.json"), answers=False)


@pytest.mark.parametrize("source", ["/no/such/folder", "no such id!"])
def test_no_such_source(source):
    with pytest.raises(RaceError, match="no such folder"):
        read_source(source)


def test_folder_of_something_else(tmp_path):
    write(tmp_path, "notes/readme.txt", b"hello")
    with pytest.raises(RaceError, match="no questions found"):
        read_source(str(tmp_path))
