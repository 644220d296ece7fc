"""The token cache: passages encoded once, written as Arrow files beside their text, and described by a manifest."""

import dataclasses
import hashlib
import itertools
import json
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from tqdm.auto import tqdm

from race import LEVELS, MAX_LEN, MAX_QA_LEN, OPTIONS, SPLITS, RaceError, check_least
from race.data.base_model import keep_model, load_tokenizer, tokenizer_hash
from race.data.encoding import Template, check_encoding, keep_last, question_option
from race.data.passages import Passage, read_source, record_problems
from race.data.reference import LINE, check_reference
from race.data.tokenizing import WordTokenizer
from race.files import file_hash, file_identity, known_hash, move_into_place, temporary_folder

FORMAT = 2
NO_HASH = "0" * 64
AGAIN = "make the cache again with --force"


def build_cache(
    source: str,
    model: str,
    out: str | Path,
    max_qa_len: int = MAX_QA_LEN,
    workers: int = 1,
    force: bool = False,
    skip_bad: bool = False,
    answers: bool = True,
) -> dict:
    """Encode `source` with the tokenizer of `model` (hub name or folder) into the folder `out`; returns the manifest.

    The cache is written atomically. If `out` holds a cache of the same content, that one is kept; another cache is
    replaced only with `force`. With `skip_bad`, what is bad in the source is left out and listed in
    `out`/left-out.txt. Without `answers`, questions may lack theirs: a cache to predict on only. Raises RaceError.
    """
    started, out = time.perf_counter(), Path(out)
    check_least(**{"--max-qa-len": (max_qa_len, 1)})
    if out.exists() and not (out / "manifest.json").is_file():
        raise RaceError(f"{out} exists and is not a cache; choose another --out")
    splits, left_out = read_source(source, skip_bad, answers)
    with temporary_folder(out) as temporary:
        folder = temporary / out.name
        try:
            manifest = _write_cache(folder, source, splits, left_out, model, max_qa_len, workers)
        except SafetensorError as error:
            raise RaceError(f"{out}: the weights of {model} cannot be read or written ({error})") from error
        manifest["seconds"] = round(time.perf_counter() - started, 2)
        write_manifest(folder / "manifest.json", manifest)
        return _install(folder, out, manifest, force)


def _write_cache(
    folder: Path, source: str, splits: dict, left_out: list[str], model: str, max_qa_len: int, workers: int
) -> dict:
    folder.mkdir()
    if left_out:
        (folder / "left-out.txt").write_text("".join(f"{line}\n" for line in left_out), encoding="utf-8")
    tokenizer, has_weights = keep_model(model, folder / "model")
    template = Template.of(tokenizer)
    if not 1 <= max_qa_len <= MAX_LEN - template.specials:
        raise RaceError(f"--max-qa-len {max_qa_len}: expected 1 to {MAX_LEN - template.specials} tokens")
    tokenize = WordTokenizer(tokenizer, workers)
    passages = [*itertools.chain(*splits.values())]
    check_reference(model, tokenizer, passages)
    check_encoding(tokenize, template, passages, max_qa_len)
    counts = {split: _write_split(folder, split, splits[split], tokenize, template, max_qa_len) for split in splits}
    articles = Counter(text for passages in splits.values() for text in {passage.article for passage in passages})
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "format": FORMAT,
        "source": {"name": source, "sha256": source_fingerprint(splits)},
        "tokenizer": {"name": model, "class": type(tokenizer).__name__, "vocabulary": len(tokenizer)}
        | {"sha256": tokenizer_hash(tokenizer)},
        "template": {name: [*ids] for name, ids in dataclasses.asdict(template).items()},
        "model": {"name": model, "weights": has_weights},
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "pyarrow", "numpy")},
        "max_qa_len": max_qa_len,
        "notes": left_out,
        "splits": counts,
        "articles_in_more_than_one_split": sum(count > 1 for count in articles.values()),
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
            for path in files
        },
    }


