"""What the three stage notebooks share: where a stage starts, its trainer, its logs, its best checkpoint."""

import contextlib
import errno
import logging
import os
import platform
import subprocess
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only

from race_cache import CacheError, cache_identity, check_files, load_tokenizer, read_manifest, tokenizer_hash
from race_callbacks import EarlierRunAside, LossWatch, StageReport, StartInForce
from race_checkpoints import (
    BEFORE,
    STAGES,
    SealedCheckpointIO,
    StageError,
    best_checkpoint,
    latest_stage,
    read_lineage,
    stage_checkpoints,
)
from race_data import RaceDataModule, RaceDataset
from race_files import clean, file_hash, locked
from race_module import RaceModule, weights_hash
from race_resume import KeepState, check_identity, read_state, signals_as_before, stage_identity, state_path

__all__ = [
    "best_checkpoint",
    "latest_stage",
    "read_lineage",
    "stage_checkpoints",
    "weights_hash",
]  # found here by those who look here

ROOT = Path(__file__).resolve().parent
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
VERSIONS = ("torch", "transformers", "pytorch-lightning", "pyarrow", "numpy")


# -------------------------------------------------------------------------------------------------- before training


def environment() -> pd.DataFrame:
    """Versions and hardware that this run uses, one row each."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    rows = {"python": platform.python_version()}
    rows |= {name: version(name) for name in VERSIONS}
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

    tokenizer = AutoTokenizer.from_pretrained(Path(dataset.cache_dir) / "model", trust_remote_code=False)
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
    identity = cache_identity(manifest)
    lineage = {"stage": stage, "cache": identity, "tokenizer": identity["tokenizer"]}
    if stage == "e1":
        if base_model is not None:
            _check_tokenizer(base_model, manifest)
        else:
            check_files(cache_dir, "model/")
        if base_model is None and not manifest["model"]["weights"]:
            raise StageError(f"{cache_dir} keeps no weights ({manifest['model']['name']} had none); set BASE_MODEL")
        module = RaceModule(model=base_model or Path(cache_dir) / "model", **settings)
        pretrained = weights_hash(module.model.base_model.embeddings, module.model.base_model.encoder)
        lineage |= {
            "base": str(base_model or manifest["model"]["name"]),
            "base_sha256": pretrained,  # of its weights; of the file in later stages
            "chain": [],
        }
    else:
        base = Path(base_checkpoint) if base_checkpoint else best_checkpoint(checkpoint_dir, BEFORE[stage])
        before = read_lineage(base)
        check_encoding_of(base, before, cache_dir)
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
    origin = {"versions": {name: version(name) for name in VERSIONS}, "commit": git_commit()}
    module.lineage = lineage | {"recipe": settings, "weights_start": weights_hash(module.model)} | origin
    return module


def check_encoding_of(checkpoint: str | Path, lineage: dict, cache_dir: str | Path) -> None:
    """Raise StageError where a checkpoint was trained on another tokenizer or encoding than a cache holds."""
    here = cache_identity(read_manifest(cache_dir))
    there = lineage.get("cache") if isinstance(lineage.get("cache"), dict) else {}
    if lineage.get("tokenizer") not in (None, here["tokenizer"]):
        raise StageError(f"{checkpoint} was trained with another tokenizer than {cache_dir} holds; name its own cache")
    if there.get("max_qa_len") not in (None, here["max_qa_len"]):
        raise StageError(
            f"{checkpoint} was trained with question+option cut to {there['max_qa_len']} tokens, {cache_dir} cuts to "
            f"{here['max_qa_len']}; name its own cache"
        )


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" where files differ from it; None outside a git repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _check_tokenizer(base_model: str | Path, manifest: dict) -> None:
    """A base model that brings a tokenizer of its own must bring the cache's; ids mean nothing to another model."""
    try:
        own = tokenizer_hash(load_tokenizer(base_model))
    except CacheError:
        return  # weights only: the size of the vocabulary is checked below
    if own != manifest["tokenizer"]["sha256"]:
        raise StageError(f"{base_model} has another tokenizer than the cache: make a cache with --model {base_model}")


# -------------------------------------------------------------------------------------------------- training


