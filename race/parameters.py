"""One table of parameters: what each may be and what it is for. Notebooks, `--set` and recipes are read through it."""

import argparse
import functools
import math
import os
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import yaml

from race import CHAIN, LEVELS, MONITORS, ROOT, SPLITS, RaceError
from race.schedule import NAMES, is_schedule

FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
OF_DATA = ("CACHE_DIR", "BATCH_SIZE", "MAX_LEN", "LIMIT_QUESTIONS", "LEVEL", "SEED")
OF_SCORING = ("RUN_DIR", "SPLIT", "PRECISION", "ACCELERATOR")
OF_MODULE = ("LEARNING_RATE", "SCHEDULE", "WARMUP", "MAX_GRAD_NORM", "ATTENTION_DROPOUT", "TOKEN_BUDGET")
OF_TRAINING = ("MAX_EPOCHS", "EARLY_STOPPING", "SAVE_MINUTES", "PRECISION", "ACCELERATOR")
OF_TRAINING += ("DETERMINISTIC", "COMPILE", "LOGGERS", "ACCEPT_CODE")


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
    """What values may be: in words, how they are meant (or ValueError and its like is raised), and which then fit."""

    words: str
    take: Callable
    fits: Callable = lambda meant: True

    def read(self, value):
        """The value as it is meant; raises ValueError and its like."""
        if not self.fits(meant := self.take(value)):
            raise ValueError
        return meant

    def or_none(self) -> "Kind":
        """Or None, also as text."""
        nothing = ("", "none", "null")
        return Kind(f"{self.words}, or None", lambda it: None if str(it).strip().lower() in nothing else self.read(it))

    def listed(self, words: str) -> "Kind":
        """A list of them; one alone is a list of one."""
        return Kind(words, lambda it: [self.read(one) for one in ([it] if isinstance(it, str | int | Path) else it)])


def _one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: names[names.index(value)])


