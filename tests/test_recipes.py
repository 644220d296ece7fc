"""Recipes as data: what ships with the repository, and what a user writes."""

import re

import nbformat
import pytest
from helpers import ROOT

from race import RaceError
from race.recipes import FILES, PARAMETERS, named_recipes, read_recipes, run_name
from race.train.stages import CHAIN

NAMES = ["chain", "constant", "resets", "step", "linear", "cosine"]


def parameters(stage: str) -> dict:
    """The values in a stage notebook's own parameters cell."""
    for cell in nbformat.read(ROOT / f"{CHAIN[stage]}.ipynb", 4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            values: dict = {}
            exec(cell.source, values)
            return values
    raise AssertionError


@pytest.mark.parametrize("corpus", FILES)
def test_all_recipes_of_a_corpus_have_the_same_budget_and_learning_rate(corpus):
    """What is compared differs in the schedule alone: as many epochs, the same highest rate."""
    recipes = read_recipes(FILES[corpus])
    assert list(recipes) == NAMES
    full = {name: [parameters(stage) | given for stage, given in it.stages.items()] for name, it in recipes.items()}
    assert {sum(stage["MAX_EPOCHS"] for stage in stages) for stages in full.values()} == {23 if corpus == "race" else 5}
    assert len({max(stage["LEARNING_RATE"] for stage in stages) for stages in full.values()}) == 1
    for key in ("BATCH_SIZE", "MONITOR"):
        assert len({stage[key] for stages in full.values() for stage in stages}) == 1
    chain, resets, step = (full[name] for name in ("chain", "resets", "step"))
    assert chain[2]["LEARNING_RATE"] == pytest.approx(chain[0]["LEARNING_RATE"] / 10)
    assert [stage["MAX_EPOCHS"] for stage in resets] == [stage["MAX_EPOCHS"] for stage in chain]
    before = sum(stage["MAX_EPOCHS"] for stage in chain[:2])
    assert step[0]["SCHEDULE"] == f"step {before}/{step[0]['MAX_EPOCHS']}"


def test_the_chain_of_race_is_the_notebooks_own():
    assert read_recipes(FILES["race"])["chain"].stages == {"e1": {}, "e2": {}, "e3": {}}


def test_what_a_recipe_may_set_is_in_every_stage_notebook():
    for stage in CHAIN:
        assert not set(PARAMETERS) - parameters(stage).keys() - {"MAX_GRAD_NORM"}


def test_a_users_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[slow]\nlearning_rates_tried = 3\ne1 = { LEARNING_RATE = 1e-5, WARMUP = 0.1 }\ne2 = {}\n")
    chain, slow = named_recipes(["chain", str(path)], "race")
    assert chain.name == "chain" and slow.stages == {"e1": {"LEARNING_RATE": 1e-5, "WARMUP": 0.1}, "e2": {}}
    assert slow.learning_rates_tried == 3
    with pytest.raises(RaceError, match="--recipe: slow: name each recipe once"):
        named_recipes([str(path), str(path)], "race")


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(
        "[Big]\ne1 = { SEED = 1 }\n[trial]\ne1 = {}\n"
        "[gap]\ne1 = {}\ne3 = {}\n[none]\nabout = 3\n[odd]\ne4 = {}\ne1 = 3\n"
        '[folder]\ne1 = { RUN_DIR = "x", SEED = 1 }\n[wrong]\ne1 = { MAX_EPOCHS = 1.5 }\ne2 = { WARMUP = 1.5 }\n'
        "[values]\nlearning_rates_tried = 0\n"
        "e1 = { LEARNING_RATE = nan, MAX_EPOCHS = 0, WARMUP = inf, SCHEDULE = 'step' }\n"
    )
    with pytest.raises(RaceError) as caught:
        named_recipes(["nothing", str(path), str(tmp_path / "missing.toml")], "demo")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("--recipe nothing: expected one of chain, constant")
    for place, problem in {
        "Big": "a name has small letters",
        "trial": "is not trial, recipes or seed1",
        "gap": "its stages are e1, e3: expected e1, or e1 and e2, or all three",
        "none": "about: expected str",
        "odd": "e4: expected e1, e2, e3, about or learning_rates_tried",
        "folder": "e1: RUN_DIR, SEED cannot be set by a recipe",
        "wrong": "e1: MAX_EPOCHS is 1.5",
        "values": "e1: LEARNING_RATE is nan, expected 0 or more",
    }.items():
        assert any(f"recipe {place}: " in line and problem in line for line in lines), (place, lines)
    assert any("e2: WARMUP is 1.5, expected a number of steps" in line for line in lines)
    assert any("recipe Big: e1: SEED cannot be set" in line for line in lines)
    told = "\n".join(line for line in lines if "recipe values: " in line)
    for name in ("learning_rates_tried is 0", "MAX_EPOCHS is 0", "WARMUP is inf", "SCHEDULE is 'step'"):
        assert name in told
    assert "missing.toml: cannot be read as TOML" in lines[-1]


def test_a_record_is_json_whatever_is_in_it(tmp_path):
    (tmp_path / "x.toml").write_text("[x]\ne1 = { MAX_GRAD_NORM = inf }\n")
    assert read_recipes(tmp_path / "x.toml")["x"].record()["stages"] == {"e1": {"MAX_GRAD_NORM": "inf"}}


def test_no_pattern_of_one_recipes_folders_matches_anothers():
    names = [run_name("race", recipe, seed) for recipe in NAMES for seed in (None, 1, 12)]
    assert len(set(names)) == len(names)
    for recipe in NAMES:
        own = re.compile(run_name("race", recipe, "") + r"\d+$")
        assert [it for it in names if own.match(it)] == [run_name("race", recipe, seed) for seed in (1, 12)]
