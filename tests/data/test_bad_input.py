"""Every bad input is named with its place, nothing is left behind; and no input crashes the readers."""

import contextlib
import json
import os
import random
import string
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sources import BAD, RECORD, write

import generate_race_cache
from race import RaceError
from race.data.cache import read_manifest, verify_cache
from race.data.module import RaceDataset
from race.data.sources import read_source

QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def generate(source, out, *more: str) -> int:
    return generate_race_cache.main(["--source", str(source), "--model", "demo", "--out", str(out), *more])


MORE_BAD = {
    "extra key": (RECORD | {"answer": ["B"]}, "unknown key 'answer'"),
    "no options key": ({k: v for k, v in RECORD.items() if k != "options"}, "'options' is missing"),
    "deep JSON": (b"[" * 100_000, "not JSON"),
    "cut JSON": (json.dumps(RECORD).encode()[:50], "not JSON"),
    "empty file": (b"", "not JSON"),
    "UTF-16": (json.dumps(RECORD).encode("utf-16"), "not UTF-8 at byte 0"),
    "answer of two letters": (RECORD | {"answers": ["AB", "C"]}, "question 0: the answer is 'AB'"),
    "answer of a small letter": (RECORD | {"answers": ["a", "C"]}, "question 0: the answer is 'a'"),
    "answer null": (RECORD | {"answers": [None, "C"]}, "question 0: the answer is None"),
    "options null": (RECORD | {"options": [None, RECORD["options"][1]]}, "question 0: options are not a list"),
    "id no text": (RECORD | {"id": 7}, "'id' is not a str"),
    "empty id": (RECORD | {"id": " "}, "id: empty"),
}


@pytest.mark.parametrize("case", [*BAD, *MORE_BAD])
def test_a_bad_record_ends_the_command_and_leaves_nothing(case, tmp_path, capsys):
    content, message = (BAD | MORE_BAD)[case]
    write(tmp_path / "race", "train/good.json", RECORD)
    write(tmp_path / "race", "train/high/7.txt", content)
    assert generate(tmp_path / "race", tmp_path / "made" / "cache") == 1
    said = capsys.readouterr().err
    assert "train/high/7.txt: " in said and message in said and "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["race"]


@pytest.mark.parametrize("case", [*BAD, *MORE_BAD])
def test_skip_bad_goes_on_without_it_and_lists_it(case, tmp_path, capsys):
    content, message = (BAD | MORE_BAD)[case]
    write(tmp_path / "race", "train/good.json", RECORD)
    write(tmp_path / "race", "train/high/7.txt", content | OTHER if case in SOME_GOOD else content)
    assert generate(tmp_path / "race", tmp_path / "cache", "--skip-bad") == 0
    (line,) = (tmp_path / "cache" / "left-out.txt").read_text().splitlines()
    assert line.startswith("train/high/7.txt: ") and message in line and line.endswith("left out")
    assert line in capsys.readouterr().out
    dataset = RaceDataset(tmp_path / "cache", "train")
    kept = [(text["example_id"], text["question_index"]) for text in map(dataset.text, range(len(dataset)))]
    other = {i for i in (0, 1) if f"question {i}" not in line} if case in SOME_GOOD else set()
    assert kept == [("middle1.txt", 0), ("middle1.txt", 1), *(("7", i) for i in sorted(other))]
    assert verify_cache(tmp_path / "cache") == []


OTHER = {"id": "7", "article": "Tom has a dog and a hen."}
# bad in one question: the other one of the record stays, under its own number
SOME_GOOD = {"answer", "answer no text", "three options", "five options", "empty option", "empty question"}
SOME_GOOD |= {"answer of two letters", "answer of a small letter", "answer null", "options null"}


