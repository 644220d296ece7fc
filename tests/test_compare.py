"""Recipes compared, from small runs on disk to the executed notebook; its verdict is recomputed from predictions."""

import json
import shutil

import nbformat
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from helpers import ROOT, recipes_by_hand
from scipy.stats import t

from race import RaceError
from race.chain import run_notebook
from race.data import RaceDataModule
from race.files import file_hash
from race.report import tables
from race.report.figures import differences_figure
from race.report.recipes import budget, difference, observed, planning, scope, title
from race.report.training_figures import courses_figure
from race.score.runs import accuracies, answers, budgets, compare, courses, find_runs, same_base
from race.train.stages import Stage
from race.train.training import start_stage, train_stage

RECIPES = {  # learning rate, epochs and more of each stage; three epochs each
    "chain": {"e1": (1e-2, 1, {}), "e2": (1e-2, 1, {}), "e3": (1e-3, 1, {})},
    "resets": {"e1": (1e-2, 1, {}), "e2": (1e-2, 1, {}), "e3": (1e-2, 1, {})},
    "linear": {"e1": (1e-2, 3, {"schedule": "linear", "warmup": 0.2, "max_grad_norm": 1.0})},
}
SEEDS = [1, 2]


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """A folder with the runs of all RECIPES and SEEDS, named as race.chain names them."""
    folder = tmp_path_factory.mktemp("recipes")
    for recipe, stages in RECIPES.items():
        for seed in SEEDS:
            place = f"small{'' if recipe == 'chain' else f'-{recipe}'}-seed{seed}"
            record = {"name": recipe, "stages": {key: {} for key in stages}, "learning_rates_tried": 1}
            (folder / "runs" / place).mkdir(parents=True)
            (folder / "runs" / place / "recipe.json").write_text(json.dumps(record))
            for name, (rate, epochs, more) in stages.items():
                pl.seed_everything(seed, verbose=False)
                stage = Stage(name, folder / "checkpoints" / place, folder / "runs" / place)
                module = start_stage(stage, cache, learning_rate=rate, **more)
                data = RaceDataModule(cache, batch_size=16, limit_questions=48, seed=seed)
                train_stage(stage, module, data, epochs, log_every=1)
    return folder


@pytest.fixture(scope="module")
def found(trained):
    return find_runs(f"{trained}/checkpoints/small", f"{trained}/runs/small", list(RECIPES), SEEDS)


@pytest.fixture(scope="module")
def executed(trained, cache):
    """The folder with the results of the executed notebook."""
    parameters = {"CACHE_DIR": str(cache), "CHECKPOINT_DIR": f"{trained}/checkpoints/small"}
    parameters |= {
        "RUNS": f"{trained}/runs/small",
        "RUN_DIR": f"{trained}/runs/small-recipes",
        "RECIPES": list(RECIPES),
        "SEEDS": SEEDS,
    }
    run_notebook("compare_recipes", parameters | {"LIMIT_QUESTIONS": 60, "DIFFERENCE": "2"})
    return trained / "runs" / "small-recipes"


def test_what_each_recipe_had(found, cache):
    table = budgets(found, str(cache)).set_index("recipe")
    assert table["questions"].tolist() == [144] * 3 and table["epochs"].tolist() == [3] * 3
    assert table["stages"].tolist() == [3, 3, 1] and table["checkpoints"].tolist() == [3] * 3
    assert table.loc["chain", "learning_rate"] == [1e-2, 1e-2, 1e-3] and table.loc["linear", "seeds"] == 2
    assert budget(table.reset_index()) == "Each recipe was trained on 144 questions (3 epochs)."
    uneven = table.reset_index().assign(
        questions=[144, 144, 200], checkpoints=[3, 3, 1], learning_rates_tried=[1, 3, 1]
    )
    assert budget(uneven).startswith(
        "**The budgets differ**: chain 144, resets 144 and linear 200 questions were trained"
    )
    assert "checkpoints: chain 3, resets 3 and linear 1" in budget(uneven) and "tried: chain 1, resets 3" in budget(
        uneven
    )


