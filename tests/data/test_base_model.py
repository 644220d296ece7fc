"""Tokenizers built or checked against SentencePiece and WordPiece, and what is said of models that cannot be loaded."""

import fnmatch
import io
import json
import os
import re
import subprocess
import sys
import types

import pytest
import sentencepiece
import torch
import transformers
from helpers import ALBERT, ROOT
from transformers import AlbertConfig, AutoTokenizer, BertConfig, BertTokenizer

import race.model_files
from race import RaceError
from race.data import collate
from race.data.base_model import load_tokenizer, tokenizer_hash
from race.data.cache import build_cache, encode_question, read_manifest
from race.data.module import RaceDataset
from race.data.reference import LINE, check_reference, plain
from race_module import RaceModule

ARTICLE = (
    "“Well,” said Ada, “it's 1,250 (or 2,5) – not 30, as in 2010, the year of the café.” She didn't stop. In 2010, "
    "no one-way road -- ``none'', they said -- was open... In 2011, two were; cost: £3,400."
)
QUESTION, OPTIONS = "In 2010, the road ____ (see above).", ["was 'closed'.", 'was "open"', "cost 3,400", "didn't exist"]
NUMBERS = "in 2010, 2011, 2010, 2011, the 2010 2011 2010 2011 of"
USER_DEFINED = list('()"-.–£€')
ALBERT_SHAPE = {"embedding_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
BERT_SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] in the year road was open ##s ##d close 2010 , . ' \" ( ) – “ ” a".split()


def prepared(text: str) -> str:
    """ALBERT's preparation of ASCII and of what ARTICLE holds besides, restated."""
    return " ".join(text.split()).replace("``", '"').replace("''", '"').replace("é", "e").lower()


