"""The token cache: equal to the tokenizer, whole or absent, and honest about itself."""

import json

import numpy as np
import pytest
from conftest import ALBERT

import generate_race_cache
from race_cache import build_cache, read_manifest, verify_cache
from race_data import RaceDataset
from race_encoding import CacheError, Encoder, keep_last, question_option, splits_on_whitespace


def test_question_option():
    assert question_option("Tom has _ and _ .", "a dog") == "Tom has a dog and a dog ."
    assert question_option("What has Tom?", "A dog") == "What has Tom? A dog"


def test_every_sequence_of_real_dev_equals_the_tokenizer(real_cache):
    """All options of RACE/dev: ids and segments as the tokenizer gives them for the pair, or the tail rule."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ALBERT)
    dataset = RaceDataset(real_cache, "validation")
    assert len(dataset) == 2747
    texts = [dataset.text(i) for i in range(len(dataset))]
    articles = [text["article"] for text in texts for _ in range(4)]
    seconds = [question_option(text["question"], option) for text in texts for option in text["options"]]
    options = {"max_length": 512, "return_token_type_ids": True, "truncation": "only_first"}
    expected = tokenizer(articles, seconds, **options)
    for i in range(len(dataset)):
        item = dataset[i]
        for option in range(4):
            row = 4 * i + option
            ids, segments = expected["input_ids"][row], expected["token_type_ids"][row]
            assert len(tokenizer.tokenize(seconds[row])) <= 128  # all of dev; the tail rule has a test of its own
            assert item["input_ids"][option].tolist() == ids, (texts[i]["example_id"], option)
            assert item["token_type_ids"][option].tolist() == segments, (texts[i]["example_id"], option)


def test_long_questions_keep_their_tail_and_articles_their_head(corpus, tmp_path):
    """A plain restatement of the rule, on every option of a cache in which many question+options are too long."""
    from transformers import AutoTokenizer

    build_cache(str(corpus), "demo", tmp_path / "cache", max_qa_len=9)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cache" / "model")
    dataset, cut = RaceDataset(tmp_path / "cache", "train", max_len=40), 0
    for i in range(len(dataset)):
        item, text = dataset[i], dataset.text(i)
        article = tokenizer(text["article"], add_special_tokens=False)["input_ids"]
        for option in range(4):
            second = question_option(text["question"], text["options"][option])
            qa = tokenizer(second, add_special_tokens=False)["input_ids"]
            cut += len(qa) > 9
            qa = qa[-9:]
            first = [2, *article[: 40 - 3 - len(qa)], 3]
            assert item["input_ids"][option].tolist() == [*first, *qa, 3]
            assert item["token_type_ids"][option].tolist() == [0] * len(first) + [1] * (len(qa) + 1)
    assert cut > 100


def test_keep_last_cuts_the_head():
    from race_encoding import _list_array

    lists = _list_array(np.arange(9, dtype=np.uint16), np.array([2, 5, 0, 2]))
    assert keep_last(lists, 3).to_pylist() == [[0, 1], [4, 5, 6], [], [7, 8]]


AWKWARD = [
    "plain words only",
    " leading, trailing and   wide spaces \n\t",
    "ça naïve — “quoted” … ½ ﬁne Å",
    "file\x1cseparator and unit\x1fseparator",
    "no\u00a0break\u2003em\u3000ideographic\u2028line",
    "a \u0301mark after a space, e\u0301 in a word",
    "zero\u200bwidth \u200b alone \u200djoiner \ufeffmark",
    "a [MASK] and[SEP]in a word, <pad> <unk> [CLS]",
    "``quotes'' and '' and ``",
    "汉字 かな 한글 עברית العربية ไทย",
    "▁ literal▁metaspace ▁▁",
    "emoji 👩‍👩‍👧 🇩🇪 and \u00ad soft",
    "",
    "   ",
    "\r\ncarriage\rreturn\r\n",
]


@pytest.mark.parametrize("kind", ["demo", "albert", "bert"])
def test_word_by_word_equals_whole_texts(kind, cache, tmp_path):
    """Whatever the text, tokenising distinct words once gives what the tokenizer gives for the whole."""
    from transformers import AutoTokenizer, BertTokenizer

    if kind == "bert":
        pieces = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            "plain",
            "word",
            "##s",
            "only",
            ",",
            "a",
            "##b",
            "e",
            "汉",
        ]
        tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    elif kind == "albert" and not ALBERT.exists():
        pytest.skip(f"the ALBERT vocabulary is not at hand ({ALBERT}); set RACE_TEST_DATA")
    else:
        tokenizer = AutoTokenizer.from_pretrained(ALBERT if kind == "albert" else cache / "model")
    assert splits_on_whitespace(tokenizer)
    encode = Encoder(tokenizer)
    texts = AWKWARD + [f"{a} {b}" for a in AWKWARD for b in AWKWARD]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encode(texts).to_pylist() == expected
    assert encode(texts).to_pylist() == expected  # with all words known


def test_earlier_calls_of_the_tokenizer_leave_no_trace(cache):
    """A call with truncation and padding leaves both switched on in the tokenizer; the encoder switches them off."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cache / "model")
    encode = Encoder(tokenizer)
    text = "a [MASK] " + "word " * 600  # with a special token it is tokenised whole
    expected = tokenizer([text], add_special_tokens=False)["input_ids"]
    tokenizer([text, "b"], truncation=True, max_length=512, padding="max_length")
    assert encode([text]).to_pylist() == expected and len(expected[0]) > 600


