"""Checkpoints that other code made: read safely, scored like our own, and refused where a number would be wrong."""

import argparse
import os

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from transformers import AlbertForMultipleChoice, AlbertForPreTraining, AlbertForSequenceClassification, AlbertModel

from race import RaceError
from race.export.folder import export_checkpoint
from race.files import save_archive
from race.report.sentences import origin
from race.score.predict import predict, score_each
from race.score.statistics import PROBABILITIES, SEEN_COLUMNS
from race.train.checkpoints import Checkpoint
from race.train.stages import Stage
from race.train.training import start_stage
from race_module import RaceModule

AUTHORS = "e1-albert-race-epoch=00-val_loss_epoch=0.78.ckpt"


@pytest.fixture(scope="module")
def own(cache, tmp_path_factory) -> Checkpoint:
    """A checkpoint of ours, with weights that answer by more than chance of rounding."""
    pl.seed_everything(1, verbose=False)
    folder = tmp_path_factory.mktemp("own")
    module = start_stage(Stage("e1"), cache)
    torch.nn.init.normal_(module.model.classifier.weight, std=1.0)
    trainer = pl.Trainer(max_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "e1.ckpt", weights_only=True)
    return Checkpoint(folder / "e1.ckpt")


@pytest.fixture(scope="module")
def expected(own, cache) -> pd.DataFrame:
    return predict(own, cache, "test", device="cpu")


@pytest.fixture
def weights(own, cache) -> dict:
    return own.load(cache).model.state_dict()


class Authors(pl.LightningModule):
    """A plain module around Hugging Face's model, as other people write it."""

    def __init__(self, config):
        super().__init__()
        self.model = AlbertForMultipleChoice(config)


def test_a_plain_lightning_checkpoint_is_scored(own, expected, weights, cache, tmp_path):
    """As the original authors made theirs: objects of Lightning and argparse beside the weights, an old buffer."""
    module = Authors(own.load(cache).model.config)
    module.model.load_state_dict(weights)
    trainer = pl.Trainer(max_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / AUTHORS)
    content = torch.load(tmp_path / AUTHORS, weights_only=False)
    content["callbacks"] = {ModelCheckpoint: {"best_model_score": torch.tensor(0.78)}}  # keyed by class until 1.5
    content["hyper_parameters"] = argparse.Namespace(learning_rate=2e-5, output=tmp_path)
    content["state_dict"]["model.albert.embeddings.position_ids"] = torch.arange(512)[None]
    save_archive(content, tmp_path / AUTHORS)
    theirs = Checkpoint(tmp_path / AUTHORS)
    assert (theirs.stage, theirs.epoch, theirs.val_loss, theirs.learning_rate, theirs.base) == (None,) * 5
    assert origin(theirs) == "stage unknown, epoch unknown, trained from unknown"
    found = predict(theirs, cache, "test", device="cpu")
    check_answers(found, expected)
    predictions, tables = score_each([own, theirs], cache, "test", tmp_path, False, device="cpu")
    assert list(predictions) == ["e1", AUTHORS.removesuffix(".ckpt")]
    assert tables[0]["correct"].tolist() == tables[1]["correct"].tolist()
    assert start_stage(Stage("e2"), cache, base_checkpoint=theirs.path).lineage["chain"] == ["unknown"]


