"""A notebook's parameters as one object: what is meant is taken, the rest is refused by name, and nothing is stale."""

import sys

import pytest
import pytorch_lightning as pl

from race import RaceError
from race.data import RaceDataModule
from race.parameters import ROOT, Settings, parse_set
from race.train.stages import Stage
from race.train.training import start_stage, train_stage

WORDS = {
    "CACHE_DIR": "cache/race",
    "CHECKPOINT_DIR": "/elsewhere/checkpoints",
    "LEARNING_RATE": "1e-4",
    "MAX_EPOCHS": "3",
    "BATCH_SIZE": 32.0,
    "LIMIT_QUESTIONS": "None",
    "SEED": "0",
    "PRECISION": 32,
    "FRESH": False,
    "LEVEL": "high",
    "CHECKPOINTS": "a.ckpt",
    "BASE_MODEL": "albert-base-v2",
    "unrelated": object(),
}


def test_what_is_meant_is_taken(tmp_path, monkeypatch):
    """YAML reads 1e-4 as text; one path is a list of one; folders are relative to the repository."""
    monkeypatch.chdir(tmp_path)
    settings = Settings(WORDS)
    assert (settings.LEARNING_RATE, settings.MAX_EPOCHS, settings.BATCH_SIZE) == (1e-4, 3, 32)
    assert type(settings.MAX_EPOCHS) is type(settings.BATCH_SIZE) is int
    assert settings.LIMIT_QUESTIONS is None and settings.SEED == 0
    assert (settings.PRECISION, settings.LEVEL, settings.CHECKPOINTS) == ("32-true", "high", ["a.ckpt"])
    assert settings.CACHE_DIR == str(ROOT / "cache" / "race")
    assert settings.CHECKPOINT_DIR == "/elsewhere/checkpoints" and settings.BASE_MODEL == "albert-base-v2"


def test_where_and_how_to_compute():
    """Of a command line all is text; each is passed on where it belongs, and only if the notebook has it."""
    named = {"PRECISION": "bf16", "ACCELERATOR": "cpu", "DETERMINISTIC": "true", "COMPILE": 0}
    given = {"precision": "bf16-mixed", "accelerator": "cpu"}
    assert Settings(named).scoring() == given
    assert Settings(named).training() == given | {"deterministic": True, "compile": False}
    assert Settings({"ACCELERATOR": "None"}).training() == {"accelerator": None}
    wrong = {"ACCELERATOR": "cuda", "DETERMINISTIC": 2, "COMPILE": "max"}
    with pytest.raises(RaceError) as error:
        Settings(wrong)
    assert str(error.value) == (
        "ACCELERATOR is 'cuda', expected one of cpu, gpu, or None; DETERMINISTIC is 2, expected True or False; "
        "COMPILE is 'max', expected True or False"
    )


def test_what_a_command_line_says_of_recipes_and_loggers():
    """Lists and loggers as papermill gives them, or as text in YAML."""
    named = {"RECIPES": "chain", "SEEDS": ["1", 2], "DIFFERENCE": "0.5", "MONITOR": "val_acc", "MAX_GRAD_NORM": "1"}
    settings = Settings(named | {"SCHEDULE": "step 13/23", "WARMUP": "0.1", "LOGGERS": "{A: {project: race}, b.C: }"})
    assert (settings.RECIPES, settings.SEEDS, settings.DIFFERENCE) == (["chain"], [1, 2], 0.5)
    assert settings.module() == {"schedule": "step 13/23", "warmup": 0.1, "max_grad_norm": 1.0}
    assert settings.training() == {"loggers": {"A": {"project": "race"}, "b.C": {}}}
    assert Settings({"LOGGERS": "WandbLogger"}).LOGGERS == {"WandbLogger": {}}
    assert Settings({"LOGGERS": ["A", "B"]}).LOGGERS == {"A": {}, "B": {}}
    wrong = {"LOGGERS": "{A: 3}", "MONITOR": "loss", "SCHEDULE": "step 3/2", "SEEDS": [1.5]}
    with pytest.raises(RaceError) as error:
        Settings(wrong)
    assert len(str(error.value).split("; ")) == 4 and "SCHEDULE is 'step 3/2', expected constant" in str(error.value)
    with pytest.raises(RaceError, match="LOGGERS is '{A: ', expected names, each"):
        Settings({"LOGGERS": "{A: "})


def test_the_rest_is_refused_by_name():
    wrong = {"LEARNING_RATE": "fast", "MAX_EPOCHS": 2.5, "SEED": True, "SPLIT": "dev", "RUN_DIR": None}
    with pytest.raises(RaceError) as error:
        Settings(wrong)
    for name, expected in (
        ("LEARNING_RATE is 'fast'", "0 or more"),
        ("MAX_EPOCHS is 2.5", "1 or more"),
        ("SEED is True", "0 or more"),
        ("SPLIT is 'dev'", "one of train, validation, test"),
        ("RUN_DIR is None", "a folder"),
    ):
        assert f"{name}, expected {expected}" in str(error.value)


