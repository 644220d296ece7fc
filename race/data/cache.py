"""The token cache: passages encoded once, written as Arrow files beside their text, and described by a manifest."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import re
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from race import LEVELS, MAX_LEN, MAX_QA_LEN, OPTIONS, SPLITS, RaceError
from race.data.encoding import Template, check_encoding, keep_last, question_option, tokenize
from race.data.passages import PLAIN, Passage, Reading, read_source, record_problems
from race.files import below, file_hash, file_identity, known_hash, move_into_place, remove_unfinished, temporary_folder
from race.models import LINE, check_tokenizer_of_source, keep_model, load_tokenizer, local_copy, tokenizer_hash
from race.parameters import check

FORMAT = 2
NO_HASH = "0" * 64  # in place of the manifest's own, while that is computed
AGAIN = "make the cache again with --force"
SAMPLE = 48  # passages on which a tokenizer is checked, beside the longest


class Cache:
    """An opened cache: its manifest is read and checked here, once. Raises RaceError if it is missing or damaged.

    name: its folder as text. splits: those that it holds, in order.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.name = Path(folder), str(folder)
        if not self.folder.exists():  # perhaps a kill left it moved away for a new one
            remove_unfinished(self.folder.parent, self.folder.name)
        self.manifest = _read_manifest(self.folder)
        self.splits = [split for split in SPLITS if split in self.manifest["splits"]]
        self.template = _template_of(self.manifest)
        self.options: int = self.manifest.get("options", OPTIONS)  # of each question

    def __str__(self) -> str:
        return self.name

    @property
    def model(self) -> Path:
        """The folder of its base model, whose files are checked whenever they are to be read."""
        self.check_files("model/")
        return self.folder / "model"

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer of its base model."""
        return load_tokenizer(self.model)

    @property
    def identity(self) -> dict:
        """What a checkpoint remembers of the cache that it was trained on."""
        source, tokenizer = self.manifest["source"], self.manifest["tokenizer"]["sha256"]
        of_source = {"source": source["name"], "source_sha256": source["sha256"]}
        return of_source | {"tokenizer": tokenizer, "max_qa_len": self.manifest["max_qa_len"]}

    def tables(self, split: str) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        """The passages and questions of one split: checked, and memory-mapped."""
        if split not in self.splits:
            raise RaceError(f"{self} has no {split} split (it holds: {', '.join(self.splits)})")
        self.check_files(f"{split}-")
        paths = (str(self.folder / f"{split}-{name}.arrow") for name in ("passages", "questions"))
        passages, questions = (pa.ipc.open_file(pa.memory_map(path)).get_batch(0) for path in paths)
        return passages, questions

    def check_files(self, names: str = "") -> None:
        """Raise RaceError with all that is wrong with the files whose names begin with `names`."""
        if problems := self.problems(names):
            raise RaceError("\n".join([*problems, f"{AGAIN}, or fetch a good copy"]))

    def problems(self, names: str = "") -> list[str]:
        """Where files differ from the manifest; one is read once a process, and again if it has been written since."""
        files, problems = self.manifest["files"], []
        for name in tqdm([name for name in files if name.startswith(names)], "verifying", delay=2, leave=False):
            path = self.folder / name
            try:
                if known_hash(file_identity(path)) != files[name]["sha256"]:
                    problems.append(f"{path}: damaged, its hash is another than the manifest's")
            except OSError as error:
                problems.append(f"{path}: missing, or cannot be read ({error.strerror})")
        there = {names + name for name in below(self.folder / names) if not re.search(r"(^|/)\.", name)}
        others = sorted(there - {"manifest.json", *files})  # of a folder, such as "model/", or of all
        return problems + [f"{self.folder / name}: not in the manifest" for name in others]

    def check_tokenizer(self, model: str | Path) -> None:
        """Raise RaceError if a model has another tokenizer, by its vocabulary and by the ids of a text with all marks.

        Not by its description, which differs between versions of transformers.
        """
        files = [file for name in ("tokenizer.json", "vocab.*", "*.model") for file in local_copy(model).glob(name)]
        if not files:  # a model without a tokenizer
            return
        own, kept = load_tokenizer(model), self.tokenizer
        if own.get_vocab() != kept.get_vocab() or own(LINE)["input_ids"] != kept(LINE)["input_ids"]:
            raise RaceError(f"{model} has another tokenizer than {self}: make a cache with --model {model}")

    def encode_question(self, article: str, question: str, options: list[str], max_len: int = MAX_LEN) -> dict:
        """A typed question as an item of RaceDataset, with the same ids as in the cache; raises RaceError."""
        record = {"id": "typed", "article": article, "questions": [question], "options": [options], "answers": ["A"]}
        if problems := record_problems(record, Reading(options=len(options), articles=bool(self.template.between))):
            raise RaceError("; ".join(problem for _, problem in problems))
        (article_ids,) = tokenize(self.tokenizer, [article if self.template.between else ""]).to_pylist()
        texts = [question_option(question, option) for option in options]
        qa_ids = keep_last(tokenize(self.tokenizer, texts), self.manifest["max_qa_len"])
        return self.template.item(article_ids, qa_ids.to_pylist(), max_len, 0, "typed")


def open_cache(cache: "str | Path | Cache") -> Cache:
    """A cache by its folder; one that is open already as it is."""
    return cache if isinstance(cache, Cache) else Cache(cache)


def verify_cache(folder: str | Path) -> list[str]:
    """Re-read every file of a cache and compare it with its manifest; returns what is wrong. Hidden files pass."""
    known_hash.cache_clear()  # read again what was read before
    return Cache(folder).problems()


def _read_manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
    except FileNotFoundError as error:
        raise RaceError(
            f"{path}: not found; make the cache (README), or set CACHE_DIR (after make demo: cache/demo)"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise RaceError(f"{path}: cannot be read as JSON ({error}); {AGAIN}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise RaceError(f"{path}: format {found!r}, expected {FORMAT}; {AGAIN}")
    digest = str(manifest.get("sha256")).encode(errors="replace")
    if hashlib.sha256(content.replace(digest, NO_HASH.encode(), 1)).hexdigest().encode() != digest:
        raise RaceError(f"{path}: damaged, its hash does not agree; {AGAIN}")
    return manifest


def write_manifest(path: Path, manifest: dict) -> None:
    """Write a manifest with a hash of its own file."""
    text = json.dumps({"sha256": ""} | manifest | {"sha256": NO_HASH}, indent=1, ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(text.replace(NO_HASH, digest, 1), encoding="utf-8")


def _template_of(manifest: dict) -> Template:
    if "template" not in manifest:  # version 1.0
        cls, sep = ((manifest["tokenizer"][name],) for name in ("cls", "sep"))
        return Template(before=cls, between=sep, after=sep, segments=(0, 0, 0, 1, 1))
    kept = {name: tuple(ids) for name, ids in manifest["template"].items()}
    if len(kept["segments"]) == 2:  # of before version 1.4: up to the question, and of the rest
        first, second = kept["segments"]
        lengths = [len(kept[name]) + 1 for name in ("before", "between", "after")]
        kept["segments"] = (first,) * (sum(lengths[:2]) - 1) + (second,) * lengths[2]
    return Template(**kept)


def build_cache(
    source: str,
    model: str,
    out: str | Path,
    max_qa_len: int = MAX_QA_LEN,
    force: bool = False,
    skip_bad: bool = False,
    how: Reading = PLAIN,
) -> dict:
    """Encode `source` with the tokenizer of `model` into the folder `out`, atomically; returns the manifest.

    Another cache is replaced only with `force`. `skip_bad`: what is bad is listed in `out`/left-out.txt. Without
    `how.answers` some may be missing; returns `places` too. Raises RaceError.
    """
    started, out = time.perf_counter(), Path(out)
    check(max_qa_len=max_qa_len)
    if out.exists() and not (out / "manifest.json").is_file():
        raise RaceError(f"{out} exists and is not a cache; choose another --out")
    splits, left_out = read_source(source, skip_bad, how)
    with temporary_folder(out) as temporary:
        folder = temporary / out.name
        manifest = _write_cache(folder, source, splits, left_out, model, max_qa_len)
        manifest |= {"columns": how.columns, "numbering": how.numbering} if how[1:3] != PLAIN[1:3] else {}
        manifest["seconds"] = round(time.perf_counter() - started, 2)
        write_manifest(folder / "manifest.json", manifest)
        places = {} if how.answers else {"places": [place for passage in splits["test"] for place in passage.asked_at]}
        return _install(folder, out, manifest, force) | places


def _write_cache(folder: Path, source: str, splits: dict, left_out: list[str], model: str, max_qa_len: int) -> dict:
    folder.mkdir()
    if left_out:
        (folder / "left-out.txt").write_text("".join(f"{line}\n" for line in left_out), encoding="utf-8")
    tokenizer, has_weights = keep_model(model, folder / "model")
    passages = [*itertools.chain(*splits.values())]
    template = Template.of(tokenizer, any(passage.article for passage in passages))
    if max_qa_len > MAX_LEN - template.specials:
        raise RaceError(f"--max-qa-len {max_qa_len}: expected 1 to {MAX_LEN - template.specials} tokens")
    sample = [*passages[:: max(1, len(passages) // SAMPLE)], max(passages, key=lambda passage: len(passage.article))]
    articles = [passage.article for passage in sample]
    texts = [question_option(p.questions[0], p.options[0][p.labels[0]]) for p in sample]
    check_tokenizer_of_source(model, tokenizer, articles + texts)
    check_encoding(tokenizer, template, articles, texts, max_qa_len)
    counts = {split: _write_split(folder, split, splits[split], tokenizer, template, max_qa_len) for split in splits}
    occurs = Counter(text for passages in splits.values() for text in {passage.article for passage in passages} - {""})
    digest, files = tokenizer_hash(tokenizer), sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [{"bytes": it.stat().st_size, "sha256": file_hash(it)} for it in files]
    return {
        "format": FORMAT,
        "source": {"name": source, "sha256": source_fingerprint(splits), "path": Path(source).exists()},
        "tokenizer": {"name": model, "class": type(tokenizer).__name__, "vocabulary": len(tokenizer), "sha256": digest},
        "template": {name: [*ids] for name, ids in dataclasses.asdict(template).items()},
        "model": {"name": model, "weights": has_weights, "path": Path(model).exists()},
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "pyarrow", "numpy")},
        "max_qa_len": max_qa_len,
        "options": len(passages[0].options[0]),
        "notes": left_out,
        "splits": counts,
        "articles_in_more_than_one_split": sum(count > 1 for count in occurs.values()),
        "files": {it.relative_to(folder).as_posix(): of_it for it, of_it in zip(files, facts, strict=True)},
    }


def _write_split(folder: Path, split: str, passages: list, tokenizer, template: Template, max_qa_len: int) -> dict:
    """Write the two files of a split; returns its counts for the manifest."""
    example_ids, levels, articles, *_ = zip(*passages, strict=True)
    rows = [(number, *row) for number, passage in enumerate(passages) for row in zip(*passage[3:8], strict=True)]
    passage_of, questions, options, labels, further, places = zip(*rows, strict=True)
    texts, count = [question_option(row[1], option) for row in rows for option in row[2]], len(options[0])
    article_ids = tokenize(tokenizer, articles, f"{split}: articles")
    qa_ids = keep_last(tokenize(tokenizer, texts, f"{split}: questions and options"), max_qa_len)
    tables = {
        "passages": {
            "example_id": pa.array(example_ids, pa.string()),
            "level": pa.array(levels, pa.string()),
            "article": pa.array(articles, pa.large_string()),
            "article_ids": article_ids,
        },
        "questions": {
            "passage": pa.array(passage_of, pa.int32()),
            "question_index": pa.array(places, pa.int32()),
            "question": pa.array(questions, pa.large_string()),
            "options": pa.array(options, pa.list_(pa.large_string(), count)),
            "label": pa.array(labels, pa.int8()),
            "qa_ids": pa.FixedSizeListArray.from_arrays(qa_ids, count),
        },
    }
    if further[0]:
        tables["questions"]["further"] = pa.array(further)
    for name, columns in tables.items():
        batch = pa.record_batch(columns)
        with pa.ipc.new_file(str(folder / f"{split}-{name}.arrow"), batch.schema) as writer:
            writer.write_batch(batch)
    article_lengths, qa_lengths = (np.diff(ids.offsets.to_numpy()) for ids in (article_ids, qa_ids))
    article_lengths = article_lengths[np.repeat(passage_of, count)]
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


def _install(folder: Path, out: Path, manifest: dict, force: bool) -> dict:
    """Move the finished cache to `out`, unless a cache is there, perhaps from another process that was faster."""
    if force or not out.exists():
        known = []
        with contextlib.suppress(RaceError):  # of a damaged one
            known = _read_manifest(out)["files"]
        try:
            move_into_place(folder, out, known)
            return manifest
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    there = _read_manifest(out)
    if there["files"] == manifest["files"]:
        return there | {"kept": True}
    parts = [key for key in ("source", "max_qa_len", "tokenizer") if there[key] != manifest[key]]
    raise RaceError(f"{out} holds another cache ({', '.join(parts) or 'files'} differ); move it away, or --force")
