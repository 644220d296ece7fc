"""The encoder behind RaceModule: loaded from Hugging Face, run packed or padded.

Hugging Face's own modules compute everything here. Families whose layers hand a keyword down to the attention run
packed (race.attention); others padded. Of ALBERT, BERT and its like the last layer computes [CLS] only.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForMultipleChoice, PretrainedConfig
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from race import OPTIONS, RaceError
from race.attention import MOST_PADDING, has_varlen
from race.data import collate
from race.models import check_family, load_config, local_copy, weight_files, weights_problem

ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")  # by the names that families give it
LOGIT_TOLERANCE = 1e-4  # of the largest; in float32, sums in another order differ by about 1e-6


def load_model(model: str | Path | None, config: PretrainedConfig | dict | None, dropout: float | None) -> nn.Module:
    """A multiple-choice model in training mode: pretrained (hub name or folder), or of a configuration, random.

    dropout: that of attention; None: its own. Raises RaceError.
    """
    if (model is None) == (config is None):
        raise RaceError("give either model= (a name or a folder with weights) or config= (random weights)")
    if model is not None:
        return checked(_prepared(_pretrained(model, _own_settings(load_config(model), dropout))), model).train()
    known = isinstance(config, dict)  # as a checkpoint of this repository keeps it
    config = AutoConfig.for_model(**config) if known else copy.deepcopy(config)
    check_family(config)
    config.update(_own_settings(config, dropout))
    made = _prepared(AutoModelForMultipleChoice.from_config(config, dtype=torch.float32))
    return (made if known else checked(made, config.name_or_path or "this model")).train()


def checked(model: nn.Module, name: str | Path) -> nn.Module:
    """The model; raises RaceError unless a random question, beside a longer one, gets Hugging Face's logits for it."""
    if model.config.model_type == "longformer":  # it pads to 512 tokens: half a minute
        return model
    draw, size = torch.Generator().manual_seed(0), model.config.vocab_size
    drawn = [torch.randint(size, (OPTIONS, length), generator=draw).numpy() for length in (6, 12)]
    questions = [{"input_ids": ids, "token_type_ids": ids % 2, "label": 0} for ids in drawn]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        theirs = model.eval()(**padded_inputs(model, collate(questions[:1]))).logits.view(-1, 1)
        error = (option_logits(model, collate(questions))[:OPTIONS] - theirs).abs().max().item()
    if not error <= LOGIT_TOLERANCE * theirs.abs().max().item():
        what = "its type, or a setting of its config.json, is not run here (docs/models.md)"
        raise RaceError(f"{name}: {what}: beside a longer question, logits differ by {error:.2g} from Hugging Face's")
    return model


def _own_settings(config: PretrainedConfig, dropout: float | None) -> dict:
    """What this repository sets in a configuration; raises RaceError if attention has no dropout to set."""
    # BigBird's block-sparse attention depends on the length of other questions
    settings = {"attention_type": "original_full"} if config.model_type == "big_bird" else {}
    if dropout is None:
        return settings
    for name in ATTENTION_DROPOUT:
        if hasattr(config, name):
            return settings | {name: dropout}
    raise RaceError(f"ATTENTION_DROPOUT = {dropout}: a model of type {config.model_type!r} has no such setting")


