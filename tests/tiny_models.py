"""A tiny model of every family of transformers with a multiple-choice head, and tokenizers as they come with them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig

PADDED = ["big_bird", "deberta-v2", "ibert", "longformer", "megatron-bert", "mpnet", "rembert", "squeezebert", "xlnet"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"embedding_size": 32, "max_position_embeddings": 320, "initializer_range": 0.2, "pad_token_id": 1}
SIZES |= {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48}  # XLNet
SIZES |= {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}  # DistilBERT
OWN = {
    "longformer": {"attention_window": [16] * 3, "sep_token_id": 2},
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 2}
    | {"bos_token_id": 0, "eos_token_id": 2},
    "deberta-v2": {"relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm"}
    | {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_biased_input": False, "pooler_hidden_size": 32},
    "squeezebert": {f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")},
}


def tiny_config(family: str, vocabulary: int = 100, **settings) -> PretrainedConfig:
    """Three layers of 32 places, without dropout."""
    kind = CONFIG_MAPPING[family]
    default = kind().to_dict()
    known = default.keys() | kind.attribute_map.keys()
    sizes = {name: value for name, value in SIZES.items() if name in known}
    none = {name: 0.0 for name, value in default.items() if "dropout" in name and isinstance(value, float)}
    return kind(**{"vocab_size": vocabulary} | sizes | none | OWN.get(family, {}) | settings)


RESERVED = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<sep>", "<cls>"]  # 0, 1 and 2 are as in SIZES and OWN
PIECES = 400


def _trained(model, trainer, before, texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = before
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_level(texts: Iterable[str]) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=RESERVED, initial_alphabet=alphabet, show_progress=False
    )
    return _trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), texts)


def unigram(texts: Iterable[str]) -> list[tuple[str, float]]:
    trainer = trainers.UnigramTrainer(
        vocab_size=PIECES, special_tokens=RESERVED, unk_token="<unk>", show_progress=False
    )
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    vocabulary = _trained(models.Unigram(), trainer, splitter, texts).get_vocab()
    return [(piece, -1.0 - number / PIECES) for piece, number in sorted(vocabulary.items(), key=lambda item: item[1])]


def word_pieces(texts: Iterable[str]) -> dict[str, int]:
    trainer = trainers.WordPieceTrainer(vocab_size=PIECES, special_tokens=RESERVED, show_progress=False)
    lower = (text.lower() for text in texts)
    return _trained(models.WordPiece(unk_token="<unk>"), trainer, pre_tokenizers.BertPreTokenizer(), lower).get_vocab()


NAMES = {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
LIKE_ROBERTA = NAMES | {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}


def _roberta(texts):
    made = byte_level(texts)
    merges = [tuple(pair) for pair in json.loads(made.to_str())["model"]["merges"]]
    return transformers.RobertaTokenizer(vocab=made.get_vocab(), merges=merges, **LIKE_ROBERTA)


def _modernbert(texts):
    made = byte_level(texts)
    ends = [("<s>", 0), ("</s>", 2)]
    single, pair = "<s> $A </s>", "<s> $A </s> $B:1 </s>:1"
    made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **LIKE_ROBERTA)


def _of_pieces(name: str, **settings) -> Callable:
    return lambda texts: getattr(transformers, name)(vocab=unigram(texts), **NAMES | settings)


def _of_words(name: str) -> Callable:
    return lambda texts: getattr(transformers, name)(vocab=word_pieces(texts), **LIKE_ROBERTA)


TOKENIZERS: dict[str, Callable] = {
    "roberta": _roberta,
    "modernbert": _modernbert,
    "xlm-roberta": _of_pieces("XLMRobertaTokenizer", cls_token="<s>", sep_token="</s>"),
    "camembert": _of_pieces("CamembertTokenizer", cls_token="<s>", sep_token="</s>"),
    "deberta-v2": _of_pieces("DebertaV2Tokenizer", cls_token="<s>", sep_token="</s>"),
    "xlnet": _of_pieces("XLNetTokenizer", cls_token="<cls>", sep_token="<sep>", bos_token="<s>", eos_token="</s>"),
    "rembert": _of_pieces("RemBertTokenizer", cls_token="<s>", sep_token="</s>"),
    "electra": _of_words("BertTokenizer"),
    "mpnet": _of_words("MPNetTokenizer"),
}


def write_tiny_model(family: str, folder: Path, texts: Iterable[str], **settings) -> Path:
    """A folder as of the hub: configuration, random weights and tokenizer of a family."""
    tokenizer = TOKENIZERS[family](list(texts))
    tokenizer.save_pretrained(folder)
    AutoModel.from_config(tiny_config(family, len(tokenizer), **settings)).save_pretrained(folder)
    return folder
