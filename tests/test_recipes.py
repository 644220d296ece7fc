"""Recipes as data: what ships with the repository, and what a user writes."""

import re

import pytest
from helpers import ROOT, notebook_parameters

from race import CHAIN, RaceError
from race.recipes import ALLOWED, FILES, named_recipes, read_recipes, run_name

NAMES = ["chain", "constant", "resets", "step", "linear", "cosine"]


@pytest.mark.parametrize("corpus", FILES)
def test_all_recipes_of_a_corpus_have_the_same_budget_and_learning_rate(corpus):
    """What is compared differs in the schedule alone: as many epochs, the same highest rate."""
    recipes = read_recipes(FILES[corpus])
    assert list(recipes) == NAMES
    own = {stage: notebook_parameters(notebook) for stage, notebook in CHAIN.items()}
    full = {name: [own[stage] | given for stage, given in it.stages.items()] for name, it in recipes.items()}
    assert {sum(stage["MAX_EPOCHS"] for stage in stages) for stages in full.values()} == {23 if corpus == "race" else 5}
    assert len({max(stage["LEARNING_RATE"] for stage in stages) for stages in full.values()}) == 1
    for key in ("BATCH_SIZE", "MONITOR"):
        assert len({stage[key] for stages in full.values() for stage in stages}) == 1
    chain, resets, step = (full[name] for name in ("chain", "resets", "step"))
    assert chain[2]["LEARNING_RATE"] == pytest.approx(chain[0]["LEARNING_RATE"] / 10)
    assert [stage["MAX_EPOCHS"] for stage in resets] == [stage["MAX_EPOCHS"] for stage in chain]
    before = sum(stage["MAX_EPOCHS"] for stage in chain[:2])
    assert step[0]["SCHEDULE"] == f"step {before}/{step[0]['MAX_EPOCHS']}"


def test_the_chain_of_race_is_the_notebooks_own_and_they_have_what_a_recipe_may_set():
    assert read_recipes(FILES["race"])["chain"].stages == {"e1": {}, "e2": {}, "e3": {}}
    assert all(set(ALLOWED) <= notebook_parameters(notebook).keys() for notebook in CHAIN.values())


def test_the_files_that_the_page_shows_are_recipes(tmp_path):
    (slow, sweep) = (tmp_path / name for name in ("slow.toml", "sweep.toml"))
    shown = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)
    for path, text in zip((slow, sweep), shown, strict=True):
        path.write_text(text)
    assert read_recipes(slow)["slow"].learning_rates_tried == 3
    assert [it.stages["e1"]["LEARNING_RATE"] for it in read_recipes(sweep).values()] == [1e-5, 2e-5, 3e-5]


def test_a_users_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        "\ufeff[slow]\nlearning_rates_tried = 3\ne2 = {}\ne1 = { LEARNING_RATE = 1e-5, MAX_GRAD_NORM = inf }\n"
    )
    chain, slow = named_recipes(["chain", str(path)], "race")
    assert chain.name == "chain" and list(slow.stages) == ["e1", "e2"] and slow.learning_rates_tried == 3
    with pytest.raises(RaceError, match="slow, slow: name each recipe once"):
        named_recipes([str(path), str(path)], "race")
    with pytest.raises(RaceError, match="--recipe fast: expected one of chain, constant"):
        named_recipes(["fast"], "demo")


@pytest.mark.parametrize("text", ["e1 = [", "", None])
def test_a_file_without_recipes_is_named(tmp_path, text):
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RaceError, match=r"mine\.toml(: cannot be read as TOML| has no recipe)"):
        read_recipes(path)


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    (path := tmp_path / "bad.toml").write_text(
        "lone = 3\n[Big]\ne1 = {}\n[trial]\ne1 = {}\n[gap]\ne1 = {}\ne3 = {}\n[none]\nabout = 'x'\n"
        '[odd]\ne1 = {}\ne4 = {}\n[folder]\ne1 = { RUN_DIR = "x" }\n[number]\ne1 = 3\n'
        "[tried]\nlearning_rates_tried = 'three'\ne1 = {}\n"
        "[values]\ne1 = { LEARNING_RATE = nan, SCHEDULE = 'step' }\ne2 = { WARMUP = 1.5 }\n"
    )
    with pytest.raises(RaceError) as caught:
        read_recipes(path)
    lines = str(caught.value).splitlines()
    told = {"lone": "a table", "Big": "small letters", "trial": "small letters", "gap": "stages are e1, e3"}
    told |= {"odd": "e1, e4", "none": "stages are none", "folder": "e1: RUN_DIR", "number": "e1: e1"}
    told |= {"tried": "learning_rates_tried is 'three'"}
    for name, problem in told.items():
        assert any(f"{path}, recipe {name}: " in line and problem in line for line in lines), name
    values = [line for line in lines if "recipe values: " in line]
    assert "LEARNING_RATE is nan" in values[0] and "SCHEDULE is 'step'" in values[0] and "WARMUP is 1.5" in values[1]
    assert len(lines) == 11


def test_each_recipe_and_seed_has_folders_of_its_own():
    names = [run_name("race", recipe, seed) for recipe in NAMES for seed in (None, 1, 12)]
    assert len(set(names)) == len(names) and names[:2] == ["race", "race-seed1"]
