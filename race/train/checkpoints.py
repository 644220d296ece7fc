"""A checkpoint, of this repository or of other code: its file, where it comes from, and its weights."""

import functools
import hashlib
import json
from pathlib import Path

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file

from race import HUB_ID, MAX_LEN, MONITORS, RaceError
from race.data import Cache, open_cache
from race.files import file_identity, known_hash, read_archive, save_archive
from race.models import load_config, local_copy, weight_files, weights_problem
from race_module import RaceModule

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
HOLDERS = ("state_dict", "model_state_dict", "model")  # where a file may keep its weights
WRAPPERS = ("module", "_orig_mod", "_forward_module")  # parts of a name that DDP, torch.compile and Fabric add
# Libraries whose objects checkpoints keep beside the weights; they are read as nothing, and none of their code runs.
LIBRARIES = ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics")
LIBRARIES += ("transformers", "argparse", "pathlib", "omegaconf", "numpy", "typing", "collections", "__main__")


class Checkpoint:
    """A checkpoint: a file, a Hugging Face folder, or the name of a model on the hub.

    lineage: what the file says of itself. What is unknown is None. Raises RaceError: missing, damaged, could run code.
    """

    def __init__(self, source: str | Path):
        self.path, self.name = Path(source), Path(source).name
        above = self.path.parent if len(self.path.parts) > 1 else self.path  # if it is here: no hub name
        if not above.exists() and HUB_ID.fullmatch(str(source)) and self.path.suffix not in SUFFIXES:
            self.path, self.name = local_copy(str(source)), str(source)
        if not (self.path / "config.json" if self.path.is_dir() else self.path).exists():
            expected = "a file, such as one of a stage's folder, or a folder with config.json"
            raise RaceError(f"{self.path}: no such checkpoint ({expected})")
        self.lineage, self.own = _of_folder(self.path) if self.path.is_dir() else _of_file(file_identity(self.path))
        self.stage: str | None = self.lineage.get("stage")
        self.epoch: int | None = self.lineage.get("epoch")  # from 0
        metrics = self.lineage.get("metrics", {})
        self.val_loss: float | None = metrics.get("val_loss_epoch")
        self.val_acc: float | None = metrics.get("val_acc")
        self.base: str | None = self.lineage.get("base")
        self.base_sha256: str | None = self.lineage.get("base_sha256")
        self.chain: list[str] = self.lineage.get("chain", [])  # the stages before this one
        recipe = self.lineage.get("recipe", {})
        self.learning_rate: float | None = recipe.get("learning_rate")
        self.monitor: str = recipe.get("monitor") or MONITORS[0]  # what picks the best checkpoint of its stage
        codes = [it.get("code") for it in (self.lineage, *self.lineage.get("went_on_with", []))]
        self.code: str | None = next(filter(None, reversed(codes)), None)  # the last that trained it
        self.max_len: int = recipe.get("max_len") or MAX_LEN  # tokens of a sequence

    def __str__(self) -> str:
        return str(self.path)

    @property
    def label(self) -> str:
        """Its name without the suffix of a file."""
        return self.name.removesuffix(self.path.suffix) if self.path.is_file() else self.name.replace("/", "--")

    @functools.cached_property
    def beside(self) -> "list[Checkpoint]":
        """All checkpoints of its folder, as they were when it was read."""
        return read_checkpoints(self.path.parent)

    @property
    def sha256(self) -> str:
        """Of the content of the file, or of the files of a folder that decide what the model answers."""
        if self.path.is_file():
            return known_hash(file_identity(self.path))
        hashes = [known_hash(file_identity(it)) for it in (self.path / "config.json", *weight_files(self.path))]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def check_encoding(self, cache: Cache) -> None:
        """Raise RaceError if this was trained on another tokenizer or encoding than a cache holds."""
        other = f"than {cache} has; set CACHE_DIR to a cache like the one that it was trained on"
        if self.lineage.get("tokenizer") not in (None, cache.identity["tokenizer"]):
            raise RaceError(f"{self} was trained with another tokenizer {other}")
        length = (self.lineage.get("cache") or {}).get("max_qa_len")
        if length not in (None, cache.identity["max_qa_len"]):
            raise RaceError(f"{self} was trained with another length of question+option ({length} tokens) {other}")
        if self.path.is_dir() and any(self.path.glob("tokenizer*")):
            cache.check_tokenizer(self.path)

    def load(self, cache: Cache | str | Path, **settings) -> RaceModule:
        """Its weights in a RaceModule; settings: those of RaceModule.

        A file of other code gets the configuration of the cache's model. Raises RaceError unless all weights are there.
        """
        if self.own:
            return RaceModule.load_from_checkpoint(self.path, **settings)
        described = self.path if self.path.is_dir() else open_cache(cache).model
        module = RaceModule(config=load_config(described), **settings)
        state = _folder_weights(self.path) if self.path.is_dir() else _file_weights(self.path)
        named = _by_name(state, module.model.state_dict().keys(), f"{module.model.base_model_prefix}.")
        try:
            module.model.load_state_dict(named)
        except RuntimeError as error:  # names the weights that are missing, or not the model's, or of another shape
            told = " ".join(str(error).split()).partition(": ")[2][:500]
            model = f"a multiple-choice model as {described}/config.json has it"
            raise RaceError(f"{self} is not {model}: {told} (a base model is to be trained first)") from error
        return module


