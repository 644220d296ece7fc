"""Predictions of checkpoints: made once, kept with what made them, and the results that follow from them."""

import dataclasses
import functools
import hashlib
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from race import COLUMNS, LETTERS, LEVELS, ROOT, RaceError
from race.data import RaceDataModule, Reading, build_cache, collate, seen_before
from race.device import AUTOCAST, CODE, default_device, default_precision, device_name, versions
from race.files import atomic_write, file_hash, locked, write_json
from race.memory import fit_memory, in_parts
from race.score import statistics
from race.score.statistics import PROBABILITIES, SEEN_COLUMNS
from race.train.checkpoints import Checkpoint, short_names

FORMAT = 2  # of saved predictions
RESULT_COLUMNS = ["stage", "checkpoint", "split", "level", "questions", "correct", "accuracy", "ci_low", "ci_high"]


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """A table with a row for each question (as `predict` gives it), and what made it.

    made: settings with hashes, checkpoint, folder, stage, source, seconds, made, versions. saved: it was there before.
    """

    table: pd.DataFrame
    made: dict
    saved: bool = False

    @property
    def name(self) -> str:
        """How its files in a run folder are called: stage and split, and the level if it is of one alone."""
        settings = self.made["settings"]
        return "-".join(filter(None, [self.made["stage"], settings["split"], settings["level"]]))

    @functools.cached_property
    def results(self) -> pd.DataFrame:
        """accuracy_table, then macro accuracy over the levels, settings, device, seconds, versions and folder.

        Of one level alone there is one row, of that level.
        """
        made, settings = self.made, self.made["settings"]
        table = accuracy_table(self.table, made["stage"], made["checkpoint"], settings["split"], settings["level"])
        levels = table[table["level"] != "all"]
        whole = len(levels) == len(LEVELS) and levels["questions"].sum() == len(self.table)
        mean, low, high = statistics.macro_accuracy(levels) if whole else [None] * 3
        details = {"macro_accuracy": mean, "macro_low": low, "macro_high": high}
        details |= {name: value for name, value in settings.items() if name not in ("format", "split", "level")}
        details |= {"seconds": made["seconds"]} | {name: made["versions"][name] for name in ("torch", "transformers")}
        return table.assign(**details, made=made["made"], folder=made.get("folder"))


def score(checkpoint: Checkpoint, data: RaceDataModule, split: str, run_dir: str | Path, **how) -> Predictions:
    """The predictions of a checkpoint, kept in `run_dir` with results.csv; how: precision and accelerator."""
    return next(iter(score_each([checkpoint], data, split, run_dir, **how).values()))


def score_each(checkpoints: list[Checkpoint], data: RaceDataModule, split: str, run_dir, **how) -> dict:
    """`score` for several checkpoints: {short name: Predictions}; raises RaceError if one is named twice."""
    hashes = [checkpoint.sha256 for checkpoint in checkpoints]
    if twice := [str(it) for it, sha256 in zip(checkpoints, hashes, strict=True) if hashes.count(sha256) > 1]:
        raise RaceError(f"these files hold the same checkpoint; name it once: {', '.join(twice)}")
    scored = [kept_predictions(checkpoint, data, split, run_dir, **how) for checkpoint in checkpoints]
    save_results(run_dir, scored)
    return dict(zip(short_names(checkpoints), scored, strict=True))


def validation_predictions(checkpoint, data: RaceDataModule, split: str, run_dir, **how) -> Predictions | None:
    """Predictions on validation, to fit a temperature for `split`; None if that makes no sense, the reason printed."""
    data.setup()
    if split != "validation" and data.val_dataset is not None:
        return kept_predictions(checkpoint, data, "validation", run_dir, **how)
    reason = "the scored split is validation itself" if split == "validation" else f"{data.cache} has none"
    print(f"no temperature is fitted on the validation split: {reason}")


def kept_predictions(checkpoint: Checkpoint, data: RaceDataModule, split: str, run_dir, **how) -> Predictions:
    """The predictions in `run_dir` if the same checkpoint, cache and settings made them; otherwise made and kept."""
    settings = {"checkpoint_sha256": checkpoint.sha256} | prediction_settings(data, split, **how)
    name = "-".join(filter(None, [checkpoint.label, checkpoint.sha256[:8], split, data.level]))
    path = Path(run_dir) / "predictions" / f"{name}.parquet"
    if found := _saved_predictions(path):
        before = {"code": CODE} | found.made["settings"]  # which earlier versions did not note
        differ = [name for name, value in settings.items() if before.get(name) != value]
        if not differ:
            return found
        print(f"{path.name}: scored again, because the saved predictions differ in {', '.join(differ)}")
    started = time.perf_counter()
    table = predict(checkpoint, data, split, **how)
    made = {
        "settings": settings,
        "checkpoint": checkpoint.name,
        "folder": str(checkpoint.path.resolve().parent).removeprefix(f"{ROOT}/"),
        "stage": checkpoint.stage or checkpoint.label,
        "source": data.cache.manifest["source"],
        "seconds": round(time.perf_counter() - started, 2),
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": {"python": platform.python_version()} | versions(),
    }
    atomic_write(path, lambda file: table.to_parquet(file, index=False))
    write_json(path.with_suffix(".json"), made | {"sha256": file_hash(path)})
    return Predictions(pd.read_parquet(path), made)


