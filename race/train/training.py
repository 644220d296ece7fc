"""A stage from its start to its end: the module that it trains, its trainer, and training that resumes after a kill."""

import errno
import logging
import os
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from race import LETTERS, MONITORS, RaceError, check_least
from race.data.cache import cache_identity, check_files, check_tokenizer, read_manifest
from race.data.seen import seen_articles
from race.device import AUTOCAST, check_precision, default_device, default_precision, processes, versions
from race.encoder import compile_layers
from race.models import load_config
from race.parameters import ROOT
from race.train.callbacks import EarlierRun, LossWatch, ProgressBar, StageReport, StartInForce
from race.train.checkpoints import AtomicCheckpointIO, Checkpoint, weights_hash
from race.train.logs import further_loggers
from race.train.precision import Autocast
from race.train.stages import Stage
from race.train.state import (
    KeepState,
    changed_settings,
    check_identity,
    only_process,
    read_state,
    signals_as_before,
    stage_identity,
)
from race.train.together import Together
from race_module import RaceModule

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MEETING_MINUTES = 10.0  # how long the processes of a stage wait for each other at its start


def decoded_question(dataset, index: int = 0, width: int = 240) -> pd.DataFrame:
    """One cached question decoded back to text: a row for each option, with the text of its two parts.

    Parts of more than `width` characters are shown without their middle.
    """

    def shortened(text: str) -> str:
        return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"

    tokenizer = dataset.cache.tokenizer
    item, rows = dataset[index], []
    for option, (ids, parts) in enumerate(zip(item["input_ids"], dataset.parts(index), strict=True)):
        texts = [shortened(tokenizer.decode(part)) for part in parts]
        rows.append([LETTERS[option], "correct" if option == item["label"] else "", len(ids), *texts])
    table = pd.DataFrame(rows, columns=["option", "answer", "tokens", "article", "question and option"])
    return table.set_index("option").rename_axis(None)


def start_stage(
    stage: Stage,
    cache_dir: str | Path,
    base_model: str | Path | None = None,
    base_checkpoint: str | Path | None = None,
    **settings,
) -> RaceModule:
    """The module that a stage trains: the weights of its base, and no optimizer state.

    The first stage starts from `base_model` (None: the model kept in the cache), others from `base_checkpoint` (None:
    the best one of the stage before). settings: those of RaceModule, such as learning_rate.
    """
    manifest = read_manifest(cache_dir)
    identity = cache_identity(manifest)
    if stage.before is None:
        if base_model is not None:
            check_tokenizer(base_model, manifest, cache_dir)
        elif not manifest["model"]["weights"]:
            raise RaceError(f"{cache_dir} keeps no weights ({manifest['model']['name']} had none); set BASE_MODEL")
        else:
            check_files(cache_dir, "model/")
        module = RaceModule(model=base_model or Path(cache_dir) / "model", **settings)
        encoder = module.model.base_model
        base, chain = str(base_model or manifest["model"]["name"]), []
        articles = _articles_of(base_model or Path(cache_dir) / "model", base)
        pretrained = [part for name, part in encoder.named_children() if not name.startswith("pooler")]
        sha256 = weights_hash(*pretrained)  # later stages: of the file
    else:
        checkpoint = Checkpoint(base_checkpoint) if base_checkpoint else stage.before.best()
        checkpoint.check_encoding(manifest, cache_dir)
        module = checkpoint.load(cache_dir, **settings)
        base, sha256, chain = checkpoint.name, checkpoint.sha256, [*checkpoint.chain, checkpoint.stage or "unknown"]
        articles = checkpoint.lineage.get("articles")
    known, used = module.model.config.vocab_size, manifest["tokenizer"]["vocabulary"]
    if known < used:
        raise RaceError(f"the model has {known} tokens, the cache {used}: make a cache with the model's own tokenizer")
    module.lineage = {"stage": stage.name, "cache": identity, "tokenizer": identity["tokenizer"]}
    module.lineage |= {"base": base, "base_sha256": sha256, "chain": chain, "recipe": settings}
    module.lineage |= {"articles": articles}
    module.lineage |= {"weights_start": weights_hash(module.model), "versions": versions(), "commit": git_commit()}
    module.made_with = {name.upper(): value for name, value in settings.items()} | {"CACHE_DIR": str(cache_dir)}
    module.made_with |= {"BASE_MODEL": base_model, "BASE_CHECKPOINT": base_checkpoint, "SEED": torch.initial_seed()}
    return module


