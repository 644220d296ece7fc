"""The embedded default does what the README says: the chain learns, each stage from the one before."""

import warnings

import pytest
import pytorch_lightning as pl

from race.data import RaceDataModule
from race.data.cache import build_cache
from race.recipes import FILES, read_recipes
from race.score.predictions import score_each
from race.train.stages import Stage, best_checkpoints
from race.train.training import start_stage, train_stage

CHAIN = read_recipes(FILES["demo"])["chain"].stages


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Test accuracy by stage and level, and validation losses, after the whole demo chain with its own parameters."""
    folder = tmp_path_factory.mktemp("demo")
    build_cache("demo", "demo", folder / "cache")
    for name, settings in CHAIN.items():
        pl.seed_everything(0)
        stage = Stage(name, folder / "checkpoints", folder / "run")
        module = start_stage(stage, folder / "cache", learning_rate=settings["LEARNING_RATE"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train_stage(stage, module, RaceDataModule(folder / "cache"), settings["MAX_EPOCHS"])
    checkpoints = best_checkpoints(folder / "checkpoints")
    scored = score_each(checkpoints, RaceDataModule(folder / "cache"), "test", folder / "run")
    tables = [found.results for found in scored.values()]
    accuracy = {table["stage"][0]: dict(zip(table["level"], table["accuracy"], strict=True)) for table in tables}
    return accuracy, {checkpoint.stage: checkpoint.val_loss for checkpoint in checkpoints}


def test_the_demo_learns(chain):
    accuracy, loss = chain
    assert accuracy["e3"]["all"] >= 0.55
    assert accuracy["e3"]["middle"] > accuracy["e3"]["high"] + 0.3
    assert loss["e1"] > loss["e2"] > loss["e3"]


def test_learning_rates_keep_the_ratio_of_the_recipe():
    rates = [settings["LEARNING_RATE"] for settings in CHAIN.values()]
    assert rates == [rates[0], rates[0], pytest.approx(rates[0] / 10)]
