"""A stage from its start to its end: the module that it trains, its trainer, and training that resumes after a kill."""

import contextlib
import dataclasses
import errno
import importlib
import inspect
import logging
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.plugins import precision as plugins
from pytorch_lightning.strategies import DDPStrategy

from race import HUB_ID, LETTERS, MONITORS, RaceError
from race.data import Cache, open_cache, seen_articles
from race.device import AUTOCAST, CODE, check_ready, default_device, default_precision, hardware, processes, versions
from race.encoder import attention_kernel, compile_layers, longest_input
from race.files import locked, remove_unfinished
from race.parameters import ROOT, check
from race.train.callbacks import EarlyStopping, LossWatch, NewestOfEpoch, ProgressBar, StageReport
from race.train.checkpoints import AtomicCheckpointIO, Checkpoint, read_checkpoints, weights_hash
from race.train.stages import Stage
from race.train.state import KeepState, check_identity, ended_by_signals, other_code, read_state, say, stage_identity
from race_module import RaceModule

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def decoded_question(dataset, index: int = 0) -> pd.DataFrame:
    """One cached question decoded back to text: a row for each option, a long sequence without its middle."""
    item = dataset[index]
    texts = [dataset.cache.tokenizer.decode(ids) for ids in item["input_ids"]]
    texts = [text if len(text) <= 400 else f"{text[:160]} … {text[-240:]}" for text in texts]
    answers = ["correct" if option == item["label"] else "" for option in range(len(texts))]
    columns = {"answer": answers, "tokens": map(len, item["input_ids"]), "sequence": texts}
    return pd.DataFrame(columns, LETTERS[: len(texts)])


def start_stage(
    stage: Stage,
    cache: Cache | str | Path,
    base_model: str | Path | None = None,
    base_checkpoint: str | Path | None = None,
    **settings,
) -> RaceModule:
    """The module that a stage trains: the weights of its base, and no optimizer state.

    base_model: of the first stage (None: the cache's); base_checkpoint: of others (None: the best of the stage before);
    settings: those of RaceModule, such as learning_rate.
    """
    cache = open_cache(cache)
    if stage.before is None:
        module, origin = _pretrained(cache, base_model, settings)
    else:
        checkpoint = Checkpoint(base_checkpoint) if base_checkpoint else stage.before.best()
        checkpoint.check_encoding(cache)
        if other := other_code(checkpoint.lineage):
            say(f"{checkpoint} was trained with {other}")
        module = checkpoint.load(cache, **settings)
        chain = [*checkpoint.chain, checkpoint.stage or "unknown"]
        origin = {"base": checkpoint.name, "base_sha256": checkpoint.sha256, "chain": chain}
        origin["articles"] = checkpoint.lineage.get("articles")
    known, used = module.model.config.vocab_size, cache.manifest["tokenizer"]["vocabulary"]
    if known < used:
        raise RaceError(f"a vocabulary of {known} tokens, the cache's has {used}: make one with the model's tokenizer")
    module.lineage = {"stage": stage.name, "cache": cache.identity, "tokenizer": cache.identity["tokenizer"], **origin}
    module.lineage |= {"recipe": settings, "weights_start": weights_hash(module.model)}
    module.lineage |= {"versions": versions(), "commit": git_commit(), "code": CODE}
    module.made_with = settings | {"cache_dir": cache.name, "base_model": base_model}
    module.made_with |= {"base_checkpoint": base_checkpoint, "seed": torch.initial_seed()}
    return module


