"""The embedded default does what the README says: the chain learns, each stage from the one before."""

import warnings

import pytest
import pytorch_lightning as pl

from demo import STAGES
from race_cache import build_cache
from race_data import RaceDataModule
from race_evaluation import chosen_checkpoints, score
from race_training import stage_trainer, start_stage


@pytest.fixture(scope="module")
def accuracy(tmp_path_factory):
    """Test accuracy by stage and level, after the whole demo chain with its own parameters."""
    folder = tmp_path_factory.mktemp("demo")
    build_cache("demo", "demo", folder / "cache")
    for stage, settings in zip(("e1", "e2", "e3"), STAGES.values(), strict=True):
        pl.seed_everything(0)
        places = {"cache_dir": folder / "cache", "checkpoint_dir": folder / "checkpoints"}
        module = start_stage(stage, learning_rate=settings["LEARNING_RATE"], **places)
        trainer = stage_trainer(stage, folder / "run", folder / "checkpoints", settings["MAX_EPOCHS"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, RaceDataModule(folder / "cache"))
    tables = [
        score(path, folder / "cache", "test", folder / "run")[1]
        for path in chosen_checkpoints(None, folder / "checkpoints")
    ]
    return {table["stage"][0]: dict(zip(table["level"], table["accuracy"], strict=True)) for table in tables}


def test_the_demo_learns(accuracy):
    assert accuracy["e3"]["all"] >= 0.55
    assert accuracy["e3"]["middle"] > accuracy["e3"]["high"] + 0.3
    assert accuracy["e1"]["all"] < accuracy["e3"]["all"]


def test_learning_rates_keep_the_ratio_of_the_recipe():
    rates = [settings["LEARNING_RATE"] for settings in STAGES.values()]
    assert rates == [rates[0], rates[0], pytest.approx(rates[0] / 10)]
