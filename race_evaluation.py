"""Scoring checkpoints on a split: predictions, made once and kept, and their accuracy."""

import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import torch
from scipy.stats import binomtest
from tqdm.auto import tqdm

from race_cache import CacheError, load_tokenizer, read_manifest, tables
from race_data import RaceDataModule, RaceDataset, collate, length_order
from race_encoding import Encoder, keep_last, question_option
from race_files import file_hash
from race_memory import memory_kept
from race_module import RaceModule, default_token_budget
from race_results import content_hash, predictions_path, read_predictions, save_predictions, save_results
from race_sources import LEVELS, record_problems
from race_statistics import LETTERS, PROBABILITIES, accuracy_by, kind_of_question, macro_accuracy, p_value, share
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

RESULT_COLUMNS = ["stage", "checkpoint", "split", "level", "questions", "correct", "accuracy", "ci_low", "ci_high"]
HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
CHANCE = 0.25
REPORTED = {"e1": 0.671, "e2": 0.680, "e3": 0.720}  # the original authors' accuracies on RACE's test split, not ours
RACE_TEST_QUESTIONS = 4934
PUBLISHED = [  # other people's accuracies on RACE's test split
    ("guessing", 0.25, "one of four options"),
    ("ALBERT v2 base", 0.668, "README of google-research/albert"),
    ("ALBERT v2 large", 0.752, "README of google-research/albert"),
    ("ALBERT v2 xlarge", 0.807, "README of google-research/albert"),
    ("ALBERT v2 xxlarge", 0.868, "README of google-research/albert"),
    ("RoBERTa large", 0.832, "Liu et al. 2019, arXiv:1907.11692"),
    ("people, ceiling", 0.95, "Lai et al. 2017, arXiv:1704.04683"),
]


# -------------------------------------------------------------------------------------------------- which checkpoints


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


# -------------------------------------------------------------------------------------------------- predictions


