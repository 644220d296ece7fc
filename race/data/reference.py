"""A tokenizer against its model's own files: real texts must become the ids that SentencePiece or WordPiece give."""

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from race import RaceError
from race.data.base_model import spiece_proto
from race.data.encoding import question_option
from race.model_files import model_file, model_json, spiece_file

SAMPLE = 50  # articles, and as many questions
LINE = "“Ada’s” CAFÉ -- ``naïve'' … it's £1,234.50, 2,5 or 30, in 2010, (well-known: 3.14–2.71; “Don't!”) \"Über\" _ ."
USER_DEFINED = 4  # the type of a piece that SentencePiece looks for before all others
OTHER_NUMBERS = ("camembert", "xlm-roberta", "xlm-roberta-xl")  # pieces have other ids than in the SentencePiece model
CASED = 0.05  # of the pieces in a vocabulary with capital letters; vocabularies without have next to none


class Reference(NamedTuple):
    """What a file of the model makes of texts; `added`: tokens that are found before a text is split."""

    file: str
    encode: Callable[[list[str]], list[list[int]]]
    piece: Callable[[int], str]
    added: set[str]


def check_reference(model: str | Path, tokenizer, passages: list) -> None:
    """Compare a tokenizer with the files of its model on texts of the source; raises RaceError where ids differ.

    Texts with tokens that were added to the tokenizer are left out. A model without such files passes.
    """
    if model == "demo" or not tokenizer.is_fast:
        return
    sample = passages[:: max(1, len(passages) // SAMPLE)]
    questions = [question_option(passage.questions[0], passage.options[0][0]) for passage in sample]
    texts = [plain(text) for text in (LINE, *(passage.article for passage in sample), *questions)]
    for reference in references(model, tokenizer):
        added = {token.lower() for token in {*tokenizer.get_added_vocab()} - reference.added if token}
        chosen = [text for text in texts if not any(token in text.lower() for token in added)]
        if any(ours != theirs for ours, theirs in zip(*_both(tokenizer, reference, chosen), strict=True)):
            raise RaceError(_difference(model, tokenizer, reference, chosen))


def plain(text: str) -> str:
    """A text without combining marks and control characters: there, libraries and Unicode versions differ."""
    return "".join(" " if unicodedata.category(c)[0] in "CM" else c for c in unicodedata.normalize("NFC", text))


def references(model: str | Path, tokenizer) -> list[Reference]:
    """tokenizer.json as it stands, then the SentencePiece model, or vocab.txt."""
    description, settings = model_json(model, "tokenizer.json"), model_json(model, "tokenizer_config.json")
    found = [_of_tokenizer_json(model_file(model, "tokenizer.json"))] if description else []
    family, spiece = model_json(model, "config.json").get("model_type"), spiece_file(model)
    if spiece and family == "albert":
        return [*found, _of_spiece(spiece, description, settings)]
    if spiece and not description and family not in OTHER_NUMBERS:
        return [_of_pieces(spiece)]
    vocabulary = model_file(model, "vocab.txt")
    reference = vocabulary and _of_vocabulary(vocabulary, description, settings, tokenizer)
    return [*found, reference] if reference else found


def _of_tokenizer_json(path: Path) -> Reference:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(path))
    backend.no_truncation()
    backend.no_padding()
    return _of_backend(path, backend)


def _of_backend(path: Path, backend) -> Reference:
    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]

    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    return Reference(path.name, encode, backend.id_to_token, added)


def _of_spiece(path: Path, description: dict, settings: dict) -> Reference:
    """SentencePiece itself, on texts prepared as tokenizer.json or tokenizer_config.json say: its file does not."""
    from sentencepiece import SentencePieceProcessor

    proto = spiece_proto(path)
    pieces = SentencePieceProcessor(model_proto=proto.SerializeToString())
    if not description:
        lower, accents, quotes = settings.get("do_lower_case", True), settings.get("keep_accents", False), True
    else:
        steps = re.findall(r'"type": "(\w+)"', json.dumps(description.get("normalizer")))
        lower, accents, quotes = "Lowercase" in steps, "StripAccents" not in steps, "Replace" in steps

    def encode(texts: list[str]) -> list[list[int]]:
        return pieces.encode([albert_text(text, lower, accents, quotes) for text in texts])

    return Reference(
        path.name, encode, pieces.id_to_piece, {piece.piece for piece in proto.pieces if piece.type == USER_DEFINED}
    )


def albert_text(text: str, lower: bool = True, accents: bool = False, quotes: bool = True) -> str:
    """A text as ALBERT prepares it for SentencePiece (preprocess_text of its authors, and quotes of LaTeX)."""
    text = " ".join(text.split())
    if quotes:
        text = text.replace("``", '"').replace("''", '"')
    if not accents:
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return text.lower() if lower else text


def _of_pieces(path: Path) -> Reference:
    """SentencePiece itself, whose numbers are those of most families."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(path))
    return Reference(path.name, pieces.encode, pieces.id_to_piece, set())


def _of_vocabulary(path: Path, description: dict, settings: dict, tokenizer) -> Reference | None:
    """WordPiece with the pieces of vocab.txt; None beside a tokenizer.json of another kind."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    if not description:
        cased = has_capitals(path.read_text(encoding="utf-8").split())
        lower, accents = settings.get("do_lower_case", not cased), settings.get("strip_accents")
        steps = [settings.get("tokenize_chinese_chars", True), accents, lower]
    elif (normalizer := description.get("normalizer") or {}).get("type") == "BertNormalizer":
        steps = [normalizer[name] for name in ("handle_chinese_chars", "strip_accents", "lowercase")]
    else:
        return None
    unknown = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("unk_token", "[UNK]")
    backend = Tokenizer(models.WordPiece.from_file(str(path), unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(True, *steps)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _of_backend(path, backend)


def has_capitals(pieces: list[str]) -> bool:
    """Whether a vocabulary tells capital letters from small ones."""
    return sum(piece != piece.lower() and piece[0] != "[" for piece in pieces) > CASED * len(pieces)


def _both(tokenizer, reference: Reference, texts: list[str]) -> tuple[list, list]:
    ours = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return ours, reference.encode(texts)


def _difference(model: str | Path, tokenizer, reference: Reference, texts: list[str]) -> str:
    """The first word, or the beginning of the text, from which two sets of ids are made, and what to do."""
    for text in (*" ".join(texts).split(), *texts):
        (ours,), (theirs,) = _both(tokenizer, reference, [text])
        if ours != theirs:
            break
    parts = [tokenizer.convert_ids_to_tokens(ours), [reference.piece(number) for number in theirs]]
    if parts[0] == parts[1]:
        parts = [[str(number) for number in ids] for ids in (ours, theirs)]
    ours, theirs = (" ".join(part[:12]) for part in parts)
    if reference.file == "tokenizer.json":
        advice = "add the tokenizer_config.json of the model"
    elif model_file(model, "tokenizer.json") is None:
        advice = "add the tokenizer.json and tokenizer_config.json of the model"
    else:
        advice = f"fetch its tokenizer.json again, or remove {reference.file} if the model was trained without it"
    return f"{model}: its tokenizer splits {text[:60]!r} into {ours} ({reference.file}: {theirs}); {advice}"
