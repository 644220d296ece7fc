"""Weights of other people's multiple-choice models: Lightning and torch files, and Hugging Face folders."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from race import RaceError
from race.files import read_archive
from race.models import load_config, weights_problem
from race_module import RaceModule

HOLDERS = ("state_dict", "model_state_dict", "model")  # where a file may keep its weights
WRAPPERS = ("module", "_orig_mod", "_forward_module")  # parts of a name that DDP, torch.compile and Fabric add
# Libraries whose objects checkpoints keep beside the weights; they are read as nothing, and none of their code runs.
LIBRARIES = (
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "torchmetrics",
    "transformers",
)
LIBRARIES += ("argparse", "pathlib", "omegaconf", "numpy", "typing", "collections", "__main__")


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a Hugging Face folder."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def foreign_module(path: Path, cache_dir: str | Path, **settings) -> RaceModule:
    """A RaceModule with the weights of a file or folder that this repository did not make.

    The configuration is the folder's; for a file that of the model in `cache_dir`. settings: those of RaceModule.
    Raises RaceError unless the weights are those of a whole multiple-choice model.
    """
    described = path if path.is_dir() else Path(cache_dir) / "model"
    module = RaceModule(config=load_config(described), **settings)
    state = folder_weights(path) if path.is_dir() else file_weights(path)
    encoder = f"{module.model.base_model_prefix}."
    module.model.load_state_dict(matching(state, module.model.state_dict(), encoder, path, described))
    return module


def folder_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a Hugging Face folder, by name."""
    files = weight_files(folder)
    if not files:
        raise RaceError(f"{folder} has no weights (model.safetensors or pytorch_model.bin)")
    try:
        read = [load_file(path) if path.suffix == ".safetensors" else read_archive(path) for path in files]
    except (OSError, SafetensorError) as error:
        raise RaceError(f"{folder}: its weights cannot be loaded: {weights_problem(error)}") from error
    return {name: tensor for part in read for name, tensor in part.items()}


def file_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a Lightning checkpoint or in a saved state dict, by name."""
    content = read_archive(path, inert=LIBRARIES)
    state = next((content[holder] for holder in HOLDERS if isinstance(content.get(holder), dict)), content)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def matching(state: dict, wanted: dict, encoder: str, path: Path, described: Path) -> dict[str, torch.Tensor]:
    """The weights under the names of `wanted`, whatever stands before them; raises RaceError if any is not clear.

    encoder: what the names of the encoder's weights begin with; the others are the head's.
    """
    found, unknown, twice = {}, [], []
    for given, tensor in state.items():
        parts = [part for part in given.split(".") if part not in WRAPPERS]
        ends = [".".join(parts[i:]) for i in range(len(parts))]
        name = next((name for end in ends for name in (end, f"{encoder}{end}") if name in wanted), None)
        if name in found:
            twice.append(name)
        elif name is not None:
            found[name] = tensor
        elif parts[-1] != "position_ids":  # a constant that older versions of transformers saved
            unknown.append(given)
    missing = [name for name in wanted if name not in found]
    shapes = [name for name, tensor in found.items() if tensor.shape != wanted[name].shape]
    last = [name for name in wanted if not name.startswith(encoder) and wanted[name].shape[:1] == (1,)]
    if found and not any(name in found for name in last):
        raise RaceError(f"{path} has no multiple-choice head: it is a base model, to be trained first (BASE_MODEL)")
    problems = [f"{len(missing)} weights are missing, such as {missing[0]}"] if missing else []
    problems += [f"{len(unknown)} are not understood, such as {unknown[0]}"] if unknown else []
    problems += [f"{len(twice)} are there twice, such as {twice[0]}"] if twice else []
    if shapes and not missing:
        shape, expected = (tuple(tensors[shapes[0]].shape) for tensors in (found, wanted))
        problems.append(f"{shapes[0]} has the shape {shape}, not {expected}")
    if problems:
        hint = "" if path == described else ". If it is another model, set CACHE_DIR to a cache made with that one"
        told = f"{path} is no multiple-choice model as {described}/config.json has it"
        raise RaceError(f"{told}: {'; '.join(problems)}{hint}")
    return found
