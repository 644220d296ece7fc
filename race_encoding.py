"""Texts as token ids: the ALBERT authors' protocol, each distinct word tokenised once where that is exact."""

import itertools
import json
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from race_sources import Passage

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
        return np.fromiter(map(self._row_of_word.__getitem__, words), np.int64, len(words))

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
