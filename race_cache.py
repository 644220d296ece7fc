"""The token cache: passages encoded once, written as Arrow files beside their text, and described by a manifest."""

import functools
import hashlib
import itertools
import json
import pickle
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError
from tqdm.auto import tqdm

from race_encoding import (
    MAX_LEN,
    SPECIALS,
    CacheError,
    Encoder,
    check_encoding,
    keep_last,
    question_option,
)
from race_files import file_hash, file_identity, flush, folder_aside, move_in
from race_memory import memory_kept
from race_sources import LABELS, LEVELS, SPLITS, Passage, read_source

FORMAT = 2
LEFT_OUT = "left-out.txt"
NO_HASH = "0" * 64
FAMILIES = ("albert", "bert")  # that RaceModule runs

# -------------------------------------------------------------------------------------------------- building


@memory_kept()
def build_cache(
    source: str,
    model: str,
    out: str | Path,
    max_qa_len: int = 128,
    workers: int = 1,
    force: bool = False,
    skip_bad: bool = False,
) -> dict:
    """Encode `source` with the tokenizer of `model` (hub name or folder) into the folder `out`; returns the manifest.

    The cache is written beside `out` and renamed when it is complete. A cache of the same content that is there
    already is kept; another one is replaced only with `force`. With `skip_bad` what is bad in the source is left out
    and listed in `out`/left-out.txt. Raises SourceError or CacheError.
    """
    started = time.perf_counter()
    out = Path(out)
    if not 1 <= max_qa_len <= MAX_LEN - SPECIALS:
        raise CacheError(f"--max-qa-len {max_qa_len}: expected 1 to {MAX_LEN - SPECIALS} tokens")
    if out.exists() and not (out / "manifest.json").is_file():
        raise CacheError(f"{out} exists and is not a cache; choose another --out")
    splits, left_out = read_source(source, skip_bad)
    with folder_aside(out) as temporary:
        folder = temporary / out.name
        try:
            manifest = _write_cache(folder, source, splits, left_out, model, max_qa_len, workers)
        except SafetensorError as error:
            raise CacheError(f"{out}: the weights of {model} cannot be read or written ({error})") from error
        manifest |= {"seconds": round(time.perf_counter() - started, 2)}
        write_manifest(folder / "manifest.json", manifest)
        for path in (*folder.rglob("*"), folder):
            flush(path)
        return _move_into_place(folder, out, manifest, force)


def _write_cache(
    folder: Path, source: str, splits: dict, left_out: list[str], model: str, max_qa_len: int, workers: int
) -> dict:
    from importlib.metadata import version

    folder.mkdir()
    if left_out:
        (folder / LEFT_OUT).write_text("".join(f"{line}\n" for line in left_out), encoding="utf-8")
    tokenizer, has_weights = keep_model(model, folder / "model")
    manifest = {
        "format": FORMAT,
        "source": {"name": source, "sha256": source_fingerprint(splits)},
        "tokenizer": {
            "name": model,
            "class": type(tokenizer).__name__,
            "sha256": tokenizer_hash(tokenizer),
            "cls": tokenizer.cls_token_id,
            "sep": tokenizer.sep_token_id,
            "vocabulary": len(tokenizer),
        },
        "model": {"name": model, "weights": has_weights},
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "pyarrow", "numpy")},
        "max_qa_len": max_qa_len,
        "notes": left_out,
        "splits": {},
    }
    encode = Encoder(tokenizer, workers)
    check_encoding(encode, [passage for passages in splits.values() for passage in passages], max_qa_len)
    for split, passages in splits.items():
        manifest["splits"][split] = _write_split(folder, split, passages, encode, max_qa_len)
    articles = [{passage.article for passage in passages} for passages in splits.values()]
    shared = Counter(itertools.chain.from_iterable(articles))
    manifest["articles_in_more_than_one_split"] = sum(count > 1 for count in shared.values())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in files
    }
    return manifest


