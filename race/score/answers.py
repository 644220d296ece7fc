"""A model's answers to questions without known answers: a table, and no accuracy.

python -m race.score.answers checkpoints/race/e3-….ckpt questions.csv runs/race/answers --cache cache/race
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from race import LETTERS, RaceError
from race.data.cache import build_cache, read_manifest, splits_of
from race.data.module import RaceDataset
from race.files import atomic_write
from race.score.predict import predict
from race.score.statistics import PROBABILITIES
from race.train.checkpoints import Checkpoint


def main(arguments: list[str] | None = None) -> int:
    """Answer the questions of a source; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m race.score.answers", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", help="a checkpoint, a folder for transformers, or a hub name")
    add(
        "source", help="the questions: any source of generate_race_cache.py, such as a CSV file; answers may be missing"
    )
    add("out", help="the folder for the table, as CSV and parquet")
    add("--cache", default="cache/race", help="the cache that keeps the checkpoint's tokenizer (default cache/race)")
    add("--precision", help="bf16-mixed, 16-mixed or 32-true (default: by device)")
    add("--accelerator", choices=("cpu", "gpu"), help="default: the GPU if there is one")
    options = parser.parse_args(arguments)
    how = {"precision": options.precision, "accelerator": options.accelerator}
    try:
        checkpoint = Checkpoint(options.checkpoint)
        table, path = save_answers(checkpoint, options.source, options.cache, options.out, **how)
    except (RaceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(table):,} questions answered: {path} and {path.with_suffix('.parquet').name}")
    return 0


def save_answers(
    checkpoint: Checkpoint, source: str, cache_dir: str | Path, out: str | Path, **settings
) -> tuple[pd.DataFrame, Path]:
    """`answers`, kept in the folder `out` as CSV and parquet: (table, path of the CSV)."""
    table = answers(checkpoint, source, cache_dir, **settings)
    path = Path(out) / f"{Path(source).stem}-{checkpoint.label}-{checkpoint.sha256[:8]}.csv"
    atomic_write(path, lambda file: table.to_csv(file, index=False))
    atomic_write(path.with_suffix(".parquet"), lambda file: table.to_parquet(file, index=False))
    return table, path


def answers(checkpoint: Checkpoint, source: str, cache_dir: str | Path, **settings) -> pd.DataFrame:
    """A checkpoint's choice for every question of a source, a row each, in the order of the source.

    Columns: split, id, question_index, question, choice ("A".."D"), option (its text), p_A … p_D. The cache gives the
    tokenizer and the encoding; settings: max_len (that of its training), precision, batch_size, device and accelerator
    of `predict`. Raises RaceError.
    """
    manifest, model = read_manifest(cache_dir), str(Path(cache_dir) / "model")
    checkpoint.check_encoding(manifest, cache_dir)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "questions"
        splits = splits_of(build_cache(source, model, cache, manifest["max_qa_len"], answers=False))
        settings.setdefault("max_len", checkpoint.max_len)
        return pd.concat([_of_split(checkpoint, cache, split, settings) for split in splits], ignore_index=True)


def _of_split(checkpoint: Checkpoint, cache: Path, split: str, settings: dict) -> pd.DataFrame:
    predictions, dataset = predict(checkpoint, cache, split, **settings), RaceDataset(cache, split)
    texts = [dataset.text(row) for row in range(len(dataset))]
    chosen = predictions["prediction"].map(LETTERS.index)
    columns = {
        "split": split,
        "id": predictions["example_id"],
        "question_index": predictions["question_index"],
        "question": [text["question"] for text in texts],
        "choice": predictions["prediction"],
        "option": [text["options"][option] for text, option in zip(texts, chosen, strict=True)],
    }
    return pd.DataFrame(columns).join(np.round(predictions[PROBABILITIES], 6))


if __name__ == "__main__":
    sys.exit(main())
