"""Articles that trained or chose a checkpoint are found wherever they turn up, and what is not known is called so."""

import shutil

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from small_stage import e1
from small_stage import stage as train_e1

from race.data import RaceDataModule
from race.data.cache import build_cache
from race.demo.corpus import write_corpus
from race.export.folder import export_checkpoint
from race.report import sentences
from race.score.predictions import predict, score
from race.train.checkpoints import Checkpoint
from race.train.stages import Stage
from race.train.training import start_stage, train_stage


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory) -> Checkpoint:
    """e1, trained for an epoch on the whole training split of the small cache."""
    folder = tmp_path_factory.mktemp("trained")
    train_e1(folder, cache, epochs=1, data={"limit_questions": None, "batch_size": 32})
    return e1(folder).best()


@pytest.fixture(scope="module")
def turned(corpus, tmp_path_factory):
    """A cache of another source: the corpus's train is its test split, train and validation are new stories."""
    folder = tmp_path_factory.mktemp("turned")
    write_corpus(folder / "source", train=8, dev=4, test=2, seed=99)
    shutil.rmtree(folder / "source" / "test")
    shutil.copytree(corpus / "train", folder / "source" / "test")
    build_cache(str(folder / "source"), "demo", folder / "cache")
    return folder / "cache"


def known(checkpoint, cache, split: str) -> list[tuple]:
    """The combinations of (in train, in validation) that occur in the predictions, None where it is not known."""
    table = predict(checkpoint, RaceDataModule(cache, limit_questions=40), split, accelerator="cpu")
    columns = table[["article_in_train", "article_in_validation"]].astype(object)
    return sorted({tuple(row) for row in columns.where(columns.notna(), None).itertuples(index=False)}, key=str)


def without_articles(checkpoint, path, **lineage) -> Checkpoint:
    """The checkpoint as an earlier version would have written it."""
    content = torch.load(checkpoint.path, weights_only=True)
    content["race"] = {name: value for name, value in content["race"].items() if name != "articles"} | lineage
    torch.save(content, path)
    return Checkpoint(path)


def e2_on(cache, base, folder) -> Checkpoint:
    """Stage e2, trained on another cache than its base."""
    pl.seed_everything(0, verbose=False)
    stage = Stage("e2", folder / "checkpoints", folder / "run")
    module = start_stage(stage, cache, base_checkpoint=base, learning_rate=1e-3)
    train_stage(stage, module, RaceDataModule(cache, batch_size=32, limit_questions=32), 1)
    return stage.best()


def test_the_splits_of_its_own_cache(trained, cache):
    assert known(trained, cache, "train") == [(True, False)]
    assert known(trained, cache, "validation") == [(False, True)]
    assert known(trained, cache, "test") == [(False, False)]


def test_train_that_returns_as_the_test_split_of_another_cache(trained, turned, tmp_path):
    """What only the scoring cache's train could not tell."""
    table = score(trained, RaceDataModule(turned), "test", tmp_path, accelerator="cpu").results
    assert table["trained_on"].tolist() == table["questions"].tolist() and set(table["selected_on"]) == {0}
    assert "trained on the articles of all" in sentences.headline(table)
    assert pd.read_csv(tmp_path / "results.csv")["trained_on"].tolist() == table["questions"].tolist()
    assert known(trained, turned, "train") == [(False, False)]  # the scoring cache's own train taught it nothing


def test_an_earlier_version_knew_its_source_only(trained, cache, turned, tmp_path):
    old = without_articles(trained, tmp_path / "e1-old.ckpt")
    assert known(old, cache, "train") == [(True, False)] and known(old, cache, "test") == [(False, False)]
    assert known(old, turned, "test") == [(None, None)]
    later = without_articles(trained, tmp_path / "e2-old.ckpt", chain=["e1"])  # what e1 was trained on is not recorded
    assert known(later, cache, "train") == [(True, None)] and known(later, cache, "test") == [(None, None)]
    table = score(old, RaceDataModule(turned, limit_questions=8), "test", tmp_path, accelerator="cpu").results
    assert table["trained_on"].isna().all() and "is not known" in sentences.headline(table)


def test_a_later_stage_remembers_what_the_stages_before_were_trained_on(trained, cache, turned, tmp_path):
    later = e2_on(turned, trained.path, tmp_path)
    assert known(later, cache, "train") == [(True, False)] and known(later, cache, "validation") == [(False, True)]


def test_an_unknown_base_leaves_it_open(trained, cache, turned, tmp_path):
    later = e2_on(turned, without_articles(trained, tmp_path / "foreign.ckpt", cache=None).path, tmp_path)
    assert (None, None) not in known(later, turned, "validation")
    assert known(later, cache, "test") == [(None, None)]


def test_an_export_keeps_them(trained, turned, cache, tmp_path):
    export_checkpoint(trained.path, tmp_path / "export", cache)
    assert known(Checkpoint(tmp_path / "export"), turned, "test") == [(True, False)]


def test_white_space_and_capitals_do_not_hide_an_article(trained, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "source")
    for path in (tmp_path / "source" / "train").rglob("*.txt"):
        path.write_text(path.read_text().replace(". ", ".\\n ").replace("She", "SHE"))
    build_cache(str(tmp_path / "source"), "demo", tmp_path / "cache")
    assert known(trained, tmp_path / "cache", "train") == [(True, False)]
