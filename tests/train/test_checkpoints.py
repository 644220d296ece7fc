"""Checkpoints of this repository and of other code: read safely, the same answers, or refused."""

import argparse
import json
import os
import re
import shutil
import zipfile

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from transformers import (
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForSequenceClassification,
    AlbertModel,
    AlbertTokenizer,
)

from race import RaceError
from race.data import RaceDataModule, collate
from race.data.cache import Cache
from race.encoder import load_model
from race.files import save_archive
from race.models import keep_model
from race.train.checkpoints import Checkpoint, short_names
from race.train.stages import Stage
from race.train.training import start_stage
from race_module import RaceModule

AUTHORS = "e1-albert-race-epoch=00-val_loss_epoch=0.78.ckpt"


def saved_by_lightning(module: pl.LightningModule, path) -> Checkpoint:
    trainer = pl.Trainer(max_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.save_checkpoint(path, weights_only=True)
    return Checkpoint(path)


@pytest.fixture(scope="module")
def own(cache, tmp_path_factory) -> Checkpoint:
    """A checkpoint of ours, with weights that tell the options apart."""
    pl.seed_everything(1, verbose=False)
    module = start_stage(Stage("e1"), cache)
    torch.nn.init.normal_(module.model.classifier.weight, std=1.0)
    return saved_by_lightning(module, tmp_path_factory.mktemp("own") / "e1.ckpt")


@pytest.fixture(scope="module")
def answers(cache):
    """answers(checkpoint) -> logits [8, 4] of the first questions of test."""
    dataset = RaceDataModule(cache).dataset("test")
    batch = collate([dataset[index] for index in range(8)])

    def ask(checkpoint) -> torch.Tensor:
        with torch.no_grad():
            return checkpoint.load(cache).eval()(batch)

    return ask


@pytest.fixture
def model(own, cache) -> AlbertForMultipleChoice:
    """Hugging Face's model with the weights of `own`."""
    return own.load(cache).model


class Authors(pl.LightningModule):
    """A plain module around Hugging Face's model, as other people write it."""

    def __init__(self, config):
        super().__init__()
        self.model = AlbertForMultipleChoice(config)


def test_a_plain_lightning_checkpoint_answers_alike(own, answers, model, cache, tmp_path):
    """As the original authors made theirs: objects of Lightning and argparse beside the weights, an old buffer."""
    module = Authors(model.config)
    module.model.load_state_dict(model.state_dict())
    saved_by_lightning(module, tmp_path / AUTHORS)
    content = torch.load(tmp_path / AUTHORS, weights_only=False)
    content["callbacks"] = {ModelCheckpoint: {"best_model_score": torch.tensor(0.78)}}  # keyed by class until 1.5
    content["hyper_parameters"] = argparse.Namespace(learning_rate=2e-5, output=tmp_path)
    content["state_dict"]["model.albert.embeddings.position_ids"] = torch.arange(512)[None]
    save_archive(content, tmp_path / AUTHORS)
    theirs = Checkpoint(tmp_path / AUTHORS)
    assert (theirs.stage, theirs.epoch, theirs.val_loss, theirs.learning_rate, theirs.base) == (None,) * 5
    assert torch.equal(answers(theirs), answers(own))
    assert short_names([own, theirs]) == ["e1", AUTHORS.removesuffix(".ckpt")]
    assert start_stage(Stage("e2"), cache, base_checkpoint=theirs.path).lineage["chain"] == ["unknown"]


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_orig_mod.", "model._orig_mod.", "net.module.encoder."])
def test_whatever_stands_before_the_names(prefix, own, answers, model, tmp_path):
    content = {"state_dict": {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}}
    torch.save(content if prefix != "module." else content["state_dict"], tmp_path / "x.ckpt")
    assert torch.equal(answers(Checkpoint(tmp_path / "x.ckpt")), answers(own))


def test_a_file_of_an_old_torch_and_one_whose_hyper_parameters_hold_a_config(own, answers, model, tmp_path):
    """The latter as Lightning saves those of a module whose argument is a dict `config`."""
    torch.save({"state_dict": model.state_dict()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    parameters = {"config": model.config.to_dict() | {"model_type": "t5"}, "learning_rate": 1e-5}
    save_archive({"state_dict": model.state_dict(), "hyper_parameters": parameters, "race": "1"}, tmp_path / "x.ckpt")
    for name in ("old.pt", "x.ckpt"):
        assert torch.equal(answers(Checkpoint(tmp_path / name)), answers(own))


@pytest.mark.parametrize("wrong", [{"hidden_size": "big"}, {"architectures": 5}, {"dtype": "big"}])
def test_a_configuration_that_is_none_is_refused(wrong, own, tmp_path):
    content = torch.load(own.path, weights_only=True)
    content["hyper_parameters"]["config"] |= wrong
    save_archive(content, tmp_path / "x.ckpt")
    with pytest.raises(RaceError, match=r"x\.ckpt: "):
        RaceModule.load_from_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors", "name another file .of a .*safetensors, its folder"),
        ("/dev/null", "name another file"),
        ("mine.zip", "name another file"),
        (".", "no such checkpoint .a file, such as one of a stage's folder"),
    ],
)
def test_a_file_of_another_kind_is_told_from_a_damaged_one(name, said, own, tmp_path):
    shutil.copy(own.path, tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        archive.writestr("notes.txt", "mine")
    with pytest.raises(RaceError, match=said) as error:
        Checkpoint(tmp_path / name)
    assert not re.search("remove|delete|move", str(error.value))


@pytest.mark.parametrize("safe", [True, False])
def test_a_hugging_face_folder_answers_alike(safe, own, answers, model, tmp_path):
    model.save_pretrained(tmp_path / "my.albert")
    if not safe:
        (tmp_path / "my.albert" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "my.albert" / "pytorch_model.bin")
    folder = Checkpoint(tmp_path / "my.albert")
    assert folder.stage is None and folder.label == "my.albert"
    assert torch.equal(answers(folder), answers(own))


@pytest.mark.parametrize("stale", ["model_1.safetensors", "model-00009-of-00009.safetensors", "pytorch_model_1.bin"])
def test_the_weights_are_those_of_the_index(stale, own, answers, model, cache, tmp_path):
    """Whatever lies beside them: as a checkpoint, as the model of a cache, and as a base."""
    folder, kept = tmp_path / "hf", tmp_path / "kept"
    shutil.copytree(cache / "model", folder)
    (folder / "model.safetensors").unlink()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    if stale.endswith(".bin"):
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        torch.save(zeros, folder / stale)
    else:
        model.save_pretrained(folder, max_shard_size="100KB" if "0009" in stale else "1GB")
        save_file(zeros, folder / stale, {"format": "pt"})
    kept.mkdir()
    assert keep_model(str(folder), kept)[1] and stale not in {path.name for path in kept.iterdir()}
    for made in (folder, kept):
        assert torch.equal(answers(Checkpoint(made)), answers(own))
        assert torch.equal(load_model(made, None, None).classifier.weight, model.classifier.weight)
    if "0009" in stale:
        next(kept.glob("model-00001*")).unlink()
        with pytest.raises(RaceError, match=r"index.json: not the index of .*model-00001"):
            answers(Checkpoint(kept))


def test_an_export_says_where_it_comes_from(own, model, tmp_path):
    model.save_pretrained(tmp_path)
    facts = {"data": {"name": "x", "sha256": "y"}, "max_qa_len": 128, "lineage": [{"stage": "e1", "epoch": 3}]}
    (tmp_path / "export.json").write_text(json.dumps(facts))
    exported = Checkpoint(tmp_path)
    assert (exported.stage, exported.epoch, exported.lineage["cache"]["source_sha256"]) == ("e1", 3, "y")
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(RaceError, match=r"export.json: damaged"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (AlbertModel, "classifier.weight"),
        (AlbertForPreTraining, "predictions"),
        (AlbertForSequenceClassification, "size mismatch for classifier.weight"),
    ],
)
def test_a_model_without_a_head_is_never_asked_with_a_random_one(kind, named, model, answers, tmp_path):
    model.config.num_labels = 3
    kind(model.config).save_pretrained(tmp_path)
    with pytest.raises(RaceError, match=f"not a multiple-choice model .*{named}"):
        answers(Checkpoint(tmp_path))


@pytest.mark.parametrize("wrong", ["extra", "twice", "fewer", "none"])
def test_weights_that_are_not_the_models_are_refused_by_name(wrong, model, answers, tmp_path):
    weights, words = model.state_dict(), "albert.embeddings.word_embeddings.weight"
    state, named = {
        "extra": (weights | {"extra.weight": torch.ones(3)}, "extra.weight"),
        "twice": (weights | {f"ema.{name}": tensor for name, tensor in weights.items()}, f"ema.{words}"),
        "fewer": ({name: tensor for name, tensor in weights.items() if name != words}, words),
        "none": ({}, words),
    }[wrong]
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    with pytest.raises(RaceError, match=f"x.ckpt is not a multiple-choice model .*{named}"):
        answers(Checkpoint(tmp_path / "x.ckpt"))


def test_no_code_in_a_foreign_file_runs(model, answers, tmp_path, monkeypatch):
    """Objects of a library are read as nothing."""
    weights = model.state_dict()
    monkeypatch.setattr(argparse.Namespace, "__setstate__", lambda *_: os.mkdir(tmp_path / "owned"), raising=False)
    save_archive({"state_dict": weights, "hyper_parameters": argparse.Namespace(a=1)}, tmp_path / "y.ckpt")
    assert len(answers(Checkpoint(tmp_path / "y.ckpt"))) == 8
    assert not (tmp_path / "owned").exists()


def test_another_vocabulary_is_refused(model, cache, tmp_path):
    model.save_pretrained(tmp_path)
    pieces = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "▁", "a"]
    AlbertTokenizer(vocab=[(piece, 0.0) for piece in pieces]).save_pretrained(tmp_path)
    with pytest.raises(RaceError, match="another tokenizer"):
        Checkpoint(tmp_path).check_encoding(Cache(cache))


@pytest.mark.parametrize("changed", ["tokenizer", "max_qa_len"])
def test_another_encoding_is_refused(own, cache, changed):
    other = Cache(cache)
    other.manifest = other.manifest | {"max_qa_len": 9} if changed == "max_qa_len" else other.manifest
    if changed == "tokenizer":
        other.manifest = other.manifest | {"tokenizer": other.manifest["tokenizer"] | {"sha256": "of another"}}
    own.check_encoding(Cache(cache))
    with pytest.raises(RaceError, match=r"e1.ckpt was trained with another .*CACHE_DIR"):
        own.check_encoding(other)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing.ckpt", "checkpoints/nothing/e1.ckpt"])
def test_what_is_not_there_is_named(name, tmp_path, monkeypatch):
    with pytest.raises(RaceError, match=name):
        Checkpoint(name)
    monkeypatch.chdir(tmp_path.parent)  # its folder is there: the hub is not asked
    with pytest.raises(RaceError, match=f"{tmp_path.name}/nothing: no such checkpoint .a file, such as one"):
        Checkpoint(f"{tmp_path.name}/nothing")
