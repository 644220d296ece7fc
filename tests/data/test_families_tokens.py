"""Sequences of a cache are the pairs that each family's own tokenizer makes."""

import json

import pytest
from tiny_models import TOKENIZERS, write_tiny_model

from race.data import RaceDataModule
from race.data.cache import build_cache, template_of
from race.data.encoding import Template, question_option

EXPECTED = {  # special tokens before, between and after, and segments
    "roberta": ((0,), (2, 2), (2,), (0,) * 6),
    "modernbert": ((0,), (2,), (2,), (0, 0, 0, 1, 1)),
    "xlnet": ((), (5,), (5, 6), (0, 0, 1, 1, 2)),
}


def articles(corpus) -> list[str]:
    return [json.loads(path.read_text())["article"] for path in sorted(corpus.rglob("*.txt"))]


@pytest.mark.parametrize("family", TOKENIZERS)
def test_sequences_are_those_of_the_tokenizer(family, corpus, tmp_path):
    model = write_tiny_model(family, tmp_path / "model", articles(corpus))
    build_cache(str(corpus), str(model), tmp_path / "cache")
    data = RaceDataModule(tmp_path / "cache", max_len=60)
    dataset, template = data.dataset("train"), template_of(data.manifest)
    if family in EXPECTED:
        assert (template.before, template.between, template.after, template.segments) == EXPECTED[family]
    tokenizer = load(tmp_path / "cache" / "model")
    cut = 0
    for index in range(len(dataset)):
        text, item, parts = dataset.text(index), dataset[index], dataset.parts(index)
        for option, ids, segments, (first, second) in zip(
            text["options"], item["input_ids"], item["token_type_ids"], parts, strict=True
        ):
            texts = text["article"], question_option(text["question"], option)
            pair = tokenizer(*texts, truncation="only_first", max_length=60, return_token_type_ids=True)
            assert ids.tolist() == pair["input_ids"]
            assert segments.tolist() == pair["token_type_ids"]
            assert [*first, *second] == pair["input_ids"]
            assert (
                tokenizer.decode(second, skip_special_tokens=True).split()
                == tokenizer.decode(tokenizer(texts[1])["input_ids"], skip_special_tokens=True).split()
            )
            cut += len(ids) == 60
    assert cut > 20


def load(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_a_template_of_an_older_manifest_is_read():
    old = {"before": [2], "between": [3, 3], "after": [3], "segments": [0, 1]}
    assert template_of({"template": old}) == Template((2,), (3, 3), (3,), (0, 0, 0, 0, 1, 1))
