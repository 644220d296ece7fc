"""The cached data loader: questions of a token cache as packed batches, in which padding never exists."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from race_cache import CacheError, check_files, read_manifest, splits_of, tables
from race_encoding import SPECIALS
from race_sources import LABELS

OPTIONS = len(LABELS)


@dataclasses.dataclass
class PackedBatch:
    """B questions, 4 sequences each, as one flat stream of T tokens; sequence s is [cu_seqlens[s], cu_seqlens[s+1])."""

    input_ids: torch.Tensor  # int32 [T]
    token_type_ids: torch.Tensor  # int32 [T]
    position_ids: torch.Tensor  # int32 [T], from 0 in each sequence
    cu_seqlens: torch.Tensor  # int32 [4B+1]
    labels: torch.Tensor  # int64 [B]
    lengths: list[int]  # [4B] tokens, on the host: no code has to ask the device for a shape

    def __len__(self) -> int:
        return len(self.lengths) // OPTIONS

    @property
    def max_seqlen(self) -> int:
        """The longest sequence, in tokens."""
        return max(self.lengths)

    def to(self, device) -> "PackedBatch":
        """The batch with its tensors on `device`; a copy to a GPU is not waited for."""
        to_gpu = torch.device(device).type == "cuda"
        return self._map(lambda tensor: tensor.to(device, non_blocking=to_gpu))

    def pin_memory(self) -> "PackedBatch":
        """The batch in page-locked memory, so that its copy to a GPU does not block."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change) -> "PackedBatch":
        return PackedBatch(*(change(getattr(self, name)) for name in TENSORS), self.lengths)

    def micro_batches(self, token_budget: int | None) -> Iterator["PackedBatch"]:
        """The batch in order, in parts of at most `token_budget` tokens (one question at least; None: all at once)."""
        sizes = np.reshape(self.lengths, (-1, OPTIONS)).sum(1)
        first, tokens = 0, 0
        for question, size in enumerate(sizes):
            if token_budget is not None and tokens + size > token_budget and question > first:
                yield self._part(first, question)
                first, tokens = question, 0
            tokens += int(size)
        yield self._part(first, len(sizes))

    def _part(self, first: int, last: int) -> "PackedBatch":
        if (first, last) == (0, len(self)):
            return self
        lengths = self.lengths[OPTIONS * first : OPTIONS * last]
        start = sum(self.lengths[: OPTIONS * first])
        tokens = slice(start, start + sum(lengths))
        return PackedBatch(
            self.input_ids[tokens],
            self.token_type_ids[tokens],
            self.position_ids[tokens],
            self.cu_seqlens[OPTIONS * first : OPTIONS * last + 1] - start,
            self.labels[first:last],
            lengths,
        )


TENSORS = [field.name for field in dataclasses.fields(PackedBatch)][:-1]


def collate(items: list[dict]) -> PackedBatch:
    """Questions as RaceDataset gives them → one PackedBatch."""
    if not items:  # a process's share of a batch with fewer questions than there are processes
        none = torch.zeros(0, dtype=torch.int32)
        return PackedBatch(none, none, none, torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int64), [])
    sequences = [ids for item in items for ids in item["input_ids"]]
    lengths = np.fromiter(map(len, sequences), np.int32, len(sequences))
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    position_ids = np.arange(cu_seqlens[-1], dtype=np.int32) - np.repeat(cu_seqlens[:-1], lengths)
    segments = np.concatenate([ids for item in items for ids in item["token_type_ids"]])
    return PackedBatch(
        torch.from_numpy(np.concatenate(sequences).astype(np.int32)),
        torch.from_numpy(segments.astype(np.int32)),
        torch.from_numpy(position_ids),
        torch.from_numpy(cu_seqlens),
        torch.tensor([item["label"] for item in items]),
        lengths.tolist(),
    )


