"""A pretrained model, in a folder or on the hub: its files, its tokenizer, its family."""

import hashlib
import json
import pickle
import re
import shutil
import unicodedata
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from race import HUB_ID, RaceError

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "pytorch_model*.bin"]
SPECIAL = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
LINE = "“Ada’s” CAFÉ -- ``naïve'' … it's £1,234.50, 2,5 or 30, in 2010, (well-known: 3.14–2.71; “Don't!”) \"Über\" _ ."
DEPENDS = "its answer to a question depends on the padding, and so on the questions beside it"
REFUSED = {
    "canine": "it reads characters, and 512 of them hold no article of RACE",
    "convbert": DEPENDS,
    "flaubert": "its tokenizer needs a package that is not installed here",
    "fnet": DEPENDS,
    "funnel": DEPENDS,
    "luke": "its tokenizer puts no special tokens around texts without entities",
    "mobilebert": DEPENDS,
    "mra": DEPENDS,
    "nystromformer": DEPENDS,
    "roc_bert": "it reads the shape and the sound of each character, which a cache does not hold",
    "roformer": "its tokenizer needs a package that is not installed here",
    "xlm": "its tokenizer needs a package that is not installed here",
    "xmod": "its adapters fail in half precision",
    "yoso": DEPENDS,
}
NUMBER_FIRST = ("albert", "xlnet")  # pieces such as "2010," come last: the number and the comma are two pieces
OTHER_IDS = ("camembert", "xlm-roberta", "xlm-roberta-xl")  # the ids of pieces are not those of the SentencePiece model
CASED = 0.05  # of the pieces in a vocabulary with capital letters; vocabularies without have next to none

# ----------------------------------------------------------------------------------------------------- files


def check_place(model: str | Path) -> None:
    """Raise RaceError unless `model` is a folder with a config.json, or may be a name on the hub."""
    place = Path(model)
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise RaceError(
                f"{model} has no config.json: expected a Hugging Face folder (config.json, tokenizer, "
                "model.safetensors), or the model's name on the hub; a TensorFlow checkpoint is not read"
            )
    elif place.exists() or str(model).startswith(".") or not HUB_ID.fullmatch(str(model)):
        raise RaceError(f"{model}: no such folder; expected that of a model, or its name on the hub")


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


def spiece_file(model: str | Path) -> Path | None:
    """The SentencePiece model of a model: spiece.model, spm.model (DeBERTa), or in a folder its only *.model."""
    if found := model_file(model, "spiece.model") or model_file(model, "spm.model"):
        return found
    others = [*Path(model).glob("*.model")] if Path(model).is_dir() else []
    return others[0] if len(others) == 1 else None


def local_copy(name: str) -> Path:
    """The folder of a whole model of the hub, downloaded or as it was kept before; raises RaceError."""
    from huggingface_hub import snapshot_download

    try:
        *first, older = MODEL_FILES
        folder = Path(snapshot_download(name, allow_patterns=first))
        if not any(folder.glob("*.safetensors")):  # the same weights are often there in both formats
            folder = Path(snapshot_download(name, allow_patterns=[*first, older]))
        return folder
    except (OSError, ValueError) as error:
        raise not_loaded(name, "files", error) from error


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


def not_loaded(model: str | Path, part: str, error: Exception, advice: str = "") -> RaceError:
    """What to say when a part of a model cannot be loaded: the library's first sentence, and advice for a folder."""
    reason = re.split(r"(?<=[.!?])\s", " ".join(str(error).split()))[0].rstrip(".") or type(error).__name__
    if Path(model).is_dir():
        return RaceError(f"{model}: its {part} cannot be loaded ({reason}); {advice}")
    return RaceError(f"{model}: no such folder, and from the hub its {part} cannot be loaded ({reason})")


