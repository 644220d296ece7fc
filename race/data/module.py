"""The data module: opens a token cache and gives its questions, one by one or as packed batches."""

import hashlib
import itertools
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from race import MAX_LEN, SPLITS, RaceError
from race.data.batches import ShuffledBatches, collate
from race.data.cache import Cache, open_cache
from race.parameters import check


class RaceDataset(Dataset):
    """The questions of one split, memory-mapped: `len()` counts questions, tokens are read when they are used.

    cache: a Cache or its folder. rows: which rows of the cache to use (None: all). Raises RaceError.
    """

    def __init__(self, cache: Cache | str | Path, split: str, max_len: int = MAX_LEN, rows: np.ndarray | None = None):
        self.cache, self.split, self.max_len, self.rows = open_cache(cache), split, max_len, rows
        self._template = self.cache.template
        if max_len < (least := self._template.specials + 2):
            raise RaceError(f"MAX_LEN is {max_len}, expected {least} or more")
        self._passages, self._questions = self.cache.tables(split)
        # from_dlpack shares the memory map; to_numpy() would load pandas
        self._passage, self._label = (np.from_dlpack(self._questions[name]) for name in ("passage", "label"))
        self._article_ids, self._article_offsets = _ragged(self._passages["article_ids"])
        self._qa_ids, self._qa_offsets = _ragged(self._questions["qa_ids"].values)
        self._rows = np.arange(len(self._label)) if rows is None else rows

    def __reduce__(self):  # for loader workers: a memory map is opened again, not copied
        return RaceDataset, (self.cache.name, self.split, self.max_len, self.rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        """{"input_ids": [k int arrays], "token_type_ids": [k int arrays], "label": int, "example_id": str}"""
        row = self._rows[index]
        passage = self._passage[row]
        article = self._article_ids[self._article_offsets[passage] : self._article_offsets[passage + 1]]
        bounds = self._qa_offsets[self.cache.options * row : self.cache.options * (row + 1) + 1]
        options = [self._qa_ids[start:end] for start, end in itertools.pairwise(bounds)]
        example_id = self._passages["example_id"][passage].as_py()
        return self._template.item(article, options, self.max_len, int(self._label[row]), example_id)

    def text(self, index: int) -> dict:
        """The text of a question: example_id, level, article, question_index, question, options, label."""
        row = self._rows[index]
        passage = self._passages.select(["example_id", "level", "article"]).slice(self._passage[row], 1)
        question = self._questions.select(["question_index", "question", "options", "label"]).slice(row, 1)
        return passage.to_pylist()[0] | question.to_pylist()[0]

    def lengths(self) -> np.ndarray:
        """[N, k] tokens of each sequence, after truncation."""
        return self._template.lengths(*self._part_lengths(), self.max_len)

    def _part_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the articles [N, 1] and of question+option [N, k]."""
        articles = np.diff(self._article_offsets)[self._passage[self._rows], None]
        return articles, np.diff(self._qa_offsets).reshape(-1, self.cache.options)[self._rows]

    def columns(self) -> dict[str, np.ndarray]:
        """[N] arrays example_id, question_index, level and label, in the order of the dataset."""
        passages = self._passages.select(["example_id", "level"]).take(pa.array(self._passage[self._rows]))
        return {
            **{name: passages[name].to_numpy(zero_copy_only=False) for name in passages.schema.names},
            "question_index": self._questions["question_index"].to_numpy()[self._rows],
            "label": self._label[self._rows].astype(np.int64),
        }

    def facts(self):
        """[N] rows: question (text), article_tokens (before truncation), truncated (any sequence), further columns."""
        import pandas as pd

        lengths = self._part_lengths()
        questions = self._questions["question"].take(pa.array(self._rows)).to_pylist()
        truncated = (self._template.lengths(*lengths) > self.max_len).any(1)
        known = pd.DataFrame({"question": questions, "article_tokens": lengths[0][:, 0], "truncated": truncated})
        if "further" not in self._questions.schema.names:
            return known
        return known.join(pd.DataFrame(self._questions["further"].take(pa.array(self._rows)).to_pylist()))

    def article_hashes(self) -> np.ndarray:
        """[N] uint64 of each question's article: equal texts, equal numbers, whatever their spacing and capitals.

        Of a source without passages, of the question.
        """
        known = self._passages["article"] if self._template.between else self._questions["question"]
        texts = (" ".join(text.casefold().split()) for text in known.to_pylist())
        hashes = b"".join(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8] for text in texts)
        return np.frombuffer(hashes, "<u8")[self._passage[self._rows] if self._template.between else self._rows]

    def length_order(self) -> np.ndarray:
        """[N] question indices, longest first: a memory peak comes at once, and like lengths go together."""
        return np.argsort(-self.lengths().sum(1), kind="stable")


def _ragged(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    return np.from_dlpack(lists.values), np.from_dlpack(lists.offsets)


class RaceDataModule(pl.LightningDataModule):
    """Train, validation and test splits of a token cache; opens files in setup(), works without a network.

    Parameters are those of the notebooks. num_workers: None: 0 on CPU, 2 with a GPU. Splits that it lacks are None.
    """

    def __init__(
        self,
        cache_dir: str | Path | Cache,
        batch_size: int = 32,
        max_len: int = MAX_LEN,
        num_workers: int | None = None,
        limit_questions: int | None = None,
        seed: int = 0,
        level: str | None = None,
    ):
        super().__init__()
        check(batch_size=batch_size, max_len=max_len, limit_questions=limit_questions, seed=seed, level=level)
        self.cache, self.batch_size, self.max_len = open_cache(cache_dir), batch_size, max_len
        self.num_workers, self.limit_questions, self.seed, self.level = num_workers, limit_questions, seed, level
        self.longest_first = False  # within a training batch: for models that pad, so that like lengths go together
        self.train_dataset = self.val_dataset = self.test_dataset = None
        self._start = (0, 0)

    @property
    def made_with(self) -> dict:
        """The arguments that it was made with, but num_workers."""
        names = ("batch_size", "max_len", "limit_questions", "seed", "level")
        return {"cache_dir": self.cache.name} | {name: getattr(self, name) for name in names}

    def setup(self, stage: str | None = None) -> None:
        """Open the splits that the cache holds, with questions of the level."""
        if self.train_dataset or self.val_dataset or self.test_dataset:
            return
        held = self.cache.manifest["splits"].items()
        datasets = {split: self.open_split(split) for split, it in held if self.level in (None, *it["levels"])}
        self.train_dataset, self.val_dataset, self.test_dataset = map(datasets.get, SPLITS)

    def open_split(self, split: str) -> RaceDataset:
        """Open one split; raises RaceError if the cache lacks it, or its level."""
        whole = RaceDataset(self.cache, split, self.max_len)
        rows = np.arange(len(whole)) if self.level is None else np.flatnonzero(whole.columns()["level"] == self.level)
        if not len(rows):
            held = ", ".join(self.cache.manifest["splits"][split]["levels"]) or "none"
            raise RaceError(f"LEVEL = {self.level!r}: {self.cache} has no such questions in {split} (levels: {held})")
        if self.limit_questions is not None and self.limit_questions < len(rows):
            drawn = np.random.default_rng(self.seed).choice(len(rows), self.limit_questions, replace=False)
            rows = rows[np.sort(drawn)]
        return whole if len(rows) == len(whole) else RaceDataset(self.cache, split, self.max_len, rows)

    def dataset(self, split: str) -> RaceDataset:
        """The dataset of "train", "validation" or "test"; raises RaceError if the cache lacks it."""
        self.setup()
        datasets = dict(zip(SPLITS, (self.train_dataset, self.val_dataset, self.test_dataset), strict=True))
        return datasets.get(split) or self.open_split(split)  # which raises

    def start_at(self, epoch: int, batches: int) -> None:
        """Start `epoch` after its first `batches` batches, to resume a stage; other epochs start at 0."""
        self._start = (epoch, batches)

    def first_batch(self, epoch: int) -> int:
        """The number of the batch with which an epoch starts."""
        return self._start[1] if epoch == self._start[0] else 0

    def batches_per_epoch(self) -> int:
        """Batches in a whole training epoch."""
        return -(-len(self.dataset("train")) // self.batch_size)

    def batch_questions(self, batch_idx: int) -> int:
        """Questions of the batch with this number since the epoch's (re)start, of all processes together."""
        done = (self.first_batch(self.trainer.current_epoch) + batch_idx) * self.batch_size
        return min(self.batch_size, len(self.dataset("train")) - done)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of `batch_size` questions over all processes; the last one of an epoch may be smaller."""
        dataset, (rank, world) = self.dataset("train"), self._process()
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        place = self.seed, epoch, self.first_batch(epoch), rank, world
        sizes = dataset.lengths().max(1) if self.longest_first else None
        return self._loader(dataset, ShuffledBatches(len(dataset), self.batch_size, *place, sizes))

    def val_dataloader(self) -> DataLoader:
        """The validation questions, longest first."""
        return self.ordered_loader("validation")

    def ordered_loader(self, split: str) -> DataLoader:
        """The questions of a split, longest first, each on exactly one process."""
        dataset, (rank, world) = self.dataset(split), self._process()
        order = dataset.length_order()[rank::world].tolist()
        size = -(-self.batch_size // world)
        return self._loader(dataset, [order[i : i + size] for i in range(0, len(order), size)])

    def _process(self) -> tuple[int, int]:
        """(rank, world size)"""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, dataset: RaceDataset, batches) -> DataLoader:
        gpu = torch.cuda.is_available()
        workers = (2 if gpu else 0) if self.num_workers is None else self.num_workers
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            worker_init_fn=_leave_signals_to_the_parent,
            pin_memory=gpu,
            generator=torch.Generator(),  # seeds the workers, so that the global random state stays as it was
        )


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the process group must not kill a worker in a step; with SIGTERM the parent ends one that hangs."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
