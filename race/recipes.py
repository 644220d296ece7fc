"""Recipes as data: named ways to train, each of one or more stages with the parameters of their notebooks."""

import dataclasses
import re
import tomllib
from pathlib import Path

from race import CHAIN, RaceError
from race.parameters import FROM_1, OF_MODULE, ROOT, read

FILES = {"race": ROOT / "race" / "recipes.toml", "demo": ROOT / "race" / "demo" / "recipes.toml"}
ALLOWED = (*OF_MODULE, "MAX_EPOCHS", "BATCH_SIZE", "MONITOR", "EARLY_STOPPING")  # what a recipe may set
ABOUT = ("about", "learning_rates_tried")
BASELINE = "chain"
NAME = r"(?!(trial|recipes|seed\d*)$)[a-z][a-z0-9_]*"  # folders are named after it: none of the chain's own


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A name, and for each of its stages the parameters that are not as in the notebook.

    learning_rates_tried: how many were tried, on validation and with other seeds, before this one was chosen.
    """

    name: str
    stages: dict[str, dict]
    about: str = ""
    learning_rates_tried: int = 1


def run_name(name: str, recipe: str = BASELINE, seed: int | str | None = None) -> str:
    """The name of a run's folders: "race", "race-seed1", "race-linear-seed1"; the baseline is not named."""
    return name + ("" if recipe == BASELINE else f"-{recipe}") + ("" if seed is None else f"-seed{seed}")


def named_recipes(names: list[str], corpus: str) -> list[Recipe]:
    """The recipes of these names for "race" or "demo", and all of each TOML file; raises RaceError."""
    known, found = read_recipes(FILES[corpus]), []
    for name in names:
        if not name.endswith(".toml") and name not in known:
            raise RaceError(f"--recipe {name}: expected one of {', '.join(known)}, or a TOML file with recipes")
        found += read_recipes(Path(name)).values() if name.endswith(".toml") else [known[name]]
    if len({recipe.name for recipe in found}) < len(found):
        raise RaceError(f"--recipe {', '.join(recipe.name for recipe in found)}: name each recipe once")
    return found


def read_recipes(path: Path) -> dict[str, Recipe]:
    """The recipes of a TOML file by name; raises RaceError with everything that is wrong in it."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise RaceError(f"{path}: cannot be read as TOML ({error})") from error
    recipes, problems = {}, []
    for name, table in tables.items():
        if wrong := _wrong(name, table):
            problems += [f"{path}, recipe {name}: {problem}" for problem in wrong]
            continue
        about = {key: table.pop(key) for key in ABOUT if key in table}
        recipes[name] = Recipe(name, dict(sorted(table.items())), **about)
    if problems or not recipes:
        raise RaceError("\n".join(problems) or f"{path} has no recipe; docs/recipes.md shows one")
    return recipes


def _wrong(name: str, table) -> list[str]:
    """What is wrong with one recipe."""
    if not isinstance(table, dict):
        return [f"expected a table, [{name}]"]
    problems = [] if re.fullmatch(NAME, name) else ["a name is small letters, digits and _; not trial, recipes, seedN"]
    stages = sorted(table.keys() - set(ABOUT))
    if stages != list(CHAIN)[: len(stages)] or not stages:
        problems.append(f"its stages are {', '.join(stages) or 'none'}: expected e1, or e1 and e2, or all three")
    if type(tried := table.get("learning_rates_tried", 1)) is not int or tried < 1:
        problems.append(f"learning_rates_tried is {tried!r}, expected {FROM_1.words}")
    for stage in stages:
        given = table[stage] if isinstance(table[stage], dict) else {stage: table[stage]}
        if unknown := sorted(given.keys() - set(ALLOWED)):
            problems.append(f"{stage}: {', '.join(unknown)} cannot be set by a recipe; {', '.join(ALLOWED)} can")
        try:
            read(given)
        except RaceError as error:
            problems.append(f"{stage}: {error}")
    return problems
