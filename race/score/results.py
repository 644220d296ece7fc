"""What evaluations leave in a run folder: predictions with what made them; the results' columns, as JSON and CSV."""

import hashlib
import json
import math
from pathlib import Path

import pandas as pd

from race import LEVELS, RaceError
from race.files import atomic_write, file_hash
from race.score.statistics import SEEN_COLUMNS, by_passage, is_correct, macro_accuracy, wilson

RESULT_COLUMNS = ["stage", "checkpoint", "split", "level", "questions", "correct", "accuracy", "ci_low", "ci_high"]
PASSAGE_COLUMNS = ["passages", "icc", "design_effect", "passage_low", "passage_high"]
MACRO_COLUMNS = ["macro_accuracy", "macro_low", "macro_high"]
SETTINGS_COLUMNS = ["checkpoint_sha256", "cache_sha256", "batch_size", "max_len", "limit_questions", "seed"]
SETTINGS_COLUMNS += ["precision", "device"]
WHICH = ["checkpoint_sha256", "checkpoint", "folder"]  # what tells checkpoints apart


def accuracy_table(predictions: pd.DataFrame, stage: str, checkpoint: str, split: str) -> pd.DataFrame:
    """RESULT_COLUMNS (Wilson intervals), PASSAGE_COLUMNS (statistics.by_passage) and SEEN_COLUMNS, a row for all
    questions and for each level present.

    trained_on, selected_on: the number of questions whose article trained the checkpoint, or is in the validation split
    that chose it, as far as known; missing where that is known of none. not_known: of how many it is not.
    """
    parts = {"all": predictions}
    parts |= {level: part for level in LEVELS if len(part := predictions[predictions["level"] == level])}
    rows = []
    for level, part in parts.items():
        questions, correct = len(part), int(is_correct(part).sum())
        low, high = wilson(correct, questions)
        values = [stage, checkpoint, split, level, questions, correct, correct / questions, float(low), float(high)]
        rows.append(dict(zip(RESULT_COLUMNS, values, strict=True)) | by_passage(part) | _seen(part))
    return pd.DataFrame(rows).astype(dict.fromkeys(SEEN_COLUMNS, "Int64"))


def _seen(part: pd.DataFrame) -> dict:
    """SEEN_COLUMNS and not_known, counted."""
    known = {name: part.get(column, pd.Series(pd.NA, part.index)) for name, column in SEEN_COLUMNS.items()}
    counts = {name: int(column.sum()) if column.notna().any() else None for name, column in known.items()}
    return counts | {"not_known": max(int(column.isna().sum()) for column in known.values())}


def result_table(predictions: pd.DataFrame, made: dict) -> pd.DataFrame:
    """accuracy_table, then macro accuracy over the levels, hashes, settings, device, seconds, versions and folder.

    Of one level alone there is one row, of that level.
    """
    settings, versions = made["settings"], made["versions"]
    table = accuracy_table(predictions, made["stage"], made["checkpoint"], settings["split"])
    if settings.get("level"):
        table = table[table["level"] == settings["level"]].reset_index(drop=True)
    levels = table[table["level"] != "all"]
    whole = len(levels) == len(LEVELS) and levels["questions"].sum() == table["questions"].max()
    macro = macro_accuracy(levels) if whole else [None] * 3
    details = dict(zip(MACRO_COLUMNS, macro, strict=True))
    details |= {name: settings[name] for name in SETTINGS_COLUMNS} | {"seconds": made["seconds"]}
    details |= {name: versions[name] for name in ("torch", "transformers")} | {"made": made["made"]}
    details |= {"folder": made.get("folder")}
    return table.assign(**details)


def predictions_path(run_dir: str | Path, checkpoint, split: str, level: str | None = None) -> Path:
    """The file with the predictions of a Checkpoint, by name and hash; a JSON file beside it says what made them."""
    parts = [checkpoint.label, checkpoint.sha256[:8], split, *([level] if level else [])]
    return Path(run_dir) / "predictions" / f"{'-'.join(parts)}.parquet"


def save_predictions(path: Path, predictions: pd.DataFrame, made: dict) -> None:
    """Write predictions, and then `made`, which says by what, with their hash."""
    atomic_write(path, lambda file: predictions.to_parquet(file, index=False))
    write_json(path.with_suffix(".json"), made | {"sha256": file_hash(path)})


def read_predictions(path: Path, settings: dict) -> tuple[pd.DataFrame, dict] | str:
    """(predictions, what made them) if they are complete and were made with these settings; otherwise why not."""
    beside = path.with_suffix(".json")
    if not path.exists() or not beside.exists():
        return "no saved predictions"
    try:
        made = json.loads(beside.read_text(encoding="utf-8"))
        differs = [name for name, value in settings.items() if made["settings"].get(name) != value]
        complete = made["sha256"] == file_hash(path)
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{beside.name} cannot be read"
    if differs:
        return f"the saved predictions differ in {', '.join(differs)}"
    return (pd.read_parquet(path), made) if complete else f"{path.name} is not the file that {beside.name} describes"


def read_results(run_dir: str | Path) -> list[dict]:
    """The rows of results.json, or of a results.csv without it; none if there is neither. Raises RaceError."""
    path, flat = Path(run_dir) / "results.json", Path(run_dir) / "results.csv"
    if path.exists():
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            if all({"stage", "checkpoint", "split"} <= row.keys() for row in rows):
                return rows
        except (ValueError, AttributeError, TypeError):
            pass
        raise RaceError(f"{path}: not a list of results; move it away and score again")
    return pd.read_csv(flat).to_dict("records") if flat.exists() else []


def save_results(table: pd.DataFrame, run_dir: str | Path, details: dict) -> None:
    """Put a table into results.json and results.csv; the same checkpoint's rows of the split are replaced, others stay.

    The same: of one hash, or of one name in one folder, where a file has been written again. Rows of a level alone
    replace only that level's. details: nested values that go with each row into results.json only.
    """
    rows = [row | details for row in table.to_dict("records")]
    new, levels = rows[0], {row["level"] for row in rows}

    def replaced(row: dict) -> bool:
        (sha256, new_sha256), (name, new_name), (folder, new_folder) = ((row.get(it), new.get(it)) for it in WHICH)
        there = pd.isna(folder) or folder == new_folder  # earlier versions kept no folder
        same = (sha256 == new_sha256 and not pd.isna(sha256)) or (name == new_name and there)
        return same and row["split"] == new["split"] and ("all" in levels or row["level"] in levels)

    rows += [row for row in read_results(run_dir) if not replaced(row)]
    rows.sort(key=lambda row: (str(row["stage"]), row["checkpoint"], row["split"]))
    flat = pd.DataFrame([{key: value for key, value in row.items() if not isinstance(value, dict)} for row in rows])
    flat = flat[[*table.columns, *(name for name in flat.columns if name not in table.columns)]]
    write_json(Path(run_dir) / "results.json", rows)
    atomic_write(Path(run_dir) / "results.csv", lambda file: flat.to_csv(file, index=False))


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically: tables as lists of records, numbers that JSON does not know as null."""
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(path, lambda file: file.write_text(text, encoding="utf-8"))


def _plain(value: object) -> object:
    if isinstance(value, pd.DataFrame):
        value = value.to_dict("records")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


def content_hash(value: object) -> str:
    """sha256 of a plain value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
