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
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise StageError(f"{path}: not a checkpoint ({str(error).splitlines()[0]}); remove it") from error
    if not isinstance(content, dict):
        raise StageError(f"{path}: holds a {type(content).__name__}, not a checkpoint; remove it")
    return content


def read_lineage(checkpoint: str | Path) -> dict:
    """What a checkpoint remembers: stage, base, chain, cache, recipe, versions, epoch, metrics."""
    return read_checkpoint(checkpoint, mmap=True).get("race", {})


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
