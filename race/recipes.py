"""Recipes as data: named ways to train, each of one or more stages with the parameters of their notebooks."""

import dataclasses
import math
import re
import tomllib
from pathlib import Path

from race import CHAIN, RaceError
from race.parameters import OF_MODULE, ROOT, read

FILES = {"race": ROOT / "race" / "recipes.toml", "demo": ROOT / "race" / "demo" / "recipes.toml"}
PARAMETERS = (*OF_MODULE, "MAX_EPOCHS", "BATCH_SIZE", "MONITOR", "EARLY_STOPPING")  # what a recipe may set
ABOUT = {"about": str, "learning_rates_tried": int}
BASELINE = "chain"
NAME = r"(?!(trial|recipes|seed\d*)$)[a-z][a-z0-9_]*"  # folders are named after it
NAME_IN_WORDS = "a name has small letters, digits and _, and is not trial, recipes or seed1: folders are named after it"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A name, and for each of its stages the parameters that are not as in the notebook.

    learning_rates_tried: how many were tried, on validation and with other seeds, before this one was chosen.
    """

    name: str
    stages: dict[str, dict]
    about: str = ""
    learning_rates_tried: int = 1

    def record(self) -> dict:
        """It as JSON, which knows no infinite number."""
        stages = {
            stage: {name: str(value) if value == math.inf else value for name, value in given.items()}
            for stage, given in self.stages.items()
        }
        return dataclasses.asdict(self) | {"stages": stages}


def run_name(name: str, recipe: str = BASELINE, seed: int | str | None = None) -> str:
    """The name of a run's folders: "race", "race-seed1", "race-linear-seed1"; the baseline is not named."""
    return name + ("" if recipe == BASELINE else f"-{recipe}") + ("" if seed is None else f"-seed{seed}")


def named_recipes(names: list[str], corpus: str) -> list[Recipe]:
    """The recipes of these names for "race" or "demo", and all of each TOML file; RaceError with all problems."""
    known, found, problems = read_recipes(FILES[corpus]), [], []
    for name in names:
        try:
            found += read_recipes(Path(name)).values() if name.endswith(".toml") else [known[name]]
        except KeyError:
            problems.append(f"--recipe {name}: expected one of {', '.join(known)}, or a TOML file with recipes")
        except RaceError as error:
            problems.append(str(error))
    every = [recipe.name for recipe in found]
    if twice := sorted({name for name in every if every.count(name) > 1}):
        problems.append(f"--recipe: {', '.join(twice)}: name each recipe once")
    if problems:
        raise RaceError("\n".join(problems))
    return found


def read_recipes(path: Path) -> dict[str, Recipe]:
    """The recipes of a TOML file by name; raises RaceError with everything that is wrong in it."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RaceError(f"{path}: cannot be read as TOML ({error})") from error
    problems = [] if tables else [f"{path} has no recipe: write a table such as [mine] with e1 = {{ MAX_EPOCHS = 3 }}"]
    for name, table in tables.items():
        problems += [f"{path}, recipe {name}: {problem}" for problem in _problems(name, table)]
    if problems:
        raise RaceError("\n".join(problems))
    return {name: _recipe(name, table) for name, table in tables.items()}


def _recipe(name: str, table: dict) -> Recipe:
    stages = {stage: table[stage] for stage in CHAIN if stage in table}
    return Recipe(name, stages, **{key: table[key] for key in ABOUT if key in table})


def _problems(name: str, table) -> list[str]:
    """What is wrong with one recipe."""
    if not isinstance(table, dict):
        return [f"expected a table, [{name}]"]
    problems = [] if re.fullmatch(NAME, name) else [NAME_IN_WORDS]
    problems += [f"{key}: expected {it.__name__}" for key, it in ABOUT.items() if type(table.get(key, it())) is not it]
    if type(tried := table.get("learning_rates_tried", 1)) is int and tried < 1:
        problems.append(f"learning_rates_tried is {tried}, expected 1 or more")
    if unknown := sorted(table.keys() - CHAIN.keys() - ABOUT.keys()):
        problems.append(f"{', '.join(unknown)}: expected {', '.join(CHAIN)}, {' or '.join(ABOUT)}")
    stages = [stage for stage in CHAIN if stage in table]
    if stages != list(CHAIN)[: len(stages)] or not stages:
        problems.append(f"its stages are {', '.join(stages) or 'none'}: expected e1, or e1 and e2, or all three")
    for stage in stages:
        if not isinstance(table[stage], dict):
            problems.append(f"{stage}: expected parameters, such as {stage} = {{ MAX_EPOCHS = 3 }}")
        elif unknown := sorted(table[stage].keys() - set(PARAMETERS)):
            problems.append(f"{stage}: {', '.join(unknown)} cannot be set by a recipe; {', '.join(PARAMETERS)} can")
        else:
            try:
                read(table[stage])
            except RaceError as error:
                problems.append(f"{stage}: {error}")
    return problems
