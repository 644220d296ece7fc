"""The method on one page: a batch and its loss, several processes, AdamW, an epoch, a checkpoint.

A question has k options (RACE: 4), and a sequence for each: [CLS] article [SEP] question+option [SEP]. A batch of B
questions is one 1-D tensor with the token ids of all kB sequences, and `cu_seqlens`, the start of each
(race.data.batches); there are no padding tokens. The encoder gives a vector for each sequence, the head a number
(race.encoder), and the softmax over a question's k numbers gives the probabilities of its options.
"""

import contextlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from race import RaceError
from race.device import random_state, set_random_state
from race.encoder import is_packed, load_model, option_logits
from race.files import read_archive
from race.memory import fit_memory, free_unused, in_parts
from race.parameters import check
from race.schedule import Schedule


class RaceModule(pl.LightningModule):
    """Multiple choice: loss, optimizer and metrics of every stage. Give model or config."""

    def __init__(
        self,
        model: str | Path | None = None,  # hub name or folder with weights
        config: PretrainedConfig | dict | None = None,  # for random weights
        learning_rate: float = 2e-5,
        weight_decay: float = 0.0,
        adam_epsilon: float = 1e-8,
        token_budget: int | None = None,  # tokens of a micro-batch; gradients are accumulated. None: by device
        attention_dropout: float | None = None,  # None: as the model has it
        schedule: str = "constant",  # of the learning rate over a stage's steps, as warmup (race.schedule)
        warmup: float = 0,
        max_grad_norm: float | None = None,  # to which a batch's gradient is clipped; inf: it is only logged
    ):
        super().__init__()
        recipe = {"learning_rate": learning_rate, "weight_decay": weight_decay, "adam_epsilon": adam_epsilon}
        check(**recipe, token_budget=token_budget, attention_dropout=attention_dropout)
        check(schedule=schedule, warmup=warmup, max_grad_norm=max_grad_norm)
        self.model = load_model(model, config, attention_dropout)  # Hugging Face's
        self.padded = not is_packed(self.model.config)  # a family whose sequences cannot be packed
        self.learning_rate, self.weight_decay, self.adam_epsilon = learning_rate, weight_decay, adam_epsilon
        self.attention_dropout, self.max_grad_norm = attention_dropout, max_grad_norm
        self.schedule = Schedule(schedule, warmup)  # training sets its steps
        self.token_budget, self.budget_is_fitted = token_budget, token_budget is None
        self.automatic_optimization = False  # one optimizer step over several micro-batches
        self.sums: dict[str, torch.Tensor] = {}  # of the epoch so far, by split: loss, correct answers, questions
        self.tokens: torch.Tensor | None = None  # of the last training step, of all processes
        self.stop: Callable[[], None] | None = None  # called before each micro-batch; may raise
        self.step_start: dict | None = None  # within a training step: the random states before it
        self.lineage: dict = {}  # where these weights come from; saved in checkpoints
        self.save_hyperparameters({"config": self.model.config.to_dict()} | recipe, logger=False)

    def forward(self, batch) -> torch.Tensor:
        """PackedBatch of B questions → logits [B, k]"""
        return option_logits(self.model, batch).view(-1, batch.options)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What training minimises, summed over B questions; validation is always measured by cross-entropy."""
        return F.cross_entropy(logits, labels, reduction="sum")

    def training_step(self, batch, batch_idx: int) -> torch.Tensor:
        """One optimizer step on one batch, which is divided among the processes."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        questions = len(batch) if self.processes == 1 else self.trainer.datamodule.batch_questions(batch_idx)
        loss = self.model_step(batch, "train", questions)
        rate = self.learning_rate * self.schedule(self.trainer.global_step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        tokens = torch.full_like(loss, sum(batch.lengths))  # made on the device: nothing waits for it
        loss, self.tokens = self.sum_over_processes(torch.stack([loss, tokens]))
        self.log("train_loss_step", loss, batch_size=1)
        self.log("learning_rate", torch.tensor(rate))  # on the CPU; a float would be copied to the GPU
        free_unused(self.device, batch_idx)
        return loss

    def validation_step(self, batch, batch_idx: int) -> torch.Tensor:
        """Loss and accuracy on the validation split."""
        return self.model_step(batch, "val")

    def model_step(self, batch, split: str, all_questions: int | None = None) -> torch.Tensor:
        """This process's part of the mean loss of a batch, which has all_questions in all processes."""
        training, all_questions = split == "train", all_questions or len(batch)

        def part_step(part, is_last: bool) -> torch.Tensor:
            logits, labels = self(part), part.labels
            loss = self.loss(logits, labels) if training else F.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(1) == labels).sum().to(loss.dtype)
            if training:
                with self.exchange_of_gradients(is_last):
                    # times the number of processes, by which DDP divides: the gradient is that of the whole batch
                    self.manual_backward(loss / all_questions * self.processes)
            return torch.stack([loss.detach(), correct, torch.full_like(correct, len(part))])

        def undo() -> None:
            self.zero_grad()
            set_random_state(self.step_start)

        self.step_start = random_state() if training else None
        sums = torch.stack(in_parts(self, batch, part_step, undo if training else None, self.stop)).sum(0)
        self.step_start = None
        before = self.sums[split].to(sums.device) if split in self.sums else 0.0  # on the CPU after a resume
        self.sums[split] = before + sums.double()
        return sums[0] / all_questions

    @property
    def processes(self) -> int:
        """Number of processes that train together (world_size)."""
        return 1 if self._trainer is None else self._trainer.world_size

    def sum_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        """all_reduce, for which the host does not wait; the value itself where there is one process."""
        if self.processes > 1:
            torch.distributed.all_reduce(value := value.clone())
        return value

    def exchange_of_gradients(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Around a backward pass: processes exchange gradients in the last one of a step only."""
        now = is_last or self.processes == 1
        return contextlib.nullcontext() if now else self.trainer.strategy.block_backward_sync()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, matrices with weight decay, biases and layer norms without; training_step sets the learning rate."""
        parameters = [it for it in self.parameters() if it.requires_grad]
        groups = [  # by ndim: names that say LayerNorm miss ALBERT's full_layer_layer_norm
            {"params": [it for it in parameters if it.ndim >= 2], "weight_decay": self.weight_decay, "name": "decay"},
            {"params": [it for it in parameters if it.ndim < 2], "weight_decay": 0.0, "name": "no_decay"},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, eps=self.adam_epsilon, fused=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the norm of the whole batch's gradient to max_grad_norm, and log what it was."""
        if self.max_grad_norm is None:
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of fp16
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # a fused optimizer would do it in its step; of others Lightning has done it
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.max_grad_norm)  # nothing waits for it
        self.log("gradient_norm", norm, batch_size=1)

    def log_means(self, split: str, loss_name: str) -> None:
        """Log loss and accuracy as means over all questions of an epoch, of all processes."""
        none = torch.zeros(3, dtype=torch.float64, device=self.device)
        loss, correct, questions = self.sum_over_processes(self.sums.pop(split, none))
        self.log(loss_name, loss / questions, prog_bar=True, batch_size=1)
        self.log(f"{split}_acc", correct / questions, prog_bar=split != "train", batch_size=1)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's training loss and accuracy."""
        self.log_means("train", "train_loss_epoch")

    def on_validation_epoch_end(self) -> None:
        """Log the validation loss and accuracy, one of which picks the best checkpoint."""
        self.log_means("val", "val_loss_epoch")

    def setup(self, stage: str) -> None:
        """Choose the token budget for the trainer's device, unless one was given."""
        fit_memory(self, self.trainer.strategy.root_device, half="mixed" in self.trainer.precision)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Save lineage and exact metrics beside the weights; a file name has room for two digits only."""
        logged = self.trainer.callback_metrics.items()
        metrics = {name: float(value) for name, value in logged if name.startswith("val_")}
        record = self.lineage | {"metrics": metrics, "epoch": self.current_epoch}
        checkpoint["race"] = json.loads(json.dumps(record))  # plain values: a resumed run writes the same bytes
        checkpoint.pop("loops", None)  # Lightning's counters, which differ after a resume

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location="cpu", **settings) -> "RaceModule":
        """Weights and settings of a checkpoint, from this file alone; no code in it is run. Raises RaceError."""
        content, known = read_archive(checkpoint_path), inspect.signature(cls).parameters
        try:
            saved = {name: value for name, value in content.get("hyper_parameters", {}).items() if name in known}
            module = cls(**(saved | settings))
            module.load_state_dict(content["state_dict"])
        except RaceError as error:  # a setting that does not fit it
            raise RaceError(f"{checkpoint_path}: {error}") from error
        except Exception as error:  # a configuration may hold anything
            raise RaceError(f"{checkpoint_path}: holds no RaceModule that can be loaded ({error})") from error
        return module.to(map_location)
