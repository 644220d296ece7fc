"""Bad records are named with their place, and nothing is left behind; each question counts once; no input crashes."""

import itertools
import json
import os

import pytest
from helpers import RECORD
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sources import found, other, parquet, refusal, row, table, without, write

import generate_race_cache
from race import RaceError
from race.data.passages import read_source
from race.data.sources import Reading

QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FIRST, SECOND = RECORD["options"]
BAD = [  # a file, what it holds, and a key word of what is said
    ("1.txt", b"{", "JSON"),
    ("1.txt", b"[" * 100_000, "RecursionError"),
    ("1.json", json.dumps([RECORD] * 2, indent=1).encode()[:-3], "JSON"),
    ("1.jsonl", b"", "JSON"),
    ("1.txt", b'{"article": "\xff"}', "position 13"),
    ("1.csv", b"", "ValueError"),
    ("1.csv", table(row())[:-3], "cannot be read"),
    ("1.csv", table(row(article="A caf\u00e9.")).decode().encode("latin-1"), "position 59"),
    ("1.parquet", b"PAR1 and then nothing of the kind", "cannot be read"),
    ("1.txt", [], "found list"),
    ("1.txt", without(RECORD, "article"), "article: "),
    ("1.txt", RECORD | {"article": 3}, "article: "),
    ("1.txt", RECORD | {"article": "a\ud800b"}, "article: "),
    ("1.txt", RECORD | {"article": "a\0b"}, "article: "),
    ("1.txt", RECORD | {"id": 7}, "id: "),
    ("1.txt", RECORD | {"answers": ["A"]}, "'answers' of 1"),
    ("1.txt", RECORD | {"answer": ["B"]}, "'answer' of 1"),
    ("1.txt", without(RECORD, "options"), "options"),
]
BAD_QUESTION = [  # what a record holds, the number of the bad question, and a key word
    ({"answers": ["B", "E"]}, 1, "'E'"),
    ({"answers": ["B", ["A"]]}, 1, "['A']"),
    ({"answers": [None, "C"]}, 0, "None"),
    ({"options": [FIRST, ["a", "b", "c"]]}, 1, "4 options"),
    ({"options": [[*FIRST, "e"], SECOND]}, 0, "4 options"),
    ({"options": [FIRST, ["a", " ", "c", "d"]]}, 1, "option B"),
    ({"questions": ["", "Tom has _ ."]}, 0, "question: "),
]


@pytest.mark.parametrize(("name", "content", "word"), BAD)
def test_a_bad_record_is_named_or_left_out(tmp_path, name, content, word):
    write(tmp_path, "train/good.json", RECORD)
    write(tmp_path, f"train/high/{name}", content)
    said = refusal(tmp_path)
    assert f"{tmp_path}: 1 problem(s)" in said and f"\n  train/high/{name}" in said and word in said
    splits, (line,) = read_source(str(tmp_path), skip_bad=True)
    assert line.startswith(f"train/high/{name}") and word in line and line.endswith("left out")
    assert [(p.example_id, p.places) for p in splits["train"]] == [("middle1.txt", [0, 1])]


@pytest.mark.parametrize(("content", "number", "word"), BAD_QUESTION)
def test_a_bad_question_is_named_or_left_out(tmp_path, content, number, word):
    """The other question of its record stays, under its own number."""
    write(tmp_path, "train/high/7.txt", RECORD | content)
    said = refusal(tmp_path)
    assert f"\n  train/high/7.txt, question {number}: " in said and word in said and "1 problem(s)" in said
    ((passage,),), (line,) = (read := read_source(str(tmp_path), skip_bad=True))[0].values(), read[1]
    assert f"train/high/7.txt, question {number}: " in line and word in line and passage.places == [1 - number]


def generate(source, out, *more: str) -> int:
    return generate_race_cache.main(["--source", str(source), "--model", "demo", "--out", str(out), *more])


def test_the_command_leaves_nothing_or_lists_what_is_left_out(tmp_path, capsys):
    write(tmp_path / "race", "train/good.json", RECORD)
    write(tmp_path / "race", "train/high/7.txt", other("7") | {"answers": ["x", "D"]})
    assert generate(tmp_path / "race", tmp_path / "made" / "cache") == 1
    said = capsys.readouterr().err
    assert "train/high/7.txt, question 0: " in said and "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["race"]
    assert generate(tmp_path / "race", tmp_path / "cache", "--skip-bad") == 0
    (line,) = (tmp_path / "cache" / "left-out.txt").read_text().splitlines()
    assert line.startswith("train/high/7.txt, question 0: ") and line in capsys.readouterr().out


def test_all_problems_come_together_and_twenty_in_full(tmp_path):
    for i in range(25):
        write(tmp_path, f"train/{i}.json", other(str(i)) | {"answers": ["x", "x"]})
    assert refusal(tmp_path).count("the answer is 'x'") == 20 and "50 problem(s)" in refusal(tmp_path)
    assert "51 problem(s)" in refusal(tmp_path, True)  # and no questions


def test_what_looks_odd_and_is_fine(tmp_path):
    write(tmp_path, "train/a.json", b"\xef\xbb\xbf" + json.dumps(RECORD, indent=1).replace("\n", "\r\n").encode())
    write(tmp_path, "train/b.json", RECORD | {"id": "b", "questions": [], "options": [], "answers": []})
    splits, notes = read_source(str(tmp_path))
    assert [passage[2:6] for passage in splits["train"]] == [
        (RECORD["article"], RECORD["questions"], RECORD["options"], [1, 2])
    ]
    assert notes == ["train/b.json: a passage without questions, left out"]


