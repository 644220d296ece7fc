"""A pretrained model, in a folder or on the hub: its files, its configuration, and in words why it cannot be loaded."""

import json
import pickle
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from race import RaceError
from race.families import check_family

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "pytorch_model*.bin"]
TENSORFLOW = ("*.ckpt*", "*.data-?????-of-?????", "albert_config.json", "bert_config.json", "tf_model.h5")


def check_place(model: str | Path) -> None:
    """Raise RaceError if `model` is a path at which no folder of a model lies."""
    place = Path(model)
    if place.is_file():
        raise RaceError(f"{model} is a file; name the folder that holds config.json, tokenizer and weights of a model")
    if not place.is_dir():
        if re.match(r"[./~]|.*/.*/", str(model)):
            raise RaceError(f"{model}: no such folder")
    elif not (place / "config.json").is_file():
        if kind := tensorflow_file(place):
            raise RaceError(
                f"{model} holds a TensorFlow checkpoint ({kind}), which is not read; name the same model on the hub, "
                "such as albert-base-v2, or convert it to config.json, spiece.model and model.safetensors"
            )
        raise RaceError(f"{model} has no config.json; name the folder of a model, or add the config.json of this one")


def tensorflow_file(folder: Path) -> str | None:
    """The name of a file that TensorFlow left in a folder."""
    return next((path.name for pattern in TENSORFLOW for path in sorted(folder.glob(pattern))), None)


def model_file(model: str | Path, name: str) -> Path | None:
    """A file of a model, fetched if it is on the hub; None if there is none, or the hub cannot be reached."""
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils import cached_file

    if Path(model).is_dir():
        return path if (path := Path(model) / name).is_file() else None
    quiet = [f"_raise_exceptions_for_{what}" for what in ("gated_repo", "missing_entries", "connection_errors")]
    try:
        found = try_to_load_from_cache(str(model), name)  # as it was just loaded: a hub out of reach is not asked again
        if found is None:
            found = cached_file(str(model), name, **dict.fromkeys(quiet, False))
    except (OSError, ValueError):
        return None
    return Path(found) if isinstance(found, str) else None  # or a mark that the hub has no such file


def local_copy(name: str) -> Path:
    """The folder of a whole model of the hub, downloaded or as it was kept before; raises RaceError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        *first, older = MODEL_FILES
        folder = Path(snapshot_download(name, allow_patterns=first))
        if not any(folder.glob("*.safetensors")):  # the same weights are often there in both formats
            folder = Path(snapshot_download(name, allow_patterns=[*first, older]))
        return folder
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise not_loaded(name, "model", error, "") from error


def model_json(model: str | Path, name: str) -> dict:
    """The content of a JSON file of a model; empty if there is none."""
    path = model_file(model, name)
    return {} if path is None else json.loads(path.read_text(encoding="utf-8"))


def spiece_file(model: str | Path) -> Path | None:
    """The SentencePiece model of a model: spiece.model, spm.model (DeBERTa), or in a folder its only *.model."""
    if found := model_file(model, "spiece.model") or model_file(model, "spm.model"):
        return found
    others = [*Path(model).glob("*.model")] if Path(model).is_dir() else []
    return others[0] if len(others) == 1 else None


def load_config(model: str | Path):
    """The configuration of a hub name or folder; raises RaceError if its family is not run here."""
    from transformers import AutoConfig

    check_place(model)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # a configuration may hold anything
        damaged = any(isinstance(cause, json.JSONDecodeError) for cause in _causes(error))
        wrong = "is not JSON" if damaged else "is not one that transformers reads"
        raise not_loaded(model, "configuration", error, f"config.json {wrong}; fetch it again") from error
    check_family(config, model)
    return config


def not_loaded(model: str | Path, part: str, error: Exception, local: str) -> RaceError:
    """What to say when a part of a model cannot be loaded; `local`: what is wrong if it lies in a folder."""
    if Path(model).is_dir():
        return RaceError(f"{model}: its {part} cannot be loaded: {local}")
    return RaceError(f"{model}: no such folder, and from the hub its {part} cannot be loaded ({_hub_reason(error)})")


def weights_problem(error: Exception) -> str:
    """Why weights in a folder cannot be loaded."""
    if isinstance(error, MemoryError) or "memory" in str(error):
        return "the memory is not enough for them"
    if isinstance(error, pickle.UnpicklingError):
        return "they hold more than tensors, and code in them is never run; save them as model.safetensors"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})"
    return "they are damaged, or not those of its config.json; fetch them again"


def wrong_transformers() -> RaceError:
    """What to say when the installed transformers cannot run packed sequences."""
    try:
        pins = requires("albert-race") or []
    except PackageNotFoundError:
        pins = []
    pinned = next((pin.removeprefix("transformers==") for pin in pins if pin.startswith("transformers==")), None)
    wanted = f"transformers {pinned}" if pinned else "the version in requirements.txt"
    return RaceError(f"transformers {version('transformers')} does not run packed sequences; install {wanted}")


def _causes(error: BaseException | None):
    """An error, and those from which it came."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _hub_reason(error: Exception) -> str:
    """Why something did not come from the hub; of an error that is not known, the library's own first sentence."""
    from huggingface_hub import errors

    reasons = {
        errors.GatedRepoError: "its owner must grant you access; then log in with `hf auth login`",
        errors.RepositoryNotFoundError: "the hub has no model of that name, or keeps it private",
        errors.HFValidationError: "no model can have that name",
        errors.LocalEntryNotFoundError: "the hub cannot be reached, and no copy is kept here",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, and no copy is kept here",
        errors.EntryNotFoundError: "a file of it is missing there",
    }
    causes = [*_causes(error)]
    for kind, reason in reasons.items():
        if any(isinstance(cause, kind) for cause in causes):
            return reason
    return re.split(r"(?<=[.!?])\s", " ".join(str(error).split()))[0] or type(error).__name__