def _write_split(folder: Path, split: str, passages: list[Passage], encode: "Encoder", max_qa_len: int) -> dict:
    """Write one split's two files; returns its counts for the manifest."""
    article_ids = encode([passage.article for passage in passages], f"{split}: articles")
    texts = [
        question_option(question, option)
        for passage in passages
        for question, options in zip(passage.questions, passage.options, strict=True)
        for option in options
    ]
    qa_ids = keep_last(encode(texts, f"{split}: questions and options"), max_qa_len)
    passage_of = np.repeat(np.arange(len(passages), dtype=np.int32), [len(passage.questions) for passage in passages])
    columns = {
        "passages": {
            "example_id": pa.array([passage.example_id for passage in passages], pa.string()),
            "level": pa.array([passage.level for passage in passages], pa.string()),
            "article": pa.array([passage.article for passage in passages], pa.large_string()),
            "article_ids": article_ids,
        },
        "questions": {
            "passage": pa.array(passage_of),
            "question_index": pa.array([i for p in passages for i in p.places], pa.int32()),
            "question": pa.array([question for p in passages for question in p.questions], pa.large_string()),
            "options": _groups_of_four(
                pa.array([o for p in passages for os in p.options for o in os], pa.large_string())
            ),
            "label": pa.array([label for p in passages for label in p.labels], pa.int8()),
            "qa_ids": _groups_of_four(qa_ids),
        },
    }
    for name, arrays in columns.items():
        batch = pa.record_batch(list(arrays.values()), names=list(arrays))
        with (
            pa.OSFile(str(folder / f"{split}-{name}.arrow"), "wb") as file,
            pa.ipc.new_file(file, batch.schema) as writer,
        ):
            writer.write_batch(batch)
    article_len = pc.list_value_length(article_ids).to_numpy()[passage_of].repeat(len(LABELS))
    lengths = article_len + pc.list_value_length(qa_ids).to_numpy() + SPECIALS
    levels = Counter(p.level for p in passages for _ in p.questions)
    return {
        "passages": len(passages),
        "questions": len(passage_of),
        "levels": {level: levels[level] for level in (*LEVELS, "") if levels[level]},
        "tokens": int(np.minimum(lengths, MAX_LEN).sum()),
        "sequences": len(lengths),
        "truncated": int((lengths > MAX_LEN).sum()),
        "token_bytes": article_ids.nbytes + qa_ids.nbytes,
    }


def _groups_of_four(values: pa.Array) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(values, len(LABELS))


def write_manifest(path: Path, manifest: dict) -> None:
    """Write a manifest with a hash of the file itself, made with zeros in the hash's own place."""
    content = {"sha256": NO_HASH} | {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(text.replace(NO_HASH, digest, 1), encoding="utf-8")


def _move_into_place(folder: Path, out: Path, manifest: dict, force: bool) -> dict:
    """Rename the finished cache; one that another process has put there meanwhile is met like one from before."""
    for attempt in itertools.count():
        if out.exists() and not force:
            there = read_manifest(out)
            if there["files"] == manifest["files"]:
                return there | {"kept": True}
            parts = [key for key in ("source", "tokenizer", "max_qa_len") if there[key] != manifest[key]]
            raise CacheError(
                f"{out} holds another cache (differs in {', '.join(parts) or 'its files'}); --force replaces it"
            )
        try:
            move_in(folder, out)
            return manifest
        except OSError:  # another process was faster
            if attempt == 10:
                raise


# -------------------------------------------------------------------------------------------------- the base model


def keep_model(model: str, folder: Path):
    """Copy tokenizer, configuration and any weights of `model` to `folder`; returns (tokenizer, has_weights)."""
    from transformers import AutoConfig

    if model == "demo":
        from demo.model import write_model

        write_model(folder)
        return load_tokenizer(folder), True
    if not Path(model).is_dir() and re.match(r"[./~]|.*/.*/", model):
        raise CacheError(f"--model {model}: no such folder")
    tokenizer = load_tokenizer(model)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CacheError(f"{model}: its configuration cannot be loaded ({str(error).splitlines()[0]})") from error
    if config.model_type not in FAMILIES:
        raise CacheError(f"{model}: a model of type {config.model_type!r}; expected {' or '.join(FAMILIES)}")
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    return tokenizer, _keep_weights(model, folder)


def load_tokenizer(model: str | Path):
    """The tokenizer of a hub name or folder; raises CacheError where there is none.

    For a folder without tokenizer files transformers makes one that knows special tokens only, to which every word is
    unknown.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CacheError(f"{model}: its tokenizer cannot be loaded ({str(error).splitlines()[0]})") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise CacheError(f"{model} has no tokenizer files (tokenizer.json or spiece.model); add those of its model")
    return tokenizer


def _keep_weights(model: str, folder: Path) -> bool:
    """Copy the weights as safetensors; a model that has only an older format is converted."""
    local = Path(model)
    if local.is_dir():
        weights = list(local.glob("model*.safetensors")) + list(local.glob("model.safetensors.index.json"))
        for path in weights:
            shutil.copyfile(path, folder / path.name)
        if weights or not list(local.glob("pytorch_model*")):
            return bool(weights)
    from transformers import AutoModel

    try:
        AutoModel.from_pretrained(model, trust_remote_code=False).save_pretrained(folder)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CacheError(f"{model}: its weights cannot be loaded safely ({str(error).splitlines()[0]})") from error
    return True


def tokenizer_hash(tokenizer) -> str:
    """sha256 of what decides the ids: the tokenizer's whole description, or its vocabulary where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # left by earlier calls
        description.pop(state, None)
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def source_fingerprint(splits: dict[str, list[Passage]]) -> str:
    """sha256 of the content of a source, whatever its file layout."""
    digest = hashlib.sha256()
    for split, passages in splits.items():
        digest.update(f"{split} {len(passages)}\n".encode())
        for passage in passages:
            digest.update(
                "\0".join([*passage[:3], *passage.questions, *itertools.chain(*passage.options)]).encode(
                    "utf-8", "replace"
                )
            )
            digest.update(bytes(passage.labels))
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------- opening


def read_manifest(cache_dir: str | Path) -> dict:
    """The manifest of a cache; raises CacheError where there is none, it is damaged or of another format."""
    path = Path(cache_dir) / "manifest.json"
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CacheError(f"{path}: not found; make the cache with generate_race_cache.py --out {cache_dir}") from error
    except OSError as error:
        raise CacheError(f"{path}: cannot be read ({error.strerror}); make the cache again with --force") from error
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path}: not JSON ({error}); make the cache again with --force") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CacheError(f"{path}: format {found!r}, expected {FORMAT}; make the cache again with --force")
    digest = str(manifest.get("sha256")).encode()
    if hashlib.sha256(content.replace(digest, NO_HASH.encode(), 1)).hexdigest().encode() != digest:
        raise CacheError(f"{path}: damaged, its hash does not agree; make the cache again with --force")
    return manifest