def _articles_of(model: str | Path, name: str) -> dict | None:
    """What a model that e1 starts from says of its articles; {} if it is no multiple-choice model, None if unknown."""
    known = Checkpoint(model).lineage.get("articles") if Path(model).is_dir() else None
    trained = any(str(it).endswith("ForMultipleChoice") for it in load_config(model).architectures or [])
    return known or (None if trained and name != "demo" else {})


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" if files differ from it; None outside a git repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def train_stage(
    stage: Stage,
    module: RaceModule,
    data: pl.LightningDataModule,
    max_epochs: int,
    precision: str | None = None,
    early_stopping: int | None = None,
    save_minutes: float = 10.0,
    fresh: int = False,
    log_every: int = 10,
    accelerator: str | None = None,
    deterministic: bool = False,
    compile: bool = False,
    loggers: dict[str, dict] | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> pl.Trainer:
    """Train a stage, or resume it where a kill or an interrupt ended it; prints which. A finished one trains nothing.

    precision: None chooses by device. early_stopping: end after N epochs without a better validation.
    save_minutes: how often the state is saved from which a stage resumes. fresh: train the stage again, once: a run
    begun so is resumed, also if `fresh` is left standing (2, 3, … begin once more). Checkpoints of the earlier run, and
    of the stages built on it, move to `earlier/`. accelerator: None chooses, or "cpu", "gpu". deterministic: only
    algorithms that give the same bits again. compile: torch.compile of the layers. loggers, callbacks: further ones of
    Lightning's (loggers: race.train.logs.further_loggers).

    SIGTERM, SIGUSR1 and an interrupt end training after the micro-batch, with the state saved: the signal then has its
    usual effect (exit status 143 or 138, or KeyboardInterrupt). Raises RaceError if settings have changed since.
    """
    check_least(max_epochs=(max_epochs, 1), save_minutes=(save_minutes, 0), early_stopping=(early_stopping, 1))
    device, monitor = default_device(accelerator), stage.monitor or MONITORS[0]
    precision = precision or default_precision(accelerator)
    check_precision(precision)
    further = further_loggers(loggers, stage.run_dir, stage.name)
    module.schedule.steps = steps = max_epochs * data.batches_per_epoch()
    if module.schedule.warmup >= max(1, steps):
        warmup = f"WARMUP is {module.schedule.warmup:g} steps"
        raise RaceError(f"{warmup}, the stage has {steps}: give fewer, or a share such as 0.1")
    identity = stage_identity(module, data, monitor)
    state = _state_of(stage, int(fresh), identity)
    keeper = KeepState(stage, save_minutes, int(fresh) if state is None else state.get("fresh", 0))
    callbacks = [StartInForce(), EarlierRun(stage), keeper, LossWatch(), StageReport(), *callbacks]
    if early_stopping is not None:
        mode = "max" if monitor == "val_acc" else "min"
        callbacks.append(EarlyStopping(monitor, mode=mode, patience=early_stopping))
    if compile:
        compile_layers(module.model)
    before = torch.are_deterministic_algorithms_enabled()
    trainer = _trainer(
        stage, module, state, max_epochs, device, precision, log_every, deterministic, callbacks, further
    )
    data.start_at(0, 0)
    data.longest_first = module.padded
    _remember(module, data, trainer, stage, monitor)
    if state is not None:
        check_identity(state, identity, stage.name)
        if state["epoch"] >= max_epochs or (state["finished"] and state["stopped_early"] and early_stopping):
            again = f"FRESH = {keeper.fresh + 1 if fresh else True} trains it again"
            say(f"{stage.name} is finished after {state['epoch']} epochs: nothing to train ({again})")
            torch.use_deterministic_algorithms(before)
            return trainer
        say(f"{stage.name} resumes from epoch {state['epoch']}, batch {state['batches']} of {data.batches_per_epoch()}")
    try:
        _fit(trainer, keeper, module, data, resume=state is not None)
    finally:
        torch.use_deterministic_algorithms(before)
    return trainer


