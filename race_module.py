"""RaceModule: a LightningModule around a Hugging Face encoder that runs on packed tokens."""

import contextlib
import functools
import hashlib
import json
import pickle
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForMultipleChoice, PretrainedConfig
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import race_linear
from race_files import DamagedFileError, check_sealed

FAMILIES = ("albert", "bert")
OPTIONS = 4
CPU_BUFFER = 32 << 20  # bytes; glibc hands larger buffers back after each use, and touching them anew costs time
SHORT = 128  # tokens; up to here calls for all sequences at once are faster than one for each (on CPU)


class RaceModule(pl.LightningModule):
    """Multiple choice over packed sequences: the loss, the optimizer and the metrics of every stage.

    model: hub name or folder with weights; or config: a configuration (or its dict) for random weights. One of them.
    token_budget: tokens that go through the device at once; the gradient is that of the whole batch whatever it is.
    None chooses by device memory. Raises ValueError where the model is no ALBERT or BERT or its weights are missing.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        config: PretrainedConfig | dict | None = None,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.0,
        adam_epsilon: float = 1e-8,
        token_budget: int | None = None,
    ):
        super().__init__()
        if (model is None) == (config is None):
            raise ValueError(
                "give either model= (a name or folder with weights) or config= (random weights, or those of a "
                "checkpoint that carries no configuration of its own)"
            )
        settings = {"learning_rate": learning_rate, "weight_decay": weight_decay, "adam_epsilon": adam_epsilon}
        absurd = [f"{name} is {value}" for name, value in settings.items() if not 0 <= value < float("inf")]
        if token_budget is not None and token_budget < 1:
            absurd.append(f"token_budget is {token_budget}")
        if absurd:
            raise ValueError(f"{'; '.join(absurd)}; expected numbers that are not negative, and a budget of 1 or more")
        self.model = build_model(config) if model is None else load_pretrained(model)
        self.learning_rate, self.weight_decay, self.adam_epsilon = learning_rate, weight_decay, adam_epsilon
        self.token_budget = token_budget
        self.lineage: dict = {}  # where these weights come from; travels in checkpoints
        self.automatic_optimization = False  # one optimizer step over several parts of a batch
        optimizer = {"learning_rate": learning_rate, "weight_decay": weight_decay, "adam_epsilon": adam_epsilon}
        self.save_hyperparameters({"config": self.model.config.to_dict()} | optimizer)
        self._sums = {}  # of an epoch so far, by "train", "val" and "test": loss, right answers, questions
        self._step_ended = None

    def forward(self, batch) -> torch.Tensor:
        """PackedBatch of B questions → logits [B, 4]"""
        config, encoder = self.model.config, self.model.base_model
        if batch.max_seqlen > config.max_position_embeddings:
            raise ValueError(
                f"a sequence of {batch.max_seqlen} tokens; the model takes {config.max_position_embeddings}"
            )
        hidden = encoder.embeddings(
            input_ids=batch.input_ids[None],
            token_type_ids=batch.token_type_ids[None],
            position_ids=batch.position_ids[None],
        )
        if config.model_type == "albert":
            hidden = encoder.encoder.embedding_hidden_mapping_in(hidden)
        *layers, last = encoder_layers(encoder)
        for layer in layers:
            hidden = layer(hidden, None, packing=batch)
        pooled = last_layer_at_cls(last, hidden, batch)  # [1, 4B, hidden]
        if config.model_type == "albert":
            pooled = encoder.pooler_activation(encoder.pooler(pooled))[0]
        else:
            pooled = encoder.pooler(pooled.transpose(0, 1))  # it reads position 0 of each sequence
        return self.model.classifier(self.model.dropout(pooled)).view(-1, OPTIONS)

    def training_step(self, batch, batch_idx: int) -> torch.Tensor:
        """One optimizer step on the whole batch; each of several processes brings its share of the questions."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self._step(batch, "train")
        optimizer.step()
        loss = self._over_processes(loss)
        self.log("train_loss_step", loss, on_step=True, on_epoch=False, prog_bar=True, batch_size=1)
        # Tensors on the host: of a plain number Lightning makes one on the device, and waits for it.
        rate = torch.tensor(optimizer.param_groups[0]["lr"])
        self.log("learning_rate", rate, on_step=True, on_epoch=False)
        now, before = time.perf_counter(), self._step_ended
        if before is not None:
            tokens = torch.tensor(float(sum(batch.lengths)))
            tokens = tokens if self._processes == 1 else self._over_processes(tokens.to(self.device))
            self.log("tokens_per_second", tokens / (now - before), on_step=True, on_epoch=False)
        self._step_ended = now
        return loss

    def validation_step(self, batch, batch_idx: int) -> torch.Tensor:
        """Loss and accuracy on the validation split."""
        return self._step(batch, "val")

    def test_step(self, batch, batch_idx: int) -> torch.Tensor:
        """Loss and accuracy on the test split."""
        return self._step(batch, "test")

    def _step(self, batch, name: str) -> torch.Tensor:
        """This process's part of a batch's mean loss, in parts that fit the device; in training each is sent back."""
        questions = len(batch)
        if name == "train" and self._processes > 1:  # of validation batches, processes may have unequal numbers
            questions = self._over_processes(torch.tensor(float(questions), device=self.device))
        parts = list(batch.micro_batches(self.token_budget))
        sums = []
        for number, part in enumerate(parts):
            loss, correct = self._loss(part)
            if name == "train":
                with self._gradients_kept_here(number < len(parts) - 1):
                    self.manual_backward(loss / questions * self._processes)  # DDP takes the mean over processes
            sums.append(torch.stack([loss.detach(), correct]))
        loss, correct = torch.stack(sums).sum(0)
        self._add(name, loss, correct, len(batch))
        return loss / questions

    def _loss(self, part) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss and number of right answers of some questions; a process may have none of a small batch."""
        if not len(part):
            nothing = sum(parameter.sum() for parameter in self.parameters()) * 0.0
            return nothing, nothing.detach()
        logits = self(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, part.labels, reduction="sum")
        return loss, (logits.argmax(1) == part.labels).sum().to(loss.dtype)

    # ---------------------------------------------------------------------------------------------- several processes

    @property
    def _processes(self) -> int:
        return 1 if self._trainer is None else self._trainer.world_size

    def _over_processes(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a value over all processes."""
        return value if self._processes == 1 else self.trainer.strategy.reduce(value.clone(), reduce_op="sum")

    def _gradients_kept_here(self, here: bool):
        """Gradients travel between processes once a step, with the last part."""
        apart = here and self._processes > 1
        return self.trainer.strategy.block_backward_sync() if apart else contextlib.nullcontext()

    # ---------------------------------------------------------------------------------------------- means of an epoch

    def _add(self, name: str, loss: torch.Tensor, correct: torch.Tensor, questions: int) -> None:
        new = torch.stack([loss.double(), correct.double(), torch.full_like(loss, questions, dtype=torch.float64)])
        self._sums[name] = self._sums[name] + new if name in self._sums else new

    def _log_means(self, name: str, loss_name: str) -> None:
        """Log loss and accuracy as means over an epoch's questions, in whatever batches and processes they were."""
        none = torch.zeros(3, dtype=torch.float64, device=self.device)
        loss, correct, questions = self._over_processes(self._sums.pop(name, none))
        self.log(loss_name, loss / questions, prog_bar=True, batch_size=1)
        self.log(f"{name}_acc", correct / questions, prog_bar=name != "train", batch_size=1)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's training loss and accuracy."""
        self._log_means("train", "train_loss_epoch")

    def on_validation_epoch_end(self) -> None:
        """Log the validation loss and accuracy."""
        self._log_means("val", "val_loss_epoch")

    def on_test_epoch_end(self) -> None:
        """Log the test loss and accuracy."""
        self._log_means("test", "test_loss")

    def all_sums(self) -> list[float]:
        """Loss, right answers and questions of the epoch so far, of all processes."""
        return self._over_processes(self._sums["train"]).tolist()

    def own_sums(self) -> list[float]:
        """The same of this process; for going on in the midst of an epoch."""
        return self._sums["train"].tolist() if "train" in self._sums else [0.0, 0.0, 0.0]

    def set_own_sums(self, sums: list[float]) -> None:
        """Go on from what `own_sums` gave."""
        self._sums = {"train": torch.tensor(sums, dtype=torch.float64, device=self.device)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with two parameter groups and a constant learning rate."""
        groups = parameter_groups(self.model, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.learning_rate, eps=self.adam_epsilon, fused=True)

    def setup(self, stage: str) -> None:
        """Choose the token budget for the trainer's device, where none was given."""
        if self.token_budget is None:
            self.token_budget = default_token_budget(self.model, self.trainer.strategy.root_device)

    def on_train_epoch_start(self) -> None:
        """Time between epochs (validation, saving) does not count as training."""
        self._step_ended = None

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Put the lineage and the exact metrics beside the weights; a file name only has room for two digits."""
        logged = self.trainer.callback_metrics if self._trainer is not None else {}
        metrics = {name: float(value) for name, value in logged.items() if name.startswith("val_")}
        record = self.lineage | {"metrics": metrics, "epoch": self.current_epoch}
        checkpoint["race"] = json.loads(json.dumps(record))  # plain values, which give the same file again after a kill
        checkpoint.pop("loops", None)  # counters of this process's run, which an interrupted one counts otherwise

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location="cpu", **kwargs) -> "RaceModule":
        """The weights and settings of a checkpoint; needs no network and runs no code that a file brings along.

        Raises DamagedFileError where the file is not what was written, or holds more than weights and plain values.
        """
        check_sealed(checkpoint_path)
        try:
            return super().load_from_checkpoint(checkpoint_path, map_location=map_location, weights_only=True, **kwargs)
        except pickle.UnpicklingError as error:
            raise DamagedFileError(f"{checkpoint_path}: holds more than weights and plain values; refused") from error


# -------------------------------------------------------------------------------------------------- the encoder


def build_model(config: PretrainedConfig | dict) -> nn.Module:
    """A multiple-choice model of this configuration with random weights."""
    if isinstance(config, dict):
        config = AutoConfig.for_model(**config)
    _check_family(config)
    return _prepared(AutoModelForMultipleChoice.from_config(config))


def load_pretrained(model: str | Path) -> nn.Module:
    """A pretrained encoder (hub name or folder) with a new multiple-choice head, in float32."""
    _check_family(AutoConfig.from_pretrained(model, trust_remote_code=False))
    folder = Path(model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise ValueError(f"{model} has no weights (model.safetensors); name a model that has, or give config= instead")
    settings = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
    try:
        loaded, info = AutoModelForMultipleChoice.from_pretrained(model, **settings)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{model}: its weights cannot be loaded safely ({str(error).splitlines()[0]})") from error
    head = ("classifier.", f"{loaded.base_model_prefix}.pooler.")
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(head))
    if missing:
        raise ValueError(f"{model} lacks {len(missing)} weights of {type(loaded).__name__}, such as {missing[0]}")
    return _prepared(loaded)


def _check_family(config: PretrainedConfig) -> None:
    if config.model_type not in FAMILIES:
        raise ValueError(f"a model of type {config.model_type!r}; this module runs {' and '.join(FAMILIES)} encoders")


def _prepared(model: nn.Module) -> nn.Module:
    """Set packed attention, matrix products as this processor likes them, and the fused form of `gelu_new`.

    That is the tanh GELU, written out. from_pretrained gives models in evaluation mode, and Lightning trains a model in
    the mode that it finds: set it.
    """
    model.train()
    model.set_attn_implementation("packed")
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    race_linear.use_in(model)
    return model


def encoder_layers(encoder: nn.Module) -> list[nn.Module]:
    """The layers in the order in which they are applied; ALBERT applies the same one many times."""
    config, stack = encoder.config, encoder.encoder
    if config.model_type == "bert":
        return list(stack.layer)
    groups = [i * config.num_hidden_groups // config.num_hidden_layers for i in range(config.num_hidden_layers)]
    return [layer for group in groups for layer in stack.albert_layer_groups[group].albert_layers]


def last_layer_at_cls(layer: nn.Module, hidden: torch.Tensor, batch) -> torch.Tensor:
    """The last layer, [1, T, H] → [1, 4B, H], for [CLS] alone, where it is read."""
    albert = hasattr(layer, "full_layer_layer_norm")
    attention = layer.attention if albert else layer.attention.self
    dropout = attention.attention_dropout if albert else attention.dropout
    rate = dropout.p if layer.training else 0.0
    cls = hidden.index_select(1, batch.cu_seqlens[:-1])
    # a few products a sequence pay where it is long, and not on a GPU; and dropped places would spoil the mean
    if batch.max_seqlen <= SHORT or hidden.device.type != "cpu" or rate > 0.0:
        query, key, value = (
            project(states).view(1, states.shape[1], -1, attention.attention_head_size).transpose(1, 2)
            for project, states in ((attention.query, cls), (attention.key, hidden), (attention.value, hidden))
        )
        context, _ = packed_attention(layer, query, key, value, None, rate, attention.scaling, packing=batch)
        context = context.flatten(2)
    else:
        context = attention_of_cls(attention, cls[0], hidden[0], batch.lengths)[None]
    if not albert:
        return layer.feed_forward_chunk(layer.attention.output(context, cls))
    context = attention.LayerNorm(cls + attention.output_dropout(attention.dense(context)))
    return layer.full_layer_layer_norm(layer.ff_chunk(context) + context)


def attention_of_cls(attention: nn.Module, cls: torch.Tensor, hidden: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Attention of [CLS] [4B, H] over its sequence of hidden [T, H] → [4B, H], without any token's key and value.

    A score q·(Kx + b) is (Kᵀq)·x and a constant, which softmax takes away; a mean of values Vx + b is V(mean of x) + b.
    """
    size = attention.attention_head_size
    key, value = (project.weight.view(-1, size, hidden.shape[1]) for project in (attention.key, attention.value))
    query = torch.einsum("shd,hdi->shi", attention.query(cls).view(len(cls), -1, size) * attention.scaling, key)
    means = [(rows @ states.T).softmax(-1) @ states for rows, states in zip(query, hidden.split(lengths), strict=True)]
    context = torch.einsum("shi,hdi->shd", torch.stack(means), value).flatten(1)
    return context + attention.value.bias + 0.0 * attention.key.bias  # whose gradient is zero, not missing


def weights_hash(*models: nn.Module) -> str:
    """sha256 over all weights of models: tells whether they are the same."""
    digest = hashlib.sha256()
    for name, tensor in (item for model in models for item in model.state_dict().items()):
        digest.update(name.encode())
        tensor = tensor.float() if tensor.is_floating_point() else tensor  # whatever precision it trains in
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------- attention


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing=None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention inside each sequence of a PackedBatch: query [1, heads, T or 4B, d] → [1, T or 4B, heads, d].

    A query of 4B rows holds one row a sequence. Without `packing` it is plain padded attention, as SDPA gives it.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    one_row_each = query.shape[2] != key.shape[2]
    if dropout == 0.0 and _has_varlen(query):
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = packing.cu_seqlens, packing.max_seqlen
        query_ends = torch.arange(len(ends), device=ends.device, dtype=ends.dtype) if one_row_each else ends
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        out = varlen_attn(query, key, value, query_ends, ends, 1 if one_row_each else longest, longest, scale=scaling)
        return out[None], None
    settings = {"dropout_p": dropout, "scale": scaling}
    if packing.max_seqlen <= SHORT or query.is_cuda:
        return _in_one_call(query, key, value, packing, one_row_each, **settings), None
    rows = [1] * len(packing.lengths) if one_row_each else packing.lengths
    # Cut with the tokens in front, as they lie in memory: the gradient is then joined by plain copies.
    cut = [
        states.transpose(1, 2).split(lengths, 1)
        for states, lengths in ((query, rows), (key, packing.lengths), (value, packing.lengths))
    ]
    out = [
        F.scaled_dot_product_attention(*(states.transpose(1, 2) for states in sequence), **settings).transpose(1, 2)
        for sequence in zip(*cut, strict=True)
    ]
    return torch.cat(out, 1), None


def _in_one_call(query, key, value, packing, one_row_each: bool, **settings) -> torch.Tensor:
    """All sequences in one masked call, for where a call each would cost more than the masked places do."""
    count, longest = len(packing.lengths), packing.max_seqlen
    lengths = packing.cu_seqlens.diff()
    place = (
        packing.position_ids
        + torch.arange(count, device=lengths.device).repeat_interleave(lengths, output_size=key.shape[2]) * longest
    )  # [T], of each token among [4B * longest]

    def spread(states: torch.Tensor) -> torch.Tensor:  # [1, heads, T, d] → [4B, heads, longest, d]
        rows = states[0].transpose(0, 1).flatten(1)
        grid = rows.new_zeros(count * longest, rows.shape[1]).index_copy(0, place, rows)
        return grid.view(count, longest, *states.shape[1::2]).transpose(1, 2)

    key, value = spread(key), spread(value)
    query = query.transpose(0, 2) if one_row_each else spread(query)
    mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
    out = F.scaled_dot_product_attention(query, key, value, mask[:, None, None], **settings).transpose(1, 2).flatten(2)
    rows = out.flatten(0, 1) if one_row_each else out.flatten(0, 1).index_select(0, place)
    return rows.view(1, len(rows), key.shape[1], -1)


def _has_varlen(query: torch.Tensor) -> bool:
    """Whether FlashAttention's variable-length kernel takes this query (half precision, Ampere or newer)."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 and _is_ampere(query.device)


@functools.cache
def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


# -------------------------------------------------------------------------------------------------- optimisation


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices, and everything with fewer than two dimensions (all biases and layer norms), undecayed.

    By shape, because names that say LayerNorm miss ALBERT's full_layer_layer_norm.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay, "name": "decay"},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "name": "no_decay"},
    ]


def default_token_budget(model: nn.Module, device: torch.device, training: bool = True) -> int:
    """Tokens at once: on a GPU what a training step fits into its memory; on CPU few, for its caches and allocator.

    On CPU the feed-forward's activations, in float32, stay within CPU_BUFFER; in scoring, which keeps no activations
    and is to run with `race_memory.memory_kept`, within four times that.
    """
    if device.type != "cuda":
        times = 1 if training else 4
        return min(max(OPTIONS * 512, times * CPU_BUFFER // (4 * model.config.intermediate_size)), times * 4096)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return token_budget_for(model.config, parameters, torch.cuda.get_device_properties(device).total_memory)


def token_budget_for(config: PretrainedConfig, parameters: int, memory: int) -> int:
    """Tokens at once for a device with `memory` bytes: four fifths of it, less weights and optimizer, by bytes a token.

    Kept for the backward pass, a token and layer, in float32: its input, query, key, value, context as attention gives
    it and as joined, two layer-norm inputs and one output (9 hidden), and the feed-forward before and after its
    activation (2 intermediate); on its way back one layer holds about as much again in gradients. Half precision needs
    less, which leaves room for its casts.
    """
    layers = config.num_hidden_layers * getattr(config, "inner_group_num", 1)
    hidden, intermediate = config.hidden_size, config.intermediate_size
    per_token = 4 * (layers * (9 * hidden + 2 * intermediate) + 8 * hidden + 2 * intermediate)
    fixed = 16 * parameters + (1 << 30)  # weights, gradients, two moments; context and workspace
    return int(max(OPTIONS * 512, (0.8 * memory - fixed) / per_token))
