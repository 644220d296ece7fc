"""The chain run once with each of several seeds, and gone on with where it stopped."""

import json

import pandas as pd
import pytest

from race import RaceError
from race import chain as module
from race.score.results import RESULT_COLUMNS

NOTEBOOKS = ("ex01", "ex02", "ex03", *module.EVALUATIONS)


@pytest.fixture
def chain(monkeypatch, tmp_path):
    """run(*arguments) -> exit status; run.ran lists (notebook, SEED); notebooks are recorded as papermill does."""
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "prepare_cache", lambda *_: 0)
    monkeypatch.setattr(module, "read_manifest", lambda _: {"splits": ["train", "validation", "test"]})

    def run(*arguments: str) -> int:
        run.ran = []
        return module.main(list(arguments))

    def run_notebook(name: str, parameters: dict, shown: bool = True) -> None:
        run.ran.append((name, parameters["SEED"]))
        fails = (name, parameters["SEED"]) == run.failing
        run_dir = tmp_path / parameters["RUN_DIR"]
        run_dir.mkdir(parents=True, exist_ok=True)
        noted = {"end_time": "2026-01-01", "parameters": parameters} | ({} if fails else {"finished": True})
        (run_dir / f"{name}.ipynb").write_text(json.dumps({"metadata": {"papermill": noted}}))
        if fails:
            raise RaceError(name)
        if name == "eval_test_dataset_race_2":
            seed = parameters["SEED"]
            rows = [["e2", "e2.ckpt", "test", "all", 100, 60, 0.6, 0, 1]]
            rows += [["e3", "e3.ckpt", "test", "all", 100, 60, 0.6 + 0.02 * seed, 0, 1]]
            hashes = {"checkpoint_sha256": [f"e2 of {run.hashes.get(seed, seed)}", f"e3 of {seed}"]}
            pd.DataFrame(rows, columns=RESULT_COLUMNS).assign(**hashes).to_csv(run_dir / "results.csv", index=False)

    run.failing, run.hashes = None, {}
    monkeypatch.setattr(module, "run_notebook", run_notebook)
    return run


def test_each_seed_runs_the_chain_in_folders_of_its_own(chain, tmp_path, capsys):
    assert chain("race", "--seeds", "1", "2") == 0
    assert chain.ran == [(name, seed) for seed in (1, 2) for name in NOTEBOOKS]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"race-seed1", "race-seed2", "race-over-seeds"}
    said = capsys.readouterr().out
    assert "| e3 | test | all | 100 | 2 (1 2) | 63.0 % |" in said
    assert "| e3 − e2 | test | all | 2 (1 2) | +3.0 points |" in said and "| +2.0, +4.0 |" in said
    saved = {path.name for path in (tmp_path / "runs" / "race-over-seeds").iterdir()}
    assert saved == {"results.csv", "results-differences.csv"}


def test_seeds_that_share_a_checkpoint_are_refused(chain, tmp_path, capsys):
    chain.hashes[2] = 1
    assert chain("race", "--seeds", "1", "2") == 1
    folders = f"{tmp_path}/runs/race-seed1 and {tmp_path}/runs/race-seed2"
    assert f"error: {folders} have the same checkpoint of e2 on test" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "race-over-seeds").exists()


def test_what_is_finished_is_passed_over(chain, capsys):
    chain("race", "--seeds", "1")
    assert chain("race", "--seeds", "1", "2") == 0
    assert chain.ran == [(name, 2) for name in NOTEBOOKS]
    assert "runs/race-seed1: ex01 skipped, finished 2026-01-01" in capsys.readouterr().out


def test_a_seed_that_fails_stops_no_other_and_is_gone_on_with(chain, capsys):
    chain.failing = ("ex02", 1)
    assert chain("race", "--seeds", "1", "2") == 1
    assert chain.ran == [("ex01", 1), ("ex02", 1), *((name, 2) for name in NOTEBOOKS)]
    said = capsys.readouterr()
    assert "runs/race-seed1: ex02" in said.err and "1 (2)" in said.out
    chain.failing = None
    assert chain("race", "--seeds", "1", "2") == 0
    assert chain.ran == [(name, 1) for name in NOTEBOOKS[1:]]


def test_other_parameters_are_not_finished(chain, tmp_path):
    chain("race", "--seeds", "1")
    path = tmp_path / "runs" / "race-seed1" / "ex02.ipynb"
    path.write_text(path.read_text().replace("cache/race", "cache/other"))
    assert chain("race", "--seeds", "1") == 0
    assert chain.ran == [(name, 1) for name in NOTEBOOKS[1:]]  # e3 and the scores follow from e2


def test_one_stage_from_one_base_with_several_seeds(chain, monkeypatch):
    seen, run_notebook = [], module.run_notebook
    monkeypatch.setattr(module, "run_notebook", lambda *call: seen.append(call) or run_notebook(*call))
    assert chain("race", "--stages", "e2", "--base-checkpoint", "e1.ckpt", "--seeds", "1", "2") == 0
    assert [name for name, *_ in seen] == ["ex02", *module.EVALUATIONS] * 2
    assert [(p["BASE_CHECKPOINT"], p["SEED"]) for n, p, _ in seen if n == "ex02"] == [("e1.ckpt", 1), ("e1.ckpt", 2)]


@pytest.mark.parametrize(
    "wrong", [["--base-checkpoint", "x"], ["--stages", "e2", "e1"], ["--seeds", "1", "1"]], ids=lambda w: w[0]
)
def test_arguments_that_make_no_sense_are_refused(chain, wrong):
    with pytest.raises(SystemExit):
        chain("race", *wrong)