def _pretrained(model: str | Path, settings: dict) -> nn.Module:
    """A pretrained encoder with a new multiple-choice head, in float32."""
    folder = local_copy(model)
    if not weight_files(folder):
        raise RaceError(f"{model} has no weights (model.safetensors); name a model that has, or give config= instead")
    settings |= {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
    try:
        loaded, info = AutoModelForMultipleChoice.from_pretrained(folder, **settings)
    except Exception as error:  # damaged files make the libraries raise anything
        raise RaceError(f"{model}: cannot be loaded safely: its weights: {weights_problem(error)}") from error
    encoder = f"{loaded.base_model_prefix}."
    missing = sorted(name for name in info["missing_keys"] if name.startswith(encoder) and ".pooler." not in name)
    if missing:
        raise RaceError(f"{model} lacks {len(missing)} weights of {type(loaded).__name__}, such as {missing[0]}")
    return loaded


def _prepared(model: nn.Module) -> nn.Module:
    """Packed attention for the families that can; a head in float32 for the others.

    Of packed models, `gelu_new` becomes the fused tanh GELU: the same function, written as many elementwise operations.
    """
    if not is_packed(model.config):
        for child in model.children():
            if child is not model.base_model:
                run_in_full_precision(child)
        if model.config.model_type == "xlnet":  # of its pretraining: without a gradient, processes would wait for it
            model.base_model.mask_emb.requires_grad_(False)
        return model
    model.set_attn_implementation("packed")
    model.run_layer = LayerRunner()
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def option_logits(model: nn.Module, batch) -> torch.Tensor:
    """PackedBatch of B questions → [kB, 1], the logit of each sequence, in float32; raises RaceError."""
    if not len(batch):  # of several processes, one with no question: DDP waits for its gradients, of zeros
        return sum(parameter.sum() for parameter in model.parameters()) * torch.zeros(0, 1, device=batch.labels.device)
    longest = longest_input(model)
    if longest and batch.max_seqlen > longest:
        raise RaceError(f"a sequence of {batch.max_seqlen} tokens; the model takes {longest}: set MAX_LEN = {longest}")
    if not is_packed(model.config):
        return at_least_float32(model(**padded_inputs(model, batch)).logits).view(-1, 1)
    states = encode(model, batch)
    with full_precision(states):
        return PACKED[model.config.model_type](model, at_least_float32(states))


def encode(model: nn.Module, batch) -> torch.Tensor:
    """PackedBatch of B questions → [kB, hidden], of each sequence the state of [CLS], or what the head reads."""
    encoder, config, places = model.base_model, model.config, batch.position_ids
    if first := first_position(model):  # RoBERTa counts without the padding tokens that a text spells out
        pads = (batch.input_ids == first - 1).int()
        before = pads.cumsum(0, dtype=torch.int32) - pads
        starts = torch.arange(len(pads), device=pads.device) - places
        places = torch.where(pads > 0, first - 1, places + first - before + before[starts])
    inputs = {"input_ids": batch.input_ids[None], "position_ids": places[None]}
    if takes_segments(model):
        inputs["token_type_ids"] = batch.token_type_ids[None]
    elif getattr(config, "type_vocab_size", 0):  # one segment; left out, its place would be looked up in int64
        inputs["token_type_ids"] = torch.zeros_like(batch.input_ids)[None]
    if config.model_type in LAST_AT_CLS:
        hidden = _embedded(encoder, inputs)  # [1, T, hidden]
        *layers, last = layers_of(encoder)
        for layer in layers:
            hidden = model.run_layer(layer, hidden, batch)
        return run_layer(last, hidden, batch, only_cls=True)[0]
    if hasattr(config, "layer_types"):  # ModernBERT makes masks of T × T, unless they are given
        inputs["attention_mask"] = dict.fromkeys(config.layer_types)
    hidden = encoder(**inputs, packing=batch).last_hidden_state[0]  # [T, hidden]
    if getattr(config, "classifier_pooling", "cls") == "mean":
        return torch.segment_reduce(at_least_float32(hidden), "mean", lengths=batch.cu_seqlens.diff(), unsafe=True)
    return hidden.index_select(0, batch.cu_seqlens[:-1])


def _embedded(encoder: nn.Module, inputs: dict) -> torch.Tensor:
    """What the first layer reads; ALBERT's and ELECTRA's embeddings may be narrower than their layers."""
    hidden = encoder.embeddings(**inputs)
    if encoder.config.model_type == "albert":
        return encoder.encoder.embedding_hidden_mapping_in(hidden)
    return encoder.embeddings_project(hidden) if hasattr(encoder, "embeddings_project") else hidden


def layers_of(encoder: nn.Module) -> list[nn.Module]:
    """Layers in the order in which they are applied; ALBERT's are the same one many times."""
    if encoder.config.model_type != "albert":
        return [*encoder.encoder.layer]
    groups, count = encoder.encoder.albert_layer_groups, encoder.config.num_hidden_layers
    return [layer for i in range(count) for layer in groups[int(i / (count / len(groups)))].albert_layers]


def run_layer(layer: nn.Module, hidden: torch.Tensor, batch, only_cls: bool = False) -> torch.Tensor:
    """A layer of ALBERT, BERT and its like, as transformers computes it: [1, T, hidden] → [1, T, hidden].

    only_cls: → [1, kB, hidden], queries, output and feed-forward at [CLS] only (7 % of the FLOPs of 12 layers less).
    """
    albert = not hasattr(layer.attention, "self")
    attention = layer.attention if albert else layer.attention.self
    dropout = attention.attention_dropout if albert else attention.dropout
    kind = hidden.device.type
    half = torch.is_autocast_enabled(kind) and hidden.dtype == torch.float32  # one cast for query, key and value
    states = hidden.to(torch.get_autocast_dtype(kind)) if half else hidden
    rows, queries = (hidden.index_select(1, batch.cu_seqlens[:-1]),) * 2 if only_cls else (hidden, states)
    query, key, value = (
        project(it).unflatten(2, (-1, attention.attention_head_size)).transpose(1, 2)
        for project, it in ((attention.query, queries), (attention.key, states), (attention.value, states))
    )
    attend, rate = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation], dropout.p if layer.training else 0.0
    context, _ = attend(attention, query, key, value, None, rate, attention.scaling, packing=batch)
    context = context.flatten(2)
    if albert:
        context = attention.LayerNorm(rows + attention.output_dropout(attention.dense(context)))
        return layer.full_layer_layer_norm(layer.ff_chunk(context) + context)
    return layer.feed_forward_chunk(layer.attention.output(context, rows))