def test_other_tokenizers_take_whole_texts():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "Ġb": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    assert not splits_on_whitespace(tokenizer)
    assert Encoder(tokenizer)(["a b", "b a"]).to_pylist() == [[0, 2], [1, 3]]


def test_tokenizer_with_other_pairs_is_refused(corpus, cache, tmp_path):
    from tokenizers import processors
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cache / "model")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save_pretrained(tmp_path / "model")
    AutoConfig.from_pretrained(cache / "model").save_pretrained(tmp_path / "model")
    with pytest.raises(CacheError, match=r"pairs are not \[CLS\] A \[SEP\] B \[SEP\]"):
        build_cache(str(corpus), str(tmp_path / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_refused(corpus, cache, tmp_path):
    """transformers would make a tokenizer to which every word is unknown."""
    from transformers import AutoModelForMultipleChoice

    AutoModelForMultipleChoice.from_pretrained(cache / "model").save_pretrained(tmp_path / "weights")
    with pytest.raises(CacheError, match="has no tokenizer files"):
        build_cache(str(corpus), str(tmp_path / "weights"), tmp_path / "out")
    with pytest.raises(CacheError, match="its tokenizer cannot be loaded"):
        build_cache(str(corpus), "nobody/nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_storage_is_small(real_cache):
    """At most 1 KiB of token storage a question."""
    for counts in read_manifest(real_cache)["splits"].values():
        assert counts["token_bytes"] / counts["questions"] <= 1024


def test_manifest_counts_real_text(real_cache):
    splits = read_manifest(real_cache)["splits"]
    assert list(splits) == ["train", "validation"]
    assert (splits["train"]["questions"], splits["validation"]["questions"]) == (49424, 2747)
    assert (splits["train"]["passages"], splits["validation"]["passages"]) == (24998, 1389)


def test_verify_finds_what_changed(corpus, tmp_path):
    out = tmp_path / "cache"
    build_cache(str(corpus), "demo", out)
    assert verify_cache(out) == []
    path = out / "train-questions.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (out / "validation-passages.arrow").unlink()
    (out / "test-questions.arrow").write_bytes(b"short")
    (out / "stray").write_text("?")
    problems = verify_cache(out)
    assert [p.split(": ")[1] for p in problems] == [
        "5 bytes, expected " + str(read_manifest(out)["files"]["test-questions.arrow"]["bytes"]),
        "damaged, differs from the manifest (sha256)",
        "missing",
        "not in the manifest",
    ]
    assert generate_race_cache.main(["--verify", str(out)]) == 1


def test_a_cache_is_kept_refused_or_replaced(corpus, cache, tmp_path, capsys):
    out = tmp_path / "cache"
    build_cache(str(corpus), "demo", out)
    before = (out / "manifest.json").stat().st_mtime_ns
    assert build_cache(str(corpus), "demo", out)["kept"]
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(CacheError, match="another cache.*max_qa_len"):
        build_cache(str(corpus), "demo", out, max_qa_len=9)
    assert (out / "manifest.json").stat().st_mtime_ns == before
    build_cache(str(corpus), "demo", out, max_qa_len=9, force=True)
    assert read_manifest(out)["max_qa_len"] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "nothing temporary is left"


def test_nothing_is_written_for_a_bad_source(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.json").write_text("{")
    out = tmp_path / "made" / "cache"
    assert generate_race_cache.main(["--source", str(tmp_path), "--model", "demo", "--out", str(out)]) == 1
    assert "train/a.json: not JSON" in capsys.readouterr().err
    assert not out.parent.exists()


def test_a_folder_that_is_no_cache_is_not_touched(corpus, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(CacheError, match="is not a cache"):
        build_cache(str(corpus), "demo", tmp_path, force=True)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_summary_names_levels_truncation_and_missing_weights(corpus, cache, tmp_path, capsys):
    from transformers import AutoConfig, AutoTokenizer

    AutoTokenizer.from_pretrained(cache / "model").save_pretrained(tmp_path / "bare")
    AutoConfig.from_pretrained(cache / "model").save_pretrained(tmp_path / "bare")
    arguments = ["--source", str(corpus), "--model", str(tmp_path / "bare"), "--out", str(tmp_path / "out")]
    assert generate_race_cache.main(arguments) == 0
    said = capsys.readouterr().out
    for part in (
        "train",
        "validation",
        "test",
        "middle",
        "high",
        "truncated",
        "more than one split: 0",
        "has no weights",
    ):
        assert part in said
    assert read_manifest(tmp_path / "out")["model"]["weights"] is False


def test_older_weight_files_are_kept_as_safetensors(corpus, cache, tmp_path):
    """A model folder that holds pytorch_model.bin only: the same weights reach stage e1."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from race_module import RaceModule

    original = RaceModule(model=cache / "model").model
    for part in (AutoTokenizer, AutoConfig):
        part.from_pretrained(cache / "model").save_pretrained(tmp_path / "old")
    torch.save(original.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    assert build_cache(str(corpus), str(tmp_path / "old"), tmp_path / "cache")["model"]["weights"]
    assert (tmp_path / "cache" / "model" / "model.safetensors").exists()
    again = RaceModule(model=tmp_path / "cache" / "model").model
    assert all(
        torch.equal(tensor, again.albert.state_dict()[name]) for name, tensor in original.albert.state_dict().items()
    )


def test_articles_in_two_splits_are_counted(tmp_path):
    record = {"article": "Tom.", "questions": ["Who?"], "options": [["a", "b", "c", "d"]], "answers": ["A"], "id": "1"}
    for split, article in (("train", "Tom."), ("dev", "Tom."), ("test", "Ann.")):
        (tmp_path / "race" / split).mkdir(parents=True)
        (tmp_path / "race" / split / "1.json").write_text(json.dumps(record | {"article": article}))
    manifest = build_cache(str(tmp_path / "race"), "demo", tmp_path / "cache")
    assert manifest["articles_in_more_than_one_split"] == 1


def test_another_format_is_refused(corpus, tmp_path):
    build_cache(str(corpus), "demo", tmp_path / "cache")
    path = tmp_path / "cache" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with pytest.raises(CacheError, match=r"manifest.json: format 0, expected 2"):
        read_manifest(tmp_path / "cache")
    with pytest.raises(CacheError, match="format 0"):
        build_cache(str(corpus), "demo", tmp_path / "cache")
    build_cache(str(corpus), "demo", tmp_path / "cache", force=True)
    assert verify_cache(tmp_path / "cache") == []