def prediction_settings(data: RaceDataModule, split: str, precision: str | None = None, accelerator=None) -> dict:
    """Everything but the checkpoint that decides predictions to the last bit, with defaults resolved.

    precision: default by device, one of race.device.AUTOCAST; accelerator: "cpu", "gpu" or None.
    """
    whole, device = len(data.cache.tables(split)[1]), default_device(accelerator)
    precision = precision or default_precision(accelerator)
    if precision not in AUTOCAST:
        raise RaceError(f"PRECISION is {precision!r}; scoring takes one of {', '.join(AUTOCAST)}")
    limited = data.limit_questions is not None and data.limit_questions < whole
    files = json.dumps(data.cache.manifest["files"], sort_keys=True)
    return {
        "format": FORMAT,
        "cache_sha256": hashlib.sha256(files.encode()).hexdigest(),
        "split": split,
        "batch_size": data.batch_size,
        "max_len": data.max_len,
        "limit_questions": data.limit_questions if limited else None,
        "seed": data.seed if limited else None,  # draws the sample, and nothing else
        "precision": precision,
        "level": data.level,
        "device": device_name(device),
        "code": CODE,
    }


def _saved_predictions(path: Path) -> Predictions | None:
    """None if there are none, or (which is printed) other ones than the JSON file describes."""
    try:
        made = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if made["sha256"] == file_hash(path) and made["settings"]["format"] == FORMAT:
            return Predictions(pd.read_parquet(path), made, saved=True)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        pass
    print(f"{path.name}: not used, it is not what {path.with_suffix('.json').name} describes")
    return None


def save_results(run_dir: str | Path, scored: list[Predictions]) -> None:
    """Put results into results.csv, where they replace those of the same checkpoints and split; other rows stay.

    The same: of one hash, or of one name in one folder (written again). Of one level alone that level's are replaced.
    """
    path, table = Path(run_dir) / "results.csv", pd.concat([found.results.astype(object) for found in scored])
    if made := sorted(found.made["made"] for found in scored if found.saved):
        ends = " to ".join(dict.fromkeys([made[0], made[-1]]))
        print(f"saved predictions are used for {len(made)} of {len(scored)} checkpoints, made {ends}")
    with locked(path.with_name(".results.lock"), wait=True):
        if path.exists():
            old = pd.read_csv(path, dtype=str, keep_default_na=False)  # as text, so that nothing is rounded
            same = pd.Series(False, old.index)
            for columns in (["checkpoint_sha256", "split"], ["checkpoint", "folder", "split"]):
                keys = [pd.MultiIndex.from_frame(it.reindex(columns=columns, fill_value="")) for it in (old, table)]
                same |= keys[0].isin(keys[1])
            same &= ("all" in set(table["level"])) | old["level"].isin(table["level"])
            table = pd.concat([table, old[~same]])
        table = table.sort_values(["stage", "checkpoint", "split"], kind="stable")
        atomic_write(path, lambda file: table.to_csv(file, index=False))


def accuracy_table(predictions: pd.DataFrame, stage: str, checkpoint: str, split: str, only=None) -> pd.DataFrame:
    """RESULT_COLUMNS (Wilson intervals), columns of by_passage, SEEN_COLUMNS: a row for all questions and each level.

    only: the level that all are of, if they were chosen by it; then there is its row alone.
    trained_on, selected_on: the number of questions whose article was in its training or validation split, as far as
    known; missing where that is known of none. not_known: of how many it is not.
    """
    rows = []
    for level in [only] if only else ("all", *LEVELS):
        part = predictions if level == "all" else predictions[predictions["level"] == level]
        if part.empty:
            continue
        row = {"stage": stage, "checkpoint": checkpoint, "split": split, "level": level}
        row |= {"questions": len(part), "correct": int(statistics.is_correct(part).sum())}
        row |= {"options": len(statistics.letters_of(part))}
        row |= statistics.by_passage(part)
        row |= {name: part[column].sum(min_count=1) for name, column in SEEN_COLUMNS.items()}
        rows.append(row | {"not_known": part[list(SEEN_COLUMNS.values())].isna().sum().max()})
    table = statistics.with_accuracy(pd.DataFrame(rows)).astype(dict.fromkeys(SEEN_COLUMNS, "Int64"))
    return table[[*RESULT_COLUMNS, *table.columns.difference(RESULT_COLUMNS, sort=False)]]