def test_the_course_over_the_questions_seen(found, cache):
    validated, rates, notes = courses(found, str(cache))
    assert not notes
    assert validated.groupby(["recipe", "seed"])["questions"].apply(list).map(lambda it: it == [48, 96, 144]).all()
    linear = rates[(rates["recipe"] == "linear") & (rates["seed"] == 1)]
    assert linear["questions"].tolist() == [16 * step for step in range(1, 10)]
    expected = [1e-2 * min(step / 2, (9 - step) / 7) for step in range(9)]
    assert linear["learning_rate"].tolist() == pytest.approx(expected, rel=1e-5)


def test_recipes_that_go_on_from_the_same_weights_are_found(found):
    assert same_base(found) == {"resets"}
    assert same_base({"linear": found["linear"], "chain": found["chain"]}) == set()


def test_the_notebooks_verdict_from_its_predictions(executed, trained):
    """By code of the test's own: which checkpoint is chosen, who is right where, difference, interval, words."""
    saved = json.loads((executed / "recipes-test.json").read_text())
    files = {
        json.loads(path.read_text())["settings"]["checkpoint_sha256"]: path
        for path in executed.glob("predictions/*.json")
    }

    def right(recipe: str, choose) -> tuple[np.ndarray, pd.DataFrame]:
        runs = []
        for seed in SEEDS:
            place = trained / "checkpoints" / f"small{'' if recipe == 'chain' else f'-{recipe}'}-seed{seed}"
            last = list(RECIPES[recipe])[-1]
            records = {path: torch.load(path, weights_only=True)["race"] for path in place.glob(f"{last}-*.ckpt")}
            path = choose(records)
            table = pd.read_parquet(files[file_hash(path)].with_suffix(".parquet"))
            runs.append((table["answer"] == table["prediction"]).to_numpy(int))
        return np.stack(runs), table

    def lowest_loss(records: dict):
        return min(records, key=lambda it: (records[it]["metrics"]["val_loss_epoch"], records[it]["epoch"]))

    def last(records: dict):
        return max(records, key=lambda it: records[it]["epoch"])

    rows = pd.DataFrame(saved["differences"]).set_index(["choice", "second"])
    for choice, choose in (("chosen", lowest_loss), ("last epoch", last)):
        (chain, table), (linear, _) = (right(recipe, choose) for recipe in ("chain", "linear"))
        assert table.shape[0] == 60
        mean, variance, freedom = recipes_by_hand(chain, linear, table["example_id"].tolist(), table["level"].tolist())
        row = rows.loc[choice, "linear"]
        assert row["difference"] == pytest.approx(mean) and row["freedom"] == pytest.approx(freedom)
        reach = t.ppf(0.975, freedom) * variance**0.5
        assert [row["ci_low"], row["ci_high"]] == pytest.approx([mean - reach, mean + reach])
        assert row["p"] == pytest.approx(2 * t.sf(abs(mean) / variance**0.5, freedom))
    of_both = sorted(rows.loc["chosen", "p"].dropna())
    holm = [min(1, of_both[0] * len(of_both)), max(min(1, of_both[0] * len(of_both)), of_both[-1])]
    assert sorted(rows.loc["chosen", "p_holm"].dropna()) == pytest.approx(holm[: len(of_both)])
    assert rows.loc["last epoch", "p_holm"].isna().all()
    sentence = saved["verdict"][1]
    mean = rows.loc["chosen", "linear"]["difference"]
    assert f"linear − chain = {100 * mean:+.1f} points".replace("-", "−") in sentence or abs(mean) < 5e-4
    assert sentence.startswith("Over 2 seeds each, 3 epochs, checkpoints by validation loss: ")
    significant = rows.loc["chosen", "linear"]["p_holm"] < 0.05
    assert ("not significant" in sentence) != significant and (
        "is better" in sentence or "is worse" in sentence
    ) == significant


