"""What the checkpoints and logs of a chain remember: names, settings, descent, and the course of the training."""

from pathlib import Path

import numpy as np
import pandas as pd

from race_cache import read_manifest
from race_files import file_hash
from race_sources import LEVELS
from race_training import StageError, read_lineage, read_log


def short_names(checkpoints: list[str | Path]) -> list[str]:
    """A name for each checkpoint: its stage, or stage and epoch, or file name, whichever first tells all apart."""
    lineages = [read_lineage(checkpoint) for checkpoint in checkpoints]
    stems = [Path(checkpoint).stem for checkpoint in checkpoints]
    stages = [lineage.get("stage", stem) for lineage, stem in zip(lineages, stems, strict=True)]
    epochs = [f"{stage}, epoch {lineage.get('epoch')}" for stage, lineage in zip(stages, lineages, strict=True)]
    return next(names for names in (stages, epochs, stems) if len(set(names)) == len(names))


def comparison(tables: list[pd.DataFrame], checkpoints: list[str | Path]) -> pd.DataFrame:
    """One row a checkpoint: stage, base, settings, validation loss, accuracy with interval, accuracy by level."""
    rows = []
    for name, table, checkpoint in zip(short_names(checkpoints), tables, checkpoints, strict=True):
        lineage, by_level = read_lineage(checkpoint), table.set_index("level")
        rows.append(
            {
                "name": name,
                "stage": table["stage"].iloc[0],
                "checkpoint": Path(checkpoint).name,
                "base": lineage.get("base"),
                "learning_rate": lineage.get("recipe", {}).get("learning_rate"),
                "epochs": lineage["epoch"] + 1 if "epoch" in lineage else None,
                "val_loss": lineage.get("metrics", {}).get("val_loss_epoch"),
                "questions": by_level.loc["all", "questions"],
                **{name: by_level.loc["all", name] for name in ("accuracy", "ci_low", "ci_high")},
                **{level: by_level["accuracy"].get(level) for level in LEVELS},
            }
        )
    return pd.DataFrame(rows)


def comparison_style(table: pd.DataFrame):
    """The comparison for reading: shares as percentages, the interval in one column, what is not known as a dash."""
    shown = table.drop(columns=["stage", "checkpoint", "questions", "ci_low", "ci_high"])
    interval = [f"{low:.1%} – {high:.1%}" for low, high in zip(table["ci_low"], table["ci_high"], strict=True)]
    shown.insert(shown.columns.get_loc("accuracy") + 1, "95 % interval", interval)
    formats = dict.fromkeys(["accuracy", "middle", "high"], "{:.1%}")
    formats |= {"val_loss": "{:.3f}", "learning_rate": "{:g}", "epochs": "{:.0f}"}
    return shown.style.format(formats, na_rep="–").hide(axis="index")


def stages_behind(checkpoints: list[str | Path]) -> list[str]:
    """The stages that these checkpoints have gone through, as they remember them, first ones first."""
    lineages = [read_lineage(checkpoint) for checkpoint in checkpoints]
    stages = [stage for lineage in lineages for stage in [*lineage.get("chain", []), lineage.get("stage")] if stage]
    return sorted(set(stages))


def lineage_table(checkpoints: list[str | Path]) -> pd.DataFrame:
    """A row a checkpoint: name, file, base, and `parent`, the name of the one of these that its base is by hash."""
    names = short_names(checkpoints)
    name_of = {file_hash(checkpoint): name for checkpoint, name in zip(checkpoints, names, strict=True)}
    rows = []
    for checkpoint, name in zip(checkpoints, names, strict=True):
        lineage = read_lineage(checkpoint)
        row = {"name": name, "file": Path(checkpoint).name, "base": lineage.get("base")}
        row |= {"parent": name_of.get(lineage.get("base_sha256")), "epochs": lineage.get("epoch", np.nan) + 1}
        row |= {"learning_rate": lineage.get("recipe", {}).get("learning_rate", np.nan)}
        rows.append(row | {"val_loss": lineage.get("metrics", {}).get("val_loss_epoch", np.nan)})
    return pd.DataFrame(rows)


def learning_story(
    run_dir: str | Path, cache_dir: str | Path, stages: list[str], limit_questions: int | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """Validation after each epoch of all stages, on one axis of questions seen, and notes on logs that are missing.

    Columns: stage, epoch, questions (trained on by then, over all stages), val_loss, val_acc, learning_rate.
    """
    train = read_manifest(cache_dir)["splits"].get("train", {}).get("questions", 0)
    per_epoch, seen, parts, notes = min(train, limit_questions or train), 0, [], []
    for stage in stages:
        try:
            log = read_log(run_dir, stage).dropna(subset="val_loss_epoch").drop_duplicates("epoch", keep="last")
            rate = read_log(run_dir, stage)["learning_rate"].dropna().iloc[-1]
        except (StageError, KeyError, IndexError):
            notes.append(f"no log of {stage} with an epoch validated in {run_dir}/logs: it is missing from the figure")
            continue
        part = pd.DataFrame({"stage": stage, "epoch": log["epoch"].astype(int), "learning_rate": rate})
        part["questions"] = seen + (part["epoch"] + 1) * per_epoch
        parts.append(part.assign(val_loss=log["val_loss_epoch"], val_acc=log["val_acc"]))
        seen = part["questions"].max()
    columns = ["stage", "epoch", "questions", "val_loss", "val_acc", "learning_rate"]
    return (pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)), notes
