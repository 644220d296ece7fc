"""The parameters of a notebook as one object, which every cell takes its settings from."""

import argparse
from collections.abc import Callable
from pathlib import Path

from race import LEVELS, MONITORS, SPLITS, RaceError
from race.schedule import NAMES, is_schedule

ROOT = Path(__file__).resolve().parent.parent
NOTHING = ("", "none", "null")
PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}  # Lightning's short names
OF_DATA = ("CACHE_DIR", "BATCH_SIZE", "MAX_LEN", "LIMIT_QUESTIONS", "LEVEL", "SEED")
OF_SCORING = (*OF_DATA, "RUN_DIR", "SPLIT", "PRECISION", "ACCELERATOR", "FRESH")
OF_MODULE = ("LEARNING_RATE", "SCHEDULE", "WARMUP", "MAX_GRAD_NORM", "ATTENTION_DROPOUT", "TOKEN_BUDGET")
OF_TRAINING = ("MAX_EPOCHS", "PRECISION", "ACCELERATOR", "DETERMINISTIC", "COMPILE")
OF_TRAINING += ("EARLY_STOPPING", "SAVE_MINUTES", "LOGGERS", "FRESH")


class Settings:
    """A notebook's parameters under their own names, read from its variables each time one is used.

    Text that means a number, None or a flag is taken for it. Relative folders are meant from where the notebook runs if
    CACHE_DIR is there, otherwise from the repository. In a script made from a notebook, `--set NAME=VALUE` on the
    command line goes before the value in the script, and `--set e3.NAME=VALUE` is for one stage only. Raises RaceError
    with every value that is not what it should be.
    """

    def __init__(self, variables: dict):
        self._variables = variables
        script = variables.get("__name__") == "__main__" and "__file__" in variables
        self._given = _command_line(variables.get("STAGE")) if script else {}
        self._values()

    def __getattr__(self, name: str):
        if name not in KINDS:
            raise AttributeError(f"{name} is not a parameter")
        return self._values()[name]

    def _values(self) -> dict:
        known = {name: value for name, value in self._variables.items() if name in KINDS}
        return read({name: self._given.get(name, value) for name, value in known.items()})

    def _some(self, names: tuple[str, ...]) -> dict:
        values = self._values()
        return {name.lower(): values[name] for name in names if name in values}

    def data(self) -> dict:
        """What RaceDataModule takes."""
        return self._some(OF_DATA)

    def scoring(self) -> dict:
        """What race.score.predict takes, beside the checkpoint."""
        return self._some(OF_SCORING)

    def module(self) -> dict:
        """What RaceModule takes, beside its model."""
        return self._some(OF_MODULE)

    def training(self, *made) -> dict:
        """What train_stage takes, beside stage, module and data, which are given here as `made`.

        Raises RaceError if one of them was made with other parameters than those in force.
        """
        values = self._values()
        stale = [
            f"{name} is {values[name]!r}, but {type(thing).__name__} was made with {used!r}"
            for thing in made
            for name, used in getattr(thing, "made_with", {}).items()
            if name in values and values[name] != used
        ]
        if stale:
            raise RaceError(f"{'; '.join(stale)}. Run the cells below the parameters again, from the top")
        return self._some(OF_TRAINING)


def read(given: dict) -> dict:
    """Parameters by name, each as what is meant; raises RaceError with all that cannot be."""
    values, problems = {}, []
    for name, value in given.items():
        kind, expected = KINDS[name]
        try:
            values[name] = kind(value)
        except (ValueError, TypeError, OverflowError):
            problems.append(f"{name} is {value!r}, expected {expected}")
    if problems:
        raise RaceError("; ".join(problems))
    cache = Path(values.get("CACHE_DIR", ROOT))
    here = Path.cwd() == ROOT or (cache.exists() and not cache.is_absolute())
    return values if here else {name: _from_repository(name, value) for name, value in values.items()}


def _from_repository(name: str, value):
    """A folder as a path in the repository; of a file or a name that may be of the hub, only if it is there."""
    if KINDS[name] is FOLDER or (name == "EXPORT_DIR" and value):
        return str(ROOT / value)
    if KINDS[name] is PLACE and value:
        return str(ROOT / value) if (ROOT / value).exists() else value
    return [_from_repository("CHECKPOINT", one) for one in value] if name == "CHECKPOINTS" and value else value


def parse_set(pairs: list[str], stage: str | None = None) -> dict[str, str]:
    """NAME=VALUE pairs of a command line → {name: value} for one stage; raises RaceError for names nobody knows."""
    general, own, problems = {}, {}, []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        whose, dot, name = name.rpartition(".")
        if not equals or name not in KINDS:
            problems.append(f"--set {pair}: expected NAME=VALUE, with NAME one of {', '.join(KINDS)}")
        elif not dot:
            general[name] = value
        elif whose == stage:
            own[name] = value
    if problems:
        raise RaceError("\n".join(problems))
    return general | own