FOLDER = Kind("a folder", _path, lambda it: not any(map(os.path.isfile, (it, *Path(it).parents))))
PLACE = Kind("a path or a name", _path)
PLACES, NAME_LIST = PLACE.listed("a list of paths or names"), Kind("a name", str).listed("a list of names")
FROM_1 = Kind("1 or more (a whole number)", _integer, lambda it: it >= 1)
SEED = Kind("a whole number from 0, below 2**32", _integer, lambda it: 0 <= it < 2**32)
POSITIVE = Kind("a number above 0", _number, lambda it: it > 0)
FINITE = Kind("0 or more", _number, lambda it: 0 <= it < math.inf)
SHARE = Kind("a number from 0, below 1", _number, lambda it: 0 <= it < 1)
WARMUP = Kind("a number of steps, or a share of them below 1", _number, lambda it: 0 <= it < 1 or it % 1 == 0 < it)
FLAG = Kind("True or False", lambda value: FLAGS[str(value).lower()])
PARAMETERS = {  # name → (what it is for, what it may be); those in small letters are of the code alone
    "CACHE_DIR": ("the token cache", FOLDER),
    "CHECKPOINT_DIR": ("checkpoints, and states to resume from", FOLDER),
    "RUN_DIR": ("logs, figures, predictions and results", FOLDER),
    "RUNS": ("RUN_DIR of the runs to compare, without recipe and seed", FOLDER),
    "BASE_MODEL": ("what e1 starts from; None: the model in the cache", PLACE.or_none()),
    "BASE_CHECKPOINT": ("what e2 or e3 starts from; None: the best of the stage before", PLACE.or_none()),
    "CHECKPOINT": ("what is scored; None, or a folder of stages: the best of the latest", PLACE.or_none()),
    "CHECKPOINTS": ("what is compared, each as CHECKPOINT; None: the best of each stage", PLACES.or_none()),
    "GROUP_BY": ("further columns of the cache by which accuracy is shown", NAME_LIST.or_none()),
    "QUESTIONS": ("a file or folder of questions without answers, to be answered", PLACE.or_none()),
    "EXPORT_DIR": ("a new folder for transformers to load", FOLDER.or_none()),
    "RECIPES": ("the first is what the others are compared with", NAME_LIST),
    "SEEDS": ("seeds of the runs to compare", SEED.listed("a list of whole numbers from 0, below 2**32").or_none()),
    "DIFFERENCE": ("points of accuracy that would matter", POSITIVE),
    "LEARNING_RATE": ("the highest of the stage", FINITE),
    "SCHEDULE": ("of the learning rate over a stage", Kind(NAMES, str, is_schedule)),
    "WARMUP": ("steps over which the rate grows from 0", WARMUP),
    "MAX_GRAD_NORM": ("to which gradients are clipped; inf: it is only logged", POSITIVE.or_none()),
    "weight_decay": ("of AdamW, for matrices", FINITE),
    "adam_epsilon": ("of AdamW", FINITE),
    "MAX_EPOCHS": ("epochs of the stage", FROM_1),
    "BATCH_SIZE": ("questions of a step, with a sequence for each option", FROM_1),
    "MAX_LEN": ("tokens of a sequence", FROM_1),
    "max_qa_len": ("tokens of question+option", FROM_1),
    "SEED": ("of the new head, order, dropout and samples", SEED),
    "LIMIT_QUESTIONS": ("a random sample of each split; None: all", FROM_1.or_none()),
    "LEVEL": ("only these questions", _one_of(*LEVELS).or_none()),
    "MONITOR": ("what picks the best checkpoint", _one_of(*MONITORS)),
    "EARLY_STOPPING": ("epochs without a better one after which a stage ends", FROM_1.or_none()),
    "TOKEN_BUDGET": ("tokens of a micro-batch; None: by memory", FROM_1.or_none()),
    "ATTENTION_DROPOUT": ("None: as the model has it", SHARE.or_none()),
    "PRECISION": ("None: by device", _one_of("32-true", "bf16-mixed", "16-mixed", "64-true").or_none()),
    "ACCELERATOR": ("None: the GPU if there is one", _one_of("cpu", "gpu").or_none()),
    "DETERMINISTIC": ("the same bits again on a GPU, slower", FLAG),
    "COMPILE": ("torch.compile of the encoder", FLAG),
    "LOGGERS": ("further ones of Lightning", Kind("names, each with its arguments", _loggers).or_none()),
    "SAVE_MINUTES": ("minutes between saves of the state", FINITE),
    "ACCEPT_CODE": ("changed code with which a begun stage goes on", Kind("the hash in a message", str).or_none()),
    "SPLIT": ("what is scored", _one_of(*SPLITS)),
}
OF_NOTEBOOKS = [name for name in PARAMETERS if name.isupper()]
OBEYED = ("MAX_EPOCHS", "EARLY_STOPPING", "TOKEN_BUDGET", "PRECISION", "ACCELERATOR", "DETERMINISTIC", "COMPILE")
CHANGED = dict.fromkeys(("CACHE_DIR", "CHECKPOINT_DIR", "RUN_DIR"), "may move with its files")  # of a begun stage
CHANGED |= dict.fromkeys(("BASE_MODEL", "BASE_CHECKPOINT"), "another one: refused")
CHANGED |= dict.fromkeys((*OF_DATA[1:], *OF_MODULE, "MONITOR", "weight_decay", "adam_epsilon"), "refused")
CHANGED |= dict.fromkeys(("LOGGERS", "SAVE_MINUTES", "ACCEPT_CODE"), "obeyed")
CHANGED |= dict.fromkeys(OBEYED, "obeyed, recorded")


def table() -> str:
    """All parameters as a Markdown table."""
    row = "| `{}` | {} | {} | {} |".format
    rows = [row(name, kind.words, about, CHANGED.get(name, "–")) for name, (about, kind) in PARAMETERS.items()]
    return "\n".join(["| parameter | may be | what it is | changed on a begun stage |", "|---|---|---|---|", *rows])


def check(**arguments) -> None:
    """Raise RaceError with every argument, named as its parameter is in small letters, that is not allowed."""
    _meant({name if name in PARAMETERS else name.upper(): value for name, value in arguments.items()})


def _meant(given: dict) -> dict:
    values, problems = {}, []
    for name, value in given.items():
        kind = PARAMETERS[name][1]
        try:
            values[name] = kind.read(value)
        except (ValueError, TypeError, KeyError, OverflowError, RuntimeError, yaml.YAMLError):  # too deep, ~nobody
            problems.append(f"{name} is {value!r:.300}, expected {kind.words}")
    if problems:
        raise RaceError("; ".join(problems))
    return values


