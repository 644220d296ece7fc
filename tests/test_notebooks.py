"""The stages and evaluations, run as a user runs them; and what holds for all notebooks as documents."""

import json
import re
import sys

import nbformat
import pandas as pd
import pytest
from helpers import DOCUMENTS, NOTEBOOKS, ROOT, STAGES, notebook_parameters

from race import RaceError
from race.chain import run_notebook

SHARED = {"CACHE_DIR", "CHECKPOINT_DIR", "RUN_DIR", "SEED", "LIMIT_QUESTIONS"}
OWN = {  # the recipe is the default
    "ex01": {"BASE_MODEL": None, "LEARNING_RATE": 2e-5, "MAX_EPOCHS": 10},
    "ex02": {"BASE_CHECKPOINT": None, "LEARNING_RATE": 2e-5, "MAX_EPOCHS": 3},
    "ex03": {"BASE_CHECKPOINT": None, "LEARNING_RATE": 2e-6, "MAX_EPOCHS": 10},
    "eval_test_dataset_race": {"CHECKPOINT": None, "SPLIT": "test"},
    "eval_test_dataset_race_2": {"CHECKPOINTS": None, "SPLIT": "test"},
    "compare_recipes": {"SPLIT": "test"},
}


def cells(notebook: str) -> list:
    return nbformat.read(ROOT / f"{notebook}.ipynb", 4).cells


def outputs(folder, notebook: str) -> list:
    return [it for cell in nbformat.read(folder / f"{notebook}.ipynb", 4).cells for it in cell.get("outputs", [])]


def test_the_chain_runs_and_leaves_its_results(chain):
    results = pd.read_csv(chain / "run" / "results.csv")
    assert set(results["stage"]) == {"e1", "e2", "e3"} and set(results["level"]) == {"all", "middle", "high"}
    assert (results.query("level == 'all'")["questions"] == 48).all()
    figures = {path.name for path in (chain / "run" / "figures").iterdir()}
    training = {f"{stage}-training" for stage in ("e1", "e2", "e3")}
    of_e3 = {f"e3-test-{name}" for name in ("accuracy", "kinds", "groups", "confusion", "confidence")}
    for name in training | of_e3 | {"chain-test", "chain-test-differences", "chain-story"}:
        assert {f"{name}.png", f"{name}.svg"} <= figures
    assert len(list((chain / "checkpoints").glob("e?-albert-race-epoch=00-val_loss_epoch=*.ckpt"))) == 3
    for notebook in NOTEBOOKS:
        shown = outputs(chain / "run", notebook)
        pictures = [it for output in shown if "<img" in (it := output.get("data", {}).get("text/html", ""))]
        assert pictures and all(re.search(r'alt="[^"]{20,}"', it) for it in pictures)


def test_evaluations_leave_what_they_found(chain):
    analysis = json.loads((chain / "run" / "analysis-e3-test.json").read_text())
    for grouping in ("kind of question", "kind"):  # the latter by GROUP_BY
        assert sum(row["questions"] for row in analysis["groups"] if row["grouping"] == grouping) == 48
    compared = json.loads((chain / "run" / "chain-test.json").read_text())
    assert [(row["first"], row["second"]) for row in compared["pairs"]] == [("e1", "e2"), ("e1", "e3"), ("e2", "e3")]
    correct = pd.read_csv(chain / "run" / "results.csv").query("level == 'all'").set_index("stage")["correct"]
    for row in compared["pairs"]:
        assert row["gained"] - row["lost"] == correct[row["second"]] - correct[row["first"]]
    text = (chain / "run" / "eval_test_dataset_race_2.ipynb").read_text()
    assert json.dumps(f"**{compared['verdict'][0]}**", ensure_ascii=False)[1:-1] in text
    assert (chain / "export" / "model.safetensors").exists()
    (path,) = (chain / "run" / "answers").glob("asked-e3-*.csv")
    (row,) = pd.read_csv(path).to_dict("records")
    assert row["question"] == "Tom has a ____ ." and row["choice"] in "ABCD" and "accuracy" not in row
    shown = [it.get("data", {}).get("text/html", "") for it in outputs(chain / "run", "eval_test_dataset_race")]
    (browser,) = [html for html in shown if "race-cards" in html]
    assert browser.count("<details") == 48 and "race-filters" in browser


def test_a_failing_notebook_says_where_and_keeps_what_ran(tmp_path, monkeypatch):
    """And the one that was finished before."""
    monkeypatch.setattr("race.chain.ROOT", tmp_path)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    failing = [nbformat.v4.new_code_cell(source) for source in ("print('first')", "1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=failing, metadata=kernel), tmp_path / "small.ipynb")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "small.ipynb").write_text("finished")
    with pytest.raises(RaceError, match="small, cell 3: ZeroDivisionError: .*\n.*small-last-run.ipynb"):
        run_notebook("small", {"RUN_DIR": "run"})
    assert "first" in (tmp_path / "run" / "small-last-run.ipynb").read_text()
    assert (tmp_path / "run" / "small.ipynb").read_text() == "finished"


def test_the_python_that_runs_the_chain_runs_its_notebooks(tmp_path, monkeypatch):
    """Whatever another environment has registered under the name of their kernel."""
    (spec := tmp_path / "kernels" / "python3").mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setattr("race.chain.ROOT", tmp_path)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    code = [nbformat.v4.new_code_cell("import sys; print(sys.executable)")]
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata=kernel), tmp_path / "small.ipynb")
    (tmp_path / "manifest.json").touch()
    run_notebook("small", {"RUN_DIR": "run", "CHECKPOINT_DIR": ".", "CACHE_DIR": "."})
    assert sys.executable in (tmp_path / "run" / "small.ipynb").read_text()


@pytest.mark.parametrize("notebook", DOCUMENTS)
def test_notebook_as_a_document(notebook):
    """No outputs, short cells, no classes, one cell of parameters that names what others rely on."""
    content = json.loads((ROOT / f"{notebook}.ipynb").read_text())
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in content["cells"])
    code = [cell for cell in cells(notebook) if cell.cell_type == "code"]
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    values = notebook_parameters(notebook)
    own = OWN[notebook] | {"BATCH_SIZE": 32, "MAX_LEN": 512}
    assert values.keys() >= SHARED and {name: values.get(name, "missing") for name in own} == own
    usual, _, _ = parameters.source.partition("\n\n")
    assert len(usual.splitlines()) <= 8 and code[-1].source == "environment(settings.PRECISION, settings.ACCELERATOR)"
    for cell in code:
        assert (
            len(list(filter(None, cell.source.splitlines()))) <= (25 if cell is parameters else 17)
            and "class " not in cell.source
        )
    assert cells(notebook)[0].source.startswith("# ")


def test_stage_notebooks_differ_in_title_parameters_and_base_only():
    same = []
    for number, notebook in enumerate(STAGES, 1):
        code = [cell.source for cell in cells(notebook) if cell.cell_type == "code" and "BASE_" not in cell.source]
        same.append([source.replace(f'STAGE = "e{number}"', "") for source in code])
    assert same[0] == same[1] == same[2] and len(same[0]) >= 6
