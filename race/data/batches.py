"""Batches: questions of any lengths, packed without padding; and the order in which an epoch goes through them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from race import OPTIONS


@dataclasses.dataclass
class PackedBatch:
    """B questions of k options, a sequence for each, in one 1-D tensor of T token ids: no padding (sequence packing).

    `cu_seqlens` holds the start of each sequence, and T at its end. Two sequences of 3 and 2 tokens:

        input_ids    2 7 3 2 3
        position_ids 0 1 2 0 1
        cu_seqlens   0     3   5

    so sequence s is `input_ids[cu_seqlens[s]:cu_seqlens[s + 1]]`, and sequences kq to kq + k - 1 are question q's.
    """

    input_ids: torch.Tensor  # int32 [T]
    token_type_ids: torch.Tensor  # int32 [T], the segments
    position_ids: torch.Tensor  # int32 [T], from 0 in each sequence
    cu_seqlens: torch.Tensor  # int32 [kB+1]
    labels: torch.Tensor  # int64 [B]
    lengths: list[int]  # [kB] tokens of each sequence, on the CPU: shapes are known without waiting for a GPU

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def options(self) -> int:
        """How many each question has; of no question, as many as RACE."""
        return len(self.lengths) // len(self) if len(self) else OPTIONS

    @functools.cached_property
    def max_seqlen(self) -> int:
        """The longest sequence, in tokens."""
        return max(self.lengths)

    @functools.cached_property
    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the sequences padded to the longest: [T] the place of each token in [kB * L], [kB, L] what is filled."""
        lengths = self.cu_seqlens.diff()
        starts = self.max_seqlen * torch.arange(len(lengths), device=lengths.device)
        places = self.position_ids + starts.repeat_interleave(lengths, output_size=len(self.input_ids))
        return places, torch.arange(self.max_seqlen, device=lengths.device) < lengths[:, None]

    def tokens(self, padded: bool = False) -> int:
        """How many tokens a model gets: `padded`, each sequence as long as the longest."""
        return _tokens(np.array(self.lengths), padded)

    def to(self, device) -> "PackedBatch":
        """The batch with its tensors on `device`; does not wait for a copy to a GPU."""
        to_gpu = torch.device(device).type == "cuda"
        return self._map(lambda tensor: tensor.to(device, non_blocking=to_gpu))

    def pin_memory(self) -> "PackedBatch":
        """The batch in page-locked memory, so that its copy to a GPU does not block."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedBatch":
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **tensors)

    def micro_batches(self, token_budget: int | None, padded: bool = False) -> Iterator["PackedBatch"]:
        """Parts of the batch, in order, of at most `token_budget` tokens or one question; None: the whole batch.

        padded: as of a model to which every sequence is padded to the longest of its part.
        """
        lengths, start = np.reshape(self.lengths, (-1, self.options)), 0
        for end in range(1, len(self)) if token_budget is not None else ():
            if _tokens(lengths[start : end + 1], padded) > token_budget:
                yield self._part(start, end)
                start = end
        yield self._part(start, len(self))

    def _part(self, first: int, last: int) -> "PackedBatch":
        """Questions `first` to `last` - 1."""
        sequences = slice(self.options * first, self.options * last)
        lengths = self.lengths[sequences]
        start = sum(self.lengths[: sequences.start])
        tokens = slice(start, start + sum(lengths))
        cu_seqlens = self.cu_seqlens[sequences.start : sequences.stop + 1] - start
        parts = (states[tokens] for states in (self.input_ids, self.token_type_ids, self.position_ids))
        return PackedBatch(*parts, cu_seqlens, self.labels[first:last], lengths)


def _tokens(lengths: np.ndarray, padded: bool) -> int:
    return int(lengths.max() * lengths.size if padded else lengths.sum())


def collate(items: list[dict]) -> PackedBatch:
    """Questions as RaceDataset gives them → one PackedBatch; of no questions, if a process gets none of a batch."""
    sequences = [ids for item in items for ids in item["input_ids"]]
    segments = [ids for item in items for ids in item["token_type_ids"]]
    lengths = [len(ids) for ids in sequences]
    cu_seqlens = np.cumsum([0, *lengths])
    none = np.zeros(0, np.int32)
    return PackedBatch(
        _int32(np.concatenate([none, *sequences])),
        _int32(np.concatenate([none, *segments])),
        _int32(np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)),
        _int32(cu_seqlens),
        torch.tensor([item["label"] for item in items], dtype=torch.int64),
        lengths,
    )


def _int32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int32))


@dataclasses.dataclass(eq=False)
class ShuffledBatches(Sampler[list[int]]):
    """Batches of question indices, in an order that depends on (seed, epoch) only, from batch number `first` on.

    Of several processes, each takes every `world`-th question of every batch. sizes: [N] tokens of each question; the
    longest ones of a batch then come first.
    """

    questions: int
    batch_size: int
    seed: int
    epoch: int = 0
    first: int = 0
    rank: int = 0
    world: int = 1
    sizes: np.ndarray | None = None

    @property
    def sampler(self) -> "ShuffledBatches":  # where Lightning looks for set_epoch
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        if epoch != self.epoch:
            self.epoch, self.first = epoch, 0

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.questions)
        for start in range(self.first * self.batch_size, self.questions, self.batch_size):
            batch = order[start : start + self.batch_size]
            if self.sizes is not None:
                batch = batch[np.argsort(-self.sizes[batch], kind="stable")]
            yield batch[self.rank :: self.world].tolist()

    def __len__(self) -> int:
        return -(-self.questions // self.batch_size) - self.first
