"""A pretrained model, in a folder or on the hub: its files, its tokenizer, its family."""

import functools
import hashlib
import json
import pickle
import re
import shutil
import unicodedata
from pathlib import Path

import huggingface_hub
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, normalizers

from race import HUB_ID, RaceError

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
SPECIAL = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
LINE = "“Ada’s” CAFÉ -- ``naïve'' … it's £1,234.50, 2,5 or 30, in 2010, (well-known: 3.14–2.71; “Don't!”) \"Über\" _ ."
NUMBER_FIRST = ("albert", "xlnet")  # pieces such as "2010," come last: the number and its comma are two pieces
OTHER_IDS = ("camembert", "xlm-roberta", "xlm-roberta-xl")  # the ids of pieces are not those of the SentencePiece model
CASED = 0.05  # of the pieces in a vocabulary with capital letters; vocabularies without have next to none
# docs/models.md says why
REFUSED = ["canine", "flaubert", "luke", "mobilebert", "mra", "roc_bert", "roformer", "xlm", "xmod"]


@functools.cache  # the hub is asked once
def local_copy(model: str | Path) -> Path:
    """The folder of a model: `model` itself, or a whole copy of what has that name on the hub; raises RaceError."""
    folder = Path(model)
    if not folder.is_dir():
        try:
            if folder.exists() or str(model).startswith(".") or not HUB_ID.fullmatch(str(model)):
                raise ValueError("no name of a model")
            folder = Path(huggingface_hub.snapshot_download(str(model), allow_patterns=MODEL_FILES))
            if not any(folder.glob("model.safetensors*")):  # the same weights are often there in both formats
                huggingface_hub.snapshot_download(str(model), allow_patterns=[*MODEL_FILES, "pytorch_model*.bin"])
        except (OSError, ValueError) as error:
            reason = _first_sentence(error)
            raise RaceError(f"{model}: no such folder, and from the hub it cannot be loaded ({reason})") from error
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, as transformers chooses them: one, or those of an index; raises RaceError."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            try:
                parts = {*json.loads(index.read_bytes())["weight_map"].values()}
                return sorted(path for part in parts if (path := folder / part).stat())
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise RaceError(f"{index}: not the index of the files beside it ({error})") from error
    return []


def spiece_file(folder: Path) -> Path | None:
    """The SentencePiece model in a folder: spiece.model, spm.model (DeBERTa), or its only *.model."""
    found = [*folder.glob("*.model")]
    named = [path for path in found if path.name in ("spiece.model", "spm.model")]
    return named[0] if named else found[0] if len(found) == 1 else None


def keep_model(model: str, folder: Path):
    """Copy tokenizer, configuration and any weights of `model` to `folder`; returns (tokenizer, has_weights)."""
    if model == "demo":
        from race.demo.model import write_model

        write_model(folder)
        return load_tokenizer(folder), True
    config, tokenizer = load_config(model), load_tokenizer(model)
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    return tokenizer, _keep_weights(model, folder)


def _keep_weights(model: str, folder: Path) -> bool:
    """Copy the weights as safetensors; a model that has only an older format is converted."""
    weights = weight_files(local_copy(model))
    if not weights or weights[0].suffix == ".safetensors":
        parts = [*weights, weights[0].with_name("model.safetensors.index.json")] if len(weights) > 1 else []
        for path in parts or weights:
            shutil.copyfile(path, folder / (path.name if parts else "model.safetensors"))
        return bool(weights)
    from safetensors.torch import save_file
    from torch import load

    try:
        state = {name: value for file in weights for name, value in load(file, "cpu", weights_only=True).items()}
        apart = {name: value.contiguous().clone() for name, value in state.items()}
        save_file(apart, folder / "model.safetensors", {"format": "pt"})
    except Exception as error:  # damaged files make the libraries raise anything
        raise RaceError(f"{model}: its weights cannot be loaded safely: {weights_problem(error)}") from error
    return True


def weights_problem(error: Exception) -> str:
    """Why weights cannot be loaded."""
    if isinstance(error, pickle.UnpicklingError):
        return "they hold more than tensors, and code in them is never run; save them as model.safetensors"
    return f"not the weights of its config.json, damaged, or too large for the memory ({_first_sentence(error)})"


def _first_sentence(error: Exception) -> str:
    return re.split(r"(?<=[.!?])\s", " ".join(str(error).split()))[0].rstrip(".") or type(error).__name__


