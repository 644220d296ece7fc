"""The encoder behind RaceModule: loaded from Hugging Face, run on packed sequences, in parts that fit into memory.

Hugging Face's own modules compute everything here, layer by layer. Packing adds two things: attention that stays inside
each sequence, and for ALBERT a last layer that is computed at [CLS] only, because only that output is used.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from race import MAX_LEN, OPTIONS, RaceError
from race.model_files import check_family, load_config, not_loaded, tensorflow_file, weights_problem, wrong_transformers

try:
    from transformers import AttentionInterface, AutoConfig, AutoModelForMultipleChoice, PretrainedConfig
    from transformers.activations import NewGELUActivation
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
except ImportError as error:
    raise wrong_transformers() from error

SHORT = 128  # tokens; up to here one attention call with a mask is faster than one call per sequence
CPU_TOKENS = 4096  # in a micro-batch on CPU: enough for its matrix products, and little memory


def build_model(config: PretrainedConfig | dict) -> nn.Module:
    """A multiple-choice model with this configuration and random weights."""
    if isinstance(config, dict):
        config = AutoConfig.for_model(**config)
    check_family(config)
    return _prepared(AutoModelForMultipleChoice.from_config(config))


def load_pretrained(model: str | Path) -> nn.Module:
    """A pretrained encoder (hub name or folder) with a new multiple-choice head, in float32; raises RaceError."""
    load_config(model)
    folder = Path(model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        others = f", only those of TensorFlow ({name})" if (name := tensorflow_file(folder)) else ""
        raise RaceError(
            f"{model} has no weights (model.safetensors){others}; name a model that has, or give config= instead"
        )
    settings = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
    try:
        loaded, info = AutoModelForMultipleChoice.from_pretrained(model, **settings)
    except Exception as error:  # damaged files make the libraries raise anything
        if not folder.is_dir():
            raise not_loaded(model, "weights", error, "") from error
        raise RaceError(f"{model}: cannot be loaded safely: its weights: {weights_problem(error)}") from error
    head = ("classifier.", f"{loaded.base_model_prefix}.pooler.")
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(head))
    if missing:
        raise RaceError(f"{model} lacks {len(missing)} weights of {type(loaded).__name__}, such as {missing[0]}")
    return _prepared(loaded)


def _prepared(model: nn.Module) -> nn.Module:
    """Packed attention, training mode (from_pretrained gives evaluation mode), and the fused tanh GELU.

    `gelu_new` is the same function, written as many elementwise operations.
    """
    model.set_attn_implementation("packed")
    if model.config._attn_implementation != "packed":
        raise wrong_transformers()
    model.base_model.casts = []
    for module in model.modules():
        children = dict(module.named_children())
        for name, child in children.items():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
        if {"query", "key", "value"} <= children.keys():
            model.base_model.casts.append(once := CastOnce(children["value"]))
            for name in ("query", "key", "value"):
                children[name].register_forward_pre_hook(once)
    return model.train()


class CastOnce:
    """Under autocast, the states that query, key and value share are cast to half precision once, not three times."""

    def __init__(self, last: nn.Module):
        self.last, self.states, self.cast = last, None, None

    def forget(self) -> None:
        """Keep no states alive."""
        self.states = self.cast = None

    def __getstate__(self) -> dict:  # for copies of the module
        return {"last": self.last, "states": None, "cast": None}

    def __call__(self, projection: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """A forward pre-hook of the three projections, of which `last` is the last; a compiler does this by itself."""
        (states,), kind = inputs, inputs[0].device.type
        if torch.compiler.is_compiling() or not torch.is_autocast_enabled(kind) or states.dtype != torch.float32:
            return inputs
        if states is not self.states:
            self.states, self.cast = states, states.to(torch.get_autocast_dtype(kind))
        cast = self.cast
        if projection is self.last:
            self.forget()
        return (cast,)


def encode(encoder: nn.Module, batch) -> torch.Tensor:
    """PackedBatch of B questions → [4B, hidden], the pooled state of each sequence's [CLS]; raises RaceError."""
    for cast in encoder.casts:  # of a forward pass that an error or a signal has ended
        cast.forget()
    longest = encoder.config.max_position_embeddings
    if batch.max_seqlen > longest:
        raise RaceError(f"a sequence of {batch.max_seqlen} tokens; the model takes {longest}: set MAX_LEN")
    inputs = {name: getattr(batch, name)[None] for name in ("input_ids", "token_type_ids", "position_ids")}
    hidden = encoder.embeddings(**inputs)  # [1, T, embedding]
    if encoder.config.model_type == "albert":
        hidden = encoder.encoder.embedding_hidden_mapping_in(hidden)
        *layers, last = albert_layers(encoder)
        for layer in layers:
            hidden = _apply(layer, hidden, batch)
        cls = _albert_layer_at_cls(last, hidden, batch)
        with full_precision(cls):
            return encoder.pooler_activation(encoder.pooler(at_least_float32(cls)))[0]
    for layer in encoder.encoder.layer:
        hidden = _apply(layer, hidden, batch)
    cls = hidden.index_select(1, batch.cu_seqlens[:-1])
    with full_precision(cls):
        return encoder.pooler(at_least_float32(cls).transpose(0, 1))  # it reads position 0 of each sequence


