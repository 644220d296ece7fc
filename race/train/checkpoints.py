"""A checkpoint as the rest of the code knows it: its file, its hash, and what it remembers of where it comes from."""

import hashlib
import re
from pathlib import Path

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from race import RaceError
from race.files import file_identity, known_hash, read_archive, save_archive

IN_NAME = re.compile(r"e\d+-.*epoch=(?P<epoch>\d+)-val_loss_epoch=(?P<loss>\d+\.\d+|nan|inf)")


class Checkpoint:
    """A checkpoint file, read once. Raises RaceError if it is missing, damaged, or could run code.

    lineage: what the file says of itself; empty for a checkpoint of other code, of which only the file name is used.
    Everything unknown is None.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = self.path.name
        self.lineage: dict = read_archive(path, mmap=True).get("race", {})
        named = IN_NAME.match(self.name)
        self.stage: str | None = self.lineage.get("stage")
        self.epoch: int | None = self.lineage.get("epoch", int(named["epoch"]) if named else None)  # from 0
        self.metrics: dict = self.lineage.get("metrics", {})
        self.val_loss: float | None = self.metrics.get("val_loss_epoch", float(named["loss"]) if named else None)
        self.val_acc: float | None = self.metrics.get("val_acc")
        self.base: str | None = self.lineage.get("base")
        self.base_sha256: str | None = self.lineage.get("base_sha256")
        self.chain: list[str] = self.lineage.get("chain", [])  # the stages before this one
        self.learning_rate: float | None = self.lineage.get("recipe", {}).get("learning_rate")

    @property
    def sha256(self) -> str:
        """Of the file's content."""
        return known_hash(file_identity(self.path))

    def __str__(self) -> str:
        return str(self.path)

    def check_encoding(self, manifest: dict, cache_dir: str | Path) -> None:
        """Raise RaceError if this was trained on another tokenizer or encoding than a cache holds."""
        known = self.lineage.get("cache") if isinstance(self.lineage.get("cache"), dict) else {}
        if self.lineage.get("tokenizer") not in (None, manifest["tokenizer"]["sha256"]):
            raise RaceError(f"{self} was trained with another tokenizer than {cache_dir} has; name its own CACHE_DIR")
        if known.get("max_qa_len") not in (None, manifest["max_qa_len"]):
            raise RaceError(
                f"{self} was trained with question+option truncated to {known['max_qa_len']} tokens, {cache_dir} "
                f"truncates to {manifest['max_qa_len']}; name its own CACHE_DIR"
            )


def short_names(checkpoints: list[Checkpoint]) -> list[str]:
    """A name for each: its stage, or stage and epoch, or file name, whichever first tells all of them apart."""
    stems = [checkpoint.path.stem for checkpoint in checkpoints]
    stages = [checkpoint.stage or stem for checkpoint, stem in zip(checkpoints, stems, strict=True)]
    epochs = [f"{stage}, epoch {checkpoint.epoch}" for stage, checkpoint in zip(stages, checkpoints, strict=True)]
    return next((names for names in (stages, epochs) if len(set(names)) == len(names)), stems)


def weights_hash(*models: torch.nn.Module) -> str:
    """sha256 of all weights in float32: tells whether two models are the same."""
    digest = hashlib.sha256()
    for name, tensor in (item for model in models for item in model.state_dict().items()):
        digest.update(name.encode())
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints: written atomically, read as tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        """Replace `path` in one step; what was there stays until the new file is on disk."""
        save_archive(checkpoint, path)

    def load_checkpoint(self, path: str | Path, map_location=None, weights_only: bool | None = True) -> dict:
        """Whatever `weights_only` says, code in the file is never run."""
        return read_archive(path)