class LayerRunner(nn.Module):
    """run_layer as a part of the model, which torch.compile takes as it takes the layers of other families."""

    forward = staticmethod(run_layer)


def padded_inputs(model: nn.Module, batch) -> dict[str, torch.Tensor]:
    """PackedBatch of B questions → input_ids, attention_mask, perhaps token_type_ids: each [B, k, longest] int64."""
    columns = torch.stack([batch.input_ids, torch.ones_like(batch.input_ids), batch.token_type_ids], 1).long()
    side = "left" if pads_left(model) else "right"
    rows = pad_sequence(columns.split(batch.lengths), batch_first=True, padding_side=side)
    ids, mask, segments = rows.view(-1, batch.options, *rows.shape[1:]).unbind(-1)
    inputs = {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id or 0), "attention_mask": mask}
    return inputs | ({"token_type_ids": segments} if takes_segments(model) else {})


def full_precision(states: torch.Tensor) -> torch.autocast:
    """Without autocast: pooler, head and loss are small, and their rounding would decide close answers."""
    return torch.autocast(states.device.type, enabled=False)


def at_least_float32(states: torch.Tensor) -> torch.Tensor:
    """float32, or float64 where that is what comes."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def run_in_full_precision(part: nn.Module) -> None:
    """Run a part of a padded model's head in float32 from now on, whatever autocast says."""
    entered = contextlib.ExitStack()

    def enter(part: nn.Module, inputs: tuple) -> tuple:
        entered.enter_context(full_precision(inputs[0]))
        return (at_least_float32(inputs[0]), *inputs[1:])

    part.register_forward_pre_hook(enter)
    part.register_forward_hook(lambda *_: entered.close(), always_call=True)  # also if its forward has failed


def attention_kernel(config: PretrainedConfig, device: torch.device, half: torch.dtype | None) -> str:
    """How sequences run through training, in words."""
    if not is_packed(config):
        return "padded to the longest of a micro-batch"
    return f"{'variable-length' if most_padding(config, device, half) == 1 else 'masked'} attention"


def most_padding(config: PretrainedConfig, device: torch.device, half: torch.dtype | None) -> int:
    """The factor by which padding enlarges packed attention in training; 1: there is none."""
    width = config.hidden_size // config.num_attention_heads
    varlen = attention_dropout(config) == 0 and has_varlen(device, half, width)
    return 1 if varlen or not is_packed(config) else MOST_PADDING


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """torch.compile of each layer; sizes are dynamic, so that few graphs serve all batches."""
    for part in model.modules():
        if isinstance(part, LayerRunner | GradientCheckpointingLayer):  # the latter is each layer of other families
            part.compile(dynamic=True, backend=backend)


BERTS = ("bert", "camembert", "data2vec-text", "ernie", "roberta", "xlm-roberta")
LAST_AT_CLS = ("albert", "electra", *BERTS)
PACKED: dict[str, Callable] = {  # family → its head: [S, hidden] of each sequence's first token → [S, 1]
    **dict.fromkeys(
        (*BERTS, "roberta-prelayernorm", "xlm-roberta-xl"),
        lambda model, cls: model.classifier(model.dropout(model.base_model.pooler(cls[:, None]))),
    ),
    "albert": lambda m, cls: m.classifier(m.dropout(m.albert.pooler_activation(m.albert.pooler(cls)))),
    "distilbert": lambda model, cls: model.classifier(model.dropout(model.pre_classifier(cls).relu())),
    "electra": lambda model, cls: model.classifier(model.sequence_summary(cls[:, None])),
    "modernbert": lambda model, cls: model.classifier(model.drop(model.head(cls))),
}


def is_packed(config) -> bool:
    """Whether this family runs packed."""
    return config.model_type in PACKED


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
    inputs = inspect.signature(type(model.base_model).forward).parameters
    return getattr(model.config, "type_vocab_size", 2) > 1 and "token_type_ids" in inputs


def pads_left(model) -> bool:
    """Whether the head reads the last token of a row, which padding must then not follow."""
    return getattr(getattr(model, "sequence_summary", None), "summary_type", "first") == "last"


def attention_dropout(config) -> float:
    """The dropout of attention in training."""
    return next((getattr(config, name) for name in ATTENTION_DROPOUT if hasattr(config, name)), 0.0)
