"""The embedded default does what the README says: the chain learns, each stage from the one before."""

import pytorch_lightning as pl

from race.data import RaceDataModule
from race.data.cache import build_cache
from race.recipes import FILES, read_recipes
from race.score.predictions import score
from race.train.stages import Stage
from race.train.training import start_stage, train_stage


def test_the_demo_learns(tmp_path):
    """The whole chain with its own parameters: each stage lowers the validation loss, easy questions are easier."""
    build_cache("demo", "demo", tmp_path / "cache")
    losses, data = [], RaceDataModule(tmp_path / "cache")
    for name, settings in read_recipes(FILES["demo"])["chain"].stages.items():
        pl.seed_everything(0)
        stage = Stage(name, tmp_path / "checkpoints", tmp_path / "run")
        module = start_stage(stage, data.cache, learning_rate=settings["LEARNING_RATE"])
        train_stage(stage, module, RaceDataModule(data.cache), settings["MAX_EPOCHS"])
        losses.append(stage.best().val_loss)
    accuracy = score(stage.best(), data, "test", tmp_path / "run").results.set_index("level")["accuracy"]
    assert accuracy["all"] >= 0.55 and accuracy["middle"] > accuracy["high"] + 0.3
    assert losses[0] > losses[1] > losses[2]
