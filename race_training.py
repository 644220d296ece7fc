"""What the three stage notebooks share: where a stage starts, its trainer, its logs, its best checkpoint."""

import logging
import math
import pickle
import platform
import re
import shutil
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from race_cache import CacheError, file_hash, load_tokenizer, read_manifest, tokenizer_hash
from race_data import RaceDataset
from race_module import RaceModule

STAGES = ("e1", "e2", "e3")
BEFORE = {"e2": "e1", "e3": "e2"}


class StageError(RuntimeError):
    """A stage that cannot start or cannot be found; the message says what to run first."""


# -------------------------------------------------------------------------------------------------- before training


def environment() -> pd.DataFrame:
    """Versions and hardware that this run uses, one row each."""
    from importlib.metadata import version

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    rows = {"python": platform.python_version()}
    rows |= {name: version(name) for name in ("torch", "transformers", "pytorch-lightning", "pyarrow")}
    rows |= {"device": device, "precision": default_precision()}
    return pd.DataFrame({"": rows})


def default_precision() -> str:
    """bf16 on GPUs that have it (Ampere and newer), fp16 with loss scaling on older ones, fp32 on CPU."""
    if not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"


def decoded_question(dataset: RaceDataset, index: int = 0, width: int = 240) -> pd.DataFrame:
    """One cached question turned back to text: a row for each option, with what its two segments hold.

    Segments of more than `width` characters are shown without their middle.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(dataset.cache_dir) / "model")
    item, rows = dataset[index], []
    for option, (ids, segments) in enumerate(zip(item["input_ids"], item["token_type_ids"], strict=True)):
        first, second = (tokenizer.decode(ids[segments == segment]) for segment in (0, 1))
        right = "right" if option == item["label"] else ""
        rows.append(["ABCD"[option], right, len(ids), _without_middle(first, width), _without_middle(second, width)])
    return (
        pd.DataFrame(rows, columns=["option", "answer", "tokens", "segment 0", "segment 1"])
        .set_index("option")
        .rename_axis(None)
    )


def _without_middle(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"


def start_stage(
    stage: str,
    cache_dir: str | Path,
    base_model: str | Path | None = None,
    base_checkpoint: str | Path | None = None,
    checkpoint_dir: str | Path = "checkpoints",
    **settings,
) -> RaceModule:
    """The module that a stage trains: weights of its base only, a fresh optimizer, the stage's own settings.

    e1 starts from `base_model` (None: the model kept in the cache), e2 and e3 from `base_checkpoint` (None: the best
    one of the stage before). settings: learning_rate, weight_decay, adam_epsilon, token_budget of RaceModule.
    """
    manifest = read_manifest(cache_dir)
    lineage = {"stage": stage, "cache": manifest["source"], "tokenizer": manifest["tokenizer"]["sha256"]}
    if stage == "e1":
        if base_model is not None:
            _check_tokenizer(base_model, manifest)
        if base_model is None and not manifest["model"]["weights"]:
            raise StageError(f"{cache_dir} keeps no weights ({manifest['model']['name']} had none); set BASE_MODEL")
        module = RaceModule(model=base_model or Path(cache_dir) / "model", **settings)
        lineage |= {"base": str(base_model or manifest["model"]["name"]), "base_sha256": None, "chain": []}
    else:
        base = Path(base_checkpoint) if base_checkpoint else best_checkpoint(checkpoint_dir, BEFORE[stage])
        before = read_lineage(base)
        if before.get("tokenizer") not in (None, lineage["tokenizer"]):
            raise StageError(f"{base} was trained on a cache of another tokenizer than {cache_dir}")
        module = RaceModule.load_from_checkpoint(base, **settings)
        lineage |= {
            "base": base.name,
            "base_sha256": file_hash(base),
            "chain": [*before.get("chain", []), before.get("stage")],
        }
    vocabulary = module.model.config.vocab_size
    if vocabulary < manifest["tokenizer"]["vocabulary"]:
        raise StageError(
            f"the model knows {vocabulary} tokens, the cache uses {manifest['tokenizer']['vocabulary']}: "
            "make a cache with the model's own tokenizer"
        )
    module.lineage = lineage | {"recipe": settings, "weights_start": weights_hash(module.model)}
    return module


def _check_tokenizer(base_model: str | Path, manifest: dict) -> None:
    """A base model that brings a tokenizer of its own must bring the cache's; ids mean nothing to another model."""
    try:
        own = tokenizer_hash(load_tokenizer(base_model))
    except CacheError:
        return  # weights only: the size of the vocabulary is checked below
    if own != manifest["tokenizer"]["sha256"]:
        raise StageError(f"{base_model} has another tokenizer than the cache: make a cache with --model {base_model}")