def test_nothing_good_is_no_cache(tmp_path, capsys):
    write(tmp_path / "race", "train/7.json", RECORD | {"answers": ["x", "y"]})
    assert generate(tmp_path / "race", tmp_path / "cache", "--skip-bad") == 1
    assert "no questions found" in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_what_looks_odd_and_is_fine(tmp_path):
    """A byte-order mark, carriage returns, an article of megabytes, a passage without questions."""
    plain = {"train/a.json": RECORD}
    odd = {
        "train/a.json": b"\xef\xbb\xbf" + json.dumps(RECORD, indent=1).replace("\n", "\r\n").encode(),
        "train/b.json": RECORD | {"id": "b", "questions": [], "options": [], "answers": []},
        "train/c.json": RECORD | {"id": "c", "article": "Tom has\r\na dog. " * 200_000},
    }
    for name, files in (("plain", plain), ("odd", odd)):
        for file, content in files.items():
            write(tmp_path / name, file, content)
        assert generate(tmp_path / name, tmp_path / f"cache-{name}") == 0
    one, other = (RaceDataset(tmp_path / f"cache-{name}", "train") for name in ("plain", "odd"))
    assert [ids.tolist() for ids in one[0]["input_ids"]] == [ids.tolist() for ids in other[0]["input_ids"]]
    assert len(other) == 4 and all(len(ids) == 512 for ids in other[2]["input_ids"])
    assert (tmp_path / "cache-odd" / "left-out.txt").read_text() == (
        "train/b.json: a passage without questions, left out\n"
    )


def test_files_that_cannot_be_read(tmp_path, capsys):
    """A dangling link, a link to itself, a folder with the name of a file; a folder that leads back to its parent."""
    write(tmp_path / "race", "train/good.json", RECORD)
    train = tmp_path / "race" / "train"
    (train / "nowhere.json").symlink_to(tmp_path / "absent")
    (train / "loop.json").symlink_to(train / "loop.json")
    (train / "folder.json").mkdir()
    (train / "up").symlink_to(train.parent)
    assert generate(tmp_path / "race", tmp_path / "cache") == 1
    said = capsys.readouterr().err
    for name, problem in (("nowhere", "No such file"), ("loop", "Too many levels"), ("folder", "Is a directory")):
        assert f"train/{name}.json: cannot be read ({problem}" in said
    assert "3 problem(s)" in said and not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_read_is_a_problem_and_linked_folders_are_read(tmp_path, monkeypatch, capsys):
    write(tmp_path / "elsewhere", "1.txt", RECORD)
    (tmp_path / "race" / "train").mkdir(parents=True)
    (tmp_path / "race" / "train" / "high").symlink_to(tmp_path / "elsewhere")
    assert read_source(str(tmp_path / "race"))[0]["train"][0].level == "high"
    scan = os.scandir

    def forbidden(path):
        if str(path).endswith("high"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(RaceError, match=r"train/high: cannot be read \(Permission denied\)"):
        read_source(str(tmp_path / "race"))


def test_a_name_that_is_no_text(tmp_path, capsys):
    """A file name that is not UTF-8: named with escapes, in the message and in the list of what was left out."""
    write(tmp_path / "race", "train/good.json", RECORD)
    (tmp_path / "race" / "train" / os.fsdecode(b"caf\xe9.json")).write_bytes(b"{")
    assert generate(tmp_path / "race", tmp_path / "cache", "--skip-bad") == 0
    assert "train/caf\\udce9.json: not JSON" in (tmp_path / "cache" / "left-out.txt").read_text()


@pytest.mark.parametrize("kind", ["", "gz", "xz"])
def test_every_damaged_tar_is_refused(corpus, tmp_path, kind):
    """Cut off anywhere, or with a damaged header: never a smaller data set without a word."""
    rng, path = random.Random(0), tmp_path / "race.tar"
    with tarfile.open(path, f"w:{kind}") as tar:
        tar.add(corpus / "dev", "RACE/dev")
    content = path.read_bytes()
    for _ in range(60):
        path.write_bytes(content[: rng.randrange(len(content) - (10240 if not kind else 1))])
        with pytest.raises(RaceError, match="race.tar"):
            read_source(str(path))
    for _ in range(60 if kind else 0):
        changed = bytearray(content)
        changed[rng.randrange(20, len(content) - 20)] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with contextlib.suppress(RaceError):  # or, where a bit of the packing means nothing, the same passages
            assert sum(len(p.questions) for p in read_source(str(path))[0]["validation"]) > 0


def test_folders_of_nothing_and_of_something_else(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "other", "notes/readme.txt", b"hello")
    (tmp_path / "file.tar").write_bytes(b"no tar at all")
    for name, message in (
        ("empty", "no questions found"),
        ("other", "no questions found"),
        ("file.tar", "not a tar or zip file that can be read"),
        ("absent", "cannot be loaded"),
    ):
        source = tmp_path / name if name != "absent" else "nobody/absent"
        assert generate(source, tmp_path / "cache") == 1
        said = capsys.readouterr().err
        assert str(source) in said and message in said and "Traceback" not in said
    assert not (tmp_path / "cache").exists()


def test_damaged_parquet(tmp_path, capsys):
    (tmp_path / "race").mkdir()
    (tmp_path / "race" / "train.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    assert generate(tmp_path / "race", tmp_path / "cache") == 1
    assert "train.parquet: not a parquet file" in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_a_tokenizer_without_cls(corpus, cache, tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"Tom": 0, "a": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?").save_pretrained(tmp_path / "model")
    AutoConfig.from_pretrained(cache / "model").save_pretrained(tmp_path / "model")
    arguments = ["--source", str(corpus), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "cache")]
    assert generate_race_cache.main(arguments) == 1
    assert "does not encode a pair of texts as" in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_a_model_of_another_family(corpus, cache, tmp_path, capsys):
    from transformers import AutoTokenizer, GPT2Config

    AutoTokenizer.from_pretrained(cache / "model").save_pretrained(tmp_path / "model")
    GPT2Config(vocab_size=100).save_pretrained(tmp_path / "model")
    arguments = ["--source", str(corpus), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "cache")]
    assert generate_race_cache.main(arguments) == 1
    expected = "a model of type 'gpt2' has no multiple-choice head in transformers; expected one of albert, bert, "
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-qa-len", "0"], "--max-qa-len is 0, expected 1 or more"),
        (["--max-qa-len", "510"], "--max-qa-len 510"),
        (["--max-qa-len", "-5"], "--max-qa-len is -5"),
        (["--workers", "0"], "--workers 0"),
    ],
)
def test_absurd_arguments(corpus, tmp_path, capsys, arguments, message):
    try:
        status = generate(corpus, tmp_path / "cache", *arguments)
    except SystemExit as error:
        status = error.code
    assert status in (1, 2) and message in capsys.readouterr().err and not (tmp_path / "cache").exists()


