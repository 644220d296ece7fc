"""The stages and evaluations, run as a user runs them; and what holds for all notebooks as documents."""

import json
import os
import re

import nbformat
import pandas as pd
import pytest
import torch
from helpers import DOCUMENTS, NOTEBOOKS, ROOT, STAGES
from tiny_models import write_tiny_model

from race import LETTERS, RaceError
from race.chain import run_notebook
from race.data import RaceDataModule
from race.data.cache import build_cache
from race.train.checkpoints import weights_hash
from race.train.stages import Stage
from race.written import listed
from race_module import RaceModule

PARAMETERS = "CACHE_DIR CHECKPOINT_DIR RUN_DIR BATCH_SIZE MAX_LEN SEED LIMIT_QUESTIONS".split()


def cells(notebook: str) -> list:
    return nbformat.read(ROOT / f"{notebook}.ipynb", 4).cells


def test_the_chain_runs_and_leaves_its_results(chain):
    results = pd.read_csv(chain / "run" / "results.csv")
    assert set(results["stage"]) == {"e1", "e2", "e3"} and set(results["level"]) == {"all", "middle", "high"}
    assert (results.query("level == 'all'")["questions"] == 48).all()
    figures = {path.name for path in (chain / "run" / "figures").iterdir()}
    training = {f"{stage}-training" for stage in ("e1", "e2", "e3")}
    of_e3 = {f"e3-test-{name}" for name in ("accuracy", "kinds", "groups", "confusion", "confidence", "typed")}
    for name in training | of_e3 | {"chain-test", "chain-test-differences", "chain-lineage", "chain-story"}:
        assert {f"{name}.png", f"{name}.svg"} <= figures
    predictions = [path.name for path in (chain / "run" / "predictions").glob("*.parquet")]
    assert sorted(name[:2] + name[name.rindex("-") :] for name in predictions) == [
        *("e1-test.parquet", "e2-test.parquet", "e3-test.parquet", "e3-validation.parquet")
    ]
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


def test_evaluations_leave_what_they_found_as_json(chain):
    analysis = json.loads((chain / "run" / "analysis-e3-test.json").read_text())
    kinds = [row for row in analysis["groups"] if row["grouping"] == "kind of question"]
    assert sum(row["questions"] for row in kinds) == 48
    assert [row["letter"] for row in analysis["letters"]] == list("ABCD") and len(analysis["calibration"]) >= 1
    assert analysis["coverage"][0]["questions"] == 48
    compared = json.loads((chain / "run" / "chain-test.json").read_text())
    assert [(row["first"], row["second"]) for row in compared["pairs"]] == [("e1", "e2"), ("e1", "e3"), ("e2", "e3")]
    results = pd.read_csv(chain / "run" / "results.csv").query("level == 'all'").set_index("stage")["correct"]
    assert [row["name"] for row in compared["checkpoints"]] == ["e1", "e2", "e3"]
    assert all(
        row["gained"] - row["lost"] == results[row["second"]] - results[row["first"]] for row in compared["pairs"]
    )
    best = max(results)
    assert compared["verdict"].startswith(f"{listed(results[results == best].index)} ha")
    assert compared["ensemble"][0]["questions"] == 48


def test_questions_without_answers_are_answered(chain):
    (path,) = (chain / "run" / "answers").glob("asked-e3-*.csv")
    (row,) = pd.read_csv(path).to_dict("records")
    assert row["question"] == "Tom has a ____ ." and row["choice"] in "ABCD" and "accuracy" not in row


def test_an_executed_notebook_runs_again_where_it_lies(chain):
    """Imports and relative folders do not depend on the folder in which a notebook is opened."""
    import papermill

    content = nbformat.read(chain / "run" / "eval_test_dataset_race_2.ipynb", 4)
    for cell in content.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = cell.source.replace(f'RUN_DIR = "{chain}', f'RUN_DIR = "{os.path.relpath(chain, ROOT)}')
    nbformat.write(content, chain / "run" / "again.ipynb")
    papermill.execute_notebook(chain / "run" / "again.ipynb", chain / "run" / "again.ipynb", cwd=chain / "run")
    assert "saved predictions are used" in (chain / "run" / "again.ipynb").read_text()
    assert not (chain / "run" / "run").exists()