def _pretrained(cache: Cache, base_model: str | Path | None, settings: dict) -> tuple[RaceModule, dict]:
    """A pretrained encoder with a new head, and what a checkpoint remembers of it."""
    if base_model is not None:
        cache.check_tokenizer(base_model)
    elif not cache.manifest["model"]["weights"]:
        raise RaceError(f"{cache} keeps no weights ({cache.manifest['model']['name']} had none); set BASE_MODEL")
    model, name = base_model or cache.model, str(base_model or cache.manifest["model"]["name"])
    if base_model and HUB_ID.fullmatch(name) and Path(name).exists():  # a folder that is called like a model of the hub
        name = str(Path(name).resolve())
    module = RaceModule(model=model, **settings)
    articles = Checkpoint(model).lineage.get("articles") if Path(model).is_dir() else None
    trained = any(str(it).endswith("ForMultipleChoice") for it in module.model.config.architectures or [])
    if articles is None and (name == "demo" or not trained):
        articles = {}  # no multiple-choice model: it was trained on none
    encoder = [it for part, it in module.model.base_model.named_children() if not part.startswith("pooler")]
    return module, {"base": name, "base_sha256": weights_hash(*encoder), "chain": [], "articles": articles}


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
    log_every: int = 10,
    accelerator: str | None = None,
    deterministic: bool = False,
    compile: bool = False,
    loggers: dict[str, dict] | None = None,
    accept_code: str | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> pl.Trainer:
    """Train a stage, or resume it where a kill or an interrupt ended it; prints which. A finished one trains nothing.

    Settings are the notebooks' (race.parameters), but log_every (steps) and callbacks. SIGTERM, SIGUSR1 and an
    interrupt end training after the micro-batch, with the state saved, and then have their usual effect (exit status
    143 or 138, or KeyboardInterrupt). Raises RaceError if settings have changed since.
    """
    check(max_epochs=max_epochs, early_stopping=early_stopping, save_minutes=save_minutes)
    check(precision=precision, accelerator=accelerator)
    precision, monitor = precision or default_precision(accelerator), stage.monitor or MONITORS[0]
    device = default_device(accelerator)
    check_ready(compile)
    module.schedule.steps = steps = max_epochs * data.batches_per_epoch()
    if (warmup := module.schedule.warmup) >= max(1, steps):
        raise RaceError(f"WARMUP is {warmup:g} steps, the stage has {steps}: give fewer, or a share such as 0.1")
    recipe = {name: value for name, value in data.made_with.items() if name != "cache_dir"}
    recipe |= {"precision": precision, "monitor": monitor, "max_epochs": max_epochs, "early_stopping": early_stopping}
    recipe |= {"accelerator": device.type, "deterministic": deterministic, "compile": compile}
    module.lineage |= {"stage": stage.name, "recipe": module.lineage.get("recipe", {}) | recipe}
    state, keeper = read_state(stage.state_path), KeepState(stage, save_minutes, stage_identity(module, data, monitor))
    kernel = attention_kernel(module.model.config, device, AUTOCAST.get(precision))
    report = StageReport(f"{hardware(device)}, {precision}, {kernel}")
    watching = [keeper, NewestOfEpoch(stage), LossWatch(), report, *callbacks]
    if early_stopping is not None:
        watching.append(EarlyStopping(monitor, mode="max" if monitor == "val_acc" else "min", patience=early_stopping))
    of_run = {"max_epochs": max_epochs, "log_every_n_steps": log_every, "deterministic": deterministic}
    trainer = _trainer(stage, module, state, precision, device, loggers, watching, **of_run)
    module.lineage["recipe"]["processes"] = trainer.world_size
    if state is None:
        _begin(stage, module, data)
    else:
        waited = early_stopping and (state["waited"] or 0) >= early_stopping
        finished = state["epoch"] >= max_epochs or (state["finished"] and state["stopped_early"] and waited)
        check_identity(state, keeper.identity, stage, CODE if finished else accept_code)
        if finished:
            _finished(stage, state)
            return trainer
        say(f"{stage.name} resumes from epoch {state['epoch']}, batch {state['batches']} of {data.batches_per_epoch()}")
    if compile:
        compile_layers(module.model)
    _fit(trainer, keeper, module, data, state is not None)
    return trainer


def _finished(stage: Stage, state: dict) -> None:
    """Say that there is nothing to train; raises RaceError if nothing is left of it."""
    if not (left := len(dataclasses.replace(stage, found=None).saved)):
        raise RaceError(f"{stage.name} is finished, but its checkpoints are gone. {stage.how_to_train_again}")
    epochs, other = state["epoch"], other_code(state["lineage"])
    text = f"{stage.name} is finished after {epochs} epoch{'s' * (epochs > 1)}"
    text += f", {left} of its checkpoints are left" if left < epochs else ""
    say(f"{text}{f', with {other}' if other else ''}: nothing to train. {stage.how_to_train_again}")


def _begin(stage: Stage, module: RaceModule, data: pl.LightningDataModule) -> None:
    """Check that a stage starts as its checkpoints will say, and note on which articles it is trained."""
    if names := [it.name for it in read_checkpoints(stage.checkpoint_dir) if it.stage == stage.name]:
        found = f"{stage.checkpoint_dir} has checkpoints of {stage.name}, but no state to resume from"
        raise RaceError(f"{found}: {', '.join(names)}. {stage.how_to_train_again}")
    if module.lineage.get("weights_start") not in (None, weights_hash(module.model)):
        raise RaceError("the weights have been trained since the model was made: run the model's cell again first")
    longest = longest_input(module.model)
    if longest and (tokens := max(data.dataset(it).lengths().max() for it in ("train", "validation"))) > longest:
        raise RaceError(f"a sequence has {tokens} tokens, the model takes {longest}: set MAX_LEN = {longest}")
    module.lineage |= {"articles": seen_articles(data, module.lineage.get("articles"))}


