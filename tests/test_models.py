"""Tokenizers against SentencePiece, WordPiece and their own files, and what is said of models that cannot be loaded."""

import fnmatch
import io
import json
import re
import types

import huggingface_hub
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from tiny_models import TOKENIZERS, tiny_config, write_tiny_model
from transformers import AutoTokenizer, BertTokenizer

from race import RaceError
from race.data import RaceDataModule
from race.data.cache import Cache, build_cache
from race.data.encoding import question_option, tokenize
from race.models import LINE, check_tokenizer_of_source, load_tokenizer, local_copy, plain, tokenizer_hash
from race_module import RaceModule

ARTICLE = (
    "“Well,” said Ada, “it's 1,250 (or 2,5) – not 30, as in 2010, the year of the café.” She didn't stop. In 2010, "
    "no one-way road -- ``none'', they said -- was open... In 2011, two were; cost: £3,400."
)
QUESTION, OPTIONS = "In 2010, the road ____ (see above).", ["was 'closed'.", 'was "open"', "cost 3,400", "didn't exist"]
NUMBERS = "in 2010, 2011, 2010, 2011, the 2010 2011 2010 2011 of"
PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] in the year road was open ##s ##d close 2010 , . ' \" ( ) – “ ” a".split()
LIKE_DEBERTA = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]", "bos_piece": "[CLS]"}
LIKE_DEBERTA |= {"eos_piece": "[SEP]", "unk_piece": "[UNK]"}


def prepared(text: str) -> str:
    """ALBERT's preparation of ASCII and of what ARTICLE holds besides, restated."""
    return " ".join(text.split()).replace("``", '"').replace("''", '"').replace("é", "e").lower()