class RaceDataset(Dataset):
    """The questions of one split, memory-mapped: `len()` counts questions, tokens are read when they are asked for.

    `rows` restricts it to some questions of the cache. Raises CacheError.
    """

    def __init__(self, cache_dir: str | Path, split: str, max_len: int = 512, rows: np.ndarray | None = None):
        self.cache_dir, self.split, self.max_len, self.rows = cache_dir, split, max_len, rows
        tokenizer = read_manifest(cache_dir)["tokenizer"]
        self._cls, self._sep = np.array([tokenizer["cls"]]), np.array([tokenizer["sep"]])
        self._passages, self._questions = tables(cache_dir, split)
        self._passage = np.from_dlpack(
            self._questions["passage"]
        )  # shares the memory map; to_numpy() would load pandas
        self._label = np.from_dlpack(self._questions["label"])
        self._article_ids, self._article_offsets = _ragged(self._passages["article_ids"])
        self._qa_ids, self._qa_offsets = _ragged(self._questions["qa_ids"].values)

    def __reduce__(self):  # for loader workers: a memory map is opened again, not copied
        return RaceDataset, (self.cache_dir, self.split, self.max_len, self.rows)

    def __len__(self) -> int:
        return len(self._label) if self.rows is None else len(self.rows)

    def row(self, index: int) -> int:
        """The row of the cache behind question `index`; raises IndexError."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"question {index} of {len(self)}")
        return int(index) % len(self) if self.rows is None else int(self.rows[index])

    def __getitem__(self, index: int) -> dict:
        """{"input_ids": [4 int arrays], "token_type_ids": [4 int arrays], "label": int, "example_id": str}"""
        row = self.row(index)
        passage = self._passage[row]
        article = self._article_ids[self._article_offsets[passage] : self._article_offsets[passage + 1]]
        input_ids, token_type_ids = [], []
        for sequence in range(OPTIONS * row, OPTIONS * (row + 1)):
            qa = self._qa_ids[self._qa_offsets[sequence] : self._qa_offsets[sequence + 1]][-(self.max_len - SPECIALS) :]
            first = article[: self.max_len - SPECIALS - len(qa)]
            input_ids.append(np.concatenate([self._cls, first, self._sep, qa, self._sep]))
            token_type_ids.append(np.repeat([0, 1], [len(first) + 2, len(qa) + 1]))
        example_id = self._passages["example_id"][passage].as_py()
        return {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "label": int(self._label[row]),
            "example_id": example_id,
        }

    def text(self, index: int) -> dict:
        """The words behind question `index`: example_id, question_index, level, article, question, options, label."""
        row = self.row(index)
        passage, question = self._passages.slice(self._passage[row], 1), self._questions.slice(row, 1)
        names = {"example_id": passage, "level": passage, "article": passage}
        names |= {"question_index": question, "question": question, "options": question, "label": question}
        return {name: table[name][0].as_py() for name, table in names.items()}

    def lengths(self) -> np.ndarray:
        """[N, 4] tokens of each sequence, after truncation."""
        rows = np.arange(len(self._label)) if self.rows is None else self.rows
        article = np.diff(self._article_offsets)[self._passage[rows]]
        qa = np.diff(self._qa_offsets).reshape(-1, OPTIONS)[rows]
        return np.minimum(article[:, None] + qa + SPECIALS, self.max_len)

    def columns(self) -> dict[str, np.ndarray]:
        """[N] arrays example_id, question_index, level and label, in the order of the dataset."""
        rows = np.arange(len(self._label)) if self.rows is None else self.rows
        passages = self._passage[rows]
        by_passage = {
            name: self._passages[name].to_numpy(zero_copy_only=False)[passages] for name in ("example_id", "level")
        }
        return by_passage | {
            "question_index": self._questions["question_index"].to_numpy()[rows],
            "label": self._label[rows].astype(np.int64),
        }


def _ragged(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    return np.from_dlpack(lists.values), np.from_dlpack(lists.offsets)


class ShuffledBatches(Sampler[list[int]]):
    """Batches of question indices in an order that is a pure function of (seed, epoch), from batch `first` on.

    Of several processes each gets its share of every batch, so a batch holds the same questions whatever their number.
    """

    def __init__(
        self, questions: int, batch_size: int, seed: int, epoch: int = 0, first: int = 0, rank: int = 0, world: int = 1
    ):
        self.questions, self.batch_size, self.seed = questions, batch_size, seed
        self.epoch, self.first, self.rank, self.world = epoch, first, rank, world

    @property
    def sampler(self) -> "ShuffledBatches":  # where Lightning looks for set_epoch
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        if epoch != self.epoch:
            self.epoch, self.first = epoch, 0

    def order(self) -> np.ndarray:
        """[N] the questions in this epoch's order."""
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.questions)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order().tolist()
        for start in range(self.first * self.batch_size, self.questions, self.batch_size):
            yield order[start : start + self.batch_size][self.rank :: self.world]

    def __len__(self) -> int:
        return -(-self.questions // self.batch_size) - self.first


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole group of processes must not kill loader workers in the midst of a step.

    SIGTERM keeps its effect: it is how the parent ends a worker that does not answer.
    """
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def length_order(dataset: RaceDataset) -> np.ndarray:
    """[N] question indices, longest first: a memory peak shows up at once, and like lengths go together."""
    return np.argsort(-dataset.lengths().sum(1), kind="stable")


class RaceDataModule(pl.LightningDataModule):
    """Train, validation and test splits of a token cache; opens files in setup(), works without a network.

    batch_size: questions (a quarter of the sequences). limit_questions: a seeded sample of so many questions of each
    split, for a trial run. num_workers: None means 0 on CPU and 2 beside a GPU. Splits that the cache lacks are None.
    """

    def __init__(
        self,
        cache_dir: str | Path,
        batch_size: int = 32,
        max_len: int = 512,
        num_workers: int | None = None,
        limit_questions: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        problems = [f"batch_size is {batch_size}, expected 1 or more"] if batch_size < 1 else []
        if max_len < SPECIALS + 2:
            problems.append(f"max_len is {max_len}, expected {SPECIALS + 2} or more")
        if seed < 0:
            problems.append(f"seed is {seed}, expected 0 or more")
        if limit_questions is not None and limit_questions < 1:
            problems.append(f"limit_questions is {limit_questions}, expected None or 1 or more")
        if problems:
            raise ValueError("; ".join(problems))
        self.cache_dir, self.batch_size, self.max_len = Path(cache_dir), batch_size, max_len
        self.num_workers, self.limit_questions, self.seed = num_workers, limit_questions, seed
        self.train_dataset = self.val_dataset = self.test_dataset = None
        self._start = (0, 0)

    def setup(self, stage: str | None = None) -> None:
        """Open the splits that the cache holds."""
        if self.train_dataset or self.val_dataset or self.test_dataset:
            return
        held = splits_of(read_manifest(self.cache_dir))
        for split in held:
            check_files(self.cache_dir, split)
        datasets = {split: self._dataset(split) for split in held}
        self.train_dataset, self.val_dataset, self.test_dataset = map(datasets.get, ("train", "validation", "test"))

    def dataset(self, split: str) -> RaceDataset:
        """The dataset of "train", "validation" or "test"; raises CacheError where the cache lacks it."""
        self.setup()
        dataset = {"train": self.train_dataset, "validation": self.val_dataset, "test": self.test_dataset}.get(split)
        if dataset is None:
            raise CacheError(f"{self.cache_dir} has no {split} split; make a cache from a source that has one")
        return dataset

    def _dataset(self, split: str) -> RaceDataset:
        dataset = RaceDataset(self.cache_dir, split, self.max_len)
        if self.limit_questions is None or self.limit_questions >= len(dataset):
            return dataset
        sample = np.random.default_rng(self.seed).choice(len(dataset), self.limit_questions, replace=False)
        return RaceDataset(self.cache_dir, split, self.max_len, np.sort(sample))

    def start_at(self, epoch: int, batches: int) -> None:
        """Let this epoch begin after so many batches, when a stage goes on; other epochs begin at 0."""
        self._start = (epoch, batches)

    def first_batch(self, epoch: int) -> int:
        """The batch with which an epoch begins."""
        return self._start[1] if epoch == self._start[0] else 0

    def batches_per_epoch(self) -> int:
        """Batches in a whole training epoch."""
        return -(-len(self.dataset("train")) // self.batch_size)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of `batch_size` questions over all processes; the last one of an epoch may be smaller."""
        dataset, epoch = self.dataset("train"), 0 if self.trainer is None else self.trainer.current_epoch
        position = {"epoch": epoch, "first": self.first_batch(epoch)} | dict(
            zip(("rank", "world"), self._share(), strict=True)
        )
        return self._loader(dataset, ShuffledBatches(len(dataset), self.batch_size, self.seed, **position))

    def _share(self) -> tuple[int, int]:
        """(number of this process, number of processes)"""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> DataLoader:
        """The validation questions, longest first."""
        return self.ordered_loader("validation")

    def test_dataloader(self) -> DataLoader:
        """The test questions, longest first."""
        return self.ordered_loader("test")

    def ordered_loader(self, split: str) -> DataLoader:
        """The questions of a split in the order that `length_order` gives, each on one process exactly."""
        dataset, (rank, world) = self.dataset(split), self._share()
        order = length_order(dataset)[rank::world].tolist()
        size = -(-self.batch_size // world)
        return self._loader(dataset, [order[i : i + size] for i in range(0, len(order), size)])

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
            generator=torch.Generator(),  # workers get their seeds from it: the global random state stays as it was
        )
