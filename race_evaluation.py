"""Scoring checkpoints on a split: predictions, accuracy with intervals, confusion, and the files that hold them."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from tqdm.auto import tqdm

from race_data import RaceDataModule, length_order
from race_module import RaceModule, default_token_budget
from race_sources import LEVELS
from race_training import (
    STAGES,
    StageError,
    best_checkpoint,
    check_encoding_of,
    default_precision,
    latest_stage,
    read_lineage,
    stage_checkpoints,
)

LETTERS = list("ABCD")
PROBABILITIES = [f"p_{letter}" for letter in LETTERS]
RESULT_COLUMNS = ["stage", "checkpoint", "split", "level", "questions", "correct", "accuracy", "ci_low", "ci_high"]
REPORTED = {"e1": 0.671, "e2": 0.680, "e3": 0.720}  # the original authors' accuracies on RACE's test split, not ours
RACE_TEST_QUESTIONS = 4934


def default_checkpoint(checkpoint_dir: str | Path) -> Path:
    """The best checkpoint of the latest stage."""
    return best_checkpoint(checkpoint_dir, latest_stage(checkpoint_dir))


def chosen_checkpoints(checkpoints: list[str | Path] | None, checkpoint_dir: str | Path) -> list[Path]:
    """These checkpoints, or for None the best one of each stage that has any, in the order of the chain."""
    if checkpoints is None:
        stages = [stage for stage in STAGES if len(stage_checkpoints(checkpoint_dir, stage))]
        if not stages:
            raise StageError(f"{checkpoint_dir} holds no checkpoints: run ex01.ipynb first")
        return [best_checkpoint(checkpoint_dir, stage) for stage in stages]
    names = [Path(checkpoint).name for checkpoint in checkpoints]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise StageError(f"two checkpoints are called {', '.join(twice)}; results are kept by name, so rename one")
    return [Path(checkpoint) for checkpoint in checkpoints]


def predict(
    checkpoint: str | Path,
    cache_dir: str | Path,
    split: str = "test",
    batch_size: int = 32,
    max_len: int = 512,
    limit_questions: int | None = None,
    seed: int = 0,
    precision: str | None = None,
    device: str | None = None,
) -> pd.DataFrame:
    """Score one checkpoint on a split; one row a question, in the order of the cache. precision: as in training.

    Columns: example_id, question_index, level, answer and prediction ("A".."D"), p_A … p_D.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_encoding_of(checkpoint, read_lineage(checkpoint), cache_dir)
    data = RaceDataModule(cache_dir, batch_size, max_len, limit_questions=limit_questions, seed=seed)
    dataset, loader = data.dataset(split), data.ordered_loader(split)
    module = RaceModule.load_from_checkpoint(checkpoint).to(device).eval()
    budget = default_token_budget(module.model, device)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision or default_precision())
    probabilities = []
    with (
        torch.inference_mode(),
        torch.autocast(device.type, half, enabled=half is not None and device.type == "cuda"),
        tqdm(total=len(dataset), desc=f"scoring {split}", unit=" questions") as bar,
    ):
        for batch in loader:
            for part in batch.to(device).micro_batches(budget):
                probabilities.append(module(part).double().softmax(1))
            bar.update(len(batch))
    table = np.empty((len(dataset), len(LETTERS)))
    table[length_order(dataset)] = torch.cat(probabilities).cpu().numpy()
    columns = dataset.columns()
    predictions = pd.DataFrame({name: columns[name] for name in ("example_id", "question_index", "level")})
    predictions["answer"] = np.take(LETTERS, columns["label"])
    predictions["prediction"] = np.take(LETTERS, table.argmax(1))
    predictions[PROBABILITIES] = table
    return predictions