def check_answers(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """The same predictions; but what a file of other code was trained on is not known."""
    columns = list(SEEN_COLUMNS.values())
    assert found[columns].isna().all(axis=None)
    pd.testing.assert_frame_equal(found.drop(columns=columns), expected.drop(columns=columns))


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_orig_mod.", "model._orig_mod.", "net.module.encoder."])
def test_whatever_stands_before_the_names(prefix, weights, expected, cache, tmp_path):
    content = {"state_dict": {f"{prefix}{name}": tensor for name, tensor in weights.items()}}
    torch.save(content if prefix != "module." else content["state_dict"], tmp_path / "x.ckpt")
    check_answers(predict(Checkpoint(tmp_path / "x.ckpt"), cache, "test", device="cpu"), expected)


def test_a_file_of_an_old_torch_is_read(weights, expected, cache, tmp_path):
    torch.save({"state_dict": weights}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    check_answers(predict(Checkpoint(tmp_path / "x.pt"), cache, "test", device="cpu"), expected)


@pytest.mark.parametrize("safe", [True, False])
def test_a_hugging_face_folder_is_scored(safe, own, expected, cache, tmp_path):
    model = AlbertForMultipleChoice(own.load(cache).model.config)
    model.load_state_dict(own.load(cache).model.state_dict())
    model.save_pretrained(tmp_path / "my.albert")
    if not safe:
        (tmp_path / "my.albert" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "my.albert" / "pytorch_model.bin")
    folder = Checkpoint(tmp_path / "my.albert")
    assert folder.stage is None and folder.label == "my.albert"
    found = predict(folder, cache, "test", device="cpu")
    assert (found["prediction"] == expected["prediction"]).all()
    assert found[PROBABILITIES].to_numpy() == pytest.approx(expected[PROBABILITIES].to_numpy(), abs=1e-6)


def test_a_model_of_the_hub_is_scored_from_its_copy_offline(own, expected, cache, tmp_path, monkeypatch):
    """As after a download on the login node: the layout of huggingface_hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--somebody--albert-race"
    own.load(cache).model.save_pretrained(kept / "snapshots" / "abc")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    theirs = Checkpoint("somebody/albert-race")
    assert (theirs.name, theirs.label, theirs.stage) == ("somebody/albert-race", "somebody--albert-race", None)
    check_answers(predict(theirs, cache, "test", device="cpu"), expected)


def test_an_export_remembers_where_it_comes_from(own, expected, cache, tmp_path):
    export_checkpoint(own.path, tmp_path / "export", cache)
    exported = Checkpoint(tmp_path / "export")
    assert (exported.stage, exported.epoch, exported.base) == (own.stage, own.epoch, own.base)
    pd.testing.assert_frame_equal(predict(exported, cache, "test", device="cpu"), expected)
    (tmp_path / "export" / "export.json").write_text("{}")
    with pytest.raises(RaceError, match=r"export.json: damaged"):
        Checkpoint(tmp_path / "export")


def test_a_model_without_a_head_is_never_scored_with_a_random_one(own, cache, tmp_path):
    config = own.load(cache).model.config
    for name, model in (("base", AlbertModel(config)), ("pretraining", AlbertForPreTraining(config))):
        model.save_pretrained(tmp_path / name)
    config.num_labels = 3
    AlbertForSequenceClassification(config).save_pretrained(tmp_path / "classes")
    for name, message in (
        ("base", "has no multiple-choice head: it is a base model"),
        ("pretraining", "are not understood, such as predictions"),
        ("classes", r"classifier.bias has the shape \(3,\), not \(1,\)"),
    ):
        with pytest.raises(RaceError, match=message):
            predict(Checkpoint(tmp_path / name), cache, "test", device="cpu")


def test_weights_that_are_not_the_models_are_refused_with_names(weights, cache, tmp_path):
    more = weights | {"extra.weight": torch.ones(3)}
    twice = weights | {f"ema.{name}": tensor for name, tensor in weights.items()}
    fewer = {name: tensor for name, tensor in weights.items() if "word_embeddings" not in name}
    for state, message in (
        (more, "1 are not understood, such as extra.weight"),
        (twice, "are there twice, such as albert.embeddings.word_embeddings.weight"),
        (fewer, "1 weights are missing, such as albert.embeddings.word_embeddings.weight"),
        ({}, "weights are missing"),
    ):
        torch.save({"state_dict": state}, tmp_path / "x.ckpt")
        with pytest.raises(RaceError, match=message):
            predict(Checkpoint(tmp_path / "x.ckpt"), cache, "test", device="cpu")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_code_in_a_foreign_file_runs(weights, cache, tmp_path, monkeypatch):
    """Neither what is no part of any library, which is refused, nor what is: its objects are read as nothing."""
    save_archive({"state_dict": weights, "hyper_parameters": Payload(tmp_path / "owned")}, tmp_path / "x.ckpt")
    with pytest.raises(RaceError, match="holds more than weights and plain values"):
        Checkpoint(tmp_path / "x.ckpt")
    monkeypatch.setattr(argparse.Namespace, "__setstate__", lambda *_: os.mkdir(tmp_path / "owned"), raising=False)
    save_archive({"state_dict": weights, "hyper_parameters": argparse.Namespace(a=1)}, tmp_path / "y.ckpt")
    assert len(predict(Checkpoint(tmp_path / "y.ckpt"), cache, "test", device="cpu"))
    assert not (tmp_path / "owned").exists()


def test_another_vocabulary_is_refused(own, cache, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    own.load(cache).model.save_pretrained(tmp_path)
    words = {"[CLS]": 0, "[SEP]": 1, "a": 2, "?": 3, "b": 4, "<pad>": 5, "[MASK]": 6}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?").save_pretrained(tmp_path)
    with pytest.raises(RaceError, match="has another tokenizer than"):
        predict(Checkpoint(tmp_path), cache, "test", device="cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "no such folder, and from the hub it cannot be loaded"),
        ("nothing.ckpt", "no such checkpoint"),
        ("checkpoints/nothing/e1.ckpt", "no such checkpoint"),
    ],
)
def test_what_is_not_there_is_said(name, message):
    with pytest.raises(RaceError, match=f"{name}: {message}"):
        Checkpoint(name)


def test_a_module_of_ours_still_loads_from_its_file_alone(own):
    assert RaceModule.load_from_checkpoint(own.path).model.config.model_type == "albert"
