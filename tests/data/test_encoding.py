"""How questions become token ids: every sequence equals what the tokenizer gives for the pair, or the rule in words."""

import re
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
import sentencepiece
from helpers import ALBERT, ROOT

from race import RaceError
from race.data.cache import Cache, build_cache
from race.data.encoding import Template, keep_last, question_option
from race.data.module import RaceDataset
from race.models import spiece_proto


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("What has Tom?", "What has Tom? a dog"),
        ("____ has __.", "a dog has a dog."),
        ("She said, '_'", "She said, 'a dog'"),
    ],
)
def test_a_run_of_underscores_is_one_blank(question, text):
    assert question_option(question, "a dog") == text


@pytest.mark.parametrize("option", [r"C:\new\1", r"\g<0>", r"\\", "a_b __ c", "$1 & \n"])
def test_an_option_is_inserted_as_it_is(option):
    """No backslash in it means anything, and no underscore in it is filled."""
    assert question_option("Type ___ , then _ .", option) == "Type " + option + " , then " + option + " ."
    assert question_option("Type?", option) == f"Type? {option}"


def test_the_model_card_joins_question_and_option_in_the_same_way():
    """The line of its code that does it, run on blanks, backslashes and no blank."""
    (line,) = re.findall(r"text = (.* if .* else .*)", (ROOT / "race" / "export" / "card.md").read_text())
    for question in ("Tom has ____ and _ .", "Who?"):
        for option in ("a dog", r"\1 \n _"):
            names = {"re": re, "question": question, "option": option}
            assert eval(line, names) == question_option(question, option)


def test_keep_last_cuts_the_head():
    lists = pa.array([[0, 1], [2, 3, 4, 5, 6], [], [7, 8]], pa.list_(pa.uint16()))
    kept = keep_last(lists, 3)
    assert kept.to_pylist() == [[0, 1], [4, 5, 6], [], [7, 8]] and kept.type == lists.type


def test_a_sequence_by_hand():
    template = Template(before=(2,), between=(3,), after=(3, 4), segments=(0, 0, 0, 1, 1, 1))
    assert template.specials == 4
    ids, segments = template.sequence([10, 11, 12], [20, 21], 512)
    assert (ids.tolist(), segments.tolist()) == ([2, 10, 11, 12, 3, 20, 21, 3, 4], [0, 0, 0, 0, 0, 1, 1, 1, 1])
    ids, segments = template.sequence([10, 11, 12], [20, 21], 7)  # the article's end goes first
    assert (ids.tolist(), segments.tolist()) == ([2, 10, 3, 20, 21, 3, 4], [0, 0, 0, 1, 1, 1, 1])
    assert template.sequence([10, 11, 12], [20, 21], 5)[0].tolist() == [2, 3, 21, 3, 4]
    lengths = template.lengths(np.array([[3], [9]]), np.array([[2, 1], [4, 20]]), 16)
    assert lengths.tolist() == [[9, 8], [16, 16]]
    assert template.lengths(np.array([9]), np.array([20])).tolist() == [33]


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
    assert max(map(len, tokenizer(seconds)["input_ids"])) <= 130  # the tail rule has a test of its own
    for i in range(len(dataset)):
        item = dataset[i]
        for option in range(4):
            for name in ("input_ids", "token_type_ids"):
                assert item[name][option].tolist() == expected[name][4 * i + option], (texts[i]["example_id"], option)


def albert_text(text: str) -> str:
    """preprocess_text of google-research/albert, restated; `` and '' become ", as in transformers."""
    text = unicodedata.normalize("NFKD", " ".join(text.split()).replace("``", '"').replace("''", '"'))
    return "".join(c for c in text if not unicodedata.combining(c)).lower()


def by_albert_s_authors(pieces: sentencepiece.SentencePieceProcessor, texts: list[str]) -> list[list[int]]:
    """encode_pieces of google-research/albert, restated."""
    rows = []
    for row in pieces.encode([albert_text(text) for text in texts], out_type=str):
        split = []
        for piece in row:
            if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():
                parts = pieces.encode(piece[:-1].replace("▁", ""), out_type=str)
                if piece[0] != "▁" and parts[0][0] == "▁":
                    parts = parts[1:] if len(parts[0]) == 1 else [parts[0][1:], *parts[1:]]
                split += [*parts, ","]
            else:
                split.append(piece)
        rows.append(pieces.piece_to_id(split))
    return rows


def test_all_of_real_dev_equals_sentencepiece_itself(real_cache):
    """1,389 articles and 10,988 questions with option. One number, 1,050, is split otherwise than by ALBERT's authors.

    Where a piece ends in a digit and a comma, they split it afterwards; tokenizer.json lets such pieces score 100 less
    in the first place. SentencePiece gives the cache's ids for all texts when its model has these scores.
    """
    dataset = RaceDataset(real_cache, "validation")
    asked = [dataset.text(i) for i in range(len(dataset))]
    articles = dict(zip(dataset._passage.tolist(), (text["article"] for text in asked), strict=True))
    texts = list(articles.values())
    texts += [question_option(text["question"], option) for text in asked for option in text["options"]]
    passages, questions = Cache(real_cache).tables("validation")
    ours = passages["article_ids"].to_pylist() + questions["qa_ids"].flatten().to_pylist()
    assert len(articles) == 1389 and len(texts) == len(ours) == 12377
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(ALBERT / "spiece.model"))
    theirs = by_albert_s_authors(pieces, texts)
    (other,) = [i for i in range(len(texts)) if ours[i] != theirs[i]]
    assert "1,050" in texts[other] and "1,0" in pieces.id_to_piece(ours[other])
    as_in_json = sentencepiece.SentencePieceProcessor(
        model_proto=spiece_proto(ALBERT / "spiece.model", "albert").SerializeToString()
    )
    assert as_in_json.encode([albert_text(text) for text in texts]) == ours


def test_long_questions_keep_their_tail(corpus, tmp_path):
    """Where the cache is made: the last tokens of those of a cache that allows more."""
    short, long = (tmp_path / str(length) for length in (9, 128))
    for out in (short, long):
        build_cache(str(corpus), "demo", out, max_qa_len=int(out.name))
    kept, whole = (Cache(out).tables("train")[1]["qa_ids"].flatten().to_pylist() for out in (short, long))
    assert kept == [ids[-9:] for ids in whole] and sum(len(ids) > 9 for ids in whole) > 100


def model_with_pairs(cache, folder, pair: str) -> None:
    """The demo's tokenizer with another form of pairs, beside the demo's configuration."""
    from tokenizers import processors
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cache / "model")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save_pretrained(folder)
    AutoConfig.from_pretrained(cache / "model").save_pretrained(folder)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("[CLS] $B [SEP] $A:1 [SEP]:1", "in another way than Template"),
        ("$A [SEP] $B:1 [SEP]:1", "does not encode a pair of texts as"),
        ("[CLS] $A $B:1 [SEP]:1", "does not encode a pair of texts as"),
    ],
)
def test_pairs_that_no_template_describes_are_refused(corpus, cache, tmp_path, pair, message):
    model_with_pairs(cache, tmp_path / "model", pair)
    with pytest.raises(RaceError, match=message):
        build_cache(str(corpus), str(tmp_path / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_typed_question_must_be_whole(cache):
    with pytest.raises(RaceError, match="1 options.*article: "):
        Cache(cache).encode_question(" ", "Who?", ["a"])
