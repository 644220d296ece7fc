"""The encoder behind RaceModule: loaded from Hugging Face, run packed or padded, in parts that fit into memory.

Hugging Face's own modules compute everything here. Packing adds two things: attention that stays inside each sequence
(race.attention), and for ALBERT, BERT and its like a last layer at [CLS] only, because only that output is used.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForMultipleChoice, PretrainedConfig
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from race import MAX_LEN, OPTIONS, RaceError
from race.attention import SHORT, has_varlen, packed_attention
from race.families import (
    ATTENTION_DROPOUT,
    LAST_AT_CLS,
    PACKED,
    attention_dropout,
    first_position,
    intermediate_size,
    is_packed,
    longest_input,
    pads_left,
    takes_segments,
)
from race.models import check_family, load_config, not_loaded, weights_problem, wrong_transformers

ATTENTION_MAPS = 6  # [tokens, tokens] of each head that padded families keep: scores, softmax, dropout, positions
CPU_TOKENS = 4096  # in a micro-batch on CPU: enough for its matrix products, and little memory


def build_model(config: PretrainedConfig | dict, dropout: float | None = None) -> nn.Module:
    """A multiple-choice model with this configuration and random weights; dropout: that of attention, None: its own."""
    config = AutoConfig.for_model(**config) if isinstance(config, dict) else copy.deepcopy(config)
    check_family(config)
    config.update(_own_settings(config, dropout))
    return _prepared(AutoModelForMultipleChoice.from_config(config, dtype=torch.float32))


def load_pretrained(model: str | Path, dropout: float | None = None) -> nn.Module:
    """A pretrained encoder (hub name or folder) with a new multiple-choice head, in float32; raises RaceError.

    dropout: that of attention, None: its own.
    """
    settings = _own_settings(load_config(model), dropout)
    folder = Path(model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise RaceError(f"{model} has no weights (model.safetensors); name a model that has, or give config= instead")
    settings |= {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
    try:
        loaded, info = AutoModelForMultipleChoice.from_pretrained(model, **settings)
    except Exception as error:  # damaged files make the libraries raise anything
        if not folder.is_dir():
            raise not_loaded(model, "weights", error, "fetch them again") from error
        raise RaceError(f"{model}: cannot be loaded safely: its weights: {weights_problem(error)}") from error
    encoder = f"{loaded.base_model_prefix}."
    missing = sorted(name for name in info["missing_keys"] if name.startswith(encoder) and ".pooler." not in name)
    if missing:
        raise RaceError(f"{model} lacks {len(missing)} weights of {type(loaded).__name__}, such as {missing[0]}")
    return _prepared(loaded)


def _own_settings(config: PretrainedConfig, dropout: float | None) -> dict:
    """What this repository sets in a configuration; raises RaceError if attention has no dropout to set."""
    settings = {}
    if config.model_type == "big_bird":  # block-sparse attention depends on the length of other questions
        settings["attention_type"] = "original_full"
    if dropout is None:
        return settings
    for name in ATTENTION_DROPOUT:
        if hasattr(config, name):
            return settings | {name: dropout}
    raise RaceError(f"ATTENTION_DROPOUT = {dropout}: a model of type {config.model_type!r} has no such setting")


def _prepared(model: nn.Module) -> nn.Module:
    """Training mode (from_pretrained gives evaluation mode); packed attention for the families that can, else padding.

    Of packed models, `gelu_new` becomes the fused tanh GELU: the same function, written as many elementwise operations.
    """
    if not is_packed(model.config):
        for child in model.children():
            if child is not model.base_model:
                FullPrecision(child)
        if model.config.model_type == "xlnet":  # of its pretraining: without a gradient, processes would wait for it
            model.base_model.mask_emb.requires_grad_(False)
        return model.train()
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
    if model.config.model_type in LAST_AT_CLS:
        last = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)][-1]
        last.__class__ = type(type(last).__name__, (LastAtCls, type(last)), {})
    return model.train()


class LastAtCls:
    """The last layer of a BERT and its like: queries, output and feed-forward at [CLS], as nothing else is read."""

    def forward(self, hidden, *arguments, packing=None, **settings) -> torch.Tensor:
        """[1, T, hidden] → [1, 4B, hidden]; without `packing` what transformers computes."""
        if packing is None:
            return super().forward(hidden, *arguments, **settings)
        attention = self.attention.self
        dropout = attention.dropout.p if self.training else 0.0
        context, cls = _attention_at_cls(attention, hidden, packing, dropout)
        return self.feed_forward_chunk(self.attention.output(context, cls))


def _attention_at_cls(attention: nn.Module, hidden, batch, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, T, hidden] → what each [CLS] attends to, and its own state: [1, 4B, hidden] each."""
    cls = hidden.index_select(1, batch.cu_seqlens[:-1])
    query, key, value = (
        project(states).view(1, states.shape[1], -1, attention.attention_head_size).transpose(1, 2)
        for project, states in ((attention.query, cls), (attention.key, hidden), (attention.value, hidden))
    )
    context, _ = packed_attention(attention, query, key, value, None, dropout, attention.scaling, packing=batch)
    return context.flatten(2), cls


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