# -------------------------------------------------------------------------------------------------- anything at all

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
        "extra": VALUE,
    },
)


@QUIET
@given(records=st.lists(RECORDS | VALUE, max_size=4), skip=st.booleans())
def test_any_records_are_read_or_refused(tmp_path, records, skip):
    """Passages that come out are whole: four options each, labels 0 to 3, texts that are not empty."""
    folder = tmp_path / os.urandom(8).hex()
    for number, record in enumerate(records):
        write(folder, f"train/{number}.json", json.dumps(record).encode())
    folder.mkdir(exist_ok=True)
    try:
        splits, _ = read_source(str(folder), skip)
    except RaceError as error:
        assert "problem(s), nothing was written" in str(error)
        str(error).encode("utf-8", "replace")
        return
    for passage in splits["train"]:
        assert passage.article.strip() and passage.example_id.strip()
        assert len(passage.questions) == len(passage.options) == len(passage.labels) == len(passage.places) > 0
        for question, options, label in zip(passage.questions, passage.options, passage.labels, strict=True):
            assert question.strip() and len(options) == 4 and all(o.strip() for o in options) and label in range(4)


@QUIET
@given(content=st.binary(max_size=200) | st.text(string.printable, max_size=200).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path, content):
    folder = tmp_path / os.urandom(8).hex()
    write(folder, "dev/high/1.txt", content)
    with pytest.raises(RaceError, match=r"dev/high/1.txt"):
        read_source(str(folder))


@QUIET
@given(data=st.data())
def test_any_manifest_is_refused_but_the_one_that_was_written(cache, tmp_path, data):
    """Random bytes, random JSON, and the real manifest with any of its values changed."""
    real = json.loads((cache / "manifest.json").read_text())
    keys = st.sampled_from(sorted(real))
    changed = st.tuples(keys, VALUE).map(lambda pair: real | {pair[0]: pair[1]})
    missing = keys.map(lambda key: {name: value for name, value in real.items() if name != key})
    content = data.draw(
        st.binary(max_size=99) | (VALUE | changed | missing).map(lambda value: json.dumps(value).encode())
    )
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(RaceError, match=r"manifest.json: "):
        read_manifest(tmp_path)