def weights_problem(error: Exception) -> str:
    """Why weights in a folder cannot be loaded."""
    if isinstance(error, MemoryError) or "memory" in str(error):
        return "the memory is not enough for them"
    if isinstance(error, pickle.UnpicklingError):
        return "they hold more than tensors, and code in them is never run; save them as model.safetensors"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})"
    return "they are damaged, or not those of its config.json; fetch them again"


# ----------------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(model: str | Path):
    """The tokenizer of a hub name or folder; raises RaceError if there is none, or its files do not suffice."""
    from transformers import AlbertTokenizer, AutoTokenizer, DebertaV2Tokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        file, spiece = model_file(model, "tokenizer.json"), spiece_file(model)
        if isinstance(tokenizer, DebertaV2Tokenizer) and (file or spiece):
            tokenizer = _rebuilt(tokenizer, _of_file(file) if file else _of_pieces(tokenizer, spiece, "deberta-v2"))
        elif isinstance(tokenizer, AlbertTokenizer) and spiece and not file:
            tokenizer = _rebuilt(tokenizer, _of_pieces(tokenizer, spiece, "albert"))
    except Exception as error:  # damaged files make the libraries raise anything
        raise not_loaded(model, "tokenizer", error, "add the tokenizer.json of the model") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise RaceError(f"{model} has no tokenizer that transformers reads; add the tokenizer.json of the model")
    words = None if file or not getattr(tokenizer, "do_lower_case", False) else model_file(model, "vocab.txt")
    if words and has_capitals(words.read_text(encoding="utf-8").split()):
        raise RaceError(f"{model}: vocab.txt has capital letters, its tokenizer none; add its tokenizer_config.json")
    return tokenizer


def _of_file(file: Path):
    """tokenizer.json as it stands: what transformers makes of it may have another normaliser."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _of_pieces(loaded, spiece: Path, family: str):
    """The pieces of spiece.model or spm.model, split as SentencePiece does.

    transformers takes quotes and full stops for special tokens, and a normaliser of its own for DeBERTa.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers

    proto, theirs = spiece_proto(spiece, family), loaded.backend_tokenizer
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    backend = Tokenizer(models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id))
    backend.normalizer, backend.pre_tokenizer = theirs.normalizer, theirs.pre_tokenizer
    backend.post_processor, backend.decoder = theirs.post_processor, theirs.decoder
    if family == "deberta-v2":
        table = proto.normalizer_spec.precompiled_charsmap
        steps = [normalizers.Lowercase()] if loaded.do_lower_case else []
        steps += [normalizers.Precompiled(table)] if table else []
        spaces = normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " ")
        backend.normalizer = normalizers.Sequence([*steps, spaces, normalizers.Strip()])
    known = {piece for piece, _ in pieces}
    backend.add_tokens([token for _, token in sorted(loaded.added_tokens_decoder.items()) if str(token) not in known])
    return backend


def _rebuilt(loaded, backend):
    """A tokenizer with another backend and the settings of the one that was loaded."""
    from transformers import PreTrainedTokenizerFast

    names = {name: getattr(loaded, name) for name in ("model_max_length", "model_input_names", *SPECIAL)}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    made.name_or_path = loaded.name_or_path
    return made


def spiece_proto(path: Path, family: str):
    """A SentencePiece model; for some families pieces such as "2010," come last, as in their tokenizer.json."""
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, check_number_comma

    proto = SentencePieceExtractor(str(path)).proto
    for piece in proto.pieces:
        if family in NUMBER_FIRST and not check_number_comma(piece.piece):
            piece.score -= 100
    return proto