class FullPrecision:
    """A part of a padded model's head, run in float32 whatever autocast says."""

    def __init__(self, part: nn.Module):
        self.entered: list[torch.autocast] = []
        part.register_forward_pre_hook(self.enter)
        part.register_forward_hook(self.leave, always_call=True)

    def __getstate__(self) -> dict:  # for copies of the module
        return {"entered": []}

    def enter(self, part: nn.Module, inputs: tuple) -> tuple:
        """Before its forward."""
        self.entered.append(full_precision(inputs[0]))
        self.entered[-1].__enter__()
        return (at_least_float32(inputs[0]), *inputs[1:])

    def leave(self, part: nn.Module, inputs: tuple, output) -> None:
        """After it, also if it has failed."""
        if self.entered:
            self.entered.pop().__exit__(None, None, None)


def option_logits(model: nn.Module, batch) -> torch.Tensor:
    """PackedBatch of B questions → [4B, 1], the logit of each sequence, in float32; raises RaceError."""
    longest = longest_input(model)
    if longest and batch.max_seqlen > longest:
        raise RaceError(f"a sequence of {batch.max_seqlen} tokens; the model takes {longest}: set MAX_LEN")
    if not is_packed(model.config):
        try:
            return at_least_float32(model(**padded_inputs(model, batch)).logits).view(-1, 1)
        except AssertionError as error:  # of a separator within a text, in Longformer
            raise RaceError(f"{type(model).__name__}: {error}") from error
    states = encode(model, batch)
    with full_precision(states):
        return PACKED[model.config.model_type](model, at_least_float32(states))


def encode(model: nn.Module, batch) -> torch.Tensor:
    """PackedBatch of B questions → [4B, hidden], of each sequence the state of [CLS], or what the head reads."""
    encoder, config = model.base_model, model.config
    for cast in encoder.casts:  # of a forward pass that an error or a signal has ended
        cast.forget()
    inputs = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None]}
    if first := first_position(model):
        inputs["position_ids"] = inputs["position_ids"] + first
    if takes_segments(model):
        inputs["token_type_ids"] = batch.token_type_ids[None]
    elif getattr(config, "type_vocab_size", 0):  # one segment; left out, its place would be looked up in int64
        inputs["token_type_ids"] = torch.zeros_like(batch.input_ids)[None]
    if config.model_type == "albert":
        return _albert(encoder, inputs, batch)[0]
    if hasattr(config, "layer_types"):  # ModernBERT makes masks of T × T, unless they are given
        inputs["attention_mask"] = dict.fromkeys(config.layer_types)
    with _taking_packing():
        hidden = encoder(**inputs, packing=batch).last_hidden_state[0]  # [T, hidden], or [4B, hidden]
    if config.model_type in LAST_AT_CLS:
        return hidden
    if getattr(config, "classifier_pooling", "cls") == "mean":
        return torch.segment_reduce(at_least_float32(hidden), "mean", lengths=batch.cu_seqlens.diff(), unsafe=True)
    return hidden.index_select(0, batch.cu_seqlens[:-1])


def padded_inputs(model: nn.Module, batch) -> dict[str, torch.Tensor]:
    """PackedBatch of B questions → input_ids, attention_mask, perhaps token_type_ids: each [B, 4, longest] int64."""
    longest, lengths = batch.max_seqlen, batch.cu_seqlens.diff()
    first = torch.arange(len(lengths), device=lengths.device) * longest
    if pads_left(model):
        first = first + longest - lengths
    place = first.repeat_interleave(lengths, output_size=len(batch.input_ids)) + batch.position_ids

    def grid(values: torch.Tensor, padding: int) -> torch.Tensor:
        empty = values.new_full((len(lengths) * longest,), padding, dtype=torch.int64)
        return empty.index_copy(0, place, values.long()).view(-1, OPTIONS, longest)

    inputs = {"input_ids": grid(batch.input_ids, model.config.pad_token_id or 0)}
    inputs["attention_mask"] = grid(torch.ones_like(batch.input_ids), 0)
    if takes_segments(model):
        inputs["token_type_ids"] = grid(batch.token_type_ids, 0)
    return inputs