def prediction_settings(
    cache_dir: str | Path,
    split: str = "test",
    batch_size: int = 32,
    max_len: int = 512,
    limit_questions: int | None = None,
    seed: int = 0,
    precision: str | None = None,
    device: str | None = None,
) -> dict:
    """Everything but the checkpoint that decides predictions to the last bit, with defaults resolved."""
    manifest = read_manifest(cache_dir)
    if split not in manifest["splits"]:
        raise CacheError(f"{cache_dir} has no {split} split; make a cache from a source that has one")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = "32-true" if device.type == "cpu" else precision or default_precision()
    if precision not in ("32-true", *HALF):
        raise ValueError(f"precision {precision!r}: expected 32-true, {' or '.join(HALF)}")
    limited = limit_questions is not None and limit_questions < manifest["splits"][split]["questions"]
    return {
        "format": 1,
        "cache_sha256": content_hash(manifest["files"]),
        "split": split,
        "batch_size": batch_size,
        "max_len": max_len,
        "limit_questions": limit_questions if limited else None,
        "seed": seed if limited else None,  # draws the sample, and nothing else
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }


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

    Columns: example_id, question_index, level, answer and prediction ("A".."D"), p_A … p_D, and those of
    `question_facts`. Raises StageError where the model's output is not finite.
    """
    settings = prediction_settings(cache_dir, split, batch_size, max_len, limit_questions, seed, precision, device)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_encoding_of(checkpoint, read_lineage(checkpoint), cache_dir)
    data = RaceDataModule(cache_dir, batch_size, max_len, limit_questions=limit_questions, seed=seed)
    dataset, loader = data.dataset(split), data.ordered_loader(split)
    module = RaceModule.load_from_checkpoint(checkpoint).to(device).eval()
    probabilities = []
    with memory_kept(), tqdm(total=len(dataset), desc=f"scoring {split}", unit=" questions") as bar:
        for batch in loader:
            probabilities.append(_probabilities(module, batch, settings["precision"]))
            bar.update(len(batch))
    table = np.empty((len(dataset), len(LETTERS)))
    table[length_order(dataset)] = np.concatenate(probabilities)
    if bad := int((~np.isfinite(table)).any(1).sum()):
        raise StageError(
            f"{checkpoint}: the output is not finite on {bad:,} of {len(table):,} questions; it has diverged, "
            f'or {settings["precision"]} is too narrow: try PRECISION = "32-true"'
        )
    columns = dataset.columns()
    predictions = pd.DataFrame({name: columns[name] for name in ("example_id", "question_index", "level")})
    predictions["answer"] = np.take(LETTERS, columns["label"])
    predictions["prediction"] = np.take(LETTERS, table.argmax(1))
    predictions[PROBABILITIES] = table
    return pd.concat([predictions, question_facts(dataset)], axis=1)


@torch.inference_mode()
def _probabilities(module: RaceModule, batch, precision: str) -> np.ndarray:
    """[B, 4] probabilities of the options of a batch, computed where the module is, in parts that fit there."""
    half = HALF.get(precision)
    with torch.autocast(module.device.type, half, enabled=half is not None):
        budget = default_token_budget(module.model, module.device, training=False)
        parts = batch.to(module.device).micro_batches(budget)
        return torch.cat([module(part).double().softmax(1) for part in parts]).cpu().numpy()


def question_facts(dataset: RaceDataset) -> pd.DataFrame:
    """What the analyses need to know of each question, one row each, so that they need no text.

    kind; article_tokens (before truncation); truncated (any of the four sequences); longest_option ("A".."D" by
    characters, the first of equals); article_in_train (missing where there is no train split, or this is it).
    """
    passages, questions = tables(dataset.cache_dir, dataset.split)
    rows = np.arange(len(questions)) if dataset.rows is None else dataset.rows
    passage = questions["passage"].to_numpy()[rows]
    article_tokens = pc.list_value_length(passages["article_ids"]).to_numpy()[passage]
    qa_tokens = pc.list_value_length(questions["qa_ids"].values).to_numpy().reshape(-1, len(LETTERS))[rows]
    characters = pc.utf8_length(questions["options"].values).to_numpy().reshape(-1, len(LETTERS))[rows]
    untruncated = article_tokens + qa_tokens.max(1) + 3  # [CLS] and two [SEP]
    facts = {
        "kind": [kind_of_question(question) for question in questions["question"].take(rows).to_pylist()],
        "article_tokens": article_tokens,
        "truncated": untruncated > dataset.max_len,
        "longest_option": np.take(LETTERS, characters.argmax(1)),
        "article_in_train": pd.array([pd.NA] * len(rows), dtype="boolean"),
    }
    if dataset.split != "train" and "train" in read_manifest(dataset.cache_dir)["splits"]:
        train_articles = tables(dataset.cache_dir, "train")[0]["article"]
        seen = pc.is_in(passages["article"], value_set=train_articles).to_numpy(zero_copy_only=False)
        facts["article_in_train"] = pd.array(seen[passage], dtype="boolean")
    return pd.DataFrame(facts)


def saved_predictions(
    checkpoint: str | Path, cache_dir: str | Path, split: str, run_dir: str | Path, fresh: bool = False, **settings
) -> tuple[pd.DataFrame, dict]:
    """(predictions, what made them) from `run_dir`, or made and kept there where they are missing, other, or `fresh`.

    settings: those of `predict`. What made them: settings with hashes of checkpoint and cache, versions, seconds.
    """
    lineage_first = read_lineage(checkpoint)  # a checkpoint that is missing or broken is named as such
    resolved = {"checkpoint_sha256": file_hash(checkpoint)} | prediction_settings(cache_dir, split, **settings)
    path = predictions_path(run_dir, checkpoint, split)
    found = "asked afresh" if fresh else read_predictions(path, resolved)
    if not isinstance(found, str):
        print(f"{path.name}: saved predictions are used, made {found[1]['made']}")
        return found
    if found != "no saved predictions":
        print(f"{path.name}: made again, {found}")
    started = time.perf_counter()
    predictions = predict(checkpoint, cache_dir, split, **settings)
    made = {
        "settings": resolved,
        "checkpoint": Path(checkpoint).name,
        "stage": lineage_first.get("stage", Path(checkpoint).stem),
        "source": read_manifest(cache_dir)["source"],
        "questions": len(predictions),
        "seconds": round(time.perf_counter() - started, 2),
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "pytorch-lightning", "pyarrow", "numpy")},
    }
    save_predictions(path, predictions, made)
    return pd.read_parquet(path), made


def temperature_predictions(
    checkpoint: str | Path, cache_dir: str | Path, split: str, run_dir: str | Path, fresh: bool = False, **settings
) -> pd.DataFrame | None:
    """Predictions on validation, to fit a temperature with; None, with the reason printed, where that is not honest."""
    if split == "validation":
        print("no temperature is fitted: validation is the split that is scored here, and would be fitted to itself")
        return None
    if "validation" not in read_manifest(cache_dir)["splits"]:
        print(f"no temperature is fitted: {cache_dir} has no validation split")
        return None
    return saved_predictions(checkpoint, cache_dir, "validation", run_dir, fresh, **settings)[0]


# -------------------------------------------------------------------------------------------------- scores


def accuracy_table(predictions: pd.DataFrame, stage: str, checkpoint: str | Path, split: str) -> pd.DataFrame:
    """RESULT_COLUMNS for all questions and for each level present, with 95 % Wilson intervals."""
    everything = accuracy_by(predictions, np.full(len(predictions), "all"))
    levels = accuracy_by(predictions, predictions["level"], list(LEVELS))
    table = pd.concat([part for part in (everything, levels) if len(part)], ignore_index=True)
    table = table.rename(columns={"group": "level"})
    return table.assign(stage=stage, checkpoint=Path(checkpoint).name, split=split)[RESULT_COLUMNS]


def score(
    checkpoint: str | Path, cache_dir: str | Path, split: str, run_dir: str | Path, fresh: bool = False, **settings
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predict, or use what is there, and leave predictions and results in `run_dir`; (predictions, accuracy table).

    The table has RESULT_COLUMNS, then macro accuracy over levels, hashes, settings, device, seconds and versions.
    """
    predictions, made = saved_predictions(checkpoint, cache_dir, split, run_dir, fresh, **settings)
    table = accuracy_table(predictions, made["stage"], checkpoint, split)
    macro = macro_accuracy(predictions) or (None, None, None)
    table = table.assign(**dict(zip(("macro_accuracy", "macro_low", "macro_high"), macro, strict=True)))
    names = ["checkpoint_sha256", "cache_sha256", "batch_size", "max_len", "limit_questions", "seed", "precision"]
    table = table.assign(**{name: made["settings"][name] for name in [*names, "device"]}, seconds=made["seconds"])
    table = table.assign(**{name: made["versions"][name] for name in ("torch", "transformers")}, made=made["made"])
    save_results(table, run_dir, {"versions": made["versions"], "source": made["source"]})
    return predictions, table


