"""Scoring checkpoints on a split: predictions, made once and kept, and the results that follow from them."""

import platform
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from race import LETTERS, MAX_LEN, RaceError
from race.data import RaceDataModule, collate
from race.data.seen import seen
from race.device import AUTOCAST, check_precision, default_device, default_precision, device_name, versions
from race.memory import fit_memory, in_parts
from race.parameters import from_root
from race.score import results
from race.score.statistics import PROBABILITIES, kind_of_question
from race.train.checkpoints import Checkpoint, short_names
from race_module import RaceModule


def score_each(
    checkpoints: list[Checkpoint], cache_dir: str | Path, split: str, run_dir: str | Path, fresh: bool, **settings
) -> tuple[dict[str, pd.DataFrame], list[pd.DataFrame]]:
    """`score` for several checkpoints: ({short name: predictions}, [results])."""
    hashes = [checkpoint.sha256 for checkpoint in checkpoints]
    if twice := [str(it) for it, sha256 in zip(checkpoints, hashes, strict=True) if hashes.count(sha256) > 1]:
        raise RaceError(f"the same checkpoint is named more than once: {', '.join(twice)}")
    scored = [score(checkpoint, cache_dir, split, run_dir, fresh, **settings) for checkpoint in checkpoints]
    predictions = dict(zip(short_names(checkpoints), [table for table, _ in scored], strict=True))
    return predictions, [table for _, table in scored]