def _write_split(
    folder: Path, split: str, passages: list[Passage], tokenize: WordTokenizer, template: Template, max_qa_len: int
) -> dict:
    """Write the two files of a split; returns its counts for the manifest."""
    example_ids, levels, articles, *_ = zip(*passages, strict=True)
    rows = [
        (number, *question)
        for number, passage in enumerate(passages)
        for question in zip(passage.places, passage.questions, passage.options, passage.labels, strict=True)
    ]
    passage_of, places, questions, options, labels = zip(*rows, strict=True)
    texts = [question_option(question, option) for _, _, question, four, _ in rows for option in four]
    article_ids = tokenize(articles, f"{split}: articles")
    qa_ids = keep_last(tokenize(texts, f"{split}: questions and options"), max_qa_len)
    passage_columns = {
        "example_id": pa.array(example_ids, pa.string()),
        "level": pa.array(levels, pa.string()),
        "article": pa.array(articles, pa.large_string()),
        "article_ids": article_ids,
    }
    question_columns = {
        "passage": pa.array(passage_of, pa.int32()),
        "question_index": pa.array(places, pa.int32()),
        "question": pa.array(questions, pa.large_string()),
        "options": pa.array(options, pa.list_(pa.large_string(), OPTIONS)),
        "label": pa.array(labels, pa.int8()),
        "qa_ids": pa.FixedSizeListArray.from_arrays(qa_ids, OPTIONS),
    }
    for name, columns in (("passages", passage_columns), ("questions", question_columns)):
        batch = pa.record_batch(columns)
        with pa.ipc.new_file(str(folder / f"{split}-{name}.arrow"), batch.schema) as writer:
            writer.write_batch(batch)
    article_lengths, qa_lengths = (np.diff(ids.offsets.to_numpy()) for ids in (article_ids, qa_ids))
    article_lengths = article_lengths[np.repeat(passage_of, OPTIONS)]
    asked = Counter(levels[number] for number in passage_of)
    return {
        "passages": len(passages),
        "questions": len(rows),
        "levels": {level: asked[level] for level in (*LEVELS, "") if asked[level]},
        "tokens": int(template.lengths(article_lengths, qa_lengths, MAX_LEN).sum()),
        "sequences": len(texts),
        "truncated": int((template.lengths(article_lengths, qa_lengths) > MAX_LEN).sum()),
        "token_bytes": article_ids.nbytes + qa_ids.nbytes,
    }


def source_fingerprint(splits: dict[str, list[Passage]]) -> str:
    """sha256 of the content of a source, whatever its file layout."""
    digest = hashlib.sha256()
    for split, passages in splits.items():
        digest.update(f"{split} {len(passages)}\n".encode())
        for passage in passages:
            texts = [*passage[:3], *passage.questions, *itertools.chain(*passage.options)]
            digest.update("\0".join(texts).encode("utf-8", "replace") + bytes(label % 256 for label in passage.labels))
    return digest.hexdigest()


def write_manifest(path: Path, manifest: dict) -> None:
    """Write a manifest with a hash of its own file, computed with zeros in place of the hash."""
    content = {"sha256": NO_HASH} | {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(text.replace(NO_HASH, digest, 1), encoding="utf-8")


def _install(folder: Path, out: Path, manifest: dict, force: bool) -> dict:
    """Move the finished cache to `out`, unless a cache is there, perhaps from another process that was faster."""
    attempts = 0
    while force or not out.exists():
        try:
            move_into_place(folder, out)
            return manifest
        except OSError:  # another process has put its cache there in the meantime
            attempts += 1
            if attempts > 10:
                raise
    there = read_manifest(out)
    if there["files"] == manifest["files"]:
        return there | {"kept": True}
    parts = [key for key in ("source", "max_qa_len") if there[key] != manifest[key]]
    if there["tokenizer"]["sha256"] != manifest["tokenizer"]["sha256"]:
        parts.append("tokenizer")
    raise RaceError(f"{out} holds another cache (differs in {', '.join(parts) or 'its files'}); --force replaces it")


def read_manifest(cache_dir: str | Path) -> dict:
    """The manifest of a cache; raises RaceError if there is none, it is damaged or of another format."""
    path = Path(cache_dir) / "manifest.json"
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
    except FileNotFoundError as error:
        raise RaceError(f"{path}: not found; make the cache with generate_race_cache.py --out {cache_dir}") from error
    except OSError as error:
        raise RaceError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise RaceError(f"{path}: not JSON ({error}); {AGAIN}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise RaceError(f"{path}: format {found!r}, expected {FORMAT}; {AGAIN}")
    digest = str(manifest.get("sha256")).encode(errors="replace")
    if hashlib.sha256(content.replace(digest, NO_HASH.encode(), 1)).hexdigest().encode() != digest:
        raise RaceError(f"{path}: damaged, its hash does not agree; {AGAIN}")
    return manifest


def check_files(cache_dir: str | Path, names: str = "") -> None:
    """Compare the files whose names begin with `names` with the manifest; raises RaceError with all that differ.

    A file is read once a process, and again only if it has been written since.
    """
    if problems := _problems(Path(cache_dir), read_manifest(cache_dir), names):
        raise RaceError("\n".join([*problems, f"{AGAIN}, or fetch a good copy"]))


def _problems(folder: Path, manifest: dict, names: str = "") -> list[str]:
    files = [(folder / name, expected) for name, expected in manifest["files"].items() if name.startswith(names)]
    bar = tqdm(files, desc="verifying", unit=" files", delay=2, leave=False)
    return [problem for path, expected in bar if (problem := _file_problem(path, expected))]


def _file_problem(path: Path, expected: dict) -> str | None:
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path}: {path.stat().st_size} bytes, expected {expected['bytes']}"
    try:
        found = known_hash(file_identity(path))
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None if found == expected["sha256"] else f"{path}: damaged, differs from the manifest (sha256)"


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
    known_hash.cache_clear()  # read again what was read before
    others = [name for name in _not_in_manifest(folder, manifest) if not _left_by_system(name)]
    return _problems(folder, manifest) + [f"{folder / name}: not in the manifest" for name in others]


def left_by_system(cache_dir: str | Path) -> list[str]:
    """The files in a cache that a desktop or file system put there; nothing reads them."""
    folder = Path(cache_dir)
    return [name for name in _not_in_manifest(folder, read_manifest(folder)) if _left_by_system(name)]


def _not_in_manifest(folder: Path, manifest: dict) -> list[str]:
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return sorted(present - {"manifest.json", *manifest["files"]})


def _left_by_system(name: str) -> bool:
    """.DS_Store, ._x, .nfs…, .directory, Thumbs.db, desktop.ini, and all in __MACOSX or a hidden folder."""
    *folders, file = name.lower().split("/")
    return (
        file in ("thumbs.db", "desktop.ini")
        or "__macosx" in folders
        or any(part.startswith(".") for part in (*folders, file))
    )


def tables(cache_dir: str | Path, split: str) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """The passages and questions of one split, memory-mapped: nothing is read until it is used."""
    batches = []
    for name in ("passages", "questions"):
        path = Path(cache_dir) / f"{split}-{name}.arrow"
        try:
            batches.append(pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0))
        except FileNotFoundError as error:
            held = ", ".join(read_manifest(cache_dir)["splits"])
            raise RaceError(f"{cache_dir} has no {split} split (it holds: {held})") from error
        except pa.ArrowInvalid as error:
            raise RaceError(f"{path}: damaged ({error}); run generate_race_cache.py --verify {cache_dir}") from error
    return batches[0], batches[1]


