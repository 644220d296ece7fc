"""A tiny ALBERT with seeded random weights and the tokenizer of the demo corpus, as one Hugging Face folder."""

import string

import torch
from transformers import AlbertConfig, AlbertForMultipleChoice, AlbertTokenizer

from .corpus import words

SPECIAL = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]


def vocabulary() -> list[tuple[str, float]]:
    """(piece, log-probability): whole words win; characters make sure that any other ASCII text has pieces too."""
    characters = [c for c in map(chr, range(33, 127)) if c not in string.ascii_uppercase]
    singles = {"▁", *characters, *("▁" + c for c in characters)}
    whole = {"▁" + word for word in words()} - singles
    return [(p, 0.0) for p in SPECIAL] + [(p, -2.0) for p in sorted(whole)] + [(p, -10.0) for p in sorted(singles)]


def write_model(folder, seed: int = 0) -> None:
    """Write tokenizer, configuration and seeded random weights of a tiny ALBERT into `folder`.

    Keys start equal to queries, and position vectors small: a word then attends to the same word elsewhere.
    """
    vocab = vocabulary()
    AlbertTokenizer(vocab=vocab, model_max_length=512).save_pretrained(folder)
    config = AlbertConfig(
        vocab_size=len(vocab), embedding_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.15, classifier_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AlbertForMultipleChoice(config)
    attention = model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention
    with torch.no_grad():
        attention.key.weight.copy_(attention.query.weight)
        model.albert.embeddings.position_embeddings.weight.mul_(0.3)
    model.save_pretrained(folder)