def test_a_question_that_occurs_twice_counts_once(tmp_path):
    """Within a record, in another form, with another id; with other options, or in another split, it is another one."""
    twice = {key: [*RECORD[key], RECORD[key][0]] for key in ("questions", "options", "answers")}
    write(tmp_path, "dev/1.json", RECORD | twice)
    write(tmp_path, "dev/2.json", RECORD | {"id": "new", "options": [["a", "b", "c", "d"]] * 2})
    write(tmp_path, "dev/3.csv", table(row(article=RECORD["article"], question="What has Tom?", options=FIRST)))
    write(tmp_path, "dev/4.txt", f"{json.dumps(RECORD)}\n{json.dumps(RECORD | {'id': 'copy'})}\n".encode())
    write(tmp_path, "test/1.json", RECORD)
    splits, (note,) = read_source(str(tmp_path))
    assert [(p.example_id, p.places) for p in splits["validation"]] == [("middle1.txt", [0, 1]), ("new", [0, 1])]
    assert len(splits["test"][0].questions) == 2 and note.startswith("validation: 6 question(s) occur again")


def test_of_two_articles_with_one_id_or_two_answers_to_one_question_the_first_counts(tmp_path):
    write(tmp_path, "train/a.json", RECORD)
    write(tmp_path, "train/b.json", RECORD | {"article": "Tom has a cow."})
    assert "train/b.json: id 'middle1.txt' is used by train/a.json" in refusal(tmp_path)
    write(tmp_path, "train/b.json", RECORD | {"id": "b", "answers": ["B", "D"]})
    write(tmp_path, "test.csv", table(row(), row(answer="C")))
    assert found(tmp_path) == [("middle1.txt", "middle", [1, 2])] and found(tmp_path / "test.csv", "test")[0][2] == [1]
    lines = [line for line in read_source(str(tmp_path))[1] if "another answer" in line]
    assert lines[0].startswith("train/b.json, question 1: the same as train/a.json, question 1, ")
    assert read_source(str(tmp_path / "test.csv"))[1][0].startswith("test.csv, row 3: the same as test.csv, row 2, ")


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("answer", [None, "", "absent"])
def test_questions_without_answers(tmp_path, suffix, answer):
    rows = [row(1, answer=answer), row(2, answer=answer), row(2, question="Who has hens?", answer=answer)]
    rows = [without(row, "answer") for row in rows] if answer == "absent" else rows
    path = tmp_path / f"questions.{suffix}"
    if suffix == "parquet":
        parquet(path, *rows)
    else:
        path.write_bytes(table(*rows) if suffix == "csv" else "\n".join(map(json.dumps, rows)).encode())
    asked = [("high1.txt", "high", [-1]), ("high2.txt", "high", [-1]), ("high2.txt", "high", [-1])]  # row by row
    assert found(path, "test", how=Reading(False)) == asked
    path = path.rename(path.with_name(f"train.{suffix}"))
    assert found(path, "test", how=Reading(False)) == asked
    assert f"train.{suffix}" in (said := refusal(path)) and "answer" in said


def test_records_without_answers(tmp_path):
    write(tmp_path, "high/1.txt", without(RECORD, "answers"))
    write(tmp_path, "2.json", other("2") | {"answers": [None, "D"]})
    write(tmp_path, "3.json", other("3") | {"answers": float("nan")})
    expected = [("2", "", [-1, 3]), ("3", "", [-1, -1]), ("middle1.txt", "high", [-1, -1])]
    assert found(tmp_path, "test", how=Reading(False)) == expected
    write(tmp_path, "2.json", other("2") | {"answers": ["X", None]})
    assert "2.json, question 0: the answer is 'X'" in refusal(tmp_path, False, Reading(False))


TEXT = st.text(st.characters(codec=None), max_size=8) | st.sampled_from(["", " ", "A", "D", "E", "\0", "\ud800", "_"])
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "article": VALUE | st.just("Tom has a dog."),
        "id": VALUE | st.just("1.txt"),
        "questions": VALUE | st.just(["Who?", "Tom _ ."]),
        "options": VALUE | st.just([["a", "b", "c", "d"]] * 2) | st.lists(st.lists(TEXT, min_size=4, max_size=4)),
        "answers": VALUE | st.lists(st.sampled_from("ABCDE"), max_size=3),
    },
)
CELL = TEXT | st.sampled_from(['"', "'", ",", "\n", "\r", "B", "['a', 'b', 'c', 'd']", "[" * 5000])
COLUMN = st.sampled_from(["article", "question", "options", "answer", "A", "B", "C", "D", "id", "option_1", ""])


def read_or_refused(folder, *arguments) -> None:
    """Passages that come out are whole: four options each, labels 0 to 3, texts that are not empty."""
    try:
        splits, lines = read_source(str(folder), *arguments)
    except RaceError as error:
        assert str(folder) in str(error)
        return
    "\n".join(lines).encode()
    for passage in itertools.chain(*splits.values()):
        assert len({len(values) for values in passage[3:]}) == 1
        texts = [passage.article, passage.example_id, *passage.questions, *itertools.chain(*passage.options)]
        assert all(text.strip() for text in texts) and {len(options) for options in passage.options} == {4}
        assert set(passage.labels) <= {-1, 0, 1, 2, 3}


@QUIET
@given(
    records=st.lists(RECORDS | VALUE | st.binary(max_size=200), max_size=4), skip=st.booleans(), answers=st.booleans()
)
def test_any_records_are_read_or_refused(tmp_path, records, skip, answers):
    folder = tmp_path / os.urandom(8).hex()
    folder.mkdir()
    for number, record in enumerate(records):
        write(folder, f"train/{number}.json", record)
    read_or_refused(folder, skip, Reading(answers))


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
    read_or_refused(folder, skip, Reading(False))
