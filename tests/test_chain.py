"""The headless chain: what it makes, what it takes as made, and when it stops before hours are spent."""

import json
import os
import signal
import time

import pytest
from kill import in_a_process

from race import RaceError, chain
from race.data.cache import FORMAT, write_manifest
from race.score.results import RESULT_COLUMNS
from race.train.stages import Stage
from race.train.state import read_state


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(arguments) -> (exit status, commands of the cache, notebooks with parameters), with neither really run."""
    commands, notebooks = [], []
    monkeypatch.setattr(chain, "ROOT", tmp_path)

    def generate(arguments: list[str]) -> int:
        commands.append(arguments)
        if "--out" in arguments:
            write_cache(tmp_path, ["train", "validation", "test"])
        return 0

    def run_notebook(name: str, parameters: dict, shown: bool = True) -> None:
        notebooks.append((name, parameters))
        run_dir = tmp_path / parameters["RUN_DIR"]
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "results.csv").write_text(",".join(RESULT_COLUMNS) + "\n")

    monkeypatch.setattr(chain, "generate_race_cache", generate)
    monkeypatch.setattr(chain, "run_notebook", run_notebook)
    return lambda *arguments: (chain.main(list(arguments)), commands, notebooks)


def write_cache(root, splits: list[str]) -> None:
    manifest = {"format": FORMAT, "source": {"name": "ehovy/race"}, "model": {"name": "albert-base-v2"}}
    for name in ("race", "demo"):
        (root / "cache" / name).mkdir(parents=True, exist_ok=True)
        write_manifest(root / "cache" / name / "manifest.json", manifest | {"splits": dict.fromkeys(splits)})


def test_race_runs_the_recipe_on_the_hub(run):
    status, commands, notebooks = run("race")
    assert status == 0 and commands[0][:4] == ["--source", "ehovy/race", "--model", "albert-base-v2"]
    assert [name for name, _ in notebooks] == (["ex01", "ex02", "ex03", *chain.EVALUATIONS])
    assert not any("LEARNING_RATE" in parameters for _, parameters in notebooks)
    assert notebooks[0][1]["RUN_DIR"] == "runs/race" and notebooks[3][1]["SPLIT"] == "test"


def test_a_cache_that_is_there_is_verified_and_used(run, tmp_path):
    """On a node without internet `make race` must not ask the hub for a cache made before."""
    write_cache(tmp_path, ["train", "validation", "test"])
    status, commands, _ = run("race")
    assert status == 0 and commands == [["--verify", str(tmp_path / "cache" / "race")]]


def test_another_source_than_the_cache_has_is_refused(run, tmp_path, capsys):
    write_cache(tmp_path, ["train", "validation", "test"])
    status, _, notebooks = run("race", "--source", "my/race")
    assert status == 1 and notebooks == []
    assert "was made from source ehovy/race, not my/race" in capsys.readouterr().err


def test_missing_splits_are_met_before_the_training(run, tmp_path, capsys):
    write_cache(tmp_path, ["train", "test"])
    assert run("race")[0] == 1 and "no validation split" in capsys.readouterr().err
    write_cache(tmp_path, ["train", "validation"])
    status, _, notebooks = run("race")
    assert status == 0 and notebooks[-1][1]["SPLIT"] == "validation"


def test_a_trial_run_is_kept_apart(run):
    _, _, notebooks = run("race", "--limit-questions", "9")
    places = {notebooks[0][1][name] for name in ("CACHE_DIR", "CHECKPOINT_DIR", "RUN_DIR")}
    assert places == {"cache/race", "checkpoints/race-trial", "runs/race-trial"}
    assert all(parameters["LIMIT_QUESTIONS"] == 9 for _, parameters in notebooks)


def test_a_cache_that_fails_ends_the_chain(run, monkeypatch):
    monkeypatch.setattr(chain, "generate_race_cache", lambda _: 1)
    status, _, notebooks = run("demo")
    assert status == 1 and notebooks == []


def test_a_stopped_notebook_ends_the_chain(run, monkeypatch, capsys):
    ran = []

    def run_notebook(name: str, parameters: dict, shown: bool) -> None:
        ran.append(name)
        if name == "ex02":
            os.kill(os.getpid(), signal.SIGUSR1)
            raise RaceError("its process died")

    monkeypatch.setattr(chain, "run_notebook", run_notebook)
    assert run("demo")[0] == 75 and ran == ["ex01", "ex02"]
    assert "run this again to resume" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "fresh"), [([], 0), (["--fresh"], 1), (["--fresh", "2"], 2)])
def test_fresh_reaches_the_stages(run, arguments, fresh):
    _, _, notebooks = run("race", *arguments)
    assert [parameters.get("FRESH") for _, parameters in notebooks] == [fresh, fresh, fresh, None, None]


def test_parameters_from_the_command_line(run, tmp_path):
    """Each reaches the notebooks that have it; with a stage in front, that stage alone."""
    general = ["LEARNING_RATE=1e-5", "LEVEL=high", "RUN_DIR=runs/slow", "CHECKPOINT_DIR=checkpoints/slow"]
    status, _, notebooks = run("race", "--set", *general, "--set", "e3.LEARNING_RATE=1e-6", "e2.MAX_EPOCHS=4")
    assert status == 0 and {parameters["LEVEL"] for _, parameters in notebooks} == {"high"}
    assert {parameters["RUN_DIR"] for _, parameters in notebooks} == {"runs/slow"}
    assert [parameters.get("LEARNING_RATE") for _, parameters in notebooks] == ["1e-5", "1e-5", "1e-6", None, None]
    assert [parameters.get("MAX_EPOCHS") for _, parameters in notebooks] == [None, "4", None, None, None]


def test_the_cache_may_be_another(run, tmp_path):
    write_cache(tmp_path, ["train", "validation", "test"])
    (tmp_path / "cache" / "race").rename(tmp_path / "cache" / "mine")
    status, commands, notebooks = run("race", "--set", "CACHE_DIR=cache/mine")
    assert status == 0 and commands == [["--verify", str(tmp_path / "cache" / "mine")]]
    assert {parameters["CACHE_DIR"] for _, parameters in notebooks} == {"cache/mine"}


def test_no_stage_is_the_evaluations_only(run):
    status, _, notebooks = run("race", "--stages", "--set", "SPLIT=validation")
    assert status == 0 and [name for name, _ in notebooks] == [*chain.EVALUATIONS]
    assert {parameters["SPLIT"] for _, parameters in notebooks} == {"validation"}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("LERNING_RATE=1", "expected NAME=VALUE, with NAME one of CACHE_DIR"),
        ("LEARNING_RATE", "--set LEARNING_RATE: expected NAME=VALUE"),
        ("MAX_EPOCHS=3.5", "MAX_EPOCHS is '3.5', expected a whole number"),
        ("e2.LEVEL=low", "LEVEL is 'low', expected middle, high or None"),
        ("CACHE_DIR=cache/race", "the demo makes a cache of its own"),
    ],
)
def test_a_parameter_that_cannot_be_is_met_before_anything_runs(run, capsys, pair, message):
    with pytest.raises(SystemExit):
        run("demo", "--set", pair)
    assert message in capsys.readouterr().err


def test_a_signal_to_the_chain_saves_the_stage_and_the_next_run_goes_on(cache, tmp_path):
    """SIGTERM reaches the notebook's own process, which saves and ends; exit status 75 says: run again."""
    places = {"CHECKPOINT_DIR": str(tmp_path / "checkpoints"), "RUN_DIR": str(tmp_path / "run")}
    parameters = {"CACHE_DIR": str(cache), "MAX_EPOCHS": 40, "LEARNING_RATE": 1e-4, "BATCH_SIZE": 8} | places

    def run_all() -> int:
        return chain.STOPPED if chain.run_all({"run": [("ex01", parameters)]}) is None else 0

    process = in_a_process(lambda: os._exit(run_all()))
    end = time.monotonic() + 120
    while not (state := read_state(Stage("e1", tmp_path / "checkpoints").state_path)) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == chain.STOPPED
    assert chain.unfinished([("ex01", parameters)])  # although papermill notes its end, and no exception
    state = read_state(Stage("e1", tmp_path / "checkpoints").state_path)
    assert not state["finished"]
    parameters["MAX_EPOCHS"] = state["epoch"] + 1
    process = in_a_process(lambda: os._exit(run_all()))
    process.join(200)
    assert process.exitcode == 0 and read_state(Stage("e1", tmp_path / "checkpoints").state_path)["finished"]
    assert not chain.unfinished([("ex01", parameters)])
    assert "e1 resumes from epoch" in (tmp_path / "run" / "ex01.ipynb").read_text()