def full_precision(states: torch.Tensor) -> torch.autocast:
    """Without autocast: pooler, head and loss are small, and their rounding would decide close answers."""
    return torch.autocast(states.device.type, enabled=False)


def at_least_float32(states: torch.Tensor) -> torch.Tensor:
    """float32, or float64 where that is what comes."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _apply(layer: nn.Module, hidden: torch.Tensor, batch) -> torch.Tensor:
    """A layer of transformers, which hands `packing` down to the attention; raises RaceError if it does not take it."""
    try:
        return layer(hidden, None, packing=batch)
    except TypeError as error:
        if "'packing'" not in str(error):
            raise
        raise wrong_transformers() from error


def albert_layers(encoder: nn.Module) -> list[nn.Module]:
    """The layers in the order in which they are applied; ALBERT applies the same one many times."""
    config = encoder.config
    groups = [i * config.num_hidden_groups // config.num_hidden_layers for i in range(config.num_hidden_layers)]
    return [layer for group in groups for layer in encoder.encoder.albert_layer_groups[group].albert_layers]


def _albert_layer_at_cls(layer: nn.Module, hidden: torch.Tensor, batch) -> torch.Tensor:
    """[1, T, hidden] → [1, 4B, hidden]: queries, output and feed-forward at [CLS] only (7 % of all FLOPs less)."""
    attention = layer.attention
    cls = hidden.index_select(1, batch.cu_seqlens[:-1])
    query, key, value = (
        project(states).view(1, states.shape[1], -1, attention.attention_head_size).transpose(1, 2)
        for project, states in ((attention.query, cls), (attention.key, hidden), (attention.value, hidden))
    )
    dropout = attention.attention_dropout.p if layer.training else 0.0
    context, _ = packed_attention(layer, query, key, value, None, dropout, attention.scaling, packing=batch)
    context = attention.LayerNorm(cls + attention.output_dropout(attention.dense(context.flatten(2))))
    return layer.full_layer_layer_norm(layer.ff_chunk(context) + context)


def packed_attention(
    module, query, key, value, attention_mask, dropout: float = 0.0, scaling=None, packing=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """Attention inside each sequence of a PackedBatch: query [1, heads, T or 4B, d] → [1, T or 4B, heads, d].

    A query of 4B rows is one row a sequence. Without `packing` it is plain padded attention, as SDPA gives it.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    one_row_each = query.shape[2] != key.shape[2]
    if dropout == 0.0 and _has_varlen(query):
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = packing.cu_seqlens, packing.max_seqlen
        query_ends = torch.arange(len(ends), device=ends.device, dtype=ends.dtype) if one_row_each else ends
        query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
        out = varlen_attn(query, key, value, query_ends, ends, 1 if one_row_each else longest, longest, scale=scaling)
        return out[None], None
    settings = {"dropout_p": dropout, "scale": scaling}
    if packing.max_seqlen <= SHORT:
        return _masked_attention(query, key, value, packing, one_row_each, **settings), None
    rows = [1] * len(packing.lengths) if one_row_each else packing.lengths
    # Cut with the tokens in front, as they lie in memory: the gradient is then joined by plain copies.
    lengths = (rows, packing.lengths, packing.lengths)
    cut = [states.transpose(1, 2).split(each, 1) for states, each in zip((query, key, value), lengths, strict=True)]
    out = [
        F.scaled_dot_product_attention(*(states.transpose(1, 2) for states in sequence), **settings).transpose(1, 2)
        for sequence in zip(*cut, strict=True)
    ]
    return torch.cat(out, 1), None