def test_the_saved_notebook_says_which_stage_is_better_and_how_sure_that_is(chain):
    text = (chain / "run" / "eval_test_dataset_race_2.ipynb").read_text()
    verdict = json.loads((chain / "run" / "chain-test.json").read_text())["verdict"]
    assert json.dumps(f"**{verdict}**", ensure_ascii=False)[1:-1] in text
    assert verdict.count("against ") + verdict.count("Against ") == 2
    assert verdict.count("points (95 % interval ") == 2 and verdict.count("significant") == 2


def test_the_saved_notebook_holds_the_questions_themselves(chain):
    outputs = [
        output["data"]["text/html"]
        for cell in nbformat.read(chain / "run" / "eval_test_dataset_race.ipynb", 4).cells
        for output in cell.get("outputs", [])
        if "race-cards" in output.get("data", {}).get("text/html", "")
    ]
    results = pd.read_csv(chain / "run" / "results.csv").query("level == 'all' and stage == 'e3'").iloc[0]
    mistakes = results["questions"] - results["correct"]
    assert outputs[0].count("<details") == min(10, mistakes)
    assert f"{mistakes} of {mistakes} mistakes and {results['correct']} of {results['correct']} correct" in outputs[1]
    assert outputs[1].count("<details") == 48 and "race-filters" in outputs[1]
    assert (chain / "run" / "eval_test_dataset_race.ipynb").stat().st_size < 2_000_000


def test_stages_hand_on_their_best_checkpoint(chain):
    for stage, before in (("e2", "e1"), ("e3", "e2")):
        base = Stage(before, chain / "checkpoints").best()
        lineage = Stage(stage, chain / "checkpoints").best().lineage
        assert lineage["base"] == base.name
        assert lineage["weights_start"] == weights_hash(RaceModule.load_from_checkpoint(base.path).model)


def test_a_failing_notebook_says_where_and_keeps_what_ran(tmp_path):
    parameters = {"CACHE_DIR": str(tmp_path / "none"), "RUN_DIR": str(tmp_path)}
    with pytest.raises(RaceError, match="ex01, cell .*manifest.json: not found"):
        run_notebook("ex01", parameters)
    assert (tmp_path / "ex01.ipynb").exists()


@pytest.mark.parametrize("notebook", DOCUMENTS)
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
        assert len(cell.source.splitlines()) <= (25 if cell is parameters else 17) and "class " not in cell.source
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


@pytest.mark.parametrize("family", ["roberta", "deberta-v2"])
def test_another_family_goes_the_same_way(family, corpus, tmp_path):
    """A cache, a stage, scores and an export through the notebooks; transformers alone then answers the same."""
    articles = [json.loads(path.read_text())["article"] for path in sorted(corpus.rglob("*.txt"))]
    model = write_tiny_model(family, tmp_path / "model", articles, max_position_embeddings=514)
    build_cache(str(corpus), str(model), tmp_path / "cache")
    places = {"CACHE_DIR": "cache", "CHECKPOINT_DIR": "checkpoints", "RUN_DIR": "run"}
    places = {name: str(tmp_path / folder) for name, folder in places.items()} | {"LIMIT_QUESTIONS": 24}
    run_notebook("ex01", places | {"LEARNING_RATE": 1e-3, "MAX_EPOCHS": 1, "ATTENTION_DROPOUT": 0})
    run_notebook("eval_test_dataset_race", places | {"EXPORT_DIR": str(tmp_path / "export")})
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert checkpoint.name.startswith(f"e1-{family}-race-epoch=00-val_loss_epoch=")
    example = re.search(r"```python\n(.*?)```", (tmp_path / "export" / "README.md").read_text(), re.DOTALL)[1]
    card: dict = {}
    exec(example.replace('"export"', repr(str(tmp_path / "export"))), card)
    (saved,) = (tmp_path / "run" / "predictions").glob("e1-*-test.parquet")
    answered = pd.read_parquet(saved)
    texts = RaceDataModule(tmp_path / "cache", limit_questions=24).dataset("test")
    for index, row in answered.iterrows():
        text = texts.text(index)
        with torch.no_grad():
            logits = card["model"](**card["encode"](text["article"], text["question"], text["options"])).logits[0]
        ours = torch.tensor(row[[f"p_{letter}" for letter in LETTERS]].to_numpy(float))
        assert (logits.softmax(0) - ours).abs().max() < 1e-5
