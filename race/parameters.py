"""One table of parameters: what each may be and what it is for. Notebooks, `--set` and recipes are read through it."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from race import LEVELS, MONITORS, ROOT, SPLITS, RaceError
from race.schedule import NAMES, is_schedule

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
OF_DATA = ("CACHE_DIR", "BATCH_SIZE", "MAX_LEN", "LIMIT_QUESTIONS", "LEVEL", "SEED")
OF_SCORING = ("RUN_DIR", "SPLIT", "PRECISION", "ACCELERATOR")
OF_MODULE = ("LEARNING_RATE", "SCHEDULE", "WARMUP", "MAX_GRAD_NORM", "ATTENTION_DROPOUT", "TOKEN_BUDGET")
OF_TRAINING = ("MAX_EPOCHS", "EARLY_STOPPING", "SAVE_MINUTES", "PRECISION", "ACCELERATOR")
OF_TRAINING += ("DETERMINISTIC", "COMPILE", "LOGGERS")
GONE = {
    "FRESH": "FRESH is gone: to train a stage again, set another CHECKPOINT_DIR and RUN_DIR, or move its files away "
    "(docs/resuming.md); predictions are made again whenever something that made them has changed"
}


def _integer(value) -> int:
    if isinstance(value, bool) or int(float(value)) != float(value):
        raise ValueError
    return int(float(value))


def _number(value) -> float:
    if isinstance(value, bool) or math.isnan(float(value)):
        raise ValueError
    return value if isinstance(value, int | float) else float(value)


def _path(value) -> str:
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError
    return str(Path(value).expanduser())


def _loggers(value) -> dict[str, dict]:
    value = yaml.safe_load(value) if isinstance(value, str) else value
    named = value if isinstance(value, dict) else dict.fromkeys([value] if isinstance(value, str) else value)
    return {_path(name): dict(given or {}) for name, given in named.items()}


class Kind(NamedTuple):
    """What values may be: in words, and a function that takes what is meant, or raises ValueError and its like."""

    words: str
    read: Callable

    def that(self, words: str, fits: Callable) -> "Kind":
        """Only those that fit."""

        def read(value):
            if not fits(meant := self.read(value)):
                raise ValueError
            return meant

        return Kind(words, read)

    def or_none(self) -> "Kind":
        """Or None, also as text."""
        nothing = ("", "none", "null")
        return Kind(f"{self.words}, or None", lambda it: None if str(it).strip().lower() in nothing else self.read(it))

    def listed(self, words: str) -> "Kind":
        """A list of them; one alone is a list of one."""
        return Kind(words, lambda it: [self.read(one) for one in ([it] if isinstance(it, str | int | Path) else it)])


def _one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: names[names.index(value)])


FOLDER, PLACE = Kind("a folder", _path), Kind("a path or a name", _path)
PLACES, NAME_LIST = PLACE.listed("a list of paths or names"), Kind("a name", str).listed("a list of names")
WHOLE, NUMBER = Kind("a whole number", _integer), Kind("a number", _number)
FROM_0 = WHOLE.that("0 or more (a whole number)", lambda it: it >= 0)
FROM_1 = WHOLE.that("1 or more (a whole number)", lambda it: it >= 1)
POSITIVE = NUMBER.that("a number above 0", lambda it: it > 0)
FINITE = NUMBER.that("0 or more", lambda it: 0 <= it < math.inf)
SHARE = NUMBER.that("a number from 0, below 1", lambda it: 0 <= it < 1)
WARMUP = NUMBER.that("a number of steps, or a share of them below 1", lambda it: 0 <= it < 1 or it % 1 == 0 < it)
FLAG = Kind("True or False", lambda value: FLAGS[str(value).lower()])


class Parameter(NamedTuple):
    """What a parameter is for, and what it may be."""

    about: str
    kind: Kind


PARAMETERS = {  # those in small letters are arguments of the code alone, not of notebooks
    "CACHE_DIR": Parameter("the token cache", FOLDER),
    "CHECKPOINT_DIR": Parameter("checkpoints, and states to resume from", FOLDER),
    "RUN_DIR": Parameter("logs, figures, predictions and results", FOLDER),
    "RUNS": Parameter("RUN_DIR of the runs to compare, without recipe and seed", FOLDER),
    "BASE_MODEL": Parameter("what e1 starts from; None: the model in the cache", PLACE.or_none()),
    "BASE_CHECKPOINT": Parameter("what e2 or e3 starts from; None: the best of the stage before", PLACE.or_none()),
    "CHECKPOINT": Parameter("what is scored; None: the best of the latest stage", PLACE.or_none()),
    "CHECKPOINTS": Parameter("what is compared; None: the best of each stage", PLACES.or_none()),
    "QUESTIONS": Parameter("a file or folder of questions without answers, to be answered", PLACE.or_none()),
    "EXPORT_DIR": Parameter("a new folder for transformers to load", FOLDER.or_none()),
    "RECIPES": Parameter("the first is what the others are compared with", NAME_LIST),
    "SEEDS": Parameter("seeds of the runs to compare", FROM_0.listed("a list of whole numbers from 0").or_none()),
    "DIFFERENCE": Parameter("points of accuracy that would matter", POSITIVE.or_none()),
    "LEARNING_RATE": Parameter("the highest of the stage", FINITE),
    "SCHEDULE": Parameter("of the learning rate over a stage", Kind(NAMES, str).that(NAMES, is_schedule)),
    "WARMUP": Parameter("steps over which the rate grows from 0", WARMUP),
    "MAX_GRAD_NORM": Parameter("to which gradients are clipped; inf: it is only logged", POSITIVE.or_none()),
    "weight_decay": Parameter("of AdamW, for matrices", FINITE),
    "adam_epsilon": Parameter("of AdamW", FINITE),
    "MAX_EPOCHS": Parameter("epochs of the stage", FROM_1),
    "BATCH_SIZE": Parameter("questions of a step, four sequences each", FROM_1),
    "MAX_LEN": Parameter("tokens of a sequence", FROM_1),
    "max_qa_len": Parameter("tokens of question+option", FROM_1),
    "workers": Parameter("threads of the tokenizer", FROM_1),
    "SEED": Parameter("of order, dropout and samples", FROM_0),
    "LIMIT_QUESTIONS": Parameter("a random sample of each split; None: all", FROM_1.or_none()),
    "LEVEL": Parameter("only these questions", _one_of(*LEVELS).or_none()),
    "MONITOR": Parameter("what picks the best checkpoint", _one_of(*MONITORS)),
    "EARLY_STOPPING": Parameter("epochs without a better one after which a stage ends", FROM_1.or_none()),
    "TOKEN_BUDGET": Parameter("tokens of a micro-batch; None: by memory", FROM_1.or_none()),
    "ATTENTION_DROPOUT": Parameter("None: as the model has it", SHARE.or_none()),
    "PRECISION": Parameter("None: by device", _one_of(*PRECISIONS).or_none()),
    "ACCELERATOR": Parameter("None: the GPU if there is one", _one_of("cpu", "gpu").or_none()),
    "DETERMINISTIC": Parameter("the same bits again on a GPU, slower", FLAG),
    "COMPILE": Parameter("torch.compile of the encoder", FLAG),
    "LOGGERS": Parameter("further ones of Lightning", Kind("names, each with its arguments", _loggers).or_none()),
    "SAVE_MINUTES": Parameter("minutes between saves of the state", FINITE),
    "SPLIT": Parameter("what is scored", _one_of(*SPLITS)),
}
OF_NOTEBOOKS = [name for name in PARAMETERS if name.isupper()]


def table() -> str:
    """All parameters as a Markdown table."""
    rows = [f"| `{name}` | {it.kind.words} | {it.about} |" for name, it in PARAMETERS.items()]
    return "\n".join(["| parameter | may be | what it is |", "|---|---|---|", *rows])


def check(**arguments) -> None:
    """Raise RaceError with every argument, named as its parameter is in small letters, that is not allowed."""
    _meant({name if name in PARAMETERS else name.upper(): value for name, value in arguments.items()})


def _meant(given: dict) -> dict:
    values, problems = {}, []
    for name, value in given.items():
        kind = PARAMETERS[name].kind
        try:
            values[name] = kind.read(value)
        except (ValueError, TypeError, KeyError, OverflowError, yaml.YAMLError):
            problems.append(f"{name} is {value!r}, expected {kind.words}")
    if problems:
        raise RaceError("; ".join(problems))
    return values


def read(given: dict) -> dict:
    """A notebook's parameters by name, each as what is meant; raises RaceError with all that cannot be."""
    if gone := [sentence for name, sentence in GONE.items() if given.get(name)]:
        raise RaceError("\n".join(gone))
    return _meant({name: given[name] for name in given if name in OF_NOTEBOOKS})