def further_loggers(wanted: dict[str, dict] | None, run_dir: str | Path, name: str, state: dict | None = None) -> list:
    """The loggers of these names, each with its arguments; nothing is imported that is not asked for.

    Named as in pytorch_lightning.loggers, or "package.module.Class". Unless given, save_dir is `run_dir`/loggers,
    name is `name`, and version (or run_id) that of the run that resumes from `state`. Raises RaceError.
    """
    made, defaults = [], {"save_dir": str(Path(run_dir) / "loggers"), "name": name, "run_name": name}
    for named, given in (wanted or {}).items():
        module, _, kind = named.rpartition(".")
        before = ((state or {}).get("loggers", {}).get(kind) or {}).get("version")
        own = defaults | ({} if before is None else {"version": before, "run_id": before})
        try:
            make = getattr(importlib.import_module(module or "pytorch_lightning.loggers"), kind)
            taken = inspect.signature(make).parameters
            own = {key: it for key, it in own.items() if key in taken}
            own |= {"purge_step": state["steps"]} if state and make is TensorBoardLogger else {}
            made.append(make(**(own | given)))
            if not isinstance(made[-1], Logger):
                raise TypeError("no logger of Lightning")
        except Exception as error:  # whatever its package raises: not installed, not logged in, unknown argument
            raise RaceError(f"LOGGERS, {named}: {error}") from error
    return made


class MixedPrecision(plugins.MixedPrecision):
    """Lightning's, which forgets the casts of weights at once; here they last until the end of the step.

    It has the same name, under which Lightning keeps the state of the loss scaler.
    """

    def autocast_context_manager(self) -> torch.autocast:
        """Around every training and validation step."""
        return torch.autocast(self.device, AUTOCAST[self.precision])


def _trainer(
    stage: Stage, module: RaceModule, state: dict | None, precision: str, device, loggers, callbacks, **of_run
) -> pl.Trainer:
    """A checkpoint after each epoch, CSV and TensorBoard logs (of a resumed stage, those from before), progress bar."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    torch.utils.deterministic.fill_uninitialized_memory = False  # 547 kernels a step on a GPU, with DETERMINISTIC
    # Lightning's hints do not fit: the loader needs few workers, and processes() says in its own words what runs where
    hints = "many workers|persistent_workers|number of training batches|LeafSpec|not empty|sync_dist|srun"
    warnings.filterwarnings("ignore", message=f".*({hints})")
    saving = ModelCheckpoint(
        stage.checkpoint_dir,
        filename=f"{stage.name}-{module.model.config.model_type}-race-{{epoch:02d}}-{{val_loss_epoch:.2f}}",
        monitor="val_loss_epoch",  # in the file name; Stage.best() chooses
        save_top_k=-1,
        save_weights_only=True,
        enable_version_counter=False,  # an epoch that is validated again after a kill gives the same file again
    )
    seed, run = module.lineage["recipe"]["seed"], f"{Path(stage.run_dir).name}-{stage.name}"
    name = run if f"seed{seed}" in run else f"{run}-seed{seed}"
    further, logs = further_loggers(loggers, stage.run_dir, name, state), Path(stage.run_dir) / "logs"
    csv = CSVLogger(logs, stage.name, version=state and state["version"], flush_logs_every_n_steps=1)  # each row
    purge = {"purge_step": state["steps"]} if state else {}  # what was logged after the state is logged again
    board = TensorBoardLogger(logs, stage.name, version=csv.version, **purge)
    half = [MixedPrecision(precision, device.type)] if AUTOCAST.get(precision) else []
    devices, nodes, environment = processes(device.type == "cuda")
    return pl.Trainer(
        precision=None if half else precision,  # a plugin says its own
        accelerator=device.type,
        devices=devices,
        num_nodes=nodes,
        strategy="auto" if devices * nodes == 1 else DDPStrategy(broadcast_buffers=False),
        plugins=[AtomicCheckpointIO(), *half, *environment],
        logger=[csv, board, *further],
        callbacks=[*callbacks, saving, ProgressBar(refresh_rate=10)],  # a refresh reads numbers from the GPU
        num_sanity_val_steps=0,  # a cache is checked when it is made, and a batch that does not fit is divided
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,  # the epoch in which a stage resumes has fewer batches than the others
        enable_model_summary=False,
        **of_run,
    )


def _fit(trainer: pl.Trainer, keeper: KeepState, module: RaceModule, data, resume: bool) -> None:
    """Train, alone in the files of the stage."""
    path, first = keeper.stage.state_path, trainer.is_global_zero
    path.parent.mkdir(parents=True, exist_ok=True)
    if trainer.precision == "64-true":
        module.double()  # or Lightning would load the weights of a state before
    data.start_at(0, 0)
    data.longest_first = module.padded
    try:
        lock = locked(path.with_suffix(".lock")) if first else contextlib.nullcontext()
        with lock, ended_by_signals(keeper, trainer):
            if first:  # clear away what a killed process has left
                remove_unfinished(path.parent, path.name)
                remove_unfinished(path.parent.parent, f"{keeper.stage.name}-")
            trainer.fit(module, data, ckpt_path=path if resume else None, weights_only=True)
    except BlockingIOError as error:
        raise RaceError(f"another process trains {keeper.stage.name} here: wait for it ({error})") from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise RaceError(f"the disk is full ({error}): make room and run this again to resume") from error
    finally:
        module.stop = None  # the signals of this run end nothing else
