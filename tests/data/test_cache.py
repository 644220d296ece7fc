"""The token cache: complete or absent, verified, and correctly described by its manifest."""

import json
import shutil

import pytest
import torch

import generate_race_cache
from race import RaceError
from race.data.cache import Cache, build_cache, open_cache, verify_cache, write_manifest
from race.data.encoding import Template
from race.train.checkpoints import Checkpoint


def test_manifest_counts_real_text(real_cache):
    """And at most 1 KiB of token storage a question."""
    splits = Cache(real_cache).manifest["splits"]
    assert all(counts["token_bytes"] / counts["questions"] <= 1024 for counts in splits.values())
    assert list(splits) == ["train", "validation"]
    assert (splits["train"]["questions"], splits["validation"]["questions"]) == (49424, 2747)
    assert (splits["train"]["passages"], splits["validation"]["passages"]) == (24998, 1389)


def test_verify_finds_what_changed(cache, tmp_path):
    """Hidden files, as desktops and file systems leave them, are passed over: nothing reads them."""
    out = tmp_path / "cache"
    shutil.copytree(cache, out)
    for name in (".DS_Store", ".nfs0000001", "model/._config.json", ".Trash-1000/files/x.arrow"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("?")
    assert verify_cache(out) == []
    path = out / "train-questions.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (out / "validation-passages.arrow").unlink()
    (out / "test-questions.arrow").write_bytes(b"short")
    (out / "model" / "added_tokens.json").write_text("{}")  # it would change what is loaded
    problems = verify_cache(out)
    expected = {"train-questions": "damaged", "validation-passages": "missing", "test-questions": "damaged"}
    expected["model/added_tokens"] = "not in the manifest"
    for name, problem in expected.items():
        assert sum(f"/{name}" in line and problem in line for line in problems) == 1, problems
    assert len(problems) == 4
    assert generate_race_cache.main(["--verify", str(out)]) == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "added_tokens.json"])
def test_the_model_folder_is_verified_when_it_is_opened(cache, tmp_path, name):
    """A typed question, and a checkpoint of other code, would get other answers."""
    shutil.copytree(cache, tmp_path / "cache")
    with open(tmp_path / "cache" / "model" / name, "a") as file:
        file.write(" ")
    torch.save({"classifier.bias": torch.zeros(1)}, tmp_path / "foreign.ckpt")
    asked = Cache(tmp_path / "cache")
    asks = [
        lambda: asked.encode_question("Tom has a dog.", "Who has a dog?", list("abcd")),
        lambda: Checkpoint(tmp_path / "foreign.ckpt").load(asked),
    ]
    for ask in asks:
        with pytest.raises(RaceError, match=f"model/{name}: (damaged|not in the manifest)"):
            ask()


def test_a_cache_is_kept_refused_or_replaced(corpus, cache, tmp_path, capsys):
    out = tmp_path / "cache"
    build_cache(str(corpus), "demo", out)
    before = (out / "manifest.json").stat().st_mtime_ns
    assert build_cache(str(corpus), "demo", out)["kept"]
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(RaceError, match="another cache.*max_qa_len"):
        build_cache(str(corpus), "demo", out, max_qa_len=9)
    assert (out / "manifest.json").stat().st_mtime_ns == before
    build_cache(str(corpus), "demo", out, max_qa_len=9, force=True)
    assert Cache(out).manifest["max_qa_len"] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "nothing temporary is left"
    write_manifest(out / "manifest.json", Cache(out).manifest | {"format": 0})
    with pytest.raises(RaceError, match=r"manifest.json: format 0, expected 2"):
        Cache(out)
    with pytest.raises(RaceError, match="is not a cache"):
        build_cache(str(corpus), "demo", tmp_path, force=True)


@pytest.mark.parametrize("name", ["checkpoints/e1.ckpt", "e1.ckpt", ".git/HEAD", "notes"])
def test_files_of_others_in_a_cache_are_never_replaced(corpus, cache, tmp_path, name, capsys):
    """With --force, also where the manifest is damaged; and `race.chain demo` makes its cache without --force."""
    out, mine = tmp_path / "cache", tmp_path / "cache" / name
    shutil.copytree(cache, out)
    mine.parent.mkdir(exist_ok=True)
    mine.symlink_to(tmp_path) if name == "notes" else mine.write_text("mine")
    made, options = (out / "manifest.json").read_bytes(), ["--source", str(corpus), "--model=demo", "--out", str(out)]
    assert generate_race_cache.main([*options, "--max-qa-len=9", "--force"]) == 1
    assert f"{out} holds files that were not made with it: {name};" in capsys.readouterr().err
    assert generate_race_cache.main(options) == 0 and (out / "manifest.json").read_bytes() == made
    (out / "manifest.json").write_bytes(made[:-9])
    assert generate_race_cache.main([*options, "--force"]) == 1 and mine.is_symlink() | mine.is_file()
    mine.unlink()
    assert generate_race_cache.main([*options, "--force"]) == 0 and verify_cache(out) == []


def test_summary_names_levels_truncation_and_missing_weights(corpus, cache, tmp_path, capsys):
    from transformers import AutoConfig, AutoTokenizer

    AutoTokenizer.from_pretrained(cache / "model").save_pretrained(tmp_path / "bare")
    AutoConfig.from_pretrained(cache / "model").save_pretrained(tmp_path / "bare")
    arguments = ["--source", str(corpus), "--model", str(tmp_path / "bare"), "--out", str(tmp_path / "out")]
    assert generate_race_cache.main(arguments) == 0
    said = capsys.readouterr().out
    for part in ("train", "validation", "test", "middle", "high", "truncated", "split: 0", "has no weights"):
        assert part in said
    assert Cache(tmp_path / "out").manifest["model"]["weights"] is False


def test_articles_in_two_splits_are_counted(tmp_path):
    record = {"article": "Tom.", "questions": ["Who?"], "options": [["a", "b", "c", "d"]], "answers": ["A"], "id": "1"}
    for split, article in (("train", "Tom."), ("dev", "Tom."), ("test", "Ann.")):
        (tmp_path / "race" / split).mkdir(parents=True)
        (tmp_path / "race" / split / "1.json").write_text(json.dumps(record | {"article": article}))
    manifest = build_cache(str(tmp_path / "race"), "demo", tmp_path / "cache")
    assert manifest["articles_in_more_than_one_split"] == 1


def test_templates_of_version_1_3_are_read(cache, tmp_path):
    """It had a segment for all up to the question, and one for the rest."""
    old = {"before": [2], "between": [3, 3], "after": [3], "segments": [0, 1]}
    write_manifest(tmp_path / "manifest.json", Cache(cache).manifest | {"template": old})
    assert Cache(tmp_path).template == Template((2,), (3, 3), (3,), (0, 0, 0, 0, 1, 1))


def test_a_base_model_with_another_tokenizer_is_refused(cache, tmp_path):
    from transformers import BertTokenizer

    opened = open_cache(Cache(cache))
    opened.check_tokenizer(cache / "model")
    opened.check_tokenizer(tmp_path)  # no tokenizer at all: nothing to compare
    BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5}).save_pretrained(tmp_path)
    with pytest.raises(RaceError, match="has another tokenizer than .*small: make a cache with"):
        opened.check_tokenizer(tmp_path)
