"""The embedded default learns, as the README says."""

import pytorch_lightning as pl

from race.data import RaceDataModule
from race.data.cache import build_cache
from race.recipes import FILES, read_recipes
from race.score.predictions import score
from race.train.stages import Stage
from race.train.training import start_stage, train_stage


def test_the_demo_learns(tmp_path):
    """Its first stage with its own parameters: most questions are answered, and easy ones are easier."""
    build_cache("demo", "demo", tmp_path / "cache")
    settings, data = read_recipes(FILES["demo"])["chain"].stages["e1"], RaceDataModule(tmp_path / "cache")
    pl.seed_everything(0)
    stage = Stage("e1", tmp_path / "checkpoints", tmp_path / "run")
    module = start_stage(stage, data.cache, learning_rate=settings["LEARNING_RATE"])
    train_stage(stage, module, data, settings["MAX_EPOCHS"])
    accuracy = score(stage.best(), data, "test", tmp_path / "run").results.set_index("level")["accuracy"]
    assert accuracy["all"] >= 0.55 and accuracy["middle"] > accuracy["high"] + 0.3