def test_several_recipes_run_their_stages_and_are_then_compared(run):
    """Each with each seed in folders of its own, without the evaluations of a single chain."""
    status, _, notebooks = run("race", "--recipe", "chain", "linear", "--seeds", "1", "2", "--limit-questions", "9")
    assert status == 0
    ran = [(name, parameters["RUN_DIR"]) for name, parameters in notebooks]
    chain_runs = [(name, f"runs/race-trial-seed{seed}") for seed in (1, 2) for name in ("ex01", "ex02", "ex03")]
    linear_runs = [("ex01", f"runs/race-trial-linear-seed{seed}") for seed in (1, 2)]
    assert ran[:4] == [*chain_runs[:3], linear_runs[0]] and ran[4:8] == [*chain_runs[3:], linear_runs[1]]
    assert ran[8:] == [("compare_recipes", "runs/race-trial-recipes/chain-linear-2-seeds")]
    assert notebooks[3][1]["SCHEDULE"] == "linear" and notebooks[3][1]["CHECKPOINT_DIR"].endswith("-linear-seed1")
    compared = notebooks[8][1]
    assert (compared["RECIPES"], compared["SEEDS"]) == (["chain", "linear"], [1, 2])
    assert (compared["CHECKPOINT_DIR"], compared["RUNS"]) == ("checkpoints/race-trial", "runs/race-trial")