def test_the_executed_notebook(executed):
    """Figures and tables for reading, and no error."""
    cells = nbformat.read(executed / "compare_recipes.ipynb", 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [it for it in outputs if it["output_type"] == "error"]
    text = json.dumps(outputs, ensure_ascii=False)
    assert "A true difference of 2 points" in text and "Each recipe was trained on 144 questions" in text
    figures = {path.name for path in (executed / "figures").iterdir()}
    assert {"recipes-courses.png", "recipes-test-differences.svg"} <= figures


def test_one_seed_of_each_is_shown_and_refused_an_interval(executed, trained, cache):
    """Tables and figures without bands or intervals; the words say what one seed cannot say."""
    found = find_runs(f"{trained}/checkpoints/small", f"{trained}/runs/small", ["chain", "linear"], [1])
    scoring = {"cache_dir": str(cache), "split": "test", "run_dir": str(executed), "limit_questions": 60}
    correct, predictions = answers(found, **scoring)
    table, had = compare(found, correct, predictions), budgets(found, str(cache))
    assert table[["ci_low", "ci_high", "p", "p_holm"]].isna().all(axis=None) and len(table) == 3
    assert "One seed cannot say" in difference(table.iloc[0], had, 1.0)
    assert title(table[:1]) == "Differences to chain; nothing could be tested"
    shown = tables.recipes_style(table).to_html() + tables.accuracies_style(accuracies(correct)).to_html()
    assert "–" in shown and "nan" not in shown.lower() and "1e-2, 1e-2, 1e-3" in tables.budgets_style(had).to_html()
    differences_figure(table[:1], title(table[:1]))
    courses_figure(*courses(found, str(cache))[:2])
    assert "nan" not in tables.planning_table(1.0, 60, 1).to_html().lower()


def test_all_that_cannot_be_compared_is_told_at_once(trained, tmp_path):
    places = f"{trained}/checkpoints/small", f"{trained}/runs/small"
    with pytest.raises(RaceError) as caught:
        find_runs(*places, ["chain", "cosine", "chain"], [1, 3])
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and "name two or more, each once" in lines[0]
    assert lines[1].endswith("small-seed3 has no checkpoints: run python -m race.chain with --recipe chain --seeds 3")
    assert "small-cosine-seed1 has no checkpoints" in lines[2]
    with pytest.raises(RaceError, match=r"SEEDS is \[1, 1\]: name one or more, each once"):
        find_runs(*places, ["chain", "linear"], [1, 1])


def test_runs_that_are_not_what_they_are_taken_for_are_refused(trained, tmp_path):
    """A copy as another seed, another learning rate, a stage too many, a damaged file, an unfinished stage."""
    for part in ("checkpoints", "runs"):
        shutil.copytree(trained / part, tmp_path / part)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "small-linear-seed1", folder / "small-linear-seed3")
    shutil.copytree(folder / "small-seed1", folder / "small-other-seed1")
    shutil.copytree(folder / "small-linear-seed2", folder / "small-other-seed2")
    for checkpoint in (folder / "small-resets-seed1").glob("e1-*.ckpt"):
        shutil.copy(checkpoint, folder / "small-linear-seed2" / f"e2-{checkpoint.name}")
        checkpoint.write_bytes(checkpoint.read_bytes()[:2000])
    last = next((folder / "small-resets-seed2").glob("e3-*.ckpt"))
    content = torch.load(last, weights_only=True)
    torch.save(content | {"race": content["race"] | {"stage": "e1"}}, folder / "small-linear-seed2" / "e9.ckpt")
    with pytest.raises(RaceError) as caught:
        find_runs(f"{folder}/small", f"{tmp_path}/runs/small", ["chain", "linear", "resets", "other"], [1, 2, 3])
    told = str(caught.value)
    assert "small-linear-seed3: was trained with seed 1, not 3" in told
    assert "small-resets-seed1: " in told and "cut off or damaged" in told
    with pytest.raises(RaceError) as caught:
        find_runs(f"{folder}/small", f"{tmp_path}/runs/small", ["chain", "other"], [1, 2])
    assert "small-other-seed2: differs from " in str(caught.value) and " in stages, e1 " in str(caught.value)


