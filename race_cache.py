"""The token cache: passages encoded once, written as Arrow files beside their text, and described by a manifest."""

import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from race_sources import LABELS, LEVELS, SPLITS, Passage, read_source

FORMAT = 1
MAX_LEN = 512  # tokens in one sequence; the share of truncated sequences is counted against it
SPECIALS = 3  # [CLS] article [SEP] question+option [SEP]
CHUNK = 8192  # texts tokenised at a time: bounds memory
# Where whitespace for Arrow and for the tokenizer may differ, or where a mark could join a space: tokenised whole.
UNSAFE_TO_SPLIT = r"[\x1c-\x1f]|(^|[\s\p{Z}\x{85}])[\p{M}\x{200c}\x{200d}]"
LOCAL_NORMALIZERS = {
    "Replace",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "StripAccents",
    "Lowercase",
    "Precompiled",
    "BertNormalizer",
}


class CacheError(ValueError):
    """A cache that cannot be made, opened or trusted; the message names the file and what to do."""


# -------------------------------------------------------------------------------------------------- building


def build_cache(
    source: str, model: str, out: str | Path, max_qa_len: int = 128, workers: int = 1, force: bool = False
) -> dict:
    """Encode `source` with the tokenizer of `model` (hub name or folder) into the folder `out`; returns the manifest.

    The cache is written beside `out` and renamed when it is complete. A cache of the same content that is there
    already is kept; another one is replaced only with `force`. Raises SourceError or CacheError.
    """
    started = time.perf_counter()
    out = Path(out)
    if not 1 <= max_qa_len <= MAX_LEN - SPECIALS:
        raise CacheError(f"--max-qa-len {max_qa_len}: expected 1 to {MAX_LEN - SPECIALS} tokens")
    if out.exists() and not (out / "manifest.json").is_file():
        raise CacheError(f"{out} exists and is not a cache; choose another --out")
    splits, notes = read_source(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        manifest = _write_cache(folder, source, splits, model, max_qa_len, workers)
        manifest |= {"notes": notes, "seconds": round(time.perf_counter() - started, 2)}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
        _sync(folder)
        return _move_into_place(folder, out, manifest, force)


def _write_cache(folder: Path, source: str, splits: dict, model: str, max_qa_len: int, workers: int) -> dict:
    from importlib.metadata import version

    folder.mkdir()
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
            "question_index": pa.array([i for p in passages for i in range(len(p.questions))], pa.int32()),
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


def _sync(folder: Path) -> None:
    """Flush every file and folder of a finished cache to disk, before the rename makes it visible."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _move_into_place(folder: Path, out: Path, manifest: dict, force: bool) -> dict:
    if out.exists() and not force:
        there = read_manifest(out)
        if there["files"] == manifest["files"]:
            return there | {"kept": True}
        parts = [key for key in ("source", "tokenizer", "max_qa_len") if there[key] != manifest[key]]
        raise CacheError(
            f"{out} holds another cache (differs in {', '.join(parts) or 'its files'}); --force replaces it"
        )
    if out.exists():
        os.replace(out, folder.parent / "replaced")
    os.replace(folder, out)
    return manifest


# -------------------------------------------------------------------------------------------------- encoding


def question_option(question: str, option: str) -> str:
    """The second segment: a cloze question has each blank `_` filled with the option, others are joined by a space."""
    return question.replace("_", option) if "_" in question else f"{question} {option}"


def keep_last(lists: pa.ListArray, count: int) -> pa.ListArray:
    """Each list cut to its last `count` values (after ALBERT's run_race)."""
    lengths = np.diff(lists.offsets.to_numpy())
    if (lengths <= count).all():
        return lists
    kept = np.minimum(lengths, count)
    values = lists.values.to_numpy()[_ragged_positions(lists.offsets.to_numpy()[1:] - kept, kept)]
    return _list_array(values, kept)


class Encoder:
    """Texts → token ids without special tokens, each distinct word tokenised once where that is exact."""

    def __init__(self, tokenizer, workers: int = 1):
        self.tokenizer = tokenizer
        self.dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
        self.by_word = splits_on_whitespace(tokenizer)
        description = tokenizer.backend_tokenizer.to_str() if self.by_word else ""
        self.lowers = '"Lowercase"' in description or '"lowercase":true' in description
        self.marks_words = '"Metaspace"' in description
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self._starts_word = np.array([piece.startswith("▁") for piece in pieces])  # [vocabulary]
        # such tokens are looked for before anything is split: a text that holds one is tokenised whole
        self._unsafe = "|".join([UNSAFE_TO_SPLIT, *map(re.escape, tokenizer.get_added_vocab())])
        self._row_of_word: dict[str, int] = {}
        self._starts = np.zeros(0, np.int64)  # of each known word in _ids
        self._lengths = np.zeros(0, np.int64)
        self._ids = np.zeros(0, self.dtype)
        os.environ.setdefault("RAYON_NUM_THREADS", str(workers))

    def __call__(self, texts: list[str], desc: str = "tokenising") -> pa.ListArray:
        """[N] texts → ListArray [N] of ids."""
        values, lengths = [np.zeros(0, self.dtype)], [np.zeros(0, np.int64)]
        with tqdm(total=len(texts), desc=desc, unit=" texts", delay=2, leave=False) as bar:
            for start in range(0, len(texts), CHUNK):
                chunk = texts[start : start + CHUNK]
                ids, length = self._by_word(chunk) if self.by_word else self._whole(chunk)
                values.append(ids)
                lengths.append(length)
                bar.update(len(chunk))
        return _list_array(np.concatenate(values), np.concatenate(lengths))

    def _whole(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if not texts:
            return np.zeros(0, self.dtype), np.zeros(0, np.int64)
        if getattr(self.tokenizer, "is_fast", False):
            backend = self.tokenizer.backend_tokenizer
            backend.no_truncation()  # which a tokenizer's file may ask for, or a call have left behind
            backend.no_padding()
            encoded = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.fromiter(itertools.chain.from_iterable(encoded), self.dtype, lengths.sum()), lengths

    def _by_word(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        array = pa.array(texts, pa.large_string())
        unsafe = pc.match_substring_regex(array, self._unsafe).to_numpy(zero_copy_only=False)
        safe = array.filter(pa.array(~unsafe))
        words = pc.utf8_split_whitespace(pc.ascii_lower(safe) if self.lowers else safe)  # fewer distinct words
        offsets = words.offsets.to_numpy()
        coded = words.values[offsets[0] : offsets[-1]].dictionary_encode()
        rows = self._rows(coded.dictionary.to_pylist())[coded.indices.to_numpy()]
        ends = np.concatenate(([0], np.cumsum(self._lengths[rows])))
        ids = self._ids[_ragged_positions(self._starts[rows], self._lengths[rows])]
        whole = self._whole([texts[i] for i in np.flatnonzero(unsafe)])
        return _merge(unsafe, whole, (ids, np.diff(ends[offsets - offsets[0]])))

    def _rows(self, words: list[str]) -> np.ndarray:
        """The row of each word in the table of known words, after adding those not seen before."""
        new = [word for word in words if word not in self._row_of_word]
        ids, lengths = self._words(new)
        starts = len(self._ids) + np.cumsum(lengths) - lengths
        self._row_of_word.update(zip(new, itertools.count(len(self._starts))))
        self._starts, self._lengths = np.append(self._starts, starts), np.append(self._lengths, lengths)
        self._ids = np.append(self._ids, ids)
        return np.fromiter((self._row_of_word[word] for word in words), np.int64, len(words))

    def _words(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Words one by one; plain ones in lines of 256, which a tokenizer that marks word starts lets us cut again."""
        plain = np.fromiter((word.isascii() and word.isprintable() and word != "" for word in words), bool, len(words))
        if self.marks_words and plain.any():
            plain_words = [words[i] for i in np.flatnonzero(plain)]
            ids, _ = self._whole([" ".join(plain_words[i : i + 256]) for i in range(0, len(plain_words), 256)])
            starts = np.flatnonzero(self._starts_word[ids])
            if len(starts) == len(plain_words) and starts[0] == 0:
                others = self._whole([words[i] for i in np.flatnonzero(~plain)])
                return _merge(plain, (ids, np.diff(np.append(starts, len(ids)))), others)
        return self._whole(words)


def _merge(chosen: np.ndarray, a: tuple, b: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Two ragged arrays (ids, lengths), put together so that the rows of `a` lie where `chosen` [N] is true."""
    lengths = np.empty(len(chosen), np.int64)
    lengths[chosen], lengths[~chosen] = a[1], b[1]
    starts = np.cumsum(lengths) - lengths
    ids = np.empty(lengths.sum(), a[0].dtype)
    ids[_ragged_positions(starts[chosen], a[1])] = a[0]
    ids[_ragged_positions(starts[~chosen], b[1])] = b[0]
    return ids, lengths


def splits_on_whitespace(tokenizer) -> bool:
    """Whether tokenising word by word is exact: whitespace separates, and the normaliser looks at no neighbours."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizer = description["normalizer"] or {"type": "Sequence", "normalizers": []}
    normalizers = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    if any(part["type"] not in LOCAL_NORMALIZERS or _sees_whitespace(part) for part in normalizers):
        return False
    pre = description["pre_tokenizer"] or {"type": ""}
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if steps[0]["type"] == "BertPreTokenizer":
        return len(steps) == 1
    metaspace = all(step["type"] == "Metaspace" and step["prepend_scheme"] == "always" for step in steps[1:])
    return steps[0]["type"] == "WhitespaceSplit" and metaspace


def _sees_whitespace(normalizer: dict) -> bool:
    """A replacement whose pattern could match across words (regular expressions are not looked into)."""
    if normalizer["type"] != "Replace":
        return False
    pattern = normalizer["pattern"].get("String")
    return pattern is None or any(character.isspace() for character in pattern)


def _ragged_positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[N] starts and lengths → the positions of all their elements, one run after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


def _list_array(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    if offsets[-1] > np.iinfo(np.int32).max:
        raise CacheError(f"{offsets[-1]} tokens in one split: more than the 2³¹ that the cache format holds")
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def check_encoding(encode: Encoder, passages: list[Passage], max_qa_len: int, count: int = 48) -> None:
    """Compare a spread of questions, and the longest, with the tokenizer's own encoding of a pair.

    Raises CacheError where they differ, as where pairs are not [CLS] A [SEP] B [SEP] with segments 0 and 1.
    """
    tokenizer = encode.tokenizer
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise CacheError(
            f"{tokenizer.name_or_path}: the tokenizer has no [CLS] or no [SEP]; choose an ALBERT or BERT model"
        )
    longest = max(passages, key=lambda passage: len(passage.article))
    sample = [*passages[:: max(1, len(passages) // count)], longest]
    texts = [question_option(p.questions[0], p.options[0][p.labels[0]]) for p in sample]
    theirs = tokenizer(
        [passage.article for passage in sample],
        texts,
        truncation="longest_first",  # never fails; what it would cut from the question is not compared
        max_length=MAX_LEN,
        return_token_type_ids=True,
        verbose=False,
    )
    cls, sep = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    article_ids, qa_ids = encode([passage.article for passage in sample]).to_pylist(), encode(texts).to_pylist()
    for i, (passage, article, qa) in enumerate(zip(sample, article_ids, qa_ids, strict=True)):
        if len(qa) > min(max_qa_len, MAX_LEN // 4):
            continue
        first = cls + article[: MAX_LEN - SPECIALS - len(qa)] + sep
        expected = first + qa + sep, [0] * len(first) + [1] * (len(qa) + 1)
        if expected != (theirs["input_ids"][i], theirs["token_type_ids"][i]):
            raise CacheError(
                f"{tokenizer.name_or_path}: its pairs are not [CLS] A [SEP] B [SEP] with segments 0 and 1 "
                f"(seen on {passage.example_id}); choose an ALBERT or BERT model"
            )


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
    tokenizer.save_pretrained(folder)
    AutoConfig.from_pretrained(model).save_pretrained(folder)
    return tokenizer, _keep_weights(model, folder)


def load_tokenizer(model: str | Path):
    """The tokenizer of a hub name or folder; raises CacheError where there is none.

    For a folder without tokenizer files transformers makes one that knows special tokens only, to which every word is
    unknown.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
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

    AutoModel.from_pretrained(model).save_pretrained(folder)
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
    """The manifest of a cache; raises CacheError where there is none or its format is another."""
    path = Path(cache_dir) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CacheError(f"{path}: not found; make the cache with generate_race_cache.py --out {cache_dir}") from error
    except (ValueError, OSError) as error:
        raise CacheError(f"{path}: cannot be read ({error}); make the cache again with --force") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CacheError(f"{path}: format {found!r}, expected {FORMAT}; make the cache again with --force")
    return manifest


def verify_cache(cache_dir: str | Path) -> list[str]:
    """Re-read every file of a cache and compare it with the manifest; returns what is wrong."""
    folder, manifest = Path(cache_dir), read_manifest(cache_dir)
    problems = []
    for name, expected in tqdm(manifest["files"].items(), desc="verifying", unit=" files", delay=2, leave=False):
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, expected {expected['bytes']}")
        elif file_hash(path) != expected["sha256"]:
            problems.append(f"{path}: content differs from the manifest (sha256)")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    problems += [
        f"{folder / name}: not in the manifest" for name in sorted(present - {"manifest.json", *manifest["files"]})
    ]
    return problems


def file_hash(path: str | Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