def parse_set(pairs: list[str], stage: str | None = None) -> dict[str, str]:
    """NAME=VALUE pairs of a command line → {name: value} for one stage; raises RaceError for names nobody knows."""
    general, own, problems = {}, {}, []
    for pair in pairs:
        whose, dot, name = pair.partition("=")[0].rpartition(".")
        if "=" not in pair or name not in OF_NOTEBOOKS:
            expected = f"expected NAME=VALUE, with NAME one of {', '.join(OF_NOTEBOOKS)}"
            problems.append(f"--set {pair}: {GONE.get(name, expected)}")
        elif not dot or whose == stage:
            (own if dot else general)[name] = pair.partition("=")[2]
    if problems:
        raise RaceError("\n".join(problems))
    return general | own


class Settings:
    """A notebook's parameters under their own names, read from its variables each time one is used.

    Text that means a number, None or a flag is taken for it. A notebook that is opened where CACHE_DIR is not there
    goes on in the repository's folder, from which relative paths are then meant. In a script made from a notebook,
    `--set NAME=VALUE` on the command line goes before the value in the script, and `--set e3.NAME=VALUE` is for one
    stage only. Raises RaceError with every value that is not what it should be.
    """

    def __init__(self, variables: dict):
        self._variables, self._given = variables, {}
        if variables.get("__name__") == "__main__" and "__file__" in variables:
            parser = argparse.ArgumentParser(description="A stage, as its notebook runs it.")
            parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", dest="pairs")
            self._given = parse_set(parser.parse_args().pairs, variables.get("STAGE"))
        cache = self._values().get("CACHE_DIR", "/")
        if os.path.isabs(cache) or not os.path.exists(cache):
            os.chdir(ROOT)

    def __getattr__(self, name: str):
        if name not in OF_NOTEBOOKS:
            raise AttributeError(f"{name} is not a parameter")
        return self._values()[name]

    def _values(self, names: tuple[str, ...] = ()) -> dict:
        """All parameters of the notebook, or those of `names` as arguments."""
        values = read(self._variables | {name: it for name, it in self._given.items() if name in self._variables})
        return {name.lower(): values[name] for name in names if name in values} if names else values

    def data(self) -> dict:
        """What RaceDataModule takes."""
        return self._values(OF_DATA)

    def scoring(self) -> dict:
        """What race.score takes, beside checkpoints and data."""
        return self._values(OF_SCORING)

    def module(self) -> dict:
        """What RaceModule takes, beside its model."""
        return self._values(OF_MODULE)

    def training(self, *made) -> dict:
        """What train_stage takes, beside stage, module and data, which are given here as `made`.

        Raises RaceError if one of them was made with other parameters than those in force.
        """
        values = self._values()
        stale = [
            f"{name.upper()} is {values[name.upper()]!r}, but {type(thing).__name__} was made with {used!r}"
            for thing in made
            for name, used in getattr(thing, "made_with", {}).items()
            if values.get(name.upper(), used) != used
        ]
        if stale:
            raise RaceError(f"{'; '.join(stale)}. Run the cells below the parameters again, from the top")
        return self._values(OF_TRAINING)