def splits_of(manifest: dict) -> list[str]:
    """The splits that a cache holds, in the order train, validation, test."""
    return [split for split in SPLITS if split in manifest["splits"]]


def template_of(manifest: dict) -> Template:
    """How the sequences of a cache are put together."""
    if "template" not in manifest:  # as older caches keep it
        cls, sep = ((manifest["tokenizer"][name],) for name in ("cls", "sep"))
        return Template(before=cls, between=sep, after=sep, segments=(0, 0, 0, 1, 1))
    kept = {name: tuple(ids) for name, ids in manifest["template"].items()}
    if len(kept["segments"]) == 2:  # of before version 1.4: up to the question, and of the rest
        first, second = kept["segments"]
        lengths = [len(kept[name]) + 1 for name in ("before", "between", "after")]
        kept["segments"] = (first,) * (sum(lengths[:2]) - 1) + (second,) * lengths[2]
    return Template(**kept)


def check_tokenizer(model: str | Path, manifest: dict, cache_dir: str | Path) -> None:
    """Raise RaceError if a model has a tokenizer other than the cache's: the ids would be those of other words.

    Descriptions differ between versions of transformers; the same vocabulary and the same ids of a text with quotes,
    capitals, accents and digits are the same tokenizer.
    """
    try:
        own = load_tokenizer(model)
    except RaceError:
        return  # a model without a tokenizer
    if tokenizer_hash(own) == manifest["tokenizer"]["sha256"]:
        return
    kept = load_tokenizer(Path(cache_dir) / "model")
    if own.get_vocab() != kept.get_vocab() or own(LINE)["input_ids"] != kept(LINE)["input_ids"]:
        raise RaceError(f"{model} has another tokenizer than {cache_dir}: make a cache with --model {model}")


def encode_question(
    cache_dir: str | Path, article: str, question: str, options: list[str], max_len: int = MAX_LEN
) -> dict:
    """A typed question as an item of RaceDataset, with the same ids as in the cache; raises RaceError."""
    record = {"id": "typed", "article": article, "questions": [question], "options": [options], "answers": ["A"]}
    if problems := record_problems(record):
        raise RaceError("; ".join(problem for _, problem in problems))
    manifest, tokenize = read_manifest(cache_dir), WordTokenizer(load_tokenizer(Path(cache_dir) / "model"))
    (article_ids,) = tokenize([article]).to_pylist()
    qa_ids = keep_last(tokenize([question_option(question, option) for option in options]), manifest["max_qa_len"])
    return template_of(manifest).item(article_ids, qa_ids.to_pylist(), max_len, 0, "typed")