def load_tokenizer(model: str | Path):
    """The tokenizer of a hub name or folder; raises RaceError if there is none, or its files do not suffice."""
    from transformers import AutoTokenizer, DebertaV2Tokenizer

    folder = local_copy(model)
    spiece, file = spiece_file(folder), folder / "tokenizer.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if file.is_file():  # followed to the letter: transformers has normalisers of its own for some families
            backend = Tokenizer.from_file(str(file))
            backend.no_padding()
            ids = tokenizer(LINE, add_special_tokens=False)["input_ids"]
            if backend.encode(LINE, add_special_tokens=False).ids != ids:
                tokenizer = _with_backend(tokenizer, backend)
        elif spiece and isinstance(tokenizer, DebertaV2Tokenizer):
            tokenizer = _deberta_tokenizer(tokenizer, spiece)
    except Exception as error:  # damaged files make the libraries raise anything
        reason = _first_sentence(error)
        raise RaceError(f"{model}: its tokenizer cannot be loaded ({reason}); add its tokenizer.json") from error
    words = tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}
    if not words:
        raise RaceError(f"{model} has no tokenizer files that transformers reads; add its tokenizer.json")
    capitals = sum(word != word.lower() for word in words)
    if getattr(tokenizer, "do_lower_case", False) and capitals > CASED * len(words):
        raise RaceError(f"{model}: its tokenizer lower-cases, its vocabulary does not; add its tokenizer_config.json")
    tokenizer.name_or_path = str(model)
    return tokenizer


def _deberta_tokenizer(loaded, spiece: Path):
    """From spm.model alone: transformers leaves its normaliser out."""
    table = spiece_proto(spiece, "deberta-v2").normalizer_spec.precompiled_charsmap
    steps = [normalizers.Lowercase()] if loaded.do_lower_case else []
    steps += [normalizers.Precompiled(table)] if table else []
    spaces = normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " ")
    loaded.backend_tokenizer.normalizer = normalizers.Sequence([*steps, spaces, normalizers.Strip()])
    return _with_backend(loaded, loaded.backend_tokenizer)


def _with_backend(loaded, backend):
    """A tokenizer of a class that leaves its backend as it is, with the settings of the one that was loaded."""
    from transformers import PreTrainedTokenizerFast

    names = {name: getattr(loaded, name) for name in ("model_max_length", "model_input_names", *SPECIAL)}
    side = {"padding_side": "left"} if loaded.padding_side == "left" else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **side)


def spiece_proto(path: Path, family: str):
    """A SentencePiece model with the scores of the family's tokenizer.json."""
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, check_number_comma

    proto = SentencePieceExtractor(str(path)).proto
    for piece in proto.pieces:
        if family in NUMBER_FIRST and not check_number_comma(piece.piece):
            piece.score -= 100
    return proto


def tokenizer_hash(tokenizer) -> str:
    """sha256 of what decides the ids: the tokenizer's whole description."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    del description["truncation"], description["padding"]  # set by earlier calls
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def check_tokenizer_of_source(model: str | Path, tokenizer, texts: list[str]) -> None:
    """Raise RaceError if a model brings a SentencePiece model that gives texts of the source other ids."""
    spiece = None if model == "demo" else spiece_file(local_copy(model))
    if spiece is None or (family := load_config(model).model_type) in OTHER_IDS:
        return
    proto, normalizer = spiece_proto(spiece, family), tokenizer.backend_tokenizer.normalizer
    pieces = SentencePieceProcessor(model_proto=proto.SerializeToString())

    def differs(text: str) -> bool:
        theirs = pieces.encode(normalizer.normalize_str(text) if normalizer else text)
        return theirs != tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    looked_for = {piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED}  # by SentencePiece too
    added = [token.lower() for token in tokenizer.get_added_vocab().keys() - looked_for]
    for text in map(plain, (LINE, *texts)):
        if not any(token in text.lower() for token in added) and differs(text):
            word = next(filter(differs, text.split()), text[:60])
            split = f"its tokenizer splits {word!r} into {' '.join(tokenizer.tokenize(word))}, unlike {spiece.name}"
            raise RaceError(f"{model}: {split}; fetch its tokenizer.json, or move a {spiece.name} of another away")


def plain(text: str) -> str:
    """A text without combining marks and control characters: there, libraries and Unicode versions differ."""
    return "".join(" " if unicodedata.category(c)[0] in "CM" else c for c in unicodedata.normalize("NFC", text)).strip()


def load_config(model: str | Path):
    """The configuration of a hub name or folder; raises RaceError if its family is not run here."""
    from transformers import AutoConfig

    folder = local_copy(model)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a configuration may hold anything
        raise RaceError(f"{model}: its config.json cannot be loaded ({_first_sentence(error)})") from error
    check_family(config, model)
    return config


def check_family(config, model: str | Path = "this model") -> None:
    """Raise RaceError unless a configuration is that of an encoder with a multiple-choice head that runs here."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES as HEADS

    family, known = config.model_type, sorted(HEADS.keys() - REFUSED)
    if family not in known:
        raise RaceError(f"{model}: the type {family!r} is not run here (docs/models.md), but {', '.join(known)}")
    if getattr(config, "is_decoder", False) or getattr(config, "attn_type", "bi") == "uni":
        raise RaceError(f"{model}: its config.json makes a decoder of it (is_decoder, attn_type), expected an encoder")
