"""All five notebooks, run as a user runs them; and what holds for them as documents."""

import json

import nbformat
import pandas as pd
import pytest
from conftest import ROOT

from run_chain import NOTEBOOKS, run_notebook

STAGES = ("ex01", "ex02", "ex03")
PARAMETERS = "CACHE_DIR CHECKPOINT_DIR RUN_DIR BATCH_SIZE MAX_LEN SEED LIMIT_QUESTIONS".split()


def cells(notebook: str) -> list:
    return nbformat.read(ROOT / f"{notebook}.ipynb", 4).cells


@pytest.fixture(scope="module")
def chain(cache, tmp_path_factory):
    """The whole chain on a small demo, with a learning rate at which something happens in a few steps."""
    folder = tmp_path_factory.mktemp("notebooks")
    places = {
        "CACHE_DIR": str(cache),
        "CHECKPOINT_DIR": str(folder / "checkpoints"),
        "RUN_DIR": str(folder / "run"),
        "LIMIT_QUESTIONS": 48,
    }
    for notebook, rate in zip(NOTEBOOKS, (1e-2, 1e-2, 1e-3, None, None), strict=True):
        training = {"LEARNING_RATE": rate, "MAX_EPOCHS": 1} if rate else {}
        run_notebook(notebook, places | training)
    return folder


def test_the_chain_runs_and_leaves_its_results(chain):
    results = pd.read_csv(chain / "run" / "results.csv")
    assert set(results["stage"]) == {"e1", "e2", "e3"} and set(results["level"]) == {"all", "middle", "high"}
    assert (results.query("level == 'all'")["questions"] == 48).all()
    figures = {path.name for path in (chain / "run" / "figures").iterdir()}
    for name in ("e1-training", "e2-training", "e3-training", "e3-test-accuracy", "e3-test-confusion", "chain-test"):
        assert {f"{name}.png", f"{name}.svg"} <= figures
    assert len(list((chain / "run" / "predictions").glob("*.parquet"))) == 3
    assert len(list((chain / "checkpoints").glob("e?-albert-race-epoch=00-val_loss_epoch=*.ckpt"))) == 3


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_executed_notebook_shows_tables_and_figures(chain, notebook):
    outputs = [
        output
        for cell in nbformat.read(chain / "run" / f"{notebook}.ipynb", 4).cells
        for output in cell.get("outputs", [])
    ]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/html"} <= kinds
    assert not [output for output in outputs if output["output_type"] == "error"]


def test_stages_hand_on_their_best_checkpoint(chain):
    from race_module import RaceModule
    from race_training import best_checkpoint, read_lineage, weights_hash

    for stage, before in (("e2", "e1"), ("e3", "e2")):
        base = best_checkpoint(chain / "checkpoints", before)
        lineage = read_lineage(best_checkpoint(chain / "checkpoints", stage))
        assert lineage["base"] == base.name
        assert lineage["weights_start"] == weights_hash(RaceModule.load_from_checkpoint(base).model)


def test_a_failing_notebook_says_where_and_keeps_what_ran(tmp_path):
    parameters = {"CACHE_DIR": str(tmp_path / "none"), "RUN_DIR": str(tmp_path)}
    with pytest.raises(SystemExit, match="ex01, cell .*manifest.json: not found"):
        run_notebook("ex01", parameters)
    assert (tmp_path / "ex01.ipynb").exists()


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_as_a_document(notebook):
    """No outputs, short cells, no classes, one cell of parameters that names what others rely on."""
    content = json.loads((ROOT / f"{notebook}.ipynb").read_text())
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in content["cells"])
    code = [cell for cell in cells(notebook) if cell.cell_type == "code"]
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    wanted = [*PARAMETERS, *(["LEARNING_RATE", "MAX_EPOCHS"] if notebook in STAGES else ["SPLIT"])]
    wanted += {"ex01": ["BASE_MODEL"], "ex02": ["BASE_CHECKPOINT"], "ex03": ["BASE_CHECKPOINT"]}.get(notebook, [])
    wanted += {"eval_test_dataset_race": ["CHECKPOINT"], "eval_test_dataset_race_2": ["CHECKPOINTS"]}.get(notebook, [])
    assert all(f"\n{name} = " in f"\n{parameters.source}" for name in wanted)
    for cell in code:
        assert len(cell.source.splitlines()) <= 15 and "class " not in cell.source
    assert cells(notebook)[0].source.startswith("# ")


def test_stage_notebooks_differ_in_title_parameters_and_base_only():
    same = [
        [
            cell.source.replace(f'STAGE = "e{number}"', "")
            for cell in cells(notebook)
            if cell.cell_type == "code" and "BASE_" not in cell.source
        ]
        for number, notebook in enumerate(STAGES, 1)
    ]
    assert same[0] == same[1] == same[2] and len(same[0]) >= 6


def test_the_recipe_is_the_default():
    expected = {"ex01": ("2e-5", "10"), "ex02": ("2e-5", "3"), "ex03": ("2e-6", "10")}
    for notebook, (rate, epochs) in expected.items():
        (source,) = [cell.source for cell in cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
        for line in (f"LEARNING_RATE = {rate}", f"MAX_EPOCHS = {epochs}", "BATCH_SIZE = 32", "MAX_LEN = 512"):
            assert line in source
