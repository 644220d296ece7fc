"""The encoders of transformers that have a multiple-choice head: which run packed, and what differs between them.

Packed: those that hand a keyword of their forward down to the attention. All others run as Hugging Face wrote them, on
a batch padded to its longest sequence.
"""

import functools
import inspect
from collections.abc import Callable

# -------------------------------------------------------------------------------------------------- heads


def _with_pooler(model, states):
    """[S, hidden] of each sequence's first token → [S, 1]"""
    return model.classifier(model.dropout(model.base_model.pooler(states[:, None])))  # it reads the first place


def _albert(model, states):
    encoder = model.base_model
    return model.classifier(model.dropout(encoder.pooler_activation(encoder.pooler(states))))


def _distilbert(model, states):
    return model.classifier(model.dropout(model.pre_classifier(states).relu()))


def _electra(model, states):
    return model.classifier(model.sequence_summary(states[:, None]))


def _modernbert(model, states):
    return model.classifier(model.drop(model.head(states)))


LIKE_BERT = ("bert", "camembert", "data2vec-text", "ernie", "roberta", "roberta-prelayernorm")
LIKE_BERT += ("xlm-roberta", "xlm-roberta-xl")
LAST_AT_CLS = (*(family for family in LIKE_BERT if family not in ("roberta-prelayernorm", "xlm-roberta-xl")), "electra")
PACKED: dict[str, Callable] = dict.fromkeys(LIKE_BERT, _with_pooler)
PACKED |= {"albert": _albert, "distilbert": _distilbert, "electra": _electra, "modernbert": _modernbert}


def is_packed(config) -> bool:
    """Whether this family runs packed."""
    return config.model_type in PACKED


# -------------------------------------------------------------------------------------------------- configurations


def first_position(model) -> int:
    """The position of a sequence's first token: RoBERTa and its like count from the padding id + 1."""
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)
    return 0 if padding is None else padding + 1


def longest_input(model) -> int | None:
    """Tokens of the longest sequence that a model takes; None: any."""
    places = getattr(model.config, "max_position_embeddings", None) or 0
    return places - first_position(model) if places > 0 else None


def takes_segments(model) -> bool:
    """Whether a model tells segments apart: token_type_ids are among its inputs, and of more than one kind."""
    return getattr(model.config, "type_vocab_size", 2) > 1 and "token_type_ids" in _inputs(type(model.base_model))


@functools.cache
def _inputs(encoder: type) -> tuple[str, ...]:
    return tuple(inspect.signature(encoder.forward).parameters)


def pads_left(model) -> bool:
    """Whether the head reads the last token of a row, which padding must then not follow."""
    return getattr(getattr(model, "sequence_summary", None), "summary_type", "first") == "last"


def intermediate_size(config) -> int:
    """Width of the feed-forward layers, by the names that families give it."""
    names = ("intermediate_size", "hidden_dim", "d_inner")
    return next((size for name in names if (size := getattr(config, name, None))), 4 * config.hidden_size)


ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")


def attention_dropout(config) -> float:
    """The dropout of attention in training, by the names that families give it."""
    return next((getattr(config, name) for name in ATTENTION_DROPOUT if hasattr(config, name)), 0.0)