@pytest.fixture(scope="module")
def spiece() -> bytes:
    """A small SentencePiece model with the layout of ALBERT's: its special pieces, user-defined marks, "2010,"."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(map(prepared, (ARTICLE, LINE, NUMBERS))) * 20),
        model_writer=model, vocab_size=100, hard_vocab_limit=False, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1,
        control_symbols=["[CLS]", "[SEP]", "[MASK]"], user_defined_symbols=USER_DEFINED, split_by_number=False,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


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
    """make(config, files): a model folder with these files."""

    def make(config=None, **files: str | bytes | list | dict):
        made = tmp_path / "model"
        made.mkdir(exist_ok=True)
        if config is not None:
            config.save_pretrained(made)
        for name, content in files.items():
            name = re.sub(r"_(model|json|txt)$", r".\1", name)
            if isinstance(content, list | dict):
                content = "\n".join(content) if isinstance(content, list) else json.dumps(content)
            (made / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return made

    return make


def albert() -> AlbertConfig:
    return AlbertConfig(vocab_size=200, **ALBERT_SHAPE)


def bert() -> BertConfig:
    return BertConfig(vocab_size=100, **BERT_SHAPE)


def by_sentencepiece(model: bytes, texts: list[str]) -> list[list[int]]:
    """SentencePiece's own ids; a piece of a digit and a comma becomes the pieces of the number, and a comma."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    rows = []
    for ids in pieces.encode([prepared(text) for text in texts]):
        row = []
        for number in ids:
            piece = pieces.id_to_piece(number)
            if re.search(r"\d,$", piece):
                number_alone = pieces.encode(piece[:-1].replace("▁", " ").strip(), out_type=str)
                row += [*map(pieces.piece_to_id, number_alone), pieces.piece_to_id(",")]
            else:
                row.append(number)
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", ["spiece_model", "30k-clean_model"])
def test_spiece_alone_gives_the_ids_of_sentencepiece(name, spiece, source, folder, tmp_path):
    """Quotes, dashes, full stops and numbers too; what the cache keeps gives the same ids and the same hash."""
    model = folder(albert(), **{name: spiece})
    manifest = build_cache(str(source), str(model), tmp_path / "cache")
    dataset, texts = RaceDataset(tmp_path / "cache", "train"), [ARTICLE]
    texts += [QUESTION.replace("____", option) for option in OPTIONS]
    article, *seconds = by_sentencepiece(spiece, texts)
    built, kept = load_tokenizer(model), load_tokenizer(tmp_path / "cache" / "model")
    assert "▁2010,▁" not in built.get_vocab() and "▁2010," in built.get_vocab()
    assert built.convert_ids_to_tokens(seconds[0])[:3] == ["▁in", "▁2010", ","]
    typed = encode_question(tmp_path / "cache", ARTICLE, QUESTION, OPTIONS)
    for ids, again, second in zip(dataset[0]["input_ids"], typed["input_ids"], seconds, strict=True):
        assert ids.tolist() == again.tolist() == [2, *article, 3, *second, 3]
    assert tokenizer_hash(built) == tokenizer_hash(kept) == manifest["tokenizer"]["sha256"]
    assert built(texts)["input_ids"] == kept(texts)["input_ids"]


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False, "keep_accents": True}])
def test_the_real_spiece_alone_equals_tokenizer_json(settings, folder):
    if not ALBERT.exists():
        pytest.skip(f"the ALBERT vocabulary is not at hand ({ALBERT}); set RACE_TEST_DATA")
    model = folder(albert(), spiece_model=(ALBERT / "spiece.model").read_bytes(), tokenizer_config_json=settings)
    built, theirs = load_tokenizer(model), AutoTokenizer.from_pretrained(ALBERT, **settings)
    texts = [
        ARTICLE,
        LINE,
        *(f"a{chr(code)}b {chr(code)} 1{chr(code)}2" for code in range(33, 0x3000)),
        *theirs.get_vocab(),
    ]
    assert built(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert built.get_vocab() == theirs.get_vocab() and len(built) == 30000


def test_a_model_in_the_hub_s_cache_is_built_too(spiece, tmp_path):
    """Offline, by name: spiece.model is found where huggingface_hub keeps it."""
    commit = "0" * 40
    kept = tmp_path / "hub" / "models--me--albert"
    albert().save_pretrained(kept / "snapshots" / commit)
    (kept / "snapshots" / commit / "spiece.model").write_bytes(spiece)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    code = (
        "from race.data.base_model import load_tokenizer\nfrom race.data.reference import references\n"
        "made = load_tokenizer('me/albert')\nprint([part.file for part in references('me/albert', made)])\n"
        "print(made.tokenize('In 2010, \"a\".'))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    files, tokens = run.stdout.splitlines()
    assert files == "['spiece.model']" and tokens.startswith("['▁in', '▁2010', ',', '▁', '\"'"), run.stdout


def test_a_tokenizer_json_that_is_not_of_its_spiece_is_refused(spiece, source, folder, tmp_path):
    """As transformers saves it from spiece.model alone. Without that file, nothing can be said against it."""
    model = folder(albert(), spiece_model=spiece)
    AutoTokenizer.from_pretrained(model).save_pretrained(model)
    with pytest.raises(
        RaceError, match=r"model: its tokenizer splits '.+' into .+ \(spiece.model: .+\); fetch its tok"
    ):
        build_cache(str(source), str(model), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    (model / "spiece.model").unlink()
    build_cache(str(source), str(model), tmp_path / "cache")


def test_a_spiece_of_another_layout_is_refused(source, folder, tmp_path):
    """The tokenizer built for an ALBERT takes piece 1 for unknown words; here it is piece 0."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["in the year the road was open"] * 20), model_writer=model, vocab_size=30,
        hard_vocab_limit=False, control_symbols=["[CLS]", "[SEP]", "[MASK]", "<pad>"], minloglevel=2,
    )  # fmt: skip
    made = folder(albert(), spiece_model=model.getvalue())
    with pytest.raises(RaceError, match=r"\(spiece.model: .*<unk>.*; add the tokenizer.json and tokenizer_config.json"):
        build_cache(str(source), str(made), tmp_path / "cache")


def test_added_tokens_are_nothing_to_refuse(spiece, source, folder, tmp_path):
    model = folder(albert(), spiece_model=spiece)
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["2010", "road"])
    tokenizer.save_pretrained(model)
    build_cache(str(source), str(model), tmp_path / "cache")
    assert read_manifest(tmp_path / "cache")["tokenizer"]["vocabulary"] == len(tokenizer)


def cased(model, **settings) -> None:
    """Make a folder's tokenizer.json one that tells capital letters from small ones."""
    description = json.loads((model / "tokenizer.json").read_text())
    steps = description["normalizer"]
    if steps["type"] == "BertNormalizer":
        steps["lowercase"] = False
    else:
        steps["normalizers"] = [step for step in steps["normalizers"] if step["type"] != "Lowercase"]
    (model / "tokenizer.json").write_text(json.dumps(description))
    (model / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("kind", ["albert", "bert"])
def test_case_is_as_tokenizer_json_has_it(kind, spiece, source, folder, tmp_path):
    """Without tokenizer_config.json transformers lower-cases whatever tokenizer.json says."""
    if kind == "albert":
        model = folder(albert(), spiece_model=spiece)
    else:
        model = folder(bert(), vocab_txt=[*PIECES, "In", "I", "A", "##n"])
    load_tokenizer(model).save_pretrained(model)
    build_cache(str(source), str(model), tmp_path / "small")
    cased(model)
    with pytest.raises(RaceError, match=r"\(tokenizer.json: .*; add the tokenizer_config.json of the model"):
        build_cache(str(source), str(model), tmp_path / "cache")
    cased(model, do_lower_case=False)
    build_cache(str(source), str(model), tmp_path / "cache")
    cased(model, tokenizer_class="PreTrainedTokenizerFast", cls_token="[CLS]", sep_token="[SEP]")
    build_cache(str(source), str(model), tmp_path / "fast")
    ids = [read_manifest(tmp_path / name)["files"]["train-passages.arrow"] for name in ("small", "cache", "fast")]
    assert ids[0] != ids[1] == ids[2]


@pytest.mark.parametrize("config", [albert(), bert()], ids=["albert", "bert"])
def test_vocab_txt_gives_the_ids_of_wordpiece(config, source, folder, tmp_path):
    model = folder(config, vocab_txt=PIECES)
    manifest = build_cache(str(source), str(model), tmp_path / "cache")
    assert manifest["tokenizer"]["class"] == "BertTokenizer"
    item = encode_question(tmp_path / "cache", "In the year 2010, Closed Roads.", "“A ___ road”", OPTIONS)
    words = "[CLS] in the year 2010 , close ##d road ##s . [SEP] “ a was ' close ##d ' . road ” [SEP]"
    assert load_tokenizer(model).convert_ids_to_tokens(item["input_ids"][0]) == words.split()
    assert tokenizer_hash(load_tokenizer(tmp_path / "cache" / "model")) == manifest["tokenizer"]["sha256"]


def test_vocab_txt_with_capitals_needs_its_tokenizer_config(source, folder, tmp_path):
    """Without one, transformers lower-cases: no piece with a capital letter would ever be used."""
    model = folder(bert(), vocab_txt=[*PIECES, "ada", "Ada", "In", "She", "Well"])
    with pytest.raises(
        RaceError, match=r"into .* ada .* \(vocab.txt: .* Ada .*\); add the tokenizer.json and tokenizer_conf"
    ):
        build_cache(str(source), str(model), tmp_path / "cache")
    (model / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    build_cache(str(source), str(model), tmp_path / "cache")
    assert "Ada" in load_tokenizer(tmp_path / "cache" / "model").tokenize(ARTICLE)


def test_a_tokenizer_json_that_is_not_of_its_vocab_txt_is_refused(source, folder, tmp_path):
    model = folder(bert(), vocab_txt=PIECES)
    load_tokenizer(model).save_pretrained(model)
    build_cache(str(source), str(model), tmp_path / "same")
    folder(vocab_txt=[*PIECES[:5], *PIECES[:4:-1]])
    with pytest.raises(RaceError, match=r"splits '.+' into [\d ]+ \(vocab.txt: [\d ]+\); fetch .* or remove vocab.txt"):
        build_cache(str(source), str(model), tmp_path / "cache")


def test_other_tokenizers_pass(source, folder, tmp_path):
    """One that is none of WordPiece beside a vocab.txt; a truncation in tokenizer.json; special tokens in a text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Whitespace()
    model = folder(bert(), vocab_txt=PIECES[::-1])
    backend.enable_truncation(4)
    backend.save(str(model / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    passages = [types.SimpleNamespace(article=f"{ARTICLE} [MASK] [SEP]", questions=["[CLS] _"], options=[["a"]])]
    check_reference(model, load_tokenizer(model), passages)
    model = folder(vocab_txt=PIECES)
    BertTokenizer(vocab=str(model / "vocab.txt")).save_pretrained(model)
    check_reference(model, load_tokenizer(model), passages)


def test_plain_text_keeps_all_but_marks_and_controls():
    assert plain(ARTICLE) == ARTICLE and plain(LINE) == LINE
    assert plain("cafe\u0301 a\u20dd\x1cb\nc") == "café a  b c"


def tensorflow(model) -> None:
    for name in ("model.ckpt-best.index", "model.ckpt-best.data-00000-of-00001", "30k-clean.model"):
        (model / name).write_bytes(b"")
    (model / "albert_config.json").write_text(json.dumps({"hidden_size": 768}))


def nothing(model) -> None:
    (model / "readme.txt").write_text("?")


def config_not_json(model) -> None:
    (model / "config.json").write_text("{")


def config_of_nothing(model) -> None:
    (model / "config.json").write_text('{"model_type": "albert", "hidden_size": "big"}')


def config_of_another(model) -> None:
    (model / "config.json").write_text('{"model_type": "t5"}')


def config_of_one_that_leaks(model) -> None:
    (model / "config.json").write_text('{"model_type": "fnet"}')


def no_tokenizer(model) -> None:
    albert().save_pretrained(model)


def damaged_spiece(model) -> None:
    albert().save_pretrained(model)
    (model / "spiece.model").write_bytes(b"junk")


def damaged_json(model) -> None:
    bert().save_pretrained(model)
    (model / "tokenizer.json").write_text("{}")


def damaged_weights(model) -> None:
    folder_of_bert(model)
    (model / "pytorch_model.bin").write_bytes(b"junk")


def code_in_weights(model) -> None:
    folder_of_bert(model)
    torch.save({"bert.pooler.dense.bias": types.SimpleNamespace(of_others=1)}, model / "pytorch_model.bin")


def folder_of_bert(model) -> None:
    bert().save_pretrained(model)
    (model / "vocab.txt").write_text("\n".join(PIECES))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (tensorflow, r"holds a TensorFlow checkpoint \(model.ckpt-best.*\), which is not read; name the same model on"),
        (nothing, "has no config.json; name the folder of a model, or add"),
        (config_not_json, ": its configuration cannot be loaded: config.json is not JSON; fetch it again"),
        (config_of_nothing, ": its configuration cannot be loaded: config.json is not one that transformers reads"),
        (
            config_of_another,
            ": a model of type 't5' has no multiple-choice head in transformers; expected one of albert",
        ),
        (
            config_of_one_that_leaks,
            ": a model of type 'fnet' is not run: its answer to a question depends on the padding",
        ),
        (no_tokenizer, r"has no tokenizer files \(tokenizer.json, or spiece.model \(ALBERT\), vocab.txt \(BERT\), "),
        (
            damaged_spiece,
            ": its tokenizer cannot be loaded: its files are damaged or incomplete; add the tokenizer.json",
        ),
        (damaged_json, ": its tokenizer cannot be loaded: its files are damaged or incomplete; add the tokenizer.json"),
        (damaged_weights, ": its weights cannot be loaded safely: they are damaged, or not those of its config.json"),
        (
            code_in_weights,
            ": its weights cannot be loaded safely: they hold more than tensors, and code in them is nev",
        ),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_told_in_one_sentence(make, said, source, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    make(model)
    with pytest.raises(RaceError, match=f"^{re.escape(str(model))}:? ?{said}") as caught:
        build_cache(str(source), str(model), tmp_path / "cache")
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists()
    if make not in (no_tokenizer, damaged_spiece, damaged_json):  # as a base model, told in the same way
        with pytest.raises(
            RaceError, match=said.replace("its weights cannot be", "cannot be").replace(": they", ": its weights: they")
        ):
            RaceModule(model=model)


def test_weights_of_tensorflow_beside_a_configuration(folder):
    model = folder(albert(), tf_model_h5=b"")
    (model / "tf_model_h5").rename(model / "tf_model.h5")
    with pytest.raises(
        RaceError, match=r"no weights \(model.safetensors\), only those of TensorFlow \(tf_model.h5\); na"
    ):
        RaceModule(model=model)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("models/albrt", "no such folder, and from the hub its .* cannot be loaded (the hub cannot be reached, and no"),
        ("my model", "no such folder, and from the hub its .* cannot be loaded (no model can have that name)"),
        ("./albrt", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
    ],
)
def test_a_mistyped_model_is_told_in_one_sentence(model, said, source, tmp_path):
    said = said.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(RaceError, match=f"^{model}: {said}"):
        build_cache(str(source), model, tmp_path / "cache")
    with pytest.raises(RaceError, match=f"^{model}: {said}"):
        RaceModule(model=model)


def test_a_file_is_no_model(folder):
    model = folder(albert(), model_safetensors=b"")
    with pytest.raises(RaceError, match="config.json is a file; name the folder that holds"):
        RaceModule(model=model / "config.json")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("RepositoryNotFoundError", "the hub has no model of that name, or keeps it private"),
        ("GatedRepoError", "its owner must grant you access; then log in with `hf auth login`"),
        ("RemoteEntryNotFoundError", "a file of it is missing there"),
        ("BadRequestError", r"The library has a say\.\)$"),
    ],
)
def test_what_the_hub_answers_is_told(kind, reason, monkeypatch):
    """Of errors of other kinds, the library's first sentence is told whole."""
    import httpx
    from huggingface_hub import errors

    def answer(*args, **settings):
        response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
        raise OSError("The library\nhas a say. And more.") from getattr(errors, kind)("?", response=response)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", answer)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", answer)
    with pytest.raises(RaceError, match=rf"^me/albert: no such folder, .* its tokenizer cannot be loaded \({reason}"):
        load_tokenizer("me/albert")
    with pytest.raises(
        RaceError, match=rf"^me/albert: no such folder, .* its configuration cannot be loaded \({reason}"
    ):
        RaceModule(model="me/albert")


@pytest.mark.parametrize("config", ["albert_config", "bert_config"])
def test_layers_that_do_not_know_packing_are_told_with_both_versions(config, items, request, monkeypatch):
    """As in transformers 4, and whatever its number is: only a call that fails is refused."""
    module, batch = RaceModule(config=request.getfixturevalue(config)).eval(), collate(items(2))
    encoder = module.model.base_model
    of_albert = config == "albert_config"
    part = encoder.encoder.albert_layer_groups[0].albert_layers[0] if of_albert else encoder
    of_layer, of_model = (
        (lambda self, hidden, mask=None: None),
        (lambda self, input_ids, position_ids, token_type_ids: None),
    )
    monkeypatch.setattr(race.model_files, "version", lambda name: "4.40.0")
    module(batch)
    monkeypatch.setattr(type(part), "forward", of_layer if of_albert else of_model)
    with pytest.raises(
        RaceError, match=r"^transformers 4.40.0 does not run packed sequences; install transformers 5.17.0$"
    ):
        module(batch)

    def unknown(name: str):
        raise race.model_files.PackageNotFoundError(name)

    monkeypatch.setattr(race.model_files, "requires", unknown)
    with pytest.raises(RaceError, match=r"^transformers 4.40.0 does .* sequences; install the version in requirements"):
        module(batch)


def test_other_errors_of_a_layer_stay_what_they_are(albert_config, items, monkeypatch):
    module = RaceModule(config=albert_config)

    def forward(self, hidden, mask, packing):
        raise TypeError("of another kind")

    monkeypatch.setattr(type(module.model.albert.encoder.albert_layer_groups[0].albert_layers[0]), "forward", forward)
    with pytest.raises(TypeError, match="of another kind"):
        module(collate(items(1)))


def test_attention_that_cannot_be_chosen_is_told(albert_config, monkeypatch):
    """transformers 4.5x only warns of it."""
    monkeypatch.setattr(transformers.PreTrainedModel, "set_attn_implementation", lambda *args: None)
    with pytest.raises(RaceError, match=r"does not run packed sequences; install transformers 5.17.0"):
        RaceModule(config=albert_config)


@pytest.mark.parametrize(
    ("there", "fetched"), [(["model.safetensors", "pytorch_model.bin"], 1), (["pytorch_model.bin"], 2)]
)
def test_weights_of_the_hub_are_fetched_in_one_format(there, fetched, tmp_path, monkeypatch):
    calls = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        calls.append(allow_patterns)
        for file in there:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert race.model_files.local_copy("some/model") == tmp_path
    assert len(calls) == fetched and {path.name for path in tmp_path.iterdir()} == {there[0]}