def _masked_attention(query, key, value, packing, one_row_each: bool, **settings) -> torch.Tensor:
    """All sequences in one padded and masked call, for short ones."""
    count, longest = len(packing.lengths), packing.max_seqlen
    lengths = packing.cu_seqlens.diff()
    sequence = torch.arange(count, device=lengths.device).repeat_interleave(lengths, output_size=key.shape[2])
    place = packing.position_ids + sequence * longest  # [T], of each token among [4B * longest]

    def pad(states: torch.Tensor) -> torch.Tensor:  # [1, heads, T, d] → [4B, heads, longest, d]
        rows = states[0].transpose(0, 1).flatten(1)
        grid = rows.new_zeros(count * longest, rows.shape[1]).index_copy(0, place, rows)
        return grid.view(count, longest, *states.shape[1::2]).transpose(1, 2)

    key, value = pad(key), pad(value)
    query = query.transpose(0, 2) if one_row_each else pad(query)
    mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
    out = F.scaled_dot_product_attention(query, key, value, mask[:, None, None], **settings).transpose(1, 2).flatten(2)
    rows = out.flatten(0, 1) if one_row_each else out.flatten(0, 1).index_select(0, place)
    return rows.view(1, len(rows), key.shape[1], -1)


def _has_varlen(query: torch.Tensor) -> bool:
    """Whether FlashAttention's variable-length kernel takes this query (half precision, Ampere or newer)."""
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    width = query.shape[-1]
    return half and width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attention_kernel(config: PretrainedConfig, device: torch.device, half: torch.dtype | None) -> str:
    """Which attention packed training runs through, in words."""
    width = config.hidden_size // config.num_attention_heads
    dropout = config.attention_probs_dropout_prob
    if half and dropout == 0 and _has_varlen(torch.empty(0, width, dtype=half, device=device)):
        return "attention of variable length"
    return f"attention sequence by sequence (up to {SHORT} tokens in one masked call)"


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """torch.compile of each layer; lengths are dynamic, and attention stays outside, so that few graphs serve all."""
    AttentionInterface.register("packed", torch.compiler.disable(packed_attention))
    encoder = model.base_model.encoder
    layers = albert_layers(model.base_model) if model.config.model_type == "albert" else encoder.layer
    for layer in {id(layer): layer for layer in layers}.values():
        layer.compile(dynamic=True, backend=backend)


def token_budget(model: nn.Module, device: torch.device, half: bool) -> int:
    """Tokens of a micro-batch: as many as a training step fits into what is free of a GPU's memory; half: autocast."""
    if device.type != "cuda":
        return CPU_TOKENS
    torch.cuda.empty_cache()  # what this process keeps, and does not use, is free too
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return token_budget_for(model.config, parameters, torch.cuda.mem_get_info(device)[0], half)


def token_budget_for(config: PretrainedConfig, parameters: int, free: int, half: bool) -> int:
    """Tokens of a micro-batch with `free` bytes: nine tenths of them, less weights and optimizer state.

    Kept for the backward pass, a token and layer. In float32: its input, query, key, value, context as attention gives
    it and as joined, two layer-norm inputs and one output (9 hidden of 4 bytes), and the feed-forward before and after
    its activation (2 intermediate). Under autocast: the layer-norm inputs in float32, 7 hidden and 2 intermediate of 2
    bytes. In the backward pass, one layer's gradients need about as much again.
    """
    layers = config.num_hidden_layers * getattr(config, "inner_group_num", 1)
    hidden, intermediate = config.hidden_size, config.intermediate_size
    layer = 22 * hidden + 4 * intermediate if half else 36 * hidden + 8 * intermediate
    fixed = 20 * parameters + (1 << 29)  # weights, gradients, two moments, casts or buckets; context and workspace
    return int(max(OPTIONS * MAX_LEN, (0.9 * free - fixed) / (layer * (layers + 1) + 32 * hidden)))
