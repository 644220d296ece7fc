"""How a question becomes token ids: the protocol of the ALBERT authors, top to bottom.

One sequence an option: `[CLS] article [SEP] question+option [SEP]`. Question+option is truncated from the left, to
MAX_QA_LEN tokens, when the cache is made; the article from the right, to MAX_LEN tokens in all, when it is read.
"""

import itertools
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from race import MAX_LEN, RaceError

CHUNK = 8192  # texts tokenised at a time: bounds memory
WORDS = r"^[\t\n\r -~]*$"  # texts of which each word is tokenised alone; in others, a mark may join a space
PROBE = " Two  words,\n(and) it's\t$3.50 or 4%. "  # shows whether a tokenizer sees each word alone


def question_option(question: str, option: str) -> str:
    """The text of the second segment: the option in each blank, a run of `_`; without a blank, the option follows."""
    return re.sub("_+", lambda _: option, question) if "_" in question else f"{question} {option}"


def tokenize(tokenizer, texts: list[str], desc: str = "tokenising") -> pa.ListArray:
    """[N] texts → ListArray [N] of token ids without special tokens; where that is the same, word by word."""
    kind = pa.list_(pa.uint16() if len(tokenizer) <= 1 << 16 else pa.uint32())
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # which earlier calls may have set
    backend.no_padding()

    def ids_of(some: list[str]) -> pa.ListArray:
        return pa.array([one.ids for one in backend.encode_batch_fast(some, add_special_tokens=False)], kind)

    probe = " ".join(tokenizer.get_added_vocab()) + PROBE
    by_word = ids_of([probe]).values.equals(ids_of(probe.split()).values)
    chunks, starts = [pa.array([], kind)], range(0, len(texts), CHUNK)
    for start in tqdm(starts, desc=desc, unit=" texts", unit_scale=CHUNK, delay=2, leave=False):
        chunk = pa.array(texts[start : start + CHUNK], pa.large_string())
        words = pa.ListArray.from_arrays(np.arange(len(chunk) + 1, dtype=np.int32), chunk)  # each text as one
        if by_word:
            words = pc.if_else(pc.match_substring_regex(chunk, WORDS), pc.ascii_split_whitespace(chunk), words)
        coded = words.values.dictionary_encode()
        ids = ids_of(coded.dictionary.to_pylist()).take(coded.indices)  # each distinct word is tokenised once
        chunks.append(pa.ListArray.from_arrays(ids.offsets.take(words.offsets), ids.values))
    return pa.concat_arrays(chunks)


def keep_last(lists: pa.ListArray, count: int) -> pa.ListArray:
    """Truncate each list from the left, to its last `count` values (after ALBERT's run_race)."""
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
    lengths = np.diff(offsets)
    kept = np.repeat(offsets[1:], lengths) - np.arange(len(values), dtype=offsets.dtype) <= count
    kept_offsets = np.cumsum([0, *np.minimum(lengths, count)], dtype=np.int32)
    return pa.ListArray.from_arrays(kept_offsets, values[kept])


@dataclass(frozen=True)
class Template:
    """The special tokens of a sequence: `before` article `between` question+option `after`.

    segments: the token type of each special token and text; of [CLS] article [SEP] question+option [SEP]: 0 0 0 1 1.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    segments: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer, has_articles: bool = True) -> "Template":
        """Read from a pair that the tokenizer encodes; raises RaceError if none stand between the texts.

        Without articles from a single text: that of question and option, behind an empty article.
        """
        if not has_articles:
            one = tokenizer("b", return_token_type_ids=True, return_special_tokens_mask=True)
            ids, kinds, at = one["input_ids"], one["token_type_ids"], one["special_tokens_mask"].index(0)
            return cls(tuple(ids[:at]), (), tuple(ids[at + 1 :]), (*kinds[:at], 0, *kinds[at:]))
        pair = tokenizer("a", "b", return_token_type_ids=True, return_special_tokens_mask=True)
        tokens = zip(pair["special_tokens_mask"], pair["input_ids"], pair["token_type_ids"], strict=True)
        runs = [(special, [*run]) for special, run in itertools.groupby(tokens, key=lambda token: token[0])]
        specials = [tuple(number for _, number, _ in run) for special, run in runs if special]
        if runs and not runs[0][0]:  # as XLNet, which has none before the article
            specials.insert(0, ())
        kinds = [kind for special, run in runs for *_, kind in (run if special else run[:1])]
        no_first = specials[:1] == [()] and tokenizer.padding_side != "left"  # what a head would read
        if [special for special, _ in runs][-4:] != [0, 1, 0, 1] or len(specials) != 3 or no_first:
            expected = "does not encode a pair of texts as [CLS] article [SEP] question [SEP]"
            raise RaceError(f"{tokenizer.name_or_path}: its tokenizer {expected}; choose another model")
        return cls(*specials, segments=tuple(kinds))

    @property
    def specials(self) -> int:
        """The number of special tokens in a sequence."""
        return len(self.before) + len(self.between) + len(self.after)

    def sequence(self, article, qa, max_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of an article and of question+option → (input_ids, token_type_ids) of at most `max_len` tokens.

        The article's end is cut off first; then, if there is no article left, the question's beginning.
        """
        qa = qa[-(max_len - self.specials) :]
        article = article[: max_len - self.specials - len(qa)]
        parts = self.before, article, self.between, qa, self.after
        input_ids = np.concatenate(parts, dtype=np.int64, casting="unsafe")  # numpy takes an empty list for floats
        counts = [1] * (self.specials + 2)
        counts[len(self.before)], counts[-len(self.after) - 1] = len(article), len(qa)
        return input_ids, np.repeat(self.segments, counts)

    def item(self, article, options: list, max_len: int, label: int, example_id: str) -> dict:
        """A question as the data module gives it: a sequence for each option."""
        sequences = [self.sequence(article, qa, max_len) for qa in options]
        input_ids, token_type_ids = map(list, zip(*sequences, strict=True))
        return {"input_ids": input_ids, "token_type_ids": token_type_ids, "label": label, "example_id": example_id}

    def lengths(self, article_lengths: np.ndarray, qa_lengths: np.ndarray, max_len: int | None = None) -> np.ndarray:
        """Tokens of sequences, after truncation to `max_len`; without it, before truncation."""
        lengths = article_lengths + qa_lengths + self.specials
        return lengths if max_len is None else np.minimum(lengths, max_len)


def check_encoding(tokenizer, template: Template, articles: list[str], texts: list[str], max_qa_len: int) -> None:
    """Compare sequences of articles with questions and options with the pairs that the tokenizer encodes itself.

    Raises RaceError if one differs. Long questions, which the tokenizer would truncate otherwise, are not compared.
    """
    ours = zip(tokenize(tokenizer, articles).to_pylist(), tokenize(tokenizer, texts).to_pylist(), strict=True)
    asked = {"max_length": MAX_LEN, "return_token_type_ids": True, "verbose": False}
    given = (articles, texts) if template.between else (texts,)
    pairs = tokenizer(*given, truncation="longest_first", **asked)  # which never fails
    theirs = zip(pairs["input_ids"], pairs["token_type_ids"], strict=True)
    for text, (article, qa), pair in zip(texts, ours, theirs, strict=True):
        sequence = tuple(ids.tolist() for ids in template.sequence(article, qa, MAX_LEN))
        if len(qa) <= min(max_qa_len, MAX_LEN // 4) and sequence != pair:
            seen = f"encodes {text[:60]!r} after an article in another way than {template}"
            raise RaceError(f"{tokenizer.name_or_path}: its tokenizer {seen}; choose another model")