def test_one_other_recipe_is_run_and_evaluated_like_the_chain(run, tmp_path):
    status, _, notebooks = run("demo", "--recipe", "step")
    assert status == 0 and [name for name, _ in notebooks] == ["ex01", *chain.EVALUATIONS]
    assert {parameters["RUN_DIR"] for _, parameters in notebooks} == {"runs/demo-step"}
    assert json.loads((tmp_path / "runs" / "demo-step" / "recipe.json").read_text())["name"] == "step"


def test_runs_side_by_side(run, monkeypatch):
    """Two at a time, the stages of each in their order; one that fails stops no other, and nothing is compared."""
    together, now, ran = [], set(), []

    def run_notebook(name: str, parameters: dict, shown: bool) -> None:
        now.add(parameters["RUN_DIR"])
        time.sleep(0.05)
        together.append(len(now))
        now.remove(parameters["RUN_DIR"])
        ran.append((parameters["RUN_DIR"], name))
        if parameters["RUN_DIR"] == "runs/demo-resets-seed1":
            raise RaceError("broken")

    monkeypatch.setattr(chain, "run_notebook", run_notebook)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run("demo", "--recipe", "chain", "resets", "step", "--seeds", "1", "2", "--jobs", "2")[0] == 1
    assert max(together) == 2
    assert [name for folder, name in ran if folder == "runs/demo-seed2"] == ["ex01", "ex02", "ex03"]
    assert [name for folder, name in ran if folder == "runs/demo-resets-seed1"] == ["ex01"]
    assert not [name for _, name in ran if name == "compare_recipes"]


def test_whatever_a_run_raises_the_others_go_on_and_it_is_named(run, monkeypatch, capsys):
    def run_notebook(name: str, parameters: dict, shown: bool) -> None:
        if parameters["RUN_DIR"] == "runs/race-seed1":
            raise RuntimeError("Kernel didn't respond in 60 seconds")

    monkeypatch.setattr(chain, "run_notebook", run_notebook)
    monkeypatch.setattr(chain, "report_over_seeds", lambda arguments: 0)
    assert run("race", "--seeds", "1", "2")[0] == 1
    assert 'runs/race-seed1: RuntimeError("Kernel didn' in capsys.readouterr().err.split("not finished:")[1]


def test_a_comparison_that_is_stopped_is_not_done(run, monkeypatch):
    def run_notebook(name: str, parameters: dict, shown: bool) -> None:
        if name == "compare_recipes":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(chain, "run_notebook", run_notebook)
    assert run("race", "--recipe", "chain", "linear")[0] == 75


def test_how_many_seeds_a_difference_takes_is_said_before_anything_runs(run, capsys):
    arguments = ["race", "--recipe", "chain", "linear", "cosine", "--seeds", "1", "2", "3", "--difference", "1"]
    status, commands, notebooks = run(*arguments)
    assert status == 0 and not commands and not notebooks
    assert "after Holm's adjustment for 2, on 4,934 questions with 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "fast"], "--recipe fast: expected one of chain, constant"),
        (["--recipe", "chain", "linear", "--stages", "e1"], "--stages and --base-checkpoint go with one recipe"),
        (["--recipe", "chain", "linear", "--set", "RUN_DIR=x"], "--set RUN_DIR: --seeds and several recipes"),
        (["--recipe", "linear", "--stages", "e2"], "--stages e2: recipe linear has e1 only"),
        (
            ["--recipe", "chain", "--recipe", "linear", "--set", "e1.MAX_EPOCHS=1"],
            "--set MAX_EPOCHS: the recipes set it",
        ),
        (["--jobs", "0"], "--jobs 0: expected 1 or more"),
        (["--difference", "-1"], "expected points of accuracy above 0"),
    ],
)
def test_recipes_that_make_no_sense_are_met_before_anything_runs(run, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run("race", *arguments)
    assert message in capsys.readouterr().err
