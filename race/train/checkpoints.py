"""A checkpoint as the rest of the code knows it: its file, its hash, and what it remembers of where it comes from."""

import functools
import hashlib
import json
from pathlib import Path

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from race import HUB_ID, MAX_LEN, MONITORS, RaceError
from race.data.cache import check_tokenizer
from race.files import file_identity, known_hash, read_archive, save_archive
from race.models import local_copy
from race.train.weights import LIBRARIES, foreign_module, weight_files
from race_module import RaceModule

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


class Checkpoint:
    """A checkpoint of this repository or of other code: a file, a Hugging Face folder, or the name of one on the hub.

    lineage: what the file says of itself; the file's name says nothing. Everything unknown is None. Raises RaceError if
    it is missing, damaged, or could run code.
    """

    def __init__(self, source: str | Path):
        self.path, self.name = Path(source), Path(source).name
        if not self.path.exists() and HUB_ID.fullmatch(str(source)) and self.path.suffix not in SUFFIXES:
            self.path, self.name = local_copy(str(source)), str(source)
        self.lineage, self.own = _of_folder(self.path) if self.path.is_dir() else _of_file(self.path)
        self.stage: str | None = self.lineage.get("stage")
        self.epoch: int | None = self.lineage.get("epoch")  # from 0
        self.metrics: dict = self.lineage.get("metrics", {})
        self.val_loss: float | None = self.metrics.get("val_loss_epoch")
        self.val_acc: float | None = self.metrics.get("val_acc")
        self.base: str | None = self.lineage.get("base")
        self.base_sha256: str | None = self.lineage.get("base_sha256")
        self.chain: list[str] = self.lineage.get("chain", [])  # the stages before this one
        recipe = self.lineage.get("recipe", {})
        self.learning_rate: float | None = recipe.get("learning_rate")
        self.monitor: str = recipe.get("monitor") or MONITORS[0]  # what picks the best checkpoint of its stage
        self.max_len: int = recipe.get("max_len") or MAX_LEN  # tokens of a sequence

    @property
    def label(self) -> str:
        """Its name without the suffix of a file."""
        return self.name.removesuffix(self.path.suffix) if self.path.is_file() else self.name.replace("/", "--")

    @property
    def files(self) -> list[Path]:
        """The file; or those of a folder that decide what the model answers."""
        return [self.path / "config.json", *weight_files(self.path)] if self.path.is_dir() else [self.path]

    @property
    def sha256(self) -> str:
        """Of the content of the file, or of the files of a folder."""
        hashes = [known_hash(file_identity(path)) for path in self.files]
        return hashes[0] if self.path.is_file() else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def load(self, cache_dir: str | Path, **settings) -> RaceModule:
        """Its weights in a RaceModule; the cache gives the configuration to a file of other code. Raises RaceError."""
        if self.own:
            return RaceModule.load_from_checkpoint(self.path, **settings)
        return foreign_module(self.path, cache_dir, **settings)

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
        if self.path.is_dir() and any(self.path.glob("tokenizer*")):
            check_tokenizer(self.path, manifest, cache_dir)


def _of_file(path: Path) -> tuple[dict, bool]:
    """(lineage, whether it is a checkpoint of RaceModule)"""
    try:
        return _read(file_identity(path))
    except FileNotFoundError as error:
        raise RaceError(f"{path}: no such checkpoint") from error


@functools.lru_cache(maxsize=256)
def _read(identity: tuple) -> tuple[dict, bool]:
    content = read_archive(identity[0], mmap=True, inert=LIBRARIES)
    hyper_parameters = content.get("hyper_parameters")
    return content.get("race", {}), isinstance(hyper_parameters, dict) and isinstance(
        hyper_parameters.get("config"), dict
    )


def _of_folder(folder: Path) -> tuple[dict, bool]:
    """The same for a folder: an export of this repository says where it comes from."""
    try:
        facts = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        cache = {"source": facts["data"]["name"], "source_sha256": facts["data"]["sha256"]}
        cache |= {"max_qa_len": facts["max_qa_len"]}
        return {**facts["lineage"][-1], "cache": cache, "articles": facts.get("articles")}, False
    except FileNotFoundError:
        return {}, False
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise RaceError(f"{folder}/export.json: damaged ({error!r}); make the export again") from error


def short_names(checkpoints: list[Checkpoint]) -> list[str]:
    """A name for each: its stage, stage and epoch, name, or folder and name: the first that tells all of them apart."""
    labels = [checkpoint.label for checkpoint in checkpoints]
    stages = [checkpoint.stage or checkpoint.label for checkpoint in checkpoints]
    epochs = [
        name if it.epoch is None else f"{name}, epoch {it.epoch}" for name, it in zip(stages, checkpoints, strict=True)
    ]
    folders = [f"{checkpoint.path.parent.name}/{checkpoint.label}" for checkpoint in checkpoints]
    paths = [str(checkpoint.path) for checkpoint in checkpoints]
    return next((names for names in (stages, epochs, labels, folders) if len(set(names)) == len(names)), paths)


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
