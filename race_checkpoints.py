"""The checkpoints of a chain: where each comes from, which is the best of a stage, and that none runs code."""

import math
import pickle
import re
from pathlib import Path

import pandas as pd
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from race_files import DamagedFileError, check_sealed, save_sealed

STAGES = ("e1", "e2", "e3")
BEFORE = {"e2": "e1", "e3": "e2"}


class StageError(RuntimeError):
    """A stage that cannot start, go on or be found; the message says what to do."""


class SealedCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints: written whole and sealed, read as tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        """Replace `path` in one step; what was there stays until the new file is on disk."""
        save_sealed(checkpoint, path)

    def load_checkpoint(self, path: str | Path, map_location=None, weights_only: bool | None = True) -> dict:
        """Whatever `weights_only` says, no code of the file runs; raises StageError where it is damaged."""
        return read_checkpoint(path)


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict:
    """Tensors (on the CPU) and plain values of a checkpoint; raises StageError where it is damaged or brings code."""
    try:
        check_sealed(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (DamagedFileError, FileNotFoundError) as error:
        raise StageError(str(error)) from error
    except pickle.UnpicklingError as error:
        raise StageError(f"{path}: holds more than weights and plain values, and could run code; refused") from error
    except OSError as error:
        raise StageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise StageError(f"{path}: not a checkpoint ({str(error).splitlines()[0]}); remove it") from error
    if not isinstance(content, dict):
        raise StageError(f"{path}: holds a {type(content).__name__}, not a checkpoint; remove it")
    return content


def read_lineage(checkpoint: str | Path) -> dict:
    """What a checkpoint remembers: stage, base, chain, cache, recipe, versions, epoch, metrics."""
    return read_checkpoint(checkpoint, mmap=True).get("race", {})


def stage_checkpoints(checkpoint_dir: str | Path, stage: str) -> pd.DataFrame:
    """The checkpoints of a stage, best first: path, epoch, val_loss_epoch (exact), val_acc; damaged ones are named."""
    table, damaged = _stage_checkpoints(checkpoint_dir, stage)
    for _, problem in damaged:
        print(f"passed over: {problem}")
    return table


def _stage_checkpoints(checkpoint_dir: str | Path, stage: str) -> tuple[pd.DataFrame, list[tuple[float, str]]]:
    """(table of stage_checkpoints, (loss in the name, problem) of each damaged one)"""
    rows, damaged = [], []
    for path in sorted(Path(checkpoint_dir).glob(f"{stage}-*.ckpt")):
        named = re.search(r"epoch=(\d+)-val_loss_epoch=(\d+\.\d+|nan|inf)", path.name)
        if named:  # all that a checkpoint from elsewhere tells
            epoch, loss = int(named[1]), float(named[2])
            try:
                lineage = read_lineage(path)
            except StageError as error:
                damaged.append((loss, str(error)))
                continue
            metrics = {"val_loss_epoch": loss, "val_acc": float("nan")} | lineage.get("metrics", {})
            rows.append([path, lineage.get("epoch", epoch), metrics["val_loss_epoch"], metrics["val_acc"]])
    table = pd.DataFrame(rows, columns=["path", "epoch", "val_loss_epoch", "val_acc"])
    return table.sort_values(["val_loss_epoch", "epoch"], ignore_index=True), damaged


def best_checkpoint(checkpoint_dir: str | Path, stage: str) -> Path:
    """The checkpoint of a stage with the lowest validation loss; the earlier one where two are equal.

    Raises StageError where there is none, or where a damaged one may have been the best.
    """
    table, damaged = _stage_checkpoints(checkpoint_dir, stage)
    lowest = table["val_loss_epoch"].min() if len(table) else math.inf
    if problems := [problem for loss, problem in damaged if loss <= lowest + 0.005]:  # names round to two digits
        raise StageError("; ".join(problems))
    if table.empty:
        notebook = f"ex0{stage[1]}.ipynb"
        raise StageError(f"{checkpoint_dir} holds no checkpoint of stage {stage}: run {notebook} first")
    if not math.isfinite(lowest):
        raise StageError(f"{checkpoint_dir}: no checkpoint of stage {stage} has a finite validation loss; it diverged")
    return table["path"][0]


def latest_stage(checkpoint_dir: str | Path) -> str:
    """The last stage that has a checkpoint."""
    for stage in reversed(STAGES):
        if any(Path(checkpoint_dir).glob(f"{stage}-*.ckpt")):
            return stage
    raise StageError(f"{checkpoint_dir} holds no checkpoints: run ex01.ipynb first")
