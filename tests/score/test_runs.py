"""Runs compared, from small runs on disk to the executed notebook; its verdict is recomputed from predictions."""

import json
import shutil
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from helpers import recipes_by_hand
from scipy.stats import t

from race import RaceError
from race.chain import run_notebook
from race.data import RaceDataModule
from race.data.cache import Cache
from race.files import file_hash
from race.report.sentences import budget, over_seeds
from race.score.runs import Run, _settings, find_runs, stages_over_seeds, training_curves, training_totals
from race.score.statistics import is_correct
from race.train.stages import Stage
from race.train.training import start_stage, train_stage

RECIPES = {  # learning rate, epochs and more of each stage; three epochs each
    "chain": {"e1": (1e-2, 1, {}), "e2": (1e-2, 1, {}), "e3": (1e-3, 1, {})},
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
def found(trained) -> dict[str, list[Run]]:
    return find_runs(f"{trained}/checkpoints/small", f"{trained}/runs/small", list(RECIPES), SEEDS)


@pytest.fixture(scope="module")
def executed(trained, cache):
    """The folder with the results of the executed notebook."""
    parameters = {"CACHE_DIR": str(cache), "CHECKPOINT_DIR": f"{trained}/checkpoints/small", "RECIPES": list(RECIPES)}
    parameters |= {"RUNS": f"{trained}/runs/small", "RUN_DIR": f"{trained}/runs/small-recipes", "SEEDS": SEEDS}
    run_notebook("compare_recipes", parameters | {"LIMIT_QUESTIONS": 60, "DIFFERENCE": "2"})
    return trained / "runs" / "small-recipes"


def test_what_each_recipe_had(found, cache):
    totals = training_totals(found, Cache(cache))
    table = totals.set_index("recipe")
    assert table["questions"].tolist() == [144] * 2 and table["stages"].tolist() == [3, 1]
    assert (table[["epochs", "fewest_epochs", "checkpoints"]] == 3).all(axis=None) and (table["seeds"] == 2).all()
    assert table.loc["chain", "learning_rate"] == [1e-2, 1e-2, 1e-3] and "3 epochs: 144 questions" in budget(totals)


def test_the_course_over_the_questions_seen(found, cache):
    validated, rates, notes = training_curves(found, Cache(cache))
    assert not notes
    assert validated.groupby(["recipe", "seed"])["questions"].apply(list).map(lambda it: it == [48, 96, 144]).all()
    linear = rates[(rates["recipe"] == "linear") & (rates["seed"] == 1)]
    assert linear["questions"].tolist() == [16 * step for step in range(1, 10)]
    expected = [1e-2 * min(step / 2, (9 - step) / 7) for step in range(9)]
    assert linear["learning_rate"].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_notebooks_verdict_from_its_predictions(executed, trained):
    """By code of the test's own: which checkpoint is chosen, who is right where, difference, interval, words."""
    cells = nbformat.read(executed / "compare_recipes.ipynb", 4).cells
    assert not any(it["output_type"] == "error" for cell in cells for it in cell.get("outputs", []))
    assert (executed / "figures" / "recipes-courses.png").exists()
    saved = json.loads((executed / "recipes-test.json").read_text())
    made = {path: json.loads(path.read_text())["settings"] for path in executed.glob("predictions/*.json")}
    files = {settings["checkpoint_sha256"]: path for path, settings in made.items()}

    def right(recipe: str, choose) -> tuple[np.ndarray, pd.DataFrame]:
        runs = []
        for seed in SEEDS:
            place = trained / "checkpoints" / f"small{'' if recipe == 'chain' else f'-{recipe}'}-seed{seed}"
            last = list(RECIPES[recipe])[-1]
            records = {path: torch.load(path, weights_only=True)["race"] for path in place.glob(f"{last}-*.ckpt")}
            table = pd.read_parquet(files[file_hash(choose(records))].with_suffix(".parquet"))
            runs.append((table["answer"] == table["prediction"]).to_numpy(int))
        return np.stack(runs), table

    def lowest_loss(records: dict):
        return min(records, key=lambda it: (records[it]["metrics"]["val_loss_epoch"], records[it]["epoch"]))

    row = pd.DataFrame(saved["differences"]).set_index("second").loc["linear"]
    (chain, table), (linear, _) = (right(recipe, lowest_loss) for recipe in ("chain", "linear"))
    mean, variance, freedom = recipes_by_hand(chain, linear, table["example_id"].tolist(), table["level"].tolist())
    reach = t.ppf(0.975, freedom) * variance**0.5
    assert len(table) == 60 and [row["difference"], row["freedom"]] == pytest.approx([mean, freedom])
    assert [row["ci_low"], row["ci_high"]] == pytest.approx([mean - reach, mean + reach])
    assert row["p"] is None and "linear − chain = " in saved["verdict"][1]  # two seeds give no verdict
    last, _ = right("linear", lambda records: max(records, key=lambda it: records[it]["epoch"]))
    assert saved["accuracies"][1]["last_epoch"] == pytest.approx(last.mean())


def test_stages_over_seeds_are_compared_as_recipes_are(found, cache, tmp_path):
    """Seed by seed, each against the first stage; the predictions are kept where each run's are."""
    runs = [Run("chain", run.seed, run.checkpoint_dir, f"{tmp_path}/seed{run.seed}") for run in found["chain"]]
    data = RaceDataModule(cache, limit_questions=60)
    means, compared = stages_over_seeds(runs, data, "test", accelerator="cpu")

    def right(stage: str) -> np.ndarray:
        paths = (next(tmp_path.glob(f"seed{seed}/predictions/{stage}-*.parquet")) for seed in SEEDS)
        return np.array([is_correct(pd.read_parquet(path)).mean() for path in paths])

    gains = compared["differences"]
    assert means["recipe"].tolist() == ["e1", "e2", "e3"] and gains["second"].tolist() == ["e2", "e3"]
    np.testing.assert_allclose(means["each"].tolist(), [right(stage) for stage in means["recipe"]])
    expected = [(right(stage) - right("e1")).mean() for stage in gains["second"]]
    np.testing.assert_allclose(gains["difference"], expected, atol=1e-12)
    assert stages_over_seeds(runs, data, "test", accelerator="cpu")[0].equals(means)
    assert any(it.startswith("e3 − e1 = ") for it in over_seeds(means, compared, SEEDS))
    with pytest.raises(RaceError, match="two have the same checkpoint"):
        stages_over_seeds([runs[0], runs[0]], data, "test")


def test_what_was_changed_on_the_way_counts_and_the_number_of_epochs_does_not():
    later = [{"code": "b", "recipe": {"precision": ["16-mixed", "32-true"]}}]
    recipe = {"precision": "32-true", "max_epochs": 5, "batch_size": 8}
    lineage = {"code": "a", "recipe": recipe, "went_on_with": later}
    expected = {"precision": "16-mixed, then 32-true", "batch_size": 8, "code": "b"}
    assert _settings(SimpleNamespace(lineage=lineage)) == expected


def test_all_that_cannot_be_compared_is_told_at_once(trained, tmp_path):
    """No run, a copy as another seed, a damaged file, a stage that has not finished, runs of one recipe that differ."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(trained / "checkpoints", folder)
    shutil.copytree(folder / "small-linear-seed1", folder / "small-linear-seed3")
    for recipe in ("resets", "other"):
        shutil.copytree(folder / "small-seed1", folder / f"small-{recipe}-seed1")
    shutil.copytree(folder / "small-linear-seed2", folder / "small-other-seed2")
    damaged = next((folder / "small-resets-seed1").glob("e1-*.ckpt"))
    damaged.write_bytes(damaged.read_bytes()[:2000])
    path = folder / "small-seed2" / "resume" / "e3.ckpt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"resume": state["resume"] | {"finished": False}}, path)
    places = f"{folder}/small", f"{trained}/runs/small"
    with pytest.raises(RaceError) as caught:
        find_runs(*places, ["chain", "linear", "resets", "cosine", "chain"], [1, 2, 3])
    told = str(caught.value)
    assert "each once" in told.splitlines()[0] and "not finished: e3" in told and damaged.name in told
    assert "small-linear-seed3 was trained with seed 1, not 3" in told
    assert "small-cosine-seed1 has no checkpoints" in told and "--recipe cosine --seeds 1\n" in told
    with pytest.raises(RaceError, match="^no runs such as .*none-seed1: .* --recipe chain linear --seeds 1 2$"):
        find_runs(str(folder / "none"), "runs/none", ["chain", "linear"], [1, 2])
    with pytest.raises(RaceError, match="small-other-seed2 differs from .* in e1 "):
        find_runs(*places, ["other", "linear"], [1, 2])
    with pytest.raises(RaceError, match="small-other-seed1: the same checkpoint, which says nothing of two recipes"):
        find_runs(*places, ["chain", "other"], [1])
    with pytest.raises(RaceError, match=r"SEEDS is \[1, 1\]"):
        find_runs(*places, ["linear", "other"], [1, 1])