def full_precision(states: torch.Tensor) -> torch.autocast:
    """Without autocast: pooler, head and loss are small, and their rounding would decide close answers."""
    return torch.autocast(states.device.type, enabled=False)


def at_least_float32(states: torch.Tensor) -> torch.Tensor:
    """float32, or float64 where that is what comes."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


@contextlib.contextmanager
def _taking_packing() -> Iterator[None]:
    """Raise RaceError if layers of this transformers do not hand `packing` down to the attention."""
    try:
        yield
    except TypeError as error:
        if "'packing'" not in str(error):
            raise
        raise wrong_transformers() from error


def _albert(encoder: nn.Module, inputs: dict, batch) -> torch.Tensor:
    """→ [1, 4B, hidden]"""
    hidden = encoder.encoder.embedding_hidden_mapping_in(encoder.embeddings(**inputs))  # [1, T, hidden]
    *layers, last = albert_layers(encoder)
    with _taking_packing():
        for layer in layers:
            hidden = layer(hidden, None, packing=batch)
    return _albert_layer_at_cls(last, hidden, batch)


def albert_layers(encoder: nn.Module) -> list[nn.Module]:
    """ALBERT's layers in the order in which they are applied: the same one many times."""
    config = encoder.config
    groups = [i * config.num_hidden_groups // config.num_hidden_layers for i in range(config.num_hidden_layers)]
    return [layer for group in groups for layer in encoder.encoder.albert_layer_groups[group].albert_layers]


def _albert_layer_at_cls(layer: nn.Module, hidden: torch.Tensor, batch) -> torch.Tensor:
    """[1, T, hidden] → [1, 4B, hidden]: queries, output and feed-forward at [CLS] only (7 % of all FLOPs less)."""
    attention = layer.attention
    dropout = attention.attention_dropout.p if layer.training else 0.0
    context, cls = _attention_at_cls(attention, hidden, batch, dropout)
    context = attention.LayerNorm(cls + attention.output_dropout(attention.dense(context)))
    return layer.full_layer_layer_norm(layer.ff_chunk(context) + context)


def attention_kernel(config: PretrainedConfig, device: torch.device, half: torch.dtype | None) -> str:
    """How sequences run through training, in words."""
    if not is_packed(config):
        return "padded to the longest of a micro-batch"
    width = config.hidden_size // config.num_attention_heads
    if attention_dropout(config) == 0 and has_varlen(device, half, width):
        return "attention of variable length"
    return f"attention sequence by sequence (up to {SHORT} tokens in one masked call)"


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """torch.compile of each layer; lengths are dynamic, and attention stays outside, so that few graphs serve all."""
    AttentionInterface.register("packed", torch.compiler.disable(packed_attention))
    for layer in model.modules():  # each is one of these in transformers; the last one calls attention by itself
        if isinstance(layer, GradientCheckpointingLayer) and not isinstance(layer, LastAtCls):
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

    Of a padded family, padding is counted, and the maps of attention that it keeps.

    Kept for the backward pass, a token and layer. In float32: its input, query, key, value, context as attention gives
    it and as joined, two layer-norm inputs and one output (9 hidden of 4 bytes), and the feed-forward before and after
    its activation (2 intermediate). Under autocast: the layer-norm inputs in float32, 7 hidden and 2 intermediate of 2
    bytes. In the backward pass, one layer's gradients need about as much again.
    """
    layers = config.num_hidden_layers * getattr(config, "inner_group_num", 1)
    hidden, intermediate = config.hidden_size, intermediate_size(config)
    layer = 22 * hidden + 4 * intermediate if half else 36 * hidden + 8 * intermediate
    width = 2 if half else 4
    if getattr(config, "rope_parameters", None):  # ModernBERT: rotated queries and keys, and a gated feed-forward
        layer += width * (3 * hidden + 2 * intermediate)
    if not is_packed(config):
        layer += width * ATTENTION_MAPS * config.num_attention_heads * MAX_LEN
    fixed = 20 * parameters + (1 << 29)  # weights, gradients, two moments, casts or buckets; context and workspace
    return int(max(OPTIONS * MAX_LEN, (0.9 * free - fixed) / (layer * (layers + 1) + 32 * hidden)))
