"""Parameters: what is meant is taken, the rest is refused by name, and nothing is stale."""

import functools
import math
import re
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import pytorch_lightning as pl
from helpers import DOCUMENTS, ROOT, notebook_parameters

from race import RaceError
from race.data import RaceDataModule
from race.parameters import OF_NOTEBOOKS, PARAMETERS, Settings, check, names_in, parse_set, read, table
from race.train.stages import Stage
from race.train.training import start_stage, train_stage


def test_what_is_meant_is_taken():
    """YAML reads 1e-4 as text, papermill and command lines give text; one path is a list of one."""
    words = {"LEARNING_RATE": "1e-4", "MAX_EPOCHS": "3", "BATCH_SIZE": 32.0, "LIMIT_QUESTIONS": "None", "SEED": "0"}
    words |= {"LEVEL": "high", "CHECKPOINTS": "a.ckpt", "BASE_MODEL": "albert-base-v2", "SEEDS": ["1", 2]}
    words |= {"SCHEDULE": "step 13/23", "WARMUP": "0.1", "MAX_GRAD_NORM": "inf", "DETERMINISTIC": "true", "COMPILE": 0}
    values = read(words | {"unrelated": object(), "workers": "many", "FRESH": False})
    expected = words | {"LEARNING_RATE": 1e-4, "MAX_EPOCHS": 3, "BATCH_SIZE": 32, "LIMIT_QUESTIONS": None, "SEED": 0}
    expected |= {"CHECKPOINTS": ["a.ckpt"], "SEEDS": [1, 2], "WARMUP": 0.1, "MAX_GRAD_NORM": math.inf}
    assert values == expected | {"DETERMINISTIC": True, "COMPILE": False}
    assert type(values["MAX_EPOCHS"]) is type(values["BATCH_SIZE"]) is int
    assert read({"LOGGERS": "{A: {project: race}, b.C: }"})["LOGGERS"] == {"A": {"project": "race"}, "b.C": {}}
    assert read({"LOGGERS": "WandbLogger"})["LOGGERS"] == {"WandbLogger": {}}
    assert read({"LOGGERS": ["A", "B"]})["LOGGERS"] == {"A": {}, "B": {}}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *[
            (name, "fast")
            for name in ("LEARNING_RATE", "MAX_EPOCHS", "SPLIT", "LEVEL", "MONITOR", "SCHEDULE", "WARMUP")
        ],
        *[("LEARNING_RATE", value) for value in (-1, math.nan, math.inf, True, None)],
        *[("MAX_EPOCHS", value) for value in (0, 2.5, True, "1e400")],
        *[("WARMUP", value) for value in (-0.1, 1.5, math.inf)],
        *[("MAX_GRAD_NORM", 0), ("ATTENTION_DROPOUT", 1), ("SCHEDULE", "step 3/2"), ("SEED", -1), ("SEEDS", [1.5])],
        *[("SEED", 2**32), ("RUN_DIR", "~no-such-user/x"), ("RUN_DIR", f"{__file__}/x"), ("CHECKPOINT_DIR", __file__)],
        *[("RUN_DIR", None), ("RUN_DIR", " "), ("PRECISION", "bf16-true"), ("ACCELERATOR", "cuda"), ("COMPILE", "max")],
        *[("LOGGERS", "{A: 3}"), ("LOGGERS", "{A: "), ("DIFFERENCE", 0), ("TOKEN_BUDGET", 0), ("DETERMINISTIC", 2)],
        *[("SAVE_MINUTES", math.nan), ("weight_decay", -0.1), ("max_qa_len", 0)],
    ],
)
def test_the_rest_is_refused_by_name(name, wrong):
    expected = re.escape(f"{name} is {wrong!r}, expected {PARAMETERS[name][1].words}")
    with pytest.raises(RaceError, match=expected):
        check(**{name.lower(): wrong})
    if name in OF_NOTEBOOKS:
        with pytest.raises(RaceError, match=expected):
            Settings({name: wrong})


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(RaceError, match="BATCH_SIZE is 0, expected 1 or more.*; weight_decay is -1, expected 0 or"):
        check(batch_size=0, weight_decay=-1, seed=0, token_budget=None)


def test_every_parameter_is_in_a_notebook_and_each_default_is_allowed():
    given = set()
    for notebook in DOCUMENTS:
        values = notebook_parameters(notebook)
        given |= read(values).keys()
        assert names_in(notebook) == values.keys()
        assert values.keys() <= set(OF_NOTEBOOKS)
    assert given == set(OF_NOTEBOOKS) and all(f"| `{name}` | " in table() for name in PARAMETERS)


def test_each_goes_where_it_belongs():
    named = {"PRECISION": "bf16-mixed", "ACCELERATOR": "cpu", "SPLIT": "test", "RUN_DIR": "runs/x", "BATCH_SIZE": 8}
    settings = Settings(named | {"WARMUP": 1, "LOGGERS": None, "SEED": 3})
    how = {"precision": "bf16-mixed", "accelerator": "cpu"}
    assert settings.scoring() == how | {"split": "test", "run_dir": "runs/x"}
    assert settings.training() == how | {"loggers": None}
    assert (settings.data(), settings.module()) == ({"batch_size": 8, "seed": 3}, {"warmup": 1})
    with pytest.raises(AttributeError, match="workers is not a parameter"):
        settings.workers  # noqa: B018