def headline(table: pd.DataFrame) -> str:
    """The result of one checkpoint in words: accuracy with interval, against chance, and the mean over levels."""
    row = table.iloc[0]
    p = binomtest(int(row["correct"]), int(row["questions"]), CHANCE, alternative="greater").pvalue
    chance = "more" if p < 0.05 else "no more"
    text = (
        f"{row['stage']} is right on {row['correct']:,} of {row['questions']:,} questions of {row['split']}: "
        f"{share(row['accuracy'])} (95 % interval {share(row['ci_low'])} to {share(row['ci_high'])}), "
        f"{chance} than guessing gives (25 %; exact binomial {p_value(p)})."
    )
    if len(table) > 2 and "macro_accuracy" in table:
        text += f" The mean of the two levels is {share(row['macro_accuracy'])} "
        text += f"({share(row['macro_low'])} to {share(row['macro_high'])})."
    return text


def percent(table: pd.DataFrame):
    """The table for reading: shares as percentages with one digit, the interval in one column."""
    columns = [
        name for name in ("grouping", "group", *RESULT_COLUMNS) if name in table and name not in ("ci_low", "ci_high")
    ]
    interval = [f"{low:.1%} – {high:.1%}" for low, high in zip(table["ci_low"], table["ci_high"], strict=True)]
    shown = table[columns].assign(**{"95 % interval": interval})
    return shown.style.format({"accuracy": "{:.1%}", "questions": "{:,}", "correct": "{:,}"}).hide(axis="index")


