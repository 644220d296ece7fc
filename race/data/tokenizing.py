"""Texts → token ids, each distinct word tokenised once where that gives the same ids as the whole text."""

import json
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

CHUNK = 8192  # texts tokenised at a time: bounds memory
# Texts that are not split: Arrow and the tokenizer may differ on this whitespace, or a mark could join a space.
NOT_SPLIT = r"[\x1c-\x1f]|(^|[\s\p{Z}\x{85}])[\p{M}\x{200c}\x{200d}]"
# Normalisers that treat a word in the same way whatever its neighbours are.
PER_WORD = {"Replace", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Lowercase", "Precompiled", "BertNormalizer"}


class WordTokenizer:
    """Texts → token ids without special tokens; the ids of each word seen are kept for the next texts."""

    def __init__(self, tokenizer, workers: int = 1):
        os.environ.setdefault("RAYON_NUM_THREADS", str(workers))
        self.tokenizer = tokenizer
        # the tokenizer looks for added tokens before it splits: a text with one is not split here either
        not_split = [NOT_SPLIT, *map(re.escape, tokenizer.get_added_vocab())] if splits_on_whitespace(tokenizer) else ""
        self._not_split = "|".join(not_split)  # matches every text if the tokenizer is of another kind
        self._rows: dict[str, int] = {}  # word → its row in _ids
        self._ids = pa.array([], pa.list_(pa.uint16() if len(tokenizer) <= 1 << 16 else pa.uint32()))

    def __call__(self, texts: list[str], desc: str = "tokenising") -> pa.ListArray:
        """[N] texts → ListArray [N] of ids."""
        starts = range(0, len(texts), CHUNK)
        bar = tqdm(starts, desc=desc, unit=" texts", unit_scale=CHUNK, delay=2, leave=False)
        return pa.concat_arrays([self._ids[:0], *(self._tokenize(texts[start : start + CHUNK]) for start in bar)])

    def _tokenize(self, texts: list[str]) -> pa.ListArray:
        array = pa.array(texts, pa.large_string())
        whole = pa.ListArray.from_arrays(np.arange(len(texts) + 1, dtype=np.int32), array)  # each text as one "word"
        words = pc.if_else(pc.match_substring_regex(array, self._not_split), whole, pc.utf8_split_whitespace(array))
        coded = words.values.dictionary_encode()
        ids = self._ids_of(coded.dictionary.to_pylist()).take(coded.indices)
        return pa.ListArray.from_arrays(ids.offsets.take(words.offsets), ids.values)

    def _ids_of(self, words: list[str]) -> pa.ListArray:
        if not self._not_split:  # whole texts do not come again
            self._rows, self._ids = {}, self._ids[:0]
        new = [word for word in words if word not in self._rows]
        if new:
            encoded = self.tokenizer(
                new, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
            )
            self._rows.update(zip(new, range(len(self._rows), len(self._rows) + len(new)), strict=True))
            self._ids = pa.concat_arrays([self._ids, pa.array(encoded["input_ids"], self._ids.type)])
        return self._ids.take(pa.array([self._rows[word] for word in words], pa.int64()))


def splits_on_whitespace(tokenizer) -> bool:
    """Whether tokenising word by word is exact: whitespace separates, and the normaliser looks at no neighbours."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizer = description["normalizer"] or {"normalizers": []}
    normalizers = normalizer.get("normalizers", [normalizer])
    # what a replacement looks for; a regular expression counts as whitespace, for it could match across words
    patterns = [step["pattern"].get("String", " ") for step in normalizers if step["type"] == "Replace"]
    if any(step["type"] not in PER_WORD for step in normalizers) or re.search(r"\s", "".join(patterns)):
        return False
    splitter = description["pre_tokenizer"] or {"type": "none"}
    first, *others = splitter.get("pretokenizers", [splitter])
    if first["type"] == "BertPreTokenizer":
        return not others
    metaspace = all(step["type"] == "Metaspace" and step["prepend_scheme"] == "always" for step in others)
    return first["type"] == "WhitespaceSplit" and metaspace
