"""The base model of a cache: its tokenizer, configuration and weights, copied so that training needs no network."""

import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

from race import FAMILIES, RaceError


def keep_model(model: str, folder: Path):
    """Copy tokenizer, configuration and any weights of `model` to `folder`; returns (tokenizer, has_weights)."""
    from transformers import AutoConfig

    if model == "demo":
        from race.demo.model import write_model

        write_model(folder)
        return load_tokenizer(folder), True
    if not Path(model).is_dir() and re.match(r"[./~]|.*/.*/", model):
        raise RaceError(f"--model {model}: no such folder")
    tokenizer = load_tokenizer(model)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RaceError(f"{model}: its configuration cannot be loaded ({str(error).splitlines()[0]})") from error
    if config.model_type not in FAMILIES:
        raise RaceError(f"{model}: a model of type {config.model_type!r}; expected {' or '.join(FAMILIES)}")
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    return tokenizer, _keep_weights(model, folder)


def load_tokenizer(model: str | Path):
    """The tokenizer of a hub name or folder; raises RaceError if there is none.

    For a folder without tokenizer files transformers makes a tokenizer to which every word is unknown.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RaceError(f"{model}: its tokenizer cannot be loaded ({str(error).splitlines()[0]})") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise RaceError(f"{model} has no tokenizer files (tokenizer.json or spiece.model); add those of its model")
    return tokenizer


def tokenizer_hash(tokenizer) -> str:
    """sha256 of what decides the ids: the tokenizer's whole description, or its vocabulary if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # set by earlier calls
        description.pop(state, None)
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _keep_weights(model: str, folder: Path) -> bool:
    """Copy the weights as safetensors; a model that has only an older format is converted."""
    local = Path(model)
    if local.is_dir():
        weights = [*local.glob("model*.safetensors"), *local.glob("model.safetensors.index.json")]
        for path in weights:
            shutil.copyfile(path, folder / path.name)
        if weights or not any(local.glob("pytorch_model*")):
            return bool(weights)
    from transformers import AutoModel

    try:
        AutoModel.from_pretrained(model, trust_remote_code=False).save_pretrained(folder)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise RaceError(f"{model}: its weights cannot be loaded safely ({str(error).splitlines()[0]})") from error
    return True