def test_capitals_that_are_no_parameter_are_named(capsys):
    """Of an older version, or mistyped: in a notebook, Python says nothing of them."""
    Settings({"STAGE": "e1", "SEED": 1, "Seed": 2, "FRESH": True})
    assert capsys.readouterr().out.endswith("unless a cell uses them: FRESH\n")
    with pytest.raises(RaceError, match="LERNING_RATE is no parameter: did you mean LEARNING_RATE?"):
        Settings({"LERNING_RATE": 1e-3})


def test_a_notebook_works_in_the_repository_unless_its_cache_lies_beside_it(tmp_path, monkeypatch):
    """A copy of the notebooks in another folder never touches the checkpoints of the repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache" / "mine").mkdir(parents=True)
    Settings({"CACHE_DIR": "cache/mine"})
    assert Path.cwd() == tmp_path
    Settings({"CACHE_DIR": "cache/another"})
    assert Path.cwd() == ROOT


def test_a_script_takes_parameters_from_its_command_line(monkeypatch):
    """As the batch files and torchrun run a stage; in a notebook, the command line is the kernel's."""
    monkeypatch.setattr(sys, "argv", ["ex03.py", "--set", "LEARNING_RATE=1e-5", "e3.MAX_EPOCHS=2", "e1.SEED=7"])
    variables = {"LEARNING_RATE": 2e-6, "MAX_EPOCHS": 10, "SEED": 0, "STAGE": "e3", "__name__": "__main__"}
    script = Settings(variables | {"__file__": "ex03.py"})
    assert (script.LEARNING_RATE, script.MAX_EPOCHS, script.SEED) == (1e-5, 2, 0)
    assert Settings(variables).LEARNING_RATE == 2e-6
    for wrong in ("LERNRATE=1", "SEED", "e3.workers=1", "e4.SEED=1", "ex03.SEED=1"):
        with pytest.raises(
            RaceError,
            match=f"--set {wrong}: expected NAME=VALUE or, of one stage, e3.NAME=VALUE; NAME is one of CACHE_DIR",
        ):
            parse_set([wrong])
    with pytest.raises(RaceError, match="--set e1.BASE_CHECKPOINT=x: no notebook takes it"):
        parse_set(["MAX_EPOCHS=1", "e1.BASE_CHECKPOINT=x"], "e3")
    assert parse_set(["CHECKPOINT=a/e1-epoch=00.ckpt"]) == {"CHECKPOINT": "a/e1-epoch=00.ckpt"}


@pytest.mark.parametrize("file", ["ex03.ipynb", "/nb/Notebook-1.ipynb"])
def test_a_notebook_that_knows_its_file_leaves_the_command_line_to_the_kernel(monkeypatch, file):
    """As %run sets it, VS Code, and other kernels."""
    monkeypatch.setattr(sys, "argv", ["/env/ipykernel_launcher.py", "-f", "kernel.json"])
    assert Settings({"SEED": 3, "__name__": "__main__", "__file__": file}).SEED == 3


def test_what_papermill_gives_and_no_cell_has_is_an_error(tmp_path):
    """Papermill itself only warns. What a cell of the user's own has is fine."""
    code = {
        "own": "import race.parameters\nMINE = 1",
        "parameters": "CACHE_DIR = '/'\nSEED = 0",
        "last": "race.parameters.Settings(globals())",
    }
    cells = [nbformat.v4.new_code_cell(it, metadata={"tags": [tag]}) for tag, it in code.items()]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "small.ipynb")
    run = functools.partial(papermill.execute_notebook, tmp_path / "small.ipynb", None, progress_bar=False)
    run({"SEED": 1, "MINE": 2})
    with pytest.raises(papermill.PapermillExecutionError, match="SPLIT, WARM_UP: given to this notebook, but none"):
        run({"SEED": 1, "WARM_UP": 2, "SPLIT": "test"})


def test_parameters_changed_after_something_was_made_are_noticed(cache, tmp_path):
    """The parameters edited and their cell run, then the training cell: never the old ones without a word."""
    made = {"CACHE_DIR": str(cache), "CHECKPOINT_DIR": str(tmp_path / "c"), "RUN_DIR": str(tmp_path / "r")}
    made |= {"LEARNING_RATE": 1e-4, "BATCH_SIZE": 8, "SEED": 0, "LEVEL": None, "BASE_MODEL": None, "MAX_EPOCHS": 1}
    variables = dict(made)
    settings = Settings(variables)
    stage, data = Stage("e1", settings.CHECKPOINT_DIR, settings.RUN_DIR), RaceDataModule(**settings.data())
    pl.seed_everything(settings.SEED, verbose=False)
    module = start_stage(stage, settings.CACHE_DIR, settings.BASE_MODEL, **settings.module())
    changed = {"CACHE_DIR": "/other", "CHECKPOINT_DIR": "/other", "LEARNING_RATE": 1e-2, "BATCH_SIZE": 4, "SEED": 1}
    changed |= {"LEVEL": "high", "BASE_MODEL": "albert-large-v2"}
    variables |= changed
    with pytest.raises(RaceError, match="Run the cells below the parameters again") as error:
        train_stage(stage, module, data, **settings.training(stage, module, data))
    for name, value in changed.items():
        assert f"{name} is {value!r}, but " in str(error.value) and f" was made with {made[name]!r}" in str(error.value)
    variables |= made | {"LEARNING_RATE": "1e-4", "BATCH_SIZE": "8", "BASE_MODEL": "None", "MAX_EPOCHS": 2}
    assert settings.training(stage, module, data) == {"max_epochs": 2}  # read now, not when something was made