def _remember(
    module: RaceModule, data: pl.LightningDataModule, trainer: pl.Trainer, stage: Stage, monitor: str
) -> None:
    """What the checkpoints of a stage will say of its training, beside what `start_stage` knows."""
    recipe = {name.lower(): value for name, value in data.made_with.items() if name != "CACHE_DIR"}
    recipe |= {"precision": trainer.precision, "processes": trainer.world_size, "monitor": monitor}
    module.lineage |= {"stage": stage.name, "recipe": module.lineage.get("recipe", {}) | recipe}
    module.lineage |= {"articles": seen_articles(data, module.lineage.get("articles"))}


def _state_of(stage: Stage, fresh: int, identity: dict) -> dict | None:
    """The state to resume from; None to begin, which `fresh` asks for unless this very run was begun so."""
    if not fresh:
        return read_state(stage.state_path)
    try:
        state = read_state(stage.state_path)
    except RaceError:
        return None
    if state is None or state.get("fresh", 0) != fresh or changed_settings(state, identity):
        return None
    say(f"FRESH counts once: {stage.name} was begun with it and goes on (FRESH = {fresh + 1} begins once more)")
    return state


def _trainer(
    stage: Stage,
    module: RaceModule,
    state: dict | None,
    max_epochs: int,
    device: torch.device,
    precision: str,
    log_every: int,
    deterministic: bool,
    callbacks,
    further: list,
) -> pl.Trainer:
    """A checkpoint after each epoch, CSV and TensorBoard logs (of a resumed stage, those from before), progress bar."""
    _quiet()
    family = module.model.config.model_type
    checkpoints = ModelCheckpoint(
        stage.checkpoint_dir,
        filename=f"{stage.name}-{family}-race-{{epoch:02d}}-{{val_loss_epoch:.2f}}",
        monitor="val_loss_epoch",  # in the file name; Stage.best() chooses
        save_top_k=-1,
        save_weights_only=True,
        enable_version_counter=False,  # an epoch that is validated again after a kill gives the same file again
    )
    logs = Path(stage.run_dir) / "logs"
    csv = CSVLogger(logs, stage.name, version=state and state["version"], flush_logs_every_n_steps=1)  # each row
    purge = {"purge_step": state["steps"]} if state else {}  # what was logged after the state is logged again
    devices, nodes, environment = processes()
    half = [Autocast(precision, device.type)] if AUTOCAST.get(precision) else []
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts
    return pl.Trainer(
        max_epochs=max_epochs,
        precision=None if half else precision,  # a plugin says its own
        accelerator=device.type,
        deterministic=deterministic or None,  # False would switch off what the user has switched on
        devices=devices,
        num_nodes=nodes,
        strategy="auto" if devices * nodes == 1 else Together(MEETING_MINUTES, broadcast_buffers=False),
        plugins=[AtomicCheckpointIO(), *half, *environment],
        callbacks=[checkpoints, *callbacks, ProgressBar(refresh_rate=10)],  # a refresh reads numbers from the GPU
        logger=[csv, TensorBoardLogger(logs, stage.name, version=f"version_{csv.version}", **purge), *further],
        log_every_n_steps=log_every,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,  # the epoch in which a stage resumes has fewer batches than the others
        enable_model_summary=False,
    )


def _fit(
    trainer: pl.Trainer, keeper: KeepState, module: RaceModule, data: pl.LightningDataModule, resume: bool
) -> None:
    path = keeper.stage.state_path
    try:
        with only_process(keeper.stage), signals_as_before(keeper):
            trainer.fit(module, data, ckpt_path=path if resume else None, weights_only=True)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise RaceError(
            f"the disk is full ({error}): nothing that was finished is lost; make room and run this again to resume"
        ) from error
    finally:
        module.stop = None  # the signals of this run end nothing else


def say(line: str) -> None:
    """Print a line once, however many processes there are."""
    if rank_zero_only.rank == 0:
        print(line, flush=True)


def _quiet() -> None:
    """Keep Lightning's hints out of the notebook: the reports say what runs where, and the loader needs few workers."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # sync_dist: sums are reduced over processes before their mean is logged; srun: processes() says it in its own words
    for hint in ("many workers", "number of training batches", "LeafSpec", "not empty", "sync_dist", "srun"):
        warnings.filterwarnings("ignore", message=f".*{hint}.*")
