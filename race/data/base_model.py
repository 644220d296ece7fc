"""The base model of a cache: its tokenizer, configuration and weights, copied so that training needs no network."""

import hashlib
import json
import shutil
from pathlib import Path

from race import RaceError
from race.model_files import (
    check_place,
    load_config,
    local_copy,
    model_file,
    not_loaded,
    spiece_file,
    weights_problem,
)

SPECIAL = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
LAST_RESORT = 100  # by how much pieces such as "2010," score less: a number and the comma after it are two pieces


def keep_model(model: str, folder: Path):
    """Copy tokenizer, configuration and any weights of `model` to `folder`; returns (tokenizer, has_weights)."""
    if model == "demo":
        from race.demo.model import write_model

        write_model(folder)
        return load_tokenizer(folder), True
    check_place(model)
    if Path(model).is_dir():
        load_config(model)  # before the tokenizer, which cannot be loaded if this one is damaged
    tokenizer = load_tokenizer(model)
    config = load_config(model)
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    return tokenizer, _keep_weights(model, folder)


def load_tokenizer(model: str | Path):
    """The tokenizer of a hub name or folder; raises RaceError if there is none.

    An ALBERT's without tokenizer.json is built here: transformers takes quotes and full stops in spiece.model for
    special tokens, and vocab.txt for nothing. Without any file it makes a tokenizer to which every word is unknown.
    """
    from transformers import AlbertTokenizer, AutoTokenizer, DebertaV2Tokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        if isinstance(tokenizer, DebertaV2Tokenizer):
            tokenizer = _of_deberta(model, tokenizer)
        elif isinstance(tokenizer, AlbertTokenizer) and model_file(model, "tokenizer.json") is None:
            tokenizer = _built(model, tokenizer)
    except ImportError as error:  # such as sacremoses for XLM
        raise RaceError(f"{model}: its tokenizer needs a package that is not installed: {error}") from error
    except Exception as error:  # damaged files make the libraries raise anything
        local = "its files are damaged or incomplete; add the tokenizer.json of the model"
        raise not_loaded(model, "tokenizer", error, local) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        files = "tokenizer.json, or spiece.model (ALBERT), vocab.txt (BERT), vocab.json with merges.txt (RoBERTa)"
        raise RaceError(f"{model} has no tokenizer files ({files}); add those of its model")
    return tokenizer


def _built(model: str | Path, loaded):
    """The tokenizer of spiece.model, or without one of vocab.txt, with the settings of the one that was loaded."""
    from transformers import AlbertTokenizer, BertTokenizer

    spiece = spiece_file(model)
    if spiece is None:
        return BertTokenizer.from_pretrained(model) if model_file(model, "vocab.txt") else loaded
    proto = spiece_proto(spiece)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    built = AlbertTokenizer(
        vocab=pieces,
        _spm_precompiled_charsmap=proto.normalizer_spec.precompiled_charsmap or None,
        **{name: getattr(loaded, name) for name in ("do_lower_case", "keep_accents", "model_max_length", *SPECIAL)},
    )
    known = {piece for piece, _ in pieces}
    built.add_tokens([token for _, token in sorted(loaded.added_tokens_decoder.items()) if str(token) not in known])
    built.name_or_path = loaded.name_or_path
    return built


def _of_deberta(model: str | Path, loaded):
    """A DeBERTa's tokenizer with the normaliser of its tokenizer.json or spm.model, which transformers replaces."""
    from tokenizers import Regex, Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    backend = loaded.backend_tokenizer
    if file := model_file(model, "tokenizer.json"):
        backend = Tokenizer.from_file(str(file))
    elif spiece := spiece_file(model):
        table = SentencePieceExtractor(str(spiece)).proto.normalizer_spec.precompiled_charsmap
        steps = [normalizers.Lowercase()] if loaded.do_lower_case else []
        steps += [normalizers.Precompiled(table)] if table else []
        spaces = normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " ")
        backend.normalizer = normalizers.Sequence([*steps, spaces, normalizers.Strip()])
    names = {name: getattr(loaded, name) for name in ("model_max_length", "model_input_names", *SPECIAL)}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    made.name_or_path = loaded.name_or_path
    return made


def spiece_proto(path: Path):
    """A SentencePiece model in which, as in ALBERT's tokenizer.json, pieces of a digit and a comma come last."""
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, check_number_comma

    proto = SentencePieceExtractor(str(path)).proto
    for piece in proto.pieces:
        if not check_number_comma(piece.piece):
            piece.score -= LAST_RESORT
    return proto


def tokenizer_hash(tokenizer) -> str:
    """sha256 of what decides the ids: the tokenizer's whole description, or its vocabulary if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # set by earlier calls
        description.pop(state, None)
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _keep_weights(model: str, folder: Path) -> bool:
    """Copy the weights as safetensors; a model that has only an older format is converted."""
    local = Path(model) if Path(model).is_dir() else local_copy(model)
    weights = [*local.glob("model*.safetensors"), *local.glob("model.safetensors.index.json")]
    for path in weights:
        shutil.copyfile(path, folder / path.name)
    older = sorted(local.glob("pytorch_model*.bin"))
    if weights or not older:
        return bool(weights)
    from safetensors.torch import save_file
    from torch import load

    try:
        state = {name: value for file in older for name, value in load(file, "cpu", weights_only=True).items()}
        weights = {name: value.contiguous().clone() for name, value in state.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    except Exception as error:  # damaged files make the libraries raise anything
        raise RaceError(f"{model}: its weights cannot be loaded safely: {weights_problem(error)}") from error
    return True
