"""The files that evaluations leave: predictions with what made them, and results as JSON and CSV."""

import hashlib
import json
import math
from pathlib import Path

import pandas as pd

from race_files import file_hash, write_whole


def write_json(path: Path, content: object) -> None:
    """Write JSON whole; numbers that JSON does not know become null."""
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def _plain(value: object) -> object:
    """Tables as lists of records, numpy's numbers as Python's, NaN as None."""
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


# -------------------------------------------------------------------------------------------------- predictions


def predictions_path(run_dir: str | Path, checkpoint: str | Path, split: str) -> Path:
    """Where the predictions of a checkpoint on a split lie; what made them lies beside, as JSON."""
    return Path(run_dir) / "predictions" / f"{Path(checkpoint).stem}-{split}.parquet"


def save_predictions(path: Path, predictions: pd.DataFrame, made: dict) -> None:
    """Write predictions, and then `made`, which says by what and holds their hash."""
    write_whole(path, lambda file: predictions.to_parquet(file, index=False))
    write_json(path.with_suffix(".json"), made | {"sha256": file_hash(path)})


def read_predictions(path: Path, settings: dict) -> tuple[pd.DataFrame, dict] | str:
    """(predictions, what made them) if they are whole and were made with these settings; otherwise why not."""
    beside = path.with_suffix(".json")
    if not path.exists() or not beside.exists():
        return "no saved predictions"
    try:
        made = json.loads(beside.read_text(encoding="utf-8"))
        differs = [name for name, value in settings.items() if made["settings"].get(name) != value]
        whole = made["sha256"] == file_hash(path)
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{beside.name} cannot be read"
    if differs:
        return f"the saved predictions differ in {', '.join(differs)}"
    return (pd.read_parquet(path), made) if whole else f"{path.name} is not the file that {beside.name} describes"


# -------------------------------------------------------------------------------------------------- results


def read_results(run_dir: str | Path) -> list[dict]:
    """The rows of results.json, or of a results.csv that is alone; none where there is neither. Raises ValueError."""
    path, flat = Path(run_dir) / "results.json", Path(run_dir) / "results.csv"
    if path.exists():
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            if all({"stage", "checkpoint", "split"} <= row.keys() for row in rows):
                return rows
        except (ValueError, AttributeError, TypeError):
            pass
        raise ValueError(f"{path}: not a list of results; move it away and score again")
    return pd.read_csv(flat).to_dict("records") if flat.exists() else []


def save_results(table: pd.DataFrame, run_dir: str | Path, details: dict | None = None) -> None:
    """Put a table into results.json and results.csv; rows of the same checkpoint and split are replaced, others stay.

    details: goes with each row into results.json only.
    """
    rows = [row | (details or {}) for row in table.to_dict("records")]
    keys = {(row["checkpoint"], row["split"]) for row in rows}
    rows += [row for row in read_results(run_dir) if (row["checkpoint"], row["split"]) not in keys]
    rows.sort(key=lambda row: (str(row["stage"]), row["checkpoint"], row["split"]))
    flat = pd.DataFrame([{key: value for key, value in row.items() if not isinstance(value, dict)} for row in rows])
    flat = flat[[*table.columns, *(name for name in flat.columns if name not in table.columns)]]
    write_json(Path(run_dir) / "results.json", rows)
    write_whole(Path(run_dir) / "results.csv", lambda file: flat.to_csv(file, index=False))
