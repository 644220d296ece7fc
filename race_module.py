"""The method in one file: what a batch is, forward, the step, the means of an epoch, AdamW, loading.

A question is four sequences, one for each option: [CLS] article [SEP] question+option [SEP]. A batch of B questions is
one 1-D tensor with the token ids of all 4B sequences, and `cu_seqlens`, the start of each (race.data.batches); there
are no padding tokens. The encoder gives a vector for each sequence, the head a number (race.encoder), and the softmax
over a question's four numbers gives the probabilities of its options.
"""

import contextlib
import inspect
import json
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from race import OPTIONS, RaceError
from race.device import random_state, set_random_state
from race.encoder import build_model, load_pretrained, option_logits, token_budget
from race.families import is_packed
from race.files import read_archive
from race.schedule import check_schedule, rate_factor, warmup_steps


class RaceModule(pl.LightningModule):
    """Multiple choice on packed sequences: loss, optimizer and metrics of every stage.

    model: hub name or folder with weights; or config: a configuration (or its dict) for random weights. One of the two.
    Any family of race.families. attention_dropout: None: as the model has it. schedule, warmup: of the learning rate
    over a stage's steps (race.schedule). max_grad_norm: to which a batch's gradient is clipped; inf: it is only logged.
    token_budget: tokens of a micro-batch; gradients are accumulated over the batch. None: by device.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        config: PretrainedConfig | dict | None = None,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.0,
        adam_epsilon: float = 1e-8,
        token_budget: int | None = None,
        attention_dropout: float | None = None,
        schedule: str = "constant",
        warmup: float = 0,
        max_grad_norm: float | None = None,
    ):
        super().__init__()
        if (model is None) == (config is None):
            raise RaceError("give either model= (a name or a folder with weights) or config= (random weights)")
        recipe = {"learning_rate": learning_rate, "weight_decay": weight_decay, "adam_epsilon": adam_epsilon}
        problems = [f"{name} is {value}" for name, value in recipe.items() if not 0 <= value < float("inf")]
        if token_budget is not None and token_budget < 1:
            problems.append(f"token_budget is {token_budget}")
        if attention_dropout is not None and not 0 <= attention_dropout < 1:
            problems.append(f"attention_dropout is {attention_dropout}")
        if problems:
            raise RaceError(f"{'; '.join(problems)}; expected finite numbers ≥ 0, a token budget ≥ 1, a dropout < 1")
        check_schedule(schedule, warmup, max_grad_norm)
        self.model = (
            build_model(config, attention_dropout) if model is None else load_pretrained(model, attention_dropout)
        )
        self.learning_rate, self.weight_decay, self.adam_epsilon = learning_rate, weight_decay, adam_epsilon
        self.attention_dropout, self.max_grad_norm = attention_dropout, max_grad_norm
        self.schedule, self.warmup, self.total_steps = schedule, warmup, None  # of a stage; training sets it
        self.token_budget, self.budget_is_fitted = token_budget, token_budget is None
        self.padded = not is_packed(self.model.config)  # a family whose sequences cannot be packed (race.families)
        self.lineage: dict = {}  # where these weights come from; saved in checkpoints
        # Of the epoch so far, by split: loss, correct answers, questions. Not torchmetrics.MeanMetric: a resumed epoch
        # continues the exact sums of each process, and a checkpoint's weights are Hugging Face's and nothing else.
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: torch.Tensor | None = None  # of the last training step, of all processes
        self.step_start: dict | None = None  # within a training step: the random states before it
        self.stop = None  # called before each micro-batch of a training step; may raise
        self.automatic_optimization = False  # one optimizer step over several micro-batches
        self.save_hyperparameters({"config": self.model.config.to_dict()} | recipe)

    def forward(self, batch) -> torch.Tensor:
        """PackedBatch of B questions → logits [B, 4]"""
        return option_logits(self.model, batch).view(-1, OPTIONS)

    def loss(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed cross-entropy of B questions, and how many are answered correctly."""
        if not len(batch):  # a process's share of a batch with fewer questions than processes: DDP waits for gradients
            nothing = sum(parameter.sum() for parameter in self.parameters()) * 0.0
            return nothing, nothing.detach()
        logits = self(batch)
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        return loss, (logits.argmax(1) == batch.labels).sum().to(loss.dtype)

    def training_step(self, batch, batch_idx: int) -> torch.Tensor:
        """One optimizer step on one batch, which is divided among the processes."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.model_step(batch, "train", self.questions_of_all(batch, batch_idx))
        self.clip_gradient(optimizer)
        rate = self.rate_at(self.trainer.global_step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        tokens = torch.full_like(loss, sum(batch.lengths))  # made on the device: nothing waits for it
        loss, self.tokens = self.sum_over_processes(torch.stack([loss, tokens]))
        self.log("train_loss_step", loss, prog_bar=True, batch_size=1)
        self._give_memory_back(batch_idx)
        self.log("learning_rate", torch.tensor(rate))  # on the CPU; a float would be copied to the GPU
        return loss

    def rate_at(self, step: int) -> float:
        """The learning rate of an optimizer step, from 0: a function of the recipe and the step."""
        if self.schedule == "constant" and not self.warmup:
            return self.learning_rate
        if self.total_steps is None:
            raise RaceError("the schedule needs to know all steps of the stage: set total_steps, as train_stage does")
        warmup = warmup_steps(self.warmup, self.total_steps)
        return self.learning_rate * rate_factor(self.schedule, step, self.total_steps, warmup)

    def clip_gradient(self, optimizer) -> None:
        """Clip the norm of the whole batch's gradient to max_grad_norm, and log what it was; fp16 is unscaled first."""
        if self.max_grad_norm is None:
            return
        if scaler := getattr(self.trainer.precision_plugin, "scaler", None):
            scaler.unscale_(optimizer.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters(), self.max_grad_norm)  # nothing waits for it
        self.log("gradient_norm", norm, batch_size=1)

    def validation_step(self, batch, batch_idx: int) -> torch.Tensor:
        """Loss and accuracy on the validation split."""
        return self.model_step(batch, "val")

    def test_step(self, batch, batch_idx: int) -> torch.Tensor:
        """Loss and accuracy on the test split."""
        return self.model_step(batch, "test")

    def model_step(self, batch, split: str, all_questions: int | None = None) -> torch.Tensor:
        """This process's part of the mean loss of a batch; in training, its gradients are accumulated.

        all_questions: in the batch, of all processes. On a GPU that runs out of memory, the step begins anew with half
        the token budget; raises RaceError if one question does not fit.
        """
        all_questions = all_questions or len(batch)
        self.step_start = random_state() if split == "train" else None
        while True:
            sums, self._exchanging = [], False
            parts = list(batch.micro_batches(self.token_budget, self.padded))
            try:
                for part in parts:
                    if split == "train" and self.stop is not None:
                        self.stop()
                    sums.append(self._part_step(part, split, all_questions, part is parts[-1]))
                break
            except torch.OutOfMemoryError as error:
                self.halve_budget(parts[len(sums)], error, self._exchanging)
            if self.step_start is not None:  # out of the except clause, which still holds what did not fit
                self.zero_grad()
                set_random_state(self.step_start)
            torch.cuda.empty_cache()
        self.step_start = None
        loss, correct = torch.stack(sums).sum(0)
        new = torch.stack([loss.double(), correct.double(), torch.full_like(loss, len(batch), dtype=torch.float64)])
        before = self.sums.get(split)  # on the CPU after a resume
        self.sums[split] = new if before is None else before.to(new.device) + new
        return loss / all_questions

    def _part_step(self, part, split: str, all_questions: int, last: bool) -> torch.Tensor:
        """Loss and correct answers of a micro-batch; in training, with the backward pass."""
        loss, correct = self.loss(part)
        if split == "train":
            sync = last or self.processes == 1  # processes exchange gradients once a step
            self._exchanging = last and self.processes > 1
            with contextlib.nullcontext() if sync else self.trainer.strategy.block_backward_sync():
                # times the number of processes, by which DDP divides: the gradient is that of the whole batch
                self.manual_backward(loss / all_questions * self.processes)
        return torch.stack([loss.detach(), correct])

    def halve_budget(self, part, error: Exception, exchanging: bool = False) -> None:
        """Half the tokens of the part that did not fit, from now on; raises RaceError if that is impossible."""
        tokens = part.tokens(self.padded)
        if len(part) == 1 or exchanging:
            what = "one question" if len(part) == 1 else "a micro-batch, while processes exchange their gradients,"
            raise RaceError(
                f"the GPU's memory is full: {what} of {tokens:,} tokens does not fit. Set a smaller MAX_LEN, or "
                f"BATCH_SIZE or TOKEN_BUDGET (now {self.token_budget}); other programs may use this GPU ({error})"
            ) from error
        self.token_budget = tokens // 2
        print(
            f"the GPU's memory was full: the step is taken again with TOKEN_BUDGET = {self.token_budget:,}", flush=True
        )

    def _give_memory_back(self, batch_idx: int) -> None:
        """Now and then, if a GPU's cache has blocks that steps of these sizes do not use."""
        if self.device.type == "cuda" and batch_idx % 16 == 15:
            if torch.cuda.memory_reserved(self.device) > 1.25 * torch.cuda.max_memory_allocated(self.device):
                torch.cuda.empty_cache()

    def questions_of_all(self, batch, batch_idx: int) -> int:
        """How many questions a training batch has in all processes; known without asking them."""
        if self.processes == 1:
            return len(batch)
        if known := getattr(self.trainer.datamodule, "batch_questions", None):
            return known(batch_idx)
        return int(self.sum_over_processes(torch.tensor(float(len(batch)), device=self.device)))  # another data module

    @property
    def processes(self) -> int:
        """Number of processes that train together (world_size)."""
        return 1 if self._trainer is None else self._trainer.world_size

    def sum_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        """all_reduce, for which the host does not wait; the value itself where there is one process."""
        if self.processes > 1:
            torch.distributed.all_reduce(value := value.clone())
        return value

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

    def on_test_epoch_end(self) -> None:
        """Log the test loss and accuracy."""
        self.log_means("test", "test_loss")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with two parameter groups; training_step sets the learning rate of each step."""
        groups = parameter_groups(self.model, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.learning_rate, eps=self.adam_epsilon, fused=True)

    def setup(self, stage: str) -> None:
        """Called by the trainer before anything else."""
        self.fit_memory(self.trainer.strategy.root_device, half="mixed" in self.trainer.precision)

    def fit_memory(self, device: torch.device, half: bool = False) -> None:
        """Choose the token budget for a device, if none was given; half: under autocast."""
        if self.token_budget is None:
            self.token_budget = token_budget(self.model, device, half)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Save lineage and exact metrics beside the weights; a file name has room for two digits only."""
        logged = self.trainer.callback_metrics if self._trainer is not None else {}
        metrics = {name: float(value) for name, value in logged.items() if name.startswith("val_")}
        record = self.lineage | {"metrics": metrics, "epoch": self.current_epoch}
        checkpoint["race"] = json.loads(json.dumps(record))  # plain values: a resumed run writes the same bytes
        checkpoint.pop("loops", None)  # Lightning's counters, which differ after a resume

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location="cpu", **settings) -> "RaceModule":
        """Weights and settings of a checkpoint, from this file alone; no code in it is run. Raises RaceError."""
        content, known = read_archive(checkpoint_path), inspect.signature(cls).parameters
        saved = {name: value for name, value in content.get("hyper_parameters", {}).items() if name in known}
        try:
            module = cls(**(saved | settings))
            module.load_state_dict(content["state_dict"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RaceError(f"{checkpoint_path}: holds no RaceModule that can be loaded ({error})") from error
        return module.to(map_location)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices with weight decay; biases and layer norms without.

    By their number of dimensions, because names with "LayerNorm" miss ALBERT's full_layer_layer_norm.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay, "name": "decay"},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "name": "no_decay"},
    ]
