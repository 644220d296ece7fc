"""The course of the training: loggers that a user adds, and what is read back from the logs on disk."""

import importlib
import inspect
import math
from pathlib import Path

import pandas as pd

from race import RaceError


def further_loggers(wanted: dict[str, dict] | None, run_dir: str | Path, stage: str) -> list:
    """The loggers of these names, each with its arguments; nothing is imported that is not asked for.

    A name is one of pytorch_lightning.loggers, such as WandbLogger, or "package.module.Class". Unless they are given,
    save_dir is `run_dir`/loggers and name is the stage. Raises RaceError.
    """
    made, defaults = [], {"save_dir": str(Path(run_dir) / "loggers"), "name": stage}
    for name, given in (wanted or {}).items():
        module, _, kind = name.rpartition(".")
        try:
            make = getattr(importlib.import_module(module or "pytorch_lightning.loggers"), kind)
            taken = inspect.signature(make).parameters
            made.append(make(**({key: it for key, it in defaults.items() if key in taken} | given)))
        except Exception as error:  # whatever its package raises: not installed, not logged in, unknown argument
            raise RaceError(f"LOGGERS, {name}: {error}") from error
    return made


def read_log(run_dir: str | Path, stage: str) -> pd.DataFrame:
    """The metrics of a stage's newest run, from its CSV log; one row per logged step. Raises RaceError."""
    logs = Path(run_dir) / "logs" / stage
    versions = sorted(logs.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    if not versions:
        raise RaceError(f"{logs} has no metrics.csv: run the training cell of the stage first")
    return pd.read_csv(versions[-1])


def learning_story(
    run_dir: str | Path, stages: dict[str, str], questions_per_epoch: int, validation_questions: int
) -> tuple[pd.DataFrame, list[str]]:
    """Validation after each epoch of all stages over the questions seen, and notes on logs that are missing.

    stages: their names, and which of MONITORS picks the best checkpoint of each.
    Columns: stage, monitor, epoch (from 0), questions (trained on by then, over all stages), val_loss, val_acc, val_low
    and val_high (Wilson's 95 % interval of val_acc), learning_rate (the stage's highest).
    """
    from statsmodels.stats.proportion import proportion_confint

    columns = ["stage", "monitor", "epoch", "questions", "val_loss", "val_acc", "val_low", "val_high", "learning_rate"]
    parts, notes, asked = [], [], validation_questions or math.nan
    for stage, monitor in stages.items():
        try:
            log = read_log(run_dir, stage)
            epochs = log.dropna(subset="val_loss_epoch").drop_duplicates("epoch", keep="last").astype({"epoch": int})
            of_stage = {"stage": stage, "monitor": monitor, "learning_rate": log["learning_rate"].max()}
        except (RaceError, KeyError):
            notes.append(f"no log of {stage} with a validated epoch in {run_dir}/logs: it is missing from the figure")
            continue
        before = parts[-1]["questions"].max() if parts else 0
        questions = before + (epochs["epoch"] + 1) * questions_per_epoch
        low, high = proportion_confint(epochs["val_acc"] * asked, asked, method="wilson")
        of_stage |= {"questions": questions, "val_loss": epochs["val_loss_epoch"], "val_low": low, "val_high": high}
        parts.append(epochs.assign(**of_stage)[columns])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns), notes