def weights_hash(model: torch.nn.Module) -> str:
    """sha256 over all weights of a model: tells whether two models are the same."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------- training


def stage_trainer(
    stage: str,
    run_dir: str | Path,
    checkpoint_dir: str | Path,
    max_epochs: int,
    precision: str | None = None,
    early_stopping: int | None = None,
    log_every: int = 10,
) -> pl.Trainer:
    """The trainer of a stage: checkpoints after each epoch, CSV and TensorBoard logs, a progress bar, a report.

    precision: None chooses by device. early_stopping: end after so many epochs without a lower validation loss.
    Checkpoints that an earlier run of the stage left, and those of the stages built on it, are moved to
    `checkpoint_dir`/earlier, never overwritten.
    """
    _quiet()
    checkpoint_dir, logs = Path(checkpoint_dir), Path(run_dir) / "logs"
    callbacks = [
        ModelCheckpoint(
            checkpoint_dir,
            filename=stage + "-albert-race-{epoch:02d}-{val_loss_epoch:.2f}",
            monitor="val_loss_epoch",
            save_top_k=-1,
            save_weights_only=True,
        ),
        StartInForce(),
        EarlierRunAside(checkpoint_dir, stage),  # after the checks: a stage that is refused moves nothing
        StageReport(),
        TQDMProgressBar(),
    ]
    if early_stopping is not None:
        callbacks.append(EarlyStopping("val_loss_epoch", patience=early_stopping))
    csv = CSVLogger(logs, name=stage, flush_logs_every_n_steps=log_every)
    return pl.Trainer(
        max_epochs=max_epochs,
        precision=precision or default_precision(),
        devices=1,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        callbacks=callbacks,
        logger=[csv, TensorBoardLogger(logs, name=stage, version=f"version_{csv.version}")],
        log_every_n_steps=log_every,
        use_distributed_sampler=False,
        enable_model_summary=False,
    )


def _quiet() -> None:
    """Keep Lightning's hints out of the notebook: what runs where is said already, and the loader needs few workers."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*number of training batches.*",
        ".*LeafSpec.*",
        ".*not empty.*",
    ):
        warnings.filterwarnings("ignore", message=message)


class StartInForce(pl.Callback):
    """Stops a stage before its first step if learning rate or weights are not those that the stage starts with."""

    def on_train_start(self, trainer: pl.Trainer, module: RaceModule) -> None:
        """Compare every parameter group and all weights with what the stage was given."""
        rates = {group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups}
        if rates != {module.learning_rate}:
            raise StageError(f"learning rate in force: {rates}; this stage's is {module.learning_rate}")
        start = module.lineage.get("weights_start")
        if start is not None and start != weights_hash(module.model):
            raise StageError("the weights have been trained since the model was made: run the model's cell again first")


class EarlierRunAside(pl.Callback):
    """Moves what an earlier run of a stage left, and the stages built on it: they must not pass for this run's."""

    def __init__(self, checkpoint_dir: Path, stage: str):
        self.checkpoint_dir, self.stage = checkpoint_dir, stage

    def on_train_start(self, trainer: pl.Trainer, module: RaceModule) -> None:
        """Move the checkpoints to a folder of their own below `earlier`."""
        later = STAGES[STAGES.index(self.stage) :]
        files = [file for each in later for file in sorted(self.checkpoint_dir.glob(f"{each}-*.ckpt"))]
        if files:
            aside = self.checkpoint_dir / "earlier" / f"{self.stage}-{time.strftime('%Y%m%d-%H%M%S')}"
            aside.mkdir(parents=True)
            for file in files:
                shutil.move(file, aside / file.name)
            print(f"{len(files)} checkpoint(s) of an earlier run, from {self.stage} on, are now in {aside}")