def _is_race_test(tables: list[pd.DataFrame]) -> bool:
    return all(
        table["split"].iloc[0] == "test" and table["questions"].iloc[0] == RACE_TEST_QUESTIONS for table in tables
    )


def reported_accuracy(tables: list[pd.DataFrame]) -> dict[str, float]:
    """What the original authors report for each stage, if the tables are of RACE's whole test split; else nothing."""
    return REPORTED if _is_race_test(tables) else {}


def published_table(table: pd.DataFrame) -> pd.DataFrame:
    """Other people's accuracies beside this one, lowest first; empty unless this is RACE's whole test split."""
    if not _is_race_test([table]):
        return pd.DataFrame(columns=["model", "accuracy", "source"])
    rows = [
        *PUBLISHED,
        *((f"original authors, {stage}", share, "reported by them") for stage, share in REPORTED.items()),
    ]
    rows.append((f"this checkpoint ({table['stage'].iloc[0]})", table["accuracy"].iloc[0], "measured here"))
    return pd.DataFrame(rows, columns=["model", "accuracy", "source"]).sort_values("accuracy", ignore_index=True)


# -------------------------------------------------------------------------------------------------- a typed question


def encoded_question(
    cache_dir: str | Path, article: str, question: str, options: list[str], max_len: int = 512
) -> dict:
    """A typed question as RaceDataset gives one of the cache, token by token the same; raises ValueError."""
    record = {"id": "typed", "article": article, "questions": [question], "options": [options], "answers": ["A"]}
    if problems := record_problems(record):
        raise ValueError("; ".join(problem for _, problem in problems))
    manifest, encode = read_manifest(cache_dir), Encoder(load_tokenizer(Path(cache_dir) / "model"))
    cls, sep = ([manifest["tokenizer"][name]] for name in ("cls", "sep"))
    article_ids = encode([article])[0].as_py()
    qa_ids = keep_last(encode([question_option(question, option) for option in options]), manifest["max_qa_len"])
    item = {"input_ids": [], "token_type_ids": [], "label": 0, "example_id": "typed"}
    for ids in qa_ids.to_pylist():
        qa = ids[-(max_len - 3) :]
        first = [*cls, *article_ids[: max_len - 3 - len(qa)], *sep]
        item["input_ids"].append(np.array([*first, *qa, *sep]))
        item["token_type_ids"].append(np.repeat([0, 1], [len(first), len(qa) + 1]))
    return item


def answer_question(
    checkpoint: str | Path,
    cache_dir: str | Path,
    article: str,
    question: str,
    options: list[str],
    max_len: int = 512,
    device: str | None = None,
) -> pd.DataFrame:
    """What a checkpoint makes of a typed question: letter, option and probability, a row each; in float32."""
    batch = collate([encoded_question(cache_dir, article, question, options, max_len)])
    module = RaceModule.load_from_checkpoint(checkpoint).eval()
    module = module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    probabilities = _probabilities(module, batch, "32-true")[0]
    return pd.DataFrame({"letter": LETTERS, "option": options, "probability": probabilities})
