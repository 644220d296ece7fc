"""Tokenising distinct words once gives the ids of the whole texts, whatever the text."""

import shutil

import pytest
from helpers import ALBERT
from sentencepiece import SentencePieceProcessor

from race.data.base_model import load_tokenizer, spiece_proto
from race.data.reference import LINE, albert_text, plain
from race.data.tokenizing import WordTokenizer, splits_on_whitespace

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


@pytest.mark.parametrize("kind", ["demo", "albert", "spiece", "bert"])
def test_word_by_word_equals_whole_texts(kind, cache, tmp_path):
    """Whatever the text, tokenising distinct words once gives what the tokenizer gives for the whole."""
    from transformers import AutoTokenizer, BertTokenizer

    if kind == "bert":
        pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] plain word ##s only , a ##b e 汉".split()
        tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    elif kind in ("albert", "spiece") and not ALBERT.exists():
        pytest.skip(f"the ALBERT vocabulary is not at hand ({ALBERT}); set RACE_TEST_DATA")
    elif kind == "spiece":
        tokenizer = of_spiece_alone(tmp_path)
    else:
        tokenizer = AutoTokenizer.from_pretrained(ALBERT if kind == "albert" else cache / "model")
    assert splits_on_whitespace(tokenizer)
    tokenize = WordTokenizer(tokenizer)
    texts = AWKWARD + [f"{a} {b}" for a in AWKWARD for b in AWKWARD]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert tokenize(texts).to_pylist() == expected
    assert tokenize(texts).to_pylist() == expected  # with all words known


def of_spiece_alone(folder):
    for name in ("config.json", "spiece.model"):
        shutil.copyfile(ALBERT / name, folder / name)
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["albert", "spiece"])
def test_awkward_texts_equal_sentencepiece(kind, tmp_path):
    """All but combining marks, control characters and special tokens, which SentencePiece does not look for."""
    if not ALBERT.exists():
        pytest.skip(f"the ALBERT vocabulary is not at hand ({ALBERT}); set RACE_TEST_DATA")
    tokenizer = load_tokenizer(ALBERT) if kind == "albert" else of_spiece_alone(tmp_path)
    pieces = SentencePieceProcessor(model_proto=spiece_proto(ALBERT / "spiece.model").SerializeToString())
    texts = [plain(text) for text in (LINE, *AWKWARD) if "[MASK]" not in text]
    texts += [f"{a} {b}" for a in texts for b in texts]
    assert WordTokenizer(tokenizer)(texts).to_pylist() == pieces.encode([albert_text(text) for text in texts])


def test_earlier_calls_of_the_tokenizer_leave_no_trace(cache):
    """A call with truncation and padding leaves both switched on in the tokenizer; WordTokenizer switches them off."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cache / "model")
    tokenize = WordTokenizer(tokenizer)
    text = "a [MASK] " + "word " * 600  # with a special token it is tokenised whole
    expected = tokenizer([text], add_special_tokens=False)["input_ids"]
    tokenizer([text, "b"], truncation=True, max_length=512, padding="max_length")
    assert tokenize([text]).to_pylist() == expected and len(expected[0]) > 600


def test_other_tokenizers_take_whole_texts():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "Ġb": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    assert not splits_on_whitespace(tokenizer)
    assert WordTokenizer(tokenizer)(["a b", "b a"]).to_pylist() == [[0, 2], [1, 3]]