def tokenizer_hash(tokenizer) -> str:
    """sha256 of what decides the ids: the tokenizer's whole description, or its vocabulary if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # set by earlier calls
        description.pop(state, None)
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def has_capitals(pieces: list[str]) -> bool:
    """Whether a vocabulary tells capital letters from small ones."""
    return sum(piece != piece.lower() and piece[0] != "[" for piece in pieces) > CASED * len(pieces)


def check_tokenizer_of_source(model: str | Path, tokenizer, texts: list[str]) -> None:
    """Compare ids of texts with those of tokenizer.json as it stands and of SentencePiece itself; raises RaceError.

    Texts with tokens that were added to the tokenizer are left out.
    """
    for file, encode, own in _references(model, tokenizer):

        def differs(text: str, encode: Callable = encode) -> bool:
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] != encode(text)

        added = [token.lower() for token in tokenizer.get_added_vocab().keys() - own if token]
        for text in (plain(text) for text in (LINE, *texts)):
            if not any(token in text.lower() for token in added) and differs(text):
                word = next(filter(differs, text.split()), text[:60])
                advice = "add or fetch again the tokenizer.json of the model"
                advice += f", or remove {file} if the model was trained without it"
                if file == "tokenizer.json":
                    advice = "add the tokenizer_config.json of the model"
                split = " ".join(tokenizer.tokenize(word))
                raise RaceError(f"{model}: its tokenizer splits {word!r} into {split}, not as {file} does; {advice}")


def _references(model: str | Path, tokenizer) -> list[tuple[str, Callable[[str], list[int]], set[str]]]:
    """(file, text → ids by this file alone, tokens that it looks for before all others) of a model's files."""
    from sentencepiece import SentencePieceProcessor

    found = []
    if file := None if model == "demo" else model_file(model, "tokenizer.json"):
        backend = _of_file(file)
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        found.append((file.name, lambda text: backend.encode(text, add_special_tokens=False).ids, known))
    spiece = None if model == "demo" else spiece_file(model)
    if spiece and (family := load_config(model).model_type) not in OTHER_IDS:
        proto, normalizer = spiece_proto(spiece, family), tokenizer.backend_tokenizer.normalizer
        pieces = SentencePieceProcessor(model_proto=proto.SerializeToString())
        known = {piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED}
        found.append((spiece.name, lambda text: pieces.encode(normalizer.normalize_str(text)), known))
    return found


def plain(text: str) -> str:
    """A text without combining marks and control characters: there, libraries and Unicode versions differ."""
    return "".join(" " if unicodedata.category(c)[0] in "CM" else c for c in unicodedata.normalize("NFC", text))


# ----------------------------------------------------------------------------------------------------- family


def load_config(model: str | Path):
    """The configuration of a hub name or folder; raises RaceError if its family is not run here."""
    from transformers import AutoConfig

    check_place(model)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # a configuration may hold anything
        raise not_loaded(model, "configuration", error, "fetch its config.json again") from error
    check_family(config, model)
    return config


def check_family(config, model=None) -> None:
    """Raise RaceError unless a configuration is that of an encoder with a multiple-choice head that runs here."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES as HEADS

    family, name = config.model_type, "" if model is None else f"{model}: "
    if family in REFUSED:
        raise RaceError(f"{name}a model of type {family!r} is not run: {REFUSED[family]}; docs/models.md lists others")
    if getattr(config, "is_decoder", False) or getattr(config, "attn_type", "bi") == "uni":
        raise RaceError(f"{name}its config.json makes a decoder of it (is_decoder, attn_type); an encoder is expected")
    if family not in HEADS:
        known = ", ".join(sorted(HEADS.keys() - REFUSED))
        raise RaceError(
            f"{name}a model of type {family!r} has no multiple-choice head in transformers; expected one of {known}"
        )


def wrong_transformers() -> RaceError:
    """What to say when the installed transformers cannot run packed sequences."""
    try:
        pins = requires("albert-race") or []
    except PackageNotFoundError:
        pins = []
    pinned = next((pin.removeprefix("transformers==") for pin in pins if pin.startswith("transformers==")), None)
    wanted = f"transformers {pinned}" if pinned else "the version in requirements.txt"
    return RaceError(f"transformers {version('transformers')} does not run packed sequences; install {wanted}")