def _command_line(stage: str | None) -> dict[str, str]:
    parser = argparse.ArgumentParser(description="A stage, as its notebook runs it.")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", dest="pairs")
    return parse_set(parser.parse_args().pairs, stage)


def _integer(value) -> int:
    if isinstance(value, bool) or int(float(value)) != float(value):
        raise ValueError
    return int(float(value))


def _number(value) -> float:
    if isinstance(value, bool):
        raise ValueError
    return value if isinstance(value, int | float) else float(value)


def _flag(value) -> int:
    words = {"true": True, "yes": True, "false": False, "no": False}
    return words[value.lower()] if str(value).lower() in words and isinstance(value, str) else int(value)


def _schedule(value) -> str:
    if not is_schedule(value):
        raise ValueError
    return value


def _true_or_false(value) -> bool:
    return _one_of((False, True))(_flag(value))


def _path(value) -> str:
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError
    return str(Path(value).expanduser())


def from_root(path: Path) -> str:
    """A path as seen from the repository, if it is in there."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _paths(value) -> list[str]:
    return [_path(one) for one in ([value] if isinstance(value, str | Path) else value)]


def _names(value) -> list[str]:
    return [str(one) for one in ([value] if isinstance(value, str) else value)]


def _integers(value) -> list[int]:
    return [_integer(one) for one in ([value] if isinstance(value, str | int) else value)]


def _loggers(value) -> dict[str, dict]:
    import yaml

    try:
        value = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ValueError from error
    named = {value: {}} if isinstance(value, str) else value if isinstance(value, dict) else dict.fromkeys(value)
    if not all(isinstance(name, str) and isinstance(given, dict | None) for name, given in named.items()):
        raise ValueError
    return {name: given or {} for name, given in named.items()}


def _precision(value) -> str:
    return PRECISIONS.get(str(value), str(value))


def _or_none(kind: Callable) -> Callable:
    return lambda value: None if value is None or str(value).strip().lower() in NOTHING else kind(value)


def _one_of(names: tuple) -> Callable:
    return lambda value: names[names.index(value)]


FOLDER, PLACE = (_path, "a folder"), (_or_none(_path), "a path or a name, or None")
COUNT, COUNT_OR_NONE = (_integer, "a whole number"), (_or_none(_integer), "a whole number, or None")
KINDS: dict[str, tuple[Callable, str]] = {
    **dict.fromkeys(("CACHE_DIR", "CHECKPOINT_DIR", "RUN_DIR", "RUNS"), FOLDER),
    **dict.fromkeys(("BASE_MODEL", "BASE_CHECKPOINT", "CHECKPOINT", "QUESTIONS"), PLACE),
    "CHECKPOINTS": (_or_none(_paths), "a list of paths or names, or None"),
    "RECIPES": (_names, "a list of names"),
    "SEEDS": (_or_none(_integers), "a list of whole numbers, or None"),
    "EXPORT_DIR": (_or_none(_path), "a folder, or None"),
    **dict.fromkeys(("LEARNING_RATE", "SAVE_MINUTES", "DIFFERENCE"), (_number, "a number")),
    **dict.fromkeys(("MAX_EPOCHS", "BATCH_SIZE", "MAX_LEN", "SEED"), COUNT),
    **dict.fromkeys(("ATTENTION_DROPOUT", "MAX_GRAD_NORM"), (_or_none(_number), "a number, or None")),
    "MONITOR": (_one_of(MONITORS), f"one of {', '.join(MONITORS)}"),
    "SCHEDULE": (_schedule, NAMES),
    "WARMUP": (_number, "a number of steps, or a share of them below 1"),
    **dict.fromkeys(("LIMIT_QUESTIONS", "EARLY_STOPPING", "TOKEN_BUDGET"), COUNT_OR_NONE),
    "PRECISION": (_or_none(_precision), "a name such as bf16-mixed, or None"),
    "SPLIT": (_one_of(SPLITS), f"one of {', '.join(SPLITS)}"),
    "LEVEL": (_or_none(_one_of(LEVELS)), f"{', '.join(LEVELS)} or None"),
    "ACCELERATOR": (_or_none(_one_of(("cpu", "gpu"))), "cpu, gpu or None"),
    **dict.fromkeys(("DETERMINISTIC", "COMPILE"), (_true_or_false, "True or False")),
    "LOGGERS": (_or_none(_loggers), "names of Lightning loggers, each with its arguments, or None"),
    "FRESH": (_flag, "True or False"),
}