def row(**changed) -> pd.Series:
    values = {"first": "chain", "second": "cosine", "questions": 4934, "seeds_first": 10, "seeds_second": 10}
    values |= {"difference": 0.004, "ci_low": -0.002, "ci_high": 0.01, "low_90": -0.001, "high_90": 0.009, "p": 0.2}
    values |= {"p_holm": 0.4, "freedom": 40.0, "sd_first": 0.004, "sd_second": 0.005, "same_base": False}
    return pd.Series(values | changed)


HAD = pd.DataFrame({"recipe": ["chain", "cosine"], "epochs": 23, "fewest_epochs": 23, "monitor": "val_loss_epoch"})


def test_the_sentence_says_what_was_found_and_no_more():
    assert difference(row(), HAD, 0.5) == (
        "Over 10 seeds each, 23 epochs, checkpoints by validation loss: cosine − chain = +0.4 points (95 % interval "
        "−0.2 to +1.0, over seeds and questions; Holm p = 0.40): not significant; a difference beyond 1.0 points is "
        "unlikely. Standard deviation over seeds: 0.4 and 0.5 points."
    )
    assert "cosine is as good as chain within 1 point (90 % interval)" in difference(row(), HAD, 1.0)
    assert "cosine is better than chain" in difference(row(p_holm=0.03, ci_low=0.001), HAD, 0.5)
    assert "cosine is worse than chain" in difference(row(p_holm=0.03, difference=-0.01), HAD, 0.5)
    one = difference(row(seeds_first=1, seeds_second=1, p=np.nan), HAD, 1.0)
    assert "interval" not in one and "significant" not in one and "One seed cannot say" in one
    assert "Over 10 and 9 seeds, compared seed by seed" in difference(row(seeds_second=9, same_base=True), HAD, 1.0)
    assert "not tested: the same answers in all runs, or" in difference(row(p=np.nan), HAD, 1.0)
    assert "; the difference is below 1 point (90 % interval)" in difference(row(p_holm=0.03), HAD, 1)
    assert "as good as chain within 0.95 points" in difference(row(), HAD, 0.95)
    assert ", 20 to 23 epochs, " in difference(row(), HAD.assign(fewest_epochs=20), 1.0)


def test_titles():
    table = pd.DataFrame([row(), row(second="linear", p_holm=0.01), row(second="step", p_holm=0.02, difference=-0.02)])
    table.index = range(3)
    assert title(table) == (
        "linear is better than chain; step is worse than chain; no significant difference to chain: cosine"
    )
    assert title(table.assign(p=np.nan)) == "Differences to chain; nothing could be tested"


def test_what_was_observed_in_words():
    words = observed({"sd": 0.0042, "runs_differ": 0.16, "recipes_differ": 0.18})
    assert (
        "spread by 0.4 points (standard deviation) beyond what" in words
        and "chance, two seeds differ on 16 % and two recipes differ on 18 % of the questions." in words
    )
    alone = {"sd": np.nan, "runs_differ": np.nan, "recipes_differ": 0.2}
    assert observed(alone) == "In these runs two recipes differ on 20 % of the questions."


def test_planning_and_scope():
    text = planning(1.0, 4934, 3, 4)
    assert text.startswith("A true difference of 1 point is found in at least 80 of 100 comparisons, after Holm's")
    assert "on 1,000 questions with no number of seeds up to 100" in text and "With 3 seeds on 4,934 questions" in text
    assert "With 1 seed" not in planning(1.0, 4934, 1, 1)
    assert scope("demo", "validation").endswith("all accuracies are optimistic.") and scope("ehovy/race", "test") == ""


def test_the_notebook_names_the_recipes_that_ship(executed):
    from race.recipes import FILES, read_recipes

    source = (ROOT / "compare_recipes.ipynb").read_text()
    assert all(f'\\"{name}\\"' in source for name in ("chain", "constant", "resets", "step", "linear"))
    assert set(read_recipes(FILES["race"])) >= {"chain", "constant", "resets", "step", "linear"}