def trained(texts: list[str], **settings) -> bytes:
    """A small SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20), model_writer=model, hard_vocab_limit=False, minloglevel=2, **settings
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def spiece() -> bytes:
    """One with the layout of ALBERT's: its special pieces, user-defined marks, "2010,"."""
    texts = [*map(prepared, (ARTICLE, LINE, NUMBERS))]
    special = {"control_symbols": ["[CLS]", "[SEP]", "[MASK]"], "user_defined_symbols": list('()"-.–£€')}
    return trained(texts, vocab_size=100, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, split_by_number=False, **special)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """One question with quotes, dashes, numbers and a long blank, as training and validation split."""
    folder = tmp_path_factory.mktemp("source")
    record = {"article": ARTICLE, "questions": [QUESTION], "options": [OPTIONS], "answers": ["A"], "id": "1"}
    for split in ("train", "dev"):
        (folder / split).mkdir()
        (folder / split / "1.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def folder(tmp_path):
    """make(family, files): a model folder with these files."""

    def make(family: str, **files: str | bytes | list | dict):
        made = tmp_path / "model"
        made.mkdir(exist_ok=True)
        tiny_config(family, 200).save_pretrained(made)
        for name, content in files.items():
            if isinstance(content, list | dict):
                content = "\n".join(content) if isinstance(content, list) else json.dumps(content)
            name = re.sub(r"_(model|json|txt|bin)$", r".\1", name)
            (made / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return made

    return make


def test_spiece_alone_of_albert_is_refused(spiece, source, folder, tmp_path):
    """transformers takes its quotes, dashes and full stops for special tokens: tokenizer.json is asked for."""
    with pytest.raises(RaceError, match=r"its tokenizer splits '.+' into .+ spiece.model; fetch its tokenizer.json"):
        build_cache(str(source), str(folder("albert", spiece_model=spiece)), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_deberta_s_own_pieces_are_followed(source, folder, tmp_path):
    """As it is on the hub: transformers normalises in another way, “…” and wide letters would become unknown."""
    spm = trained([ARTICLE, LINE], vocab_size=120, **LIKE_DEBERTA)
    model = folder("deberta-v2", spm_model=spm, tokenizer_config_json={"do_lower_case": False, "vocab_type": "spm"})
    manifest = build_cache(str(source), str(model), tmp_path / "cache")
    kept, pieces = Cache(tmp_path / "cache").tokenizer, sentencepiece.SentencePieceProcessor(model_proto=spm)
    for text in (ARTICLE, LINE, "Wait … a ½ Ｆｕｌｌ c\u00a0d", " two  spaces ", "a\nline"):
        assert kept(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)
    assert 3 not in pieces.encode("it's …") and kept.mask_token_id == len(kept) - 1 == pieces.get_piece_size()
    assert tokenizer_hash(kept) == manifest["tokenizer"]["sha256"] == tokenizer_hash(load_tokenizer(model))


CLASSES = {"deberta-v2": "DebertaV2", "xlnet": "XLNet", "rembert": "RemBert", "big_bird": "BigBird"}


@pytest.mark.parametrize("family", CLASSES)
def test_tokenizer_json_is_followed_to_the_letter(family, source, folder, tmp_path):
    """As the hub has it, with the normaliser of SentencePiece, in whose place transformers puts one of its own."""
    texts = [text.replace(",", " ,") for text in (ARTICLE, LINE)]
    model = folder("deberta-v2", spm_model=trained(texts, vocab_size=120, **LIKE_DEBERTA))
    load_tokenizer(model).save_pretrained(model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": f"{CLASSES[family]}Tokenizer", "padding_side": "left"}
    folder(family, tokenizer_config_json=settings)
    theirs, ours = AutoTokenizer.from_pretrained(model), load_tokenizer(model)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model / "spm.model"))
    assert theirs(LINE, add_special_tokens=False)["input_ids"] != pieces.encode(LINE)
    assert ours(LINE, add_special_tokens=False)["input_ids"] == pieces.encode(LINE) and ours.padding_side == "left"
    assert build_cache(str(source), str(model), tmp_path / "cache")["tokenizer"]["sha256"] == tokenizer_hash(ours)


def test_a_model_of_the_hub_is_loaded_from_what_was_kept_of_it(spiece, tmp_path, monkeypatch):
    """Offline, by name: files are found where huggingface_hub keeps them, and checked like those of a folder."""
    kept = tmp_path / "models--me--albert"
    commit = kept / "snapshots" / ("0" * 40)
    tiny_config("albert", 200).save_pretrained(commit)
    (commit / "spiece.model").write_bytes(spiece)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    made = load_tokenizer("me/albert")
    assert made.tokenize("in 2010")[0] == "▁in" and made.name_or_path == "me/albert"
    with pytest.raises(RaceError, match=r"^me/albert: its tokenizer splits '“Ada’s”' into .+, unlike spiece.model"):
        check_tokenizer_of_source("me/albert", BertTokenizer(vocab={"[UNK]": 0}), [ARTICLE])


def test_a_tokenizer_json_that_is_not_of_its_spiece_is_refused(spiece, source, folder, tmp_path):
    """As transformers saves it from spiece.model alone. Without that file, nothing can be said against it."""
    model = folder("albert", spiece_model=spiece)
    AutoTokenizer.from_pretrained(model).save_pretrained(model)
    with pytest.raises(RaceError, match=r"model: its tokenizer splits '.+' into .+ spiece.model; .+ tokenizer.json"):
        build_cache(str(source), str(model), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    (model / "spiece.model").unlink()
    build_cache(str(source), str(model), tmp_path / "cache")


def test_added_tokens_are_nothing_to_refuse(spiece, source, folder, tmp_path):
    model = folder("albert", spiece_model=spiece)
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["2010", "road"])
    tokenizer.save_pretrained(model)
    assert build_cache(str(source), str(model), tmp_path / "cache")["tokenizer"]["vocabulary"] == len(tokenizer)


def test_vocab_txt_gives_the_ids_of_wordpiece(source, folder, tmp_path):
    model = folder("bert", vocab_txt=PIECES)
    manifest = build_cache(str(source), str(model), tmp_path / "cache")
    assert manifest["tokenizer"]["class"] == "BertTokenizer"
    cache = Cache(tmp_path / "cache")
    item = cache.encode_question("In the year 2010, Closed Roads.", "“A ___ road”", OPTIONS)
    words = "[CLS] in the year 2010 , close ##d road ##s . [SEP] “ a was ' close ##d ' . road ” [SEP]"
    assert load_tokenizer(model).convert_ids_to_tokens(item["input_ids"][0]) == words.split()
    assert tokenizer_hash(cache.tokenizer) == manifest["tokenizer"]["sha256"]


def test_the_case_of_a_vocabulary_counts(folder):
    """By default transformers lower-cases, whatever tokenizer.json says: no piece with a capital would ever be used."""
    model = folder("bert", vocab_txt=[*PIECES, "ada", "Ada", "In", "She", "Well"])
    with pytest.raises(RaceError, match="model: its tokenizer lower-cases, .* tokenizer_config.json"):
        load_tokenizer(model)
    folder("bert", tokenizer_config_json={"do_lower_case": False})
    load_tokenizer(model).save_pretrained(model)
    (model / "tokenizer_config.json").unlink()
    assert "ada" in AutoTokenizer.from_pretrained(model).tokenize(ARTICLE)
    assert "Ada" in load_tokenizer(model).tokenize(ARTICLE)


def test_plain_text_keeps_all_but_marks_and_controls():
    assert plain(f"{ARTICLE}{LINE} cafe\u0301 a\u20dd\x1cb\nc\n") == f"{ARTICLE}{LINE} café a  b c"


EXPECTED = {  # special tokens before, between and after, and segments
    "roberta": ((0,), (2, 2), (2,), (0,) * 6),
    "modernbert": ((0,), (2,), (2,), (0, 0, 0, 1, 1)),
    "xlnet": ((), (5,), (5, 6), (0, 0, 1, 1, 2)),
}


def articles(corpus) -> list[str]:
    return [json.loads(path.read_text())["article"] for path in sorted(corpus.rglob("*.txt"))]


ODD = [
    "two  \t spaces\r\n ",
    "\x0b a\x0cb\x1cc",
    "a \u0301b \u200dc",
    "<s>a</s>b <mask>, <cls> [MASK] New York",
    "a~b^c _ {d",
    "",
]


@pytest.mark.parametrize("family", TOKENIZERS)
def test_texts_are_tokenised_word_by_word_or_whole_with_the_same_ids(family, corpus, tmp_path):
    tokenizer, texts = TOKENIZERS[family](articles(corpus)), [*ODD, *articles(corpus)[:20]]
    for added in ([], ["New York"]):
        tokenizer.add_tokens(added)
        expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert tokenize(tokenizer, texts).to_pylist() == expected


@pytest.mark.parametrize("family", TOKENIZERS)
def test_sequences_are_those_of_the_tokenizer(family, corpus, tmp_path):
    model = write_tiny_model(family, tmp_path / "model", articles(corpus))
    build_cache(str(corpus), str(model), tmp_path / "cache")
    dataset = RaceDataModule(tmp_path / "cache", max_len=60).dataset("train")
    template, tokenizer, cut = dataset.cache.template, AutoTokenizer.from_pretrained(tmp_path / "cache" / "model"), 0
    if family in EXPECTED:
        assert (template.before, template.between, template.after, template.segments) == EXPECTED[family]
    for index in range(len(dataset)):
        text, item = dataset.text(index), dataset[index]
        for option, *sequence in zip(text["options"], item["input_ids"], item["token_type_ids"], strict=True):
            ids, segments = (part.tolist() for part in sequence)
            texts = text["article"], question_option(text["question"], option)
            pair = tokenizer(*texts, truncation="only_first", max_length=60, return_token_type_ids=True)
            assert (ids, segments) == (pair["input_ids"], pair["token_type_ids"])
            cut += len(ids) == 60
        typed = dataset.cache.encode_question(text["article"], text["question"], text["options"], 60)
        assert [ids.tolist() for ids in typed["input_ids"]] == [ids.tolist() for ids in item["input_ids"]]
        assert dataset.lengths()[index].tolist() == [len(ids) for ids in item["input_ids"]]
    assert cut > 20


def test_weights_of_the_older_format_are_kept_as_they_are(source, folder, tmp_path):
    """ModernBERT's pretrained head lies outside the encoder, and a RoBERTa may have no pooler: none is invented."""
    model = folder("bert", vocab_txt=PIECES)
    state = {"embeddings.word_embeddings.weight": torch.rand(200, 32), "head.dense.weight": torch.ones(2, 2)}
    torch.save(state, model / "pytorch_model.bin")
    build_cache(str(source), str(model), tmp_path / "cache")
    kept = load_file(tmp_path / "cache" / "model" / "model.safetensors")
    assert kept.keys() == state.keys() and all(torch.equal(kept[name], state[name]) for name in state)


def code() -> bytes:
    file = io.BytesIO()
    torch.save({"bert.pooler.dense.bias": types.SimpleNamespace(of_others=1)}, file)
    return file.getvalue()


BERT = {"vocab_txt": PIECES}


@pytest.mark.parametrize(
    ("family", "files", "said"),
    [
        (None, {"model.ckpt-best.index": b"", "30k-clean_model": b""}, "its config.json cannot be loaded"),
        ("bert", {"config_json": "{"}, "its config.json cannot be loaded"),
        ("bert", {"config_json": {"model_type": "bert", "hidden_size": "big"}}, "its config.json cannot be loaded"),
        ("bert", {"config_json": {"model_type": "t5"}}, "'t5' is not run here .* albert, bert"),
        ("mra", {}, "'mra' is not run here .docs/models.md"),
        ("albert", {}, "has no tokenizer files .* tokenizer.json"),
        ("albert", BERT, "has no tokenizer files .* tokenizer.json"),
        ("albert", {"spiece_model": b"junk"}, "its tokenizer cannot be loaded .* tokenizer.json"),
        ("bert", {"tokenizer_json": "{}"}, "its tokenizer cannot be loaded .* tokenizer.json"),
        ("bert", BERT | {"pytorch_model_bin": b"junk"}, "its weights cannot be loaded safely: not the weights of its"),
        ("bert", BERT | {"pytorch_model_bin": code()}, "its weights cannot be loaded safely: .* code in them is never"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_told_in_one_sentence(family, files, said, folder, source, tmp_path):
    model = folder(family or "bert", **files)
    if family is None:
        (model / "config.json").unlink()
    with pytest.raises(RaceError, match=f"^{re.escape(str(model))}:? .*{said}") as caught:
        build_cache(str(source), str(model), tmp_path / "cache")
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists()
    if "tokenizer cannot" not in said and "no tokenizer" not in said:  # as a base model too
        with pytest.raises(RaceError, match=f"^{re.escape(str(model))}"):
            RaceModule(model=model)


@pytest.mark.parametrize("model", ["models/albrt", "my model", "./albrt", "/nowhere/at/all", __file__])
def test_a_mistyped_model_is_told_in_one_sentence(model, source, tmp_path):
    with pytest.raises(RaceError, match=f"^{re.escape(model)}: .*no such folder"):
        build_cache(str(source), model, tmp_path / "cache")
    with pytest.raises(RaceError, match=f"^{re.escape(model)}: .*no such folder"):
        RaceModule(model=model)


def test_what_the_hub_answers_is_told(monkeypatch):
    """The library's first sentence, whole."""

    def answer(*args, **settings):
        raise OSError("The library\nhas a say. And more.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    for load in (load_tokenizer, local_copy, lambda name: RaceModule(model=name)):
        with pytest.raises(
            RaceError, match=r"^me/no-albert: .* from the hub it cannot be loaded \(The library has a say\)$"
        ):
            load("me/no-albert")


@pytest.mark.parametrize(
    ("there", "fetched"), [(["model.safetensors", "pytorch_model.bin"], 1), (["pytorch_model.bin"], 2)]
)
def test_weights_of_the_hub_are_fetched_in_one_format_and_once(there, fetched, tmp_path, monkeypatch):
    calls = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        calls.append(allow_patterns)
        for file in [*there, "config.json"]:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for _ in range(2):
        assert local_copy(f"some/model-{fetched}") == tmp_path
    assert len(calls) == fetched and {path.name for path in tmp_path.iterdir()} == {there[0], "config.json"}
