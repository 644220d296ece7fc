"""Every layout of RACE gives the same passages; whatever is wrong in a source is told at once, with its place."""

import json
import tarfile

import pytest

from race import RaceError
from race.data.sources import read_source

RECORD = {
    "article": "Tom has a dog.",
    "questions": ["What has Tom?", "Tom has _ ."],
    "options": [["a cat", "a dog", "a cow", "a hen"], ["a car", "a hat", "a dog", "a bag"]],
    "answers": ["B", "C"],
    "id": "middle1.txt",
}


def write(folder, name: str, content) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def test_race_folder_levels_and_labels(tmp_path):
    write(tmp_path, "RACE/dev/middle/1.txt", RECORD)
    write(tmp_path, "RACE/dev/high/10.txt", RECORD | {"id": "high10.txt"})
    write(tmp_path, "RACE/dev/high/9.txt", RECORD | {"id": "high9.txt"})
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
    """A local dataset folder goes through datasets.load_dataset, as ehovy/race does."""
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
    write(tmp_path, "train/b.json", RECORD)
    with pytest.raises(RaceError, match=r"train/b.json: id 'middle1.txt' is used by train/a.json"):
        read_source(str(tmp_path))


@pytest.mark.parametrize("source", ["/no/such/folder", "no such id!"])
def test_no_such_source(source):
    with pytest.raises(RaceError, match="no such folder"):
        read_source(source)


def test_folder_of_something_else(tmp_path):
    write(tmp_path, "notes/readme.txt", b"hello")
    with pytest.raises(RaceError, match="no questions found"):
        read_source(str(tmp_path))
