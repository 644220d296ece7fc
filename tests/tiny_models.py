"""A tiny configuration of every family of transformers with a multiple-choice head."""

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from race.families import PACKED, REFUSED

PADDED = sorted(MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.keys() - PACKED.keys() - REFUSED.keys())
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"embedding_size": 32, "max_position_embeddings": 320, "initializer_range": 0.2, "pad_token_id": 1}
SIZES |= {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48, "emb_dim": 32, "n_layers": 3, "n_heads": 4}  # XLNet
SIZES |= {"dim": 32, "hidden_dim": 48, "d_head": 8, "init_std": 0.2}  # DistilBERT
OWN = {
    "longformer": {"attention_window": [16] * 3, "sep_token_id": 2},
    "luke": {"entity_vocab_size": 10},
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 2}
    | {"bos_token_id": 0, "eos_token_id": 2},
    "deberta-v2": {"relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm"}
    | {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_biased_input": False, "pooler_hidden_size": 32},
    "squeezebert": {f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")},
    "xmod": {"default_language": "en_XX"},
}


def tiny_config(family: str, vocabulary: int = 100, **settings) -> PretrainedConfig:
    """Three layers of 32 places, without dropout."""
    kind = CONFIG_MAPPING[family]
    default = kind().to_dict()
    known = default.keys() | kind.attribute_map.keys()
    sizes = {name: value for name, value in SIZES.items() if name in known}
    none = {name: 0.0 for name, value in default.items() if "dropout" in name and isinstance(value, float)}
    return kind(**{"vocab_size": vocabulary} | sizes | none | OWN.get(family, {}) | settings)