def predict(checkpoint: Checkpoint, data: RaceDataModule, split: str = "test", **how) -> pd.DataFrame:
    """Score one checkpoint on a split; one row a question, in the order of the cache. how: as prediction_settings.

    Columns: example_id, question_index, level, answer, prediction, p_A …, kind, those of RaceDataset.facts and seen.
    """
    precision = prediction_settings(data, split, **how)["precision"]
    checkpoint.check_encoding(data.cache)
    dataset, module, parts = data.dataset(split), _loaded(checkpoint, data, how.get("accelerator")), []
    label = f"{checkpoint.path.parent.name}/{checkpoint.stage or checkpoint.label}"
    with tqdm(desc=f"{label[:40]}, {split}", total=len(dataset), unit=" questions", leave=False) as bar:
        for batch in data.ordered_loader(split):
            parts.append(_probabilities(module, batch, precision))
            bar.update(len(batch))
    probabilities = np.empty((len(dataset), data.cache.options))
    probabilities[dataset.length_order()] = torch.cat(parts).cpu().numpy()  # here the host waits for the device
    if bad := int((~np.isfinite(probabilities)).any(1).sum()):
        raise RaceError(
            f"{checkpoint}: the output is not finite on {bad:,} of {len(dataset):,} questions; it has diverged, "
            f'or {precision} has too small a range: try PRECISION = "32-true"'
        )
    columns = dataset.columns()
    table = pd.DataFrame({name: columns[name] for name in ("example_id", "question_index", "level")})
    table["answer"] = np.take(LETTERS, columns["label"])
    table["prediction"] = np.take(LETTERS, probabilities.argmax(1))  # as accuracy is counted in training
    table[PROBABILITIES[: data.cache.options]] = probabilities
    facts = dataset.facts()  # of each question, so that analyses need no text
    table["kind"] = facts.pop("question").map(statistics.kind_of_question)
    known = {name: pd.array(column, "boolean") for name, column in seen_before(checkpoint.lineage, dataset).items()}
    return pd.concat([table, facts, pd.DataFrame(known)], axis=1)


def _loaded(checkpoint: Checkpoint, data: RaceDataModule, accelerator: str | None):
    device = default_device(accelerator)
    module = checkpoint.load(data.cache).to(device).eval()
    fit_memory(module, device)
    return module


@torch.inference_mode()
def _probabilities(module, batch, precision: str) -> torch.Tensor:
    """[B, k] probabilities of the options of a batch, on the module's device, computed in micro-batches that fit."""
    half = AUTOCAST[precision]
    with torch.autocast(module.device.type, half, enabled=half is not None):
        parts = in_parts(module, batch.to(module.device), lambda part, is_last: module(part).double().softmax(1))
    return torch.cat(parts)


def answer_question(
    checkpoint: Checkpoint, data: RaceDataModule, article: str, question: str, options: list[str], accelerator=None
) -> pd.DataFrame:
    """A checkpoint's answer to a typed question: letter, option and probability, a row each; in float32."""
    batch = collate([data.cache.encode_question(article, question, options, data.max_len)])
    probabilities = _probabilities(_loaded(checkpoint, data, accelerator), batch, "32-true")[0].cpu().numpy()
    return pd.DataFrame({"letter": LETTERS[: len(options)], "option": options, "probability": probabilities})


def save_answers(checkpoint: Checkpoint, source: str, data: RaceDataModule, out: str | Path, **how) -> pd.DataFrame:
    """A checkpoint's choice for every question of a source whose answers may be missing; kept as CSV and parquet.

    Columns: split ("test"), id, question_index, place, question, choice ("A" …), option (its text), p_A …; a row for
    each question, in the order of the source. out: the folder; how: those of `predict`. Raises RaceError.
    """
    cache, manifest = data.cache, data.cache.manifest
    columns = tuple((name, tuple(given)) for name, given in manifest.get("columns", ()) if name in COLUMNS)
    reading = Reading(False, columns, manifest.get("numbering", "letters"))
    checkpoint.check_encoding(cache)
    with tempfile.TemporaryDirectory() as folder:
        made = build_cache(source, str(cache.model), f"{folder}/asked", cache.manifest["max_qa_len"], how=reading)
        asked = RaceDataModule(f"{folder}/asked", data.batch_size, data.max_len)
        if asked.cache.options != cache.options:
            raise RaceError(f"{source}: {asked.cache.options} options a question; {cache} has {cache.options}")
        found, dataset = predict(checkpoint, asked, "test", **how), asked.dataset("test")
        texts = [dataset.text(row) for row in range(len(dataset))]
    chosen = [text["options"][LETTERS.index(letter)] for text, letter in zip(texts, found["prediction"], strict=True)]
    found = found.assign(split="test", place=made["places"], question=[it["question"] for it in texts], option=chosen)
    columns = ["split", "id", "question_index", "place", "question", "choice", "option"]
    columns += [*found.filter(items=PROBABILITIES)]
    table = found.rename(columns={"example_id": "id", "prediction": "choice"})[columns].round(6)
    place = hashlib.sha256(str(Path(source).resolve()).encode()).hexdigest()[:8]  # names occur in several folders
    path = Path(out) / f"{Path(source).stem[:40]}-{checkpoint.label}-{checkpoint.sha256[:8]}-{place}.csv"
    atomic_write(path, lambda file: table.to_csv(file, index=False))
    atomic_write(path.with_suffix(".parquet"), lambda file: table.to_parquet(file, index=False))
    print(f"{len(table):,} questions answered; the table is {path}")
    return table