def read_checkpoints(checkpoint_dir: str | Path) -> list[Checkpoint]:
    """All checkpoints of a folder, by name; raises RaceError with the first one that is damaged."""
    found = [Checkpoint(path) for path in sorted(Path(checkpoint_dir).glob("*.ckpt"))]
    for checkpoint in found:
        checkpoint.beside = found
    return found


@functools.lru_cache(maxsize=256)
def _of_file(identity: tuple) -> tuple[dict, bool]:
    """(lineage, whether it is a checkpoint of RaceModule)"""
    content = read_archive(identity[0], mmap=True, inert=LIBRARIES)
    lineage, parameters = content.get("race"), content.get("hyper_parameters")
    if not isinstance(lineage, dict):
        return {}, False
    return lineage, isinstance(parameters, dict) and isinstance(parameters.get("config"), dict)


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


def _folder_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a Hugging Face folder, by name."""
    files = weight_files(folder)
    if not files:
        raise RaceError(f"{folder} has no weights (model.safetensors or pytorch_model.bin)")
    try:
        read = [load_file(path) if path.suffix == ".safetensors" else read_archive(path) for path in files]
    except (OSError, SafetensorError) as error:
        raise RaceError(f"{folder}: its weights cannot be loaded: {weights_problem(error)}") from error
    return {name: tensor for part in read for name, tensor in part.items()}


def _file_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a Lightning checkpoint or in a saved state dict, by name."""
    content = read_archive(path, inert=LIBRARIES)
    state = next((content[holder] for holder in HOLDERS if isinstance(content.get(holder), dict)), content)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def _by_name(state: dict, wanted, encoder: str) -> dict[str, torch.Tensor]:
    """Weights under the names of `wanted`, whatever stands before these; what is left over keeps its own name.

    encoder: what the names of the encoder's weights begin with; the others are the head's.
    """
    found = {}
    for given, tensor in state.items():
        parts = [part for part in given.split(".") if part not in WRAPPERS]
        ends = [".".join(parts[i:]) for i in range(len(parts))]
        fits = [name for end in ends for name in (end, f"{encoder}{end}") if name in wanted and name not in found]
        if parts[-1] != "position_ids":  # a constant that older versions of transformers saved
            found[fits[0] if fits else given] = tensor
    return found


def short_names(checkpoints: list[Checkpoint]) -> list[str]:
    """A name for each: stage, epoch, or name, of several folders with the folder: the first that tells all apart."""
    names, several = [], len({it.path.parent for it in checkpoints}) > 1
    for it in checkpoints:
        stage, folder = it.stage or it.label, f"{it.path.parent.name}/" if several else ""
        epoch = stage if it.epoch is None else f"{stage}, epoch {it.epoch}"
        names.append((stage, f"{folder}{stage}", f"{folder}{epoch}", f"{folder}{it.label}", str(it.path)))
    return next(list(of_kind) for of_kind in zip(*names, strict=True) if len(set(of_kind)) == len(of_kind))


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