def score(
    checkpoint: Checkpoint, cache_dir: str | Path, split: str, run_dir: str | Path, fresh: bool = False, **settings
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(predictions, results.result_table), both kept in `run_dir`; settings: those of `predict`.

    Saved predictions of the same checkpoint, cache and settings are used again, unless `fresh`.
    """
    predictions, made = saved_predictions(checkpoint, cache_dir, split, run_dir, fresh, **settings)
    table = results.result_table(predictions, made)
    results.save_results(table, run_dir, {"versions": made["versions"], "source": made["source"]})
    return predictions, table


def validation_predictions(
    checkpoint: Checkpoint, cache_dir: str | Path, split: str, run_dir: str | Path, fresh: bool = False, **settings
) -> pd.DataFrame | None:
    """Predictions on validation, to fit a temperature for `split`; None if that makes no sense, the reason printed."""
    if split == "validation" or "validation" not in RaceDataModule(cache_dir).manifest["splits"]:
        reason = "the scored split is validation itself" if split == "validation" else f"{cache_dir} has none"
        print(f"no temperature is fitted: {reason}")
        return None
    return saved_predictions(checkpoint, cache_dir, "validation", run_dir, fresh, **settings)[0]


def saved_predictions(
    checkpoint: Checkpoint, cache_dir: str | Path, split: str, run_dir: str | Path, fresh: bool, **settings
) -> tuple[pd.DataFrame, dict]:
    """(predictions, what made them) from `run_dir`, or made and kept there if they are missing, other, or `fresh`.

    What made them: settings with hashes of checkpoint and cache, versions, seconds.
    """
    resolved = {"checkpoint_sha256": checkpoint.sha256} | prediction_settings(cache_dir, split, **settings)
    path = results.predictions_path(run_dir, checkpoint, split, resolved["level"])
    found = "FRESH is set" if fresh else results.read_predictions(path, resolved)
    if not isinstance(found, str):
        print(f"{path.name}: saved predictions are used, made {found[1]['made']}")
        return found
    if found != "no saved predictions":
        print(f"{path.name}: scored again, because {found}")
    started = time.perf_counter()
    predictions = predict(checkpoint, cache_dir, split, **settings)
    made = {
        "settings": resolved,
        "checkpoint": checkpoint.name,
        "folder": from_root(checkpoint.path.parent),
        "stage": checkpoint.stage or checkpoint.label,
        "source": RaceDataModule(cache_dir).manifest["source"],
        "questions": len(predictions),
        "seconds": round(time.perf_counter() - started, 2),
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": {"python": platform.python_version()} | versions(),
    }
    results.save_predictions(path, predictions, made)
    return pd.read_parquet(path), made


def prediction_settings(
    cache_dir: str | Path,
    split: str = "test",
    batch_size: int = 32,
    max_len: int = MAX_LEN,
    limit_questions: int | None = None,
    seed: int = 0,
    precision: str | None = None,
    level: str | None = None,
    device: str | None = None,
    accelerator: str | None = None,
) -> dict:
    """Everything but the checkpoint that decides predictions to the last bit, with defaults resolved.

    batch_size: questions; max_len: tokens of a sequence; limit_questions: size of a random sample, drawn by `seed`;
    precision: as in training, default by device; level: only the questions of "middle" or "high"; accelerator: "cpu",
    "gpu" or None, which race.device.default_device takes; device: torch's name of another one, and goes before it.
    """
    manifest, device = RaceDataModule(cache_dir).manifest, torch.device(device or default_device(accelerator))
    if split not in manifest["splits"]:
        raise RaceError(f"{cache_dir} has no {split} split; make a cache from a source that has one")
    precision = precision or ("32-true" if device.type == "cpu" else default_precision())
    check_precision(precision, tuple(AUTOCAST))
    limited = limit_questions is not None and limit_questions < manifest["splits"][split]["questions"]
    return {
        "format": 2,
        "cache_sha256": results.content_hash(manifest["files"]),
        "split": split,
        "batch_size": batch_size,
        "max_len": max_len,
        "limit_questions": limit_questions if limited else None,
        "seed": seed if limited else None,  # draws the sample, and nothing else
        "precision": precision,
        "level": level,
        "device": device_name(device),
    }


def predict(checkpoint: Checkpoint, cache_dir: str | Path, split: str = "test", **settings) -> pd.DataFrame:
    """Score one checkpoint on a split; one row a question, in the order of the cache. settings: prediction_settings.

    Columns: example_id, question_index, level, answer and prediction ("A".."D"), p_A … p_D, those of `question_facts`
    and of race.data.seen. Raises RaceError if the model's output is not finite.
    """
    resolved = prediction_settings(cache_dir, split, **settings)
    device = settings.get("device") or default_device(settings.get("accelerator"))
    sample = {name: resolved[name] for name in ("limit_questions", "level")} | {"seed": resolved["seed"] or 0}
    data = RaceDataModule(cache_dir, resolved["batch_size"], resolved["max_len"], **sample)
    checkpoint.check_encoding(data.manifest, cache_dir)
    dataset, loader = data.dataset(split), data.ordered_loader(split)
    module = _loaded(checkpoint, cache_dir, device)
    parts = []
    with tqdm(total=len(dataset), desc=f"scoring {split}", unit=" questions") as bar:
        for batch in loader:
            parts.append(_probabilities(module, batch, resolved["precision"]))
            bar.update(len(batch))
    probabilities = np.empty((len(dataset), len(LETTERS)))
    probabilities[dataset.length_order()] = np.concatenate(parts)
    if bad := int((~np.isfinite(probabilities)).any(1).sum()):
        raise RaceError(
            f"{checkpoint}: the output is not finite on {bad:,} of {len(dataset):,} questions; it has diverged, "
            f'or {resolved["precision"]} has too small a range: try PRECISION = "32-true"'
        )
    columns = dataset.columns()
    predictions = pd.DataFrame({name: columns[name] for name in ("example_id", "question_index", "level")})
    predictions["answer"] = np.take(LETTERS, columns["label"])
    predictions["prediction"] = np.take(LETTERS, probabilities.argmax(1))  # as accuracy is counted in training
    predictions[PROBABILITIES] = probabilities
    known = {name: pd.array(column, "boolean") for name, column in seen(checkpoint.lineage, dataset).items()}
    return pd.concat([predictions, question_facts(dataset), pd.DataFrame(known)], axis=1)


def question_facts(dataset) -> pd.DataFrame:
    """What the analyses need to know of each question, so that they need no text: kind, and RaceDataset.facts."""
    facts = dataset.facts()
    facts.insert(0, "kind", [kind_of_question(question) for question in facts.pop("question")])
    return facts


def _loaded(checkpoint: Checkpoint, cache_dir: str | Path, device) -> RaceModule:
    module = checkpoint.load(cache_dir).to(device).eval()
    fit_memory(module, torch.device(device))
    return module


@torch.inference_mode()
def _probabilities(module: RaceModule, batch, precision: str) -> np.ndarray:
    """[B, 4] probabilities of the options of a batch, computed on the module's device, in micro-batches that fit."""
    half = AUTOCAST[precision]
    with torch.autocast(module.device.type, half, enabled=half is not None):
        parts = in_parts(module, batch.to(module.device), lambda part, _: module(part).double().softmax(1))
    return torch.cat(parts).cpu().numpy()


def answer_question(
    checkpoint: Checkpoint,
    cache_dir: str | Path,
    article: str,
    question: str,
    options: list[str],
    max_len: int = MAX_LEN,
    accelerator: str | None = None,
) -> pd.DataFrame:
    """A checkpoint's answer to a typed question: letter, option and probability, a row each; in float32."""
    batch = collate([RaceDataModule(cache_dir, max_len=max_len).encode_question(article, question, options)])
    module = _loaded(checkpoint, cache_dir, default_device(accelerator))
    probabilities = _probabilities(module, batch, "32-true")[0]
    return pd.DataFrame({"letter": LETTERS, "option": options, "probability": probabilities})