def stage_trainer(
    stage: str,
    run_dir: str | Path,
    checkpoint_dir: str | Path,
    max_epochs: int,
    precision: str | None = None,
    early_stopping: int | None = None,
    save_minutes: float = 10.0,
    fresh: bool = False,
    log_every: int = 10,
    stuck_questions: int = 5000,
) -> pl.Trainer:
    """The trainer of a stage: checkpoints after each epoch, CSV and TensorBoard logs, a progress bar, a report.

    precision: None chooses by device. early_stopping: end after so many epochs without a lower validation loss.
    save_minutes: how often the state is saved from which `train_stage` goes on. fresh: start the stage again; the
    checkpoints of its earlier run, and of the stages built on it, are moved to `checkpoint_dir`/earlier.
    stuck_questions: after so many with a mean loss of ln 4 the user is told that the model does not learn.
    """
    absurd = [] if max_epochs >= 1 else [f"max_epochs is {max_epochs}, expected 1 or more"]
    if save_minutes < 0:
        absurd.append(f"save_minutes is {save_minutes}, expected 0 or more")
    if early_stopping is not None and early_stopping < 1:
        absurd.append(f"early_stopping is {early_stopping}, expected None or 1 or more epochs")
    if stage not in STAGES:
        absurd.append(f"stage is {stage!r}, expected one of {', '.join(STAGES)}")
    if absurd:
        raise ValueError("; ".join(absurd))
    _quiet()
    checkpoint_dir, logs = Path(checkpoint_dir), Path(run_dir) / "logs"
    state = None if fresh else read_state(checkpoint_dir, stage)
    callbacks = [
        ModelCheckpoint(
            checkpoint_dir,
            filename=stage + "-albert-race-{epoch:02d}-{val_loss_epoch:.2f}",
            monitor="val_loss_epoch",
            save_top_k=-1,
            save_weights_only=True,
            enable_version_counter=False,  # an epoch that is ended again after a kill gives the same file again
        ),
        StartInForce(),
        EarlierRunAside(checkpoint_dir, stage, fresh),  # after the checks: a stage that is refused moves nothing
        KeepState(state_path(checkpoint_dir, stage), save_minutes),
        LossWatch(stuck_questions),
        StageReport(),
        TQDMProgressBar(refresh_rate=10),  # each refresh reads numbers from the GPU
    ]
    if early_stopping is not None:
        callbacks.append(EarlyStopping("val_loss_epoch", patience=early_stopping))
    csv = CSVLogger(logs, stage, version=state and state["version"], flush_logs_every_n_steps=log_every)
    steps = {"purge_step": state["steps"]} if state else {}  # what was logged after the state is logged again
    devices, nodes, environment = _processes()
    return pl.Trainer(
        max_epochs=max_epochs,
        precision=precision or default_precision(),
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=devices,
        num_nodes=nodes,
        strategy="auto" if devices * nodes == 1 else DDPStrategy(broadcast_buffers=False),
        plugins=[SealedCheckpointIO(), *environment],
        callbacks=callbacks,
        logger=[csv, TensorBoardLogger(logs, stage, version=f"version_{csv.version}", **steps)],
        log_every_n_steps=log_every,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,  # the epoch in which a stage goes on has fewer batches than the others
        enable_model_summary=False,
    )


def _processes() -> tuple[int, int, list]:
    """(processes on this machine, machines, their environment) as torchrun or srun started them; one otherwise."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return devices, int(os.environ["WORLD_SIZE"]) // devices, [TorchElasticEnvironment()]
    tasks, nodes = (int(os.environ.get(f"SLURM_STEP_NUM_{name}", 1)) for name in ("TASKS", "NODES"))
    if tasks > 1:
        return tasks // nodes, nodes, [SLURMEnvironment(auto_requeue=False)]
    return 1, 1, [LightningEnvironment()]


def train_stage(trainer: pl.Trainer, module: RaceModule, data: RaceDataModule) -> None:
    """Train a stage, or go on where a kill or an interrupt ended it; says which, and does nothing for a finished one.

    SIGTERM, SIGUSR1 and an interrupt end it at the next step with the state saved: the signal then has its usual
    effect (exit status 143 or 138, or KeyboardInterrupt). Raises StageError where settings have changed since.
    """
    keeper = next(callback for callback in trainer.callbacks if isinstance(callback, KeepState))
    stage, checkpoint_dir = keeper.path.stem, keeper.path.parent.parent
    aside = next(callback for callback in trainer.callbacks if isinstance(callback, EarlierRunAside))
    state = None if aside.fresh else read_state(checkpoint_dir, stage)
    data.start_at(0, 0)
    module.lineage["recipe"] = module.lineage.get("recipe", {}) | {
        "batch_size": data.batch_size,
        "max_len": data.max_len,
        "seed": data.seed,
        "limit_questions": data.limit_questions,
        "precision": trainer.precision,
        "processes": trainer.world_size,
    }
    if state is not None:
        check_identity(state, stage_identity(module, data), stage)
        stopped_early = state["finished"] and state["stopped_early"] and trainer.early_stopping_callback is not None
        if state["epoch"] >= trainer.max_epochs or stopped_early:
            say(f"{stage} is finished after {state['epoch']} epochs: nothing to train (FRESH = True starts it again)")
            return
        position = f"epoch {state['epoch']}, batch {state['batches']} of {data.batches_per_epoch()}"
        say(f"{stage} goes on from {position}")
    try:
        with _alone(keeper.path), signals_as_before(keeper):
            trainer.fit(module, data, ckpt_path=keeper.path if state else None, weights_only=True)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StageError(
            f"the disk is full ({error}): nothing that was finished is lost; make room and run this again to go on"
        ) from error


def say(line: str) -> None:
    """Print a line once, however many processes there are."""
    if rank_zero_only.rank == 0:
        print(line, flush=True)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep a second run away from the files of a stage, and clear away what a killed one left half written."""
    if rank_zero_only.rank != 0:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path.with_suffix(".lock")))
        except BlockingIOError as error:
            raise StageError(f"another process is training {path.stem} in {path.parent.parent}: wait for it") from error
        clean(path.parent, path.name)
        clean(path.parent.parent, f"{path.stem}-")
        yield


def _quiet() -> None:
    """Keep Lightning's hints out of the notebook: what runs where is said already, and the loader needs few workers."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*number of training batches.*",
        ".*LeafSpec.*",
        ".*not empty.*",
        ".*sync_dist.*",  # means are summed over processes before they are logged
    ):
        warnings.filterwarnings("ignore", message=message)


def read_log(run_dir: str | Path, stage: str) -> pd.DataFrame:
    """The metrics of the newest run of a stage, from its CSV log on disk; one row per logged step."""
    logs = Path(run_dir) / "logs" / stage
    versions = sorted(logs.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    if not versions:
        raise StageError(f"{logs} holds no metrics.csv: run the stage's training cell first")
    return pd.read_csv(versions[-1])