def check_files(cache_dir: str | Path, names: str = "") -> None:
    """Compare the files whose names begin with `names` with the manifest; raises CacheError with all that differ.

    Once a process: a file that has not been written since is not read again.
    """
    folder, manifest = Path(cache_dir), read_manifest(cache_dir)
    problems = [
        problem
        for name, expected in manifest["files"].items()
        if name.startswith(names) and (problem := _file_problem(folder / name, expected))
    ]
    if problems:
        raise CacheError("\n".join([*problems, "make the cache again with --force, or fetch a good copy"]))


def _file_problem(path: Path, expected: dict) -> str | None:
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path}: {path.stat().st_size} bytes, expected {expected['bytes']}"
    try:
        found = _known_hash(file_identity(path))
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None if found == expected["sha256"] else f"{path}: damaged, differs from the manifest (sha256)"


@functools.lru_cache(maxsize=1024)
def _known_hash(identity: tuple) -> str:
    return file_hash(identity[0])


def cache_identity(manifest: dict) -> dict:
    """What a checkpoint remembers of the cache that it was trained on."""
    return {
        "source": manifest["source"]["name"],
        "source_sha256": manifest["source"]["sha256"],
        "tokenizer": manifest["tokenizer"]["sha256"],
        "max_qa_len": manifest["max_qa_len"],
    }


def verify_cache(cache_dir: str | Path) -> list[str]:
    """Re-read every file of a cache and compare it with the manifest; returns what is wrong."""
    folder, manifest = Path(cache_dir), read_manifest(cache_dir)
    _known_hash.cache_clear()  # read again what was read before
    files = tqdm(manifest["files"].items(), desc="verifying", unit=" files", delay=2, leave=False)
    problems = [problem for name, expected in files if (problem := _file_problem(folder / name, expected))]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    problems += [
        f"{folder / name}: not in the manifest" for name in sorted(present - {"manifest.json", *manifest["files"]})
    ]
    return problems


def tables(cache_dir: str | Path, split: str) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """The passages and questions of one split, memory-mapped: nothing is read until it is used."""
    batches = []
    for name in ("passages", "questions"):
        path = Path(cache_dir) / f"{split}-{name}.arrow"
        try:
            batches.append(pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0))
        except FileNotFoundError as error:
            held = ", ".join(read_manifest(cache_dir)["splits"])
            raise CacheError(f"{cache_dir} has no {split} split (it holds: {held})") from error
        except pa.ArrowInvalid as error:
            raise CacheError(f"{path}: damaged ({error}); run generate_race_cache.py --verify {cache_dir}") from error
    return batches[0], batches[1]


def splits_of(manifest: dict) -> list[str]:
    """The splits that a cache holds, in the order train, validation, test."""
    return [split for split in SPLITS if split in manifest["splits"]]