def test_a_path_that_is_there_is_one_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variables = {"CACHE_DIR": "cache/mine", "CHECKPOINT": "README.md", "CHECKPOINTS": ["docs", "some/name"]}
    settings = Settings(variables)
    assert settings.CHECKPOINT == str(ROOT / "README.md")
    assert settings.CHECKPOINTS == [str(ROOT / "docs"), "some/name"]


def test_a_notebook_beside_a_cache_of_its_own_stays_there(tmp_path, monkeypatch):
    """A copy of the notebooks in another folder never touches the checkpoints of the repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache" / "race").mkdir(parents=True)
    settings = Settings({"CACHE_DIR": "cache/race", "CHECKPOINT_DIR": "checkpoints/race", "RUN_DIR": "runs/race"})
    assert [settings.CACHE_DIR, settings.CHECKPOINT_DIR] == ["cache/race", "checkpoints/race"]
    assert settings.RUN_DIR == "runs/race"


def test_a_script_takes_parameters_from_its_command_line(monkeypatch):
    """As the batch files and torchrun run a stage; in a notebook, the command line is the kernel's."""
    monkeypatch.setattr(sys, "argv", ["ex03.py", "--set", "LEARNING_RATE=1e-5", "e3.MAX_EPOCHS=2", "e1.SEED=7"])
    variables = {"LEARNING_RATE": 2e-6, "MAX_EPOCHS": 10, "SEED": 0, "STAGE": "e3", "__name__": "__main__"}
    script = Settings(variables | {"__file__": "ex03.py"})
    assert (script.LEARNING_RATE, script.MAX_EPOCHS, script.SEED) == (1e-5, 2, 0)
    assert Settings(variables).LEARNING_RATE == 2e-6
    with pytest.raises(RaceError, match="--set LERNRATE=1: expected NAME=VALUE, with NAME one of CACHE_DIR"):
        parse_set(["LERNRATE=1"])
    assert parse_set(["CHECKPOINT=a/e1-epoch=00.ckpt"]) == {"CHECKPOINT": "a/e1-epoch=00.ckpt"}


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"LEARNING_RATE": 1e-2}, "LEARNING_RATE is 0.01, but RaceModule was made with 0.0001"),
        ({"BATCH_SIZE": 4}, "BATCH_SIZE is 4, but RaceDataModule was made with 8"),
        ({"SEED": 1}, "SEED is 1, but RaceModule was made with 0"),
        ({"LEVEL": "high"}, "LEVEL is 'high', but RaceDataModule was made with None"),
        ({"CHECKPOINT_DIR": "/other"}, "CHECKPOINT_DIR is '/other', but Stage was made with"),
        ({"BASE_MODEL": "albert-large-v2"}, "BASE_MODEL is 'albert-large-v2', but RaceModule was made with None"),
        ({"CACHE_DIR": "/other"}, "CACHE_DIR is '/other', but RaceModule was made with"),
    ],
)
def test_parameters_changed_after_something_was_made_are_noticed(cache, tmp_path, changed, what):
    """The parameters edited and their cell run, then the training cell: never the old ones without a word."""
    variables = {"CACHE_DIR": str(cache), "CHECKPOINT_DIR": str(tmp_path / "c"), "RUN_DIR": str(tmp_path / "r")}
    variables |= {"LEARNING_RATE": 1e-4, "BATCH_SIZE": 8, "MAX_LEN": 512, "SEED": 0, "LIMIT_QUESTIONS": 16}
    variables |= {"LEVEL": None, "BASE_MODEL": None, "MAX_EPOCHS": 1, "TOKEN_BUDGET": None}
    settings = Settings(variables)
    stage = Stage("e1", settings.CHECKPOINT_DIR, settings.RUN_DIR)
    data = RaceDataModule(**settings.data())
    pl.seed_everything(settings.SEED, verbose=False)
    recipe = {"learning_rate": settings.LEARNING_RATE, "token_budget": settings.TOKEN_BUDGET}
    module = start_stage(stage, settings.CACHE_DIR, settings.BASE_MODEL, **recipe)
    variables |= changed
    with pytest.raises(RaceError) as error:
        train_stage(stage, module, data, **settings.training(stage, module, data))
    assert what in str(error.value) and "Run the cells below the parameters again" in str(error.value)
    assert not (tmp_path / "c").exists()
    variables |= {"LEARNING_RATE": "1e-4", "BATCH_SIZE": "8", "SEED": 0, "LEVEL": None, "BASE_MODEL": "None"}
    variables |= {"CHECKPOINT_DIR": str(tmp_path / "c"), "CACHE_DIR": str(cache), "MAX_EPOCHS": 2}
    assert settings.training(stage, module, data)["max_epochs"] == 2  # which is used now, not when something was made
