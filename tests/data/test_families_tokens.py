"""Sequences of a cache are the pairs that each family's own tokenizer makes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tiny_models import TOKENIZERS, tiny_config, write_tiny_model

from race import RaceError
from race.data import RaceDataModule
from race.data.cache import build_cache, template_of
from race.data.encoding import Template, question_option
from race.data.reference import LINE

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


def of_pieces(folder, family: str, texts: list[str], **settings):
    """A folder with a SentencePiece model in place of tokenizer.json, as older models of the hub are."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config(family, 600).to_dict()))
    with open(folder / ("spm.model" if family == "deberta-v2" else "spiece.model"), "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter([*texts, *[LINE] * 3]), model_writer=file, vocab_size=500, **settings
        )
    return folder


DEBERTA = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]", "bos_piece": "[CLS]"}
DEBERTA |= {"eos_piece": "[SEP]", "unk_piece": "[UNK]"}


def test_deberta_s_own_pieces_are_followed(corpus, tmp_path):
    """transformers normalises texts in another way: “…” and wide letters would become unknown."""
    model = of_pieces(tmp_path / "model", "deberta-v2", articles(corpus), hard_vocab_limit=False, **DEBERTA)
    build_cache(str(corpus), str(model), tmp_path / "cache")
    kept, pieces = load(tmp_path / "cache" / "model"), SentencePieceProcessor(model_file=str(model / "spm.model"))
    for text in ("Wait … a ½ Ｆｕｌｌ c\u00a0d", LINE, " two  spaces "):
        assert kept(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)
        assert 3 not in pieces.encode("Wait …")


def test_other_pieces_need_their_tokenizer_json(corpus, tmp_path):
    special = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "hard_vocab_limit": False}
    special["control_symbols"] = ["<cls>", "<sep>", "<pad>", "<mask>", "<eod>"]
    model = of_pieces(tmp_path / "model", "xlnet", articles(corpus), **special)
    with pytest.raises(RaceError, match="add the tokenizer.json and tokenizer_config.json of the model"):
        build_cache(str(corpus), str(model), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_weights_of_the_older_format_are_kept_as_they_are(corpus, tmp_path):
    """ModernBERT's pretrained head lies outside the encoder, and a RoBERTa may have no pooler: none is invented."""
    model = write_tiny_model("roberta", tmp_path / "model", articles(corpus))
    state = {name: tensor for name, tensor in load_file(model / "model.safetensors").items() if "pooler" not in name}
    state["head.dense.weight"] = torch.ones(2, 2)
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    build_cache(str(corpus), str(model), tmp_path / "cache")
    kept = load_file(tmp_path / "cache" / "model" / "model.safetensors")
    assert kept.keys() == state.keys() and all(torch.equal(kept[name], state[name]) for name in state)