def read(given: dict) -> dict:
    """A notebook's parameters by name, each as what is meant; raises RaceError with all that cannot be."""
    return _meant({name: given[name] for name in given if name in OF_NOTEBOOKS})


def names_in(notebook: str) -> set[str]:
    """The parameters to which a notebook gives a value: what stands before a "=" in one of its lines."""
    before = re.findall(r'"([^"=]+)=', (ROOT / f"{notebook}.ipynb").read_text(encoding="utf-8"))
    return {*OF_NOTEBOOKS}.intersection(re.findall(r"\w+", " ".join(before)))


def parse_set(pairs: list[str], stage: str | None = None, takers: dict[str, set] | None = None) -> dict[str, str]:
    """NAME=VALUE pairs of a command line → {name: value} for one stage; raises RaceError for names nobody takes."""
    general, own, problems = {}, {}, []  # takers: by stage, and under "" what may stand without one
    takers = takers or {"": {*OF_NOTEBOOKS}} | {it: names_in(notebook) for it, notebook in CHAIN.items()}
    for pair in pairs:
        (whose, dot, name), value = pair.partition("=")[0].rpartition("."), pair.partition("=")[2]
        if "=" not in pair or name not in OF_NOTEBOOKS or (dot and whose not in CHAIN):
            expected = f"expected NAME=VALUE or, of one stage, e3.NAME=VALUE; NAME is one of {', '.join(OF_NOTEBOOKS)}"
            problems.append(f"--set {pair}: {expected}")
        elif name not in takers.get(whose, ()):
            problems.append(f"--set {pair}: no notebook takes it here, or --seeds and recipes set it for each run")
        elif not dot or whose == stage:
            (own if dot else general)[name] = os.path.expanduser(value)
    if problems:
        raise RaceError("\n".join(problems))
    return general | own


class Settings:
    """A notebook's parameters under their own names, read from its variables each time one is used.

    Text that means a number, None or a flag is taken for it. Where CACHE_DIR is not there, paths are meant from the
    repository's folder. A script made from a notebook takes `--set NAME=VALUE`. Raises RaceError with what is wrong.
    """

    def __init__(self, variables: dict):
        self._variables, self._given = variables, {}
        above, _, added = "\n\n".join(variables.get("In", [])).partition("\n\n# Parameters\n")  # the cell of papermill
        lost = {*re.findall(r"^\w+(?= =)", added.partition("\n\n")[0], re.M)} - {*re.findall(r"\w+", above)}
        if lost and "CACHE_DIR" in above:
            raise RaceError(f"{', '.join(sorted(lost))}: given to this notebook, but none of its cells has that")
        unknown = sorted(name for name in variables if name.isupper() and name not in (*OF_NOTEBOOKS, "STAGE"))
        meant = {name: close[0] for name in unknown if (close := get_close_matches(name, OF_NOTEBOOKS, 1, 0.85))}
        if meant:
            raise RaceError(", ".join(f"{name} is no parameter: did you mean {it}?" for name, it in meant.items()))
        if unknown:
            print(f"not parameters, so without effect unless a cell uses them: {', '.join(unknown)}")
        if Path(sys.argv[0]).name == Path(variables.get("__file__") or os.devnull).name:  # it is run as a script
            parser = argparse.ArgumentParser(description="A stage, as its notebook runs it.")
            parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", dest="pairs")
            given = parse_set(parser.parse_args().pairs, variables.get("STAGE"))
            self._given = {name: value for name, value in given.items() if name in variables}
        cache = self._values().get("CACHE_DIR", "/")
        if os.path.isabs(cache) or not os.path.exists(cache):
            os.chdir(ROOT)

    def __getattr__(self, name: str):
        if name not in OF_NOTEBOOKS:
            raise AttributeError(f"{name} is not a parameter")
        return self._values()[name]

    def _values(self, names: tuple[str, ...] = ()) -> dict:
        """All parameters of the notebook, or those of `names` as arguments."""
        values = read(self._variables | self._given)
        return {name.lower(): values[name] for name in names if name in values} if names else values

    data = functools.partialmethod(_values, OF_DATA)  # what RaceDataModule takes
    scoring = functools.partialmethod(_values, OF_SCORING)  # what race.score takes, beside checkpoints and data
    module = functools.partialmethod(_values, OF_MODULE)  # what RaceModule takes, beside its model

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