class StageReport(pl.Callback):
    """One line after each epoch, and after the first minute of training how long the stage will take."""

    def __init__(self, after_seconds: float = 60.0):
        self.after_seconds, self.estimate = after_seconds, None

    def on_train_start(self, trainer: pl.Trainer, module: RaceModule) -> None:
        """Start the clock, and log short epochs more often, so that a trial run has curves too."""
        trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, trainer.num_training_batches // 20))
        self._started, self._first_step, self.estimate = time.perf_counter(), trainer.global_step, None

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        """Give the estimate, once."""
        seconds = time.perf_counter() - self._started
        if self.estimate is None and seconds >= self.after_seconds:
            per_step = seconds / (trainer.global_step - self._first_step)
            total = timedelta(seconds=round(per_step * trainer.num_training_batches * trainer.max_epochs))
            self.estimate = (
                f"about {total} for {trainer.max_epochs} epochs of {trainer.num_training_batches:,} steps "
                f"at {per_step:.2f} s a step, without validation"
            )
            trainer.progress_bar_callback.print(self.estimate)

    def on_validation_end(self, trainer: pl.Trainer, module: RaceModule) -> None:
        """Report an epoch's validation."""
        metrics = trainer.callback_metrics
        if not trainer.sanity_checking and "val_acc" in metrics:
            trainer.progress_bar_callback.print(
                f"epoch {trainer.current_epoch}: validation loss {metrics['val_loss_epoch']:.4f}, "
                f"accuracy {metrics['val_acc']:.1%}"
            )


# -------------------------------------------------------------------------------------------------- checkpoints


def read_lineage(checkpoint: str | Path) -> dict:
    """What a checkpoint remembers: stage, base, chain, cache, recipe, epoch, metrics. Its weights are not read."""
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get("race", {})
    except FileNotFoundError as error:
        raise StageError(f"{checkpoint}: no such checkpoint") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise StageError(f"{checkpoint}: not a whole checkpoint, or one that brings code along; remove it") from error


def stage_checkpoints(checkpoint_dir: str | Path, stage: str) -> pd.DataFrame:
    """The checkpoints of a stage, best first: path, epoch, val_loss_epoch (exact), val_acc."""
    rows = []
    for path in sorted(Path(checkpoint_dir).glob(f"{stage}-*.ckpt")):
        named = re.search(r"epoch=(\d+)-val_loss_epoch=(\d+\.\d+|nan|inf)", path.name)
        if named:  # all that a checkpoint from elsewhere tells
            try:
                lineage, epoch, loss = read_lineage(path), int(named[1]), float(named[2])
            except StageError as error:  # as left by a job that was killed while saving
                print(f"passed over: {error}")
                continue
            metrics = {"val_loss_epoch": loss, "val_acc": float("nan")} | lineage.get("metrics", {})
            rows.append([path, lineage.get("epoch", epoch), metrics["val_loss_epoch"], metrics["val_acc"]])
    table = pd.DataFrame(rows, columns=["path", "epoch", "val_loss_epoch", "val_acc"])
    return table.sort_values(["val_loss_epoch", "epoch"], ignore_index=True)


def best_checkpoint(checkpoint_dir: str | Path, stage: str) -> Path:
    """The checkpoint of a stage with the lowest validation loss; the earlier one where two are equal."""
    table = stage_checkpoints(checkpoint_dir, stage)
    if table.empty:
        notebook = f"ex0{stage[1]}.ipynb"
        raise StageError(f"{checkpoint_dir} holds no checkpoint of stage {stage}: run {notebook} first")
    if not math.isfinite(table["val_loss_epoch"][0]):
        raise StageError(f"{checkpoint_dir}: no checkpoint of stage {stage} has a finite validation loss; it diverged")
    return table["path"][0]


def latest_stage(checkpoint_dir: str | Path) -> str:
    """The last stage that has a checkpoint."""
    for stage in reversed(STAGES):
        if any(Path(checkpoint_dir).glob(f"{stage}-*.ckpt")):
            return stage
    raise StageError(f"{checkpoint_dir} holds no checkpoints: run ex01.ipynb first")


def read_log(run_dir: str | Path, stage: str) -> pd.DataFrame:
    """The metrics of the newest run of a stage, from its CSV log on disk; one row per logged step."""
    logs = Path(run_dir) / "logs" / stage
    versions = sorted(logs.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    if not versions:
        raise StageError(f"{logs} holds no metrics.csv: run the stage's training cell first")
    return pd.read_csv(versions[-1])