def accuracy_table(predictions: pd.DataFrame, stage: str, checkpoint: str | Path, split: str) -> pd.DataFrame:
    """RESULT_COLUMNS for all questions and for each level present, with 95 % Wilson intervals."""
    right = predictions["answer"] == predictions["prediction"]
    groups = {"all": right} | {level: right[predictions["level"] == level] for level in LEVELS}
    rows = []
    for level, answers in groups.items():
        if len(answers):
            interval = binomtest(int(answers.sum()), len(answers)).proportion_ci(0.95, method="wilson")
            count = [len(answers), int(answers.sum()), float(answers.mean())]
            rows.append([stage, Path(checkpoint).name, split, level, *count, interval.low, interval.high])
    return pd.DataFrame(rows, columns=RESULT_COLUMNS)


def confusion(predictions: pd.DataFrame) -> pd.DataFrame:
    """[4, 4] counts: right answers in rows, predictions in columns."""
    table = pd.crosstab(predictions["answer"], predictions["prediction"])
    return table.reindex(index=LETTERS, columns=LETTERS, fill_value=0)


def score(checkpoint: str | Path, cache_dir: str | Path, split: str, run_dir: str | Path, **settings):
    """Predict, and leave predictions and results in `run_dir`; returns (predictions, accuracy table)."""
    predictions = predict(checkpoint, cache_dir, split, **settings)
    stage = read_lineage(checkpoint).get("stage", Path(checkpoint).stem)
    table = accuracy_table(predictions, stage, checkpoint, split)
    path = Path(run_dir) / "predictions" / f"{Path(checkpoint).stem}-{split}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, predictions.to_parquet)
    save_results(table, run_dir)
    return predictions, table


def save_results(table: pd.DataFrame, run_dir: str | Path) -> None:
    """Put a table into results.csv; rows of the same checkpoint and split are replaced, others stay."""
    path = Path(run_dir) / "results.csv"
    if path.exists():
        old = pd.read_csv(path)
        keys = set(zip(table["checkpoint"], table["split"], strict=True))
        kept = [key not in keys for key in zip(old["checkpoint"], old["split"], strict=True)]
        table = pd.concat([old[kept], table]) if any(kept) else table
    order = ["stage", "checkpoint", "split"]
    _replace(path, lambda file: table.sort_values(order, kind="stable").to_csv(file, index=False))


def _replace(path: Path, write) -> None:
    """Write beside `path` and rename: the file is whole or the old one."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def percent(table: pd.DataFrame):
    """The table for reading: shares as percentages with one digit, the interval in one column."""
    shown = table.drop(columns=["ci_low", "ci_high"]).copy()
    shown["95 % interval"] = [
        f"{low:.1%} – {high:.1%}" for low, high in zip(table["ci_low"], table["ci_high"], strict=True)
    ]
    return shown.style.format({"accuracy": "{:.1%}", "questions": "{:,}", "correct": "{:,}"}).hide(axis="index")


def reported_accuracy(tables: list[pd.DataFrame]) -> dict[str, float]:
    """What the original authors report for each stage, if the tables are of RACE's whole test split; else nothing."""
    whole = all(table["split"][0] == "test" and table["questions"][0] == RACE_TEST_QUESTIONS for table in tables)
    return REPORTED if whole else {}


def comparison(tables: list[pd.DataFrame], checkpoints: list[str | Path]) -> pd.DataFrame:
    """One row a checkpoint: stage, base, learning rate, epoch, validation loss, accuracy and interval, and by level."""
    rows = []
    for table, checkpoint in zip(tables, checkpoints, strict=True):
        lineage, by_level = read_lineage(checkpoint), table.set_index("level")
        rows.append(
            {
                "stage": table["stage"][0],
                "checkpoint": Path(checkpoint).name,
                "base": lineage.get("base"),
                "learning_rate": lineage.get("recipe", {}).get("learning_rate"),
                "epoch": lineage.get("epoch"),
                "val_loss": lineage.get("metrics", {}).get("val_loss_epoch"),
                **{name: by_level.loc["all", name] for name in ("accuracy", "ci_low", "ci_high")},
                **{level: by_level["accuracy"].get(level) for level in LEVELS},
            }
        )
    return pd.DataFrame(rows)
