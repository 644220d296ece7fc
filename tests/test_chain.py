"""The headless chain: what it runs with which parameters, what it takes as done, and when it stops."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import ROOT
from kill import in_a_process

from race import RaceError, chain
from race.score.predictions import write_json
from race.train.stages import Stage
from race.train.state import read_state

STAGES = ["ex01", "ex02", "ex03"]
REPORT = chain.report


class Ran:
    """The chain with stand-ins for its cache, its notebooks and its report, in a folder of its own."""

    def __init__(self, root, monkeypatch):
        self.root, self.cache, self.notebooks, self.reported = root, [], [], []
        self.failing: dict = {}  # (notebook, SEED) → what it raises
        self.splits = ["train", "validation", "test"]
        monkeypatch.setattr(chain, "ROOT", root)
        for path in ROOT.glob("*.ipynb"):
            shutil.copy(path, root)
        monkeypatch.setattr(chain, "Cache", self.open_cache)
        monkeypatch.setattr(chain, "generate_race_cache", self.generate)
        monkeypatch.setattr(chain, "run_notebook", self.run_notebook)
        monkeypatch.setattr(chain, "report", lambda *told: self.reported.append(told))
        monkeypatch.setattr(chain, "report_seeds", lambda options, evaluated: self.reported.append(evaluated))

    def __call__(self, *arguments: str) -> int:
        self.notebooks, self.cache, self.reported = [], [], []
        return chain.main(list(arguments))

    def write_cache(self, name: str) -> None:
        (self.root / "cache" / name).mkdir(parents=True, exist_ok=True)
        (self.root / "cache" / name / "manifest.json").touch()

    def open_cache(self, folder) -> SimpleNamespace:
        manifest = {"source": {"name": "ehovy/race"}, "model": {"name": "albert-base-v2"}}
        return SimpleNamespace(splits=self.splits, manifest=manifest)

    def generate(self, arguments: list[str]) -> int:
        self.cache.append(arguments)
        if arguments[-1].startswith("--out="):
            self.write_cache(arguments[-1].removeprefix("--out="))
        return 0

    def run_notebook(self, name: str, parameters: dict) -> None:
        self.notebooks.append((name, parameters))
        error = self.failing.get((name, parameters.get("SEED")))
        folder, place = self.root / parameters["RUN_DIR"], self.root / parameters["CHECKPOINT_DIR"]
        for made in (folder, place):
            made.mkdir(parents=True, exist_ok=True)
        (place / f"e{name[-1]}-epoch=00.ckpt" if name in STAGES else folder / "results.csv").touch()
        done = {} if error else {"finished": chain.inputs(name, parameters)}
        noted = {"end_time": "2026-01-01", "parameters": parameters} | done
        (folder / f"{name}.ipynb").write_text(json.dumps({"metadata": {"papermill": noted}}))
        if error:
            raise error

    def names(self) -> list[str]:
        return [name for name, _ in self.notebooks]

    def values(self, parameter: str) -> list:
        return [parameters.get(parameter) for _, parameters in self.notebooks]


@pytest.fixture
def ran(monkeypatch, tmp_path):
    return Ran(tmp_path, monkeypatch)


def test_race_makes_its_cache_once_and_runs_the_notebooks(ran, tmp_path):
    """On a node without internet `make race` must not ask the hub for a cache made before."""
    folder = tmp_path / "cache" / "race"
    assert ran("race") == 0
    assert ran.cache == [["--source=ehovy/race", "--model=albert-base-v2", f"--out={folder}"]]
    assert ran.names() == [*STAGES, *chain.EVALUATIONS] and set(ran.values("LEARNING_RATE")) == {None}
    assert set(ran.values("RUN_DIR")) == {"runs/race"} and ran.values("SPLIT")[3:] == ["test", "test"]
    assert ran("race") == 0 and ran.cache == [[f"--verify={folder}"]] and len(ran.notebooks) == 5


def test_other_data_has_a_name_of_its_own(ran):
    assert ran("race", "--name", "dream", "--source", "dream.zip", "--seeds", "1") == 0
    assert ran.cache == [["--source=dream.zip", "--model=albert-base-v2", f"--out={ran.root}/cache/dream"]]
    assert set(ran.values("CACHE_DIR")) == {"cache/dream"} and set(ran.values("RUN_DIR")) == {"runs/dream-seed1"}
    with pytest.raises(RaceError, match="there is no .*cache/dreem: make it"):
        ran("race", "--name", "dreem")


def test_a_command_ends_with_what_its_last_notebook_found(ran, capsys):
    (compared,) = ran("race", "--recipe", "chain", "linear") or ran.reported
    (evaluated,) = ran("race") or ran.reported
    folders = [ran.root / told[0]["RUN_DIR"] for told in (compared, evaluated)]
    assert [folder.name for folder in folders] == ["chain-linear", "race"]
    rows = [{"recipe": "chain", "accuracy": 0.75, "each": [0.74, 0.76], "sd": 0.01}]
    write_json(folders[0] / "recipes-test.json", {"verdict": ["No recipe differs.", "linear: …"], "accuracies": rows})
    row = {"name": "e1", "learning_rate": 2e-5, "accuracy": 0.75, "accuracy_low": 0.7, "accuracy_high": 0.8}
    write_json(folders[1] / "chain-test.json", {"verdict": ["e1: 75.0 %"], "checkpoints": [row | {"middle": None}]})
    for told in (compared, evaluated):
        REPORT(*told)
    said = capsys.readouterr().out.replace("\xa0", " ").splitlines()[-9:]
    assert said[:2] == ["No recipe differs.", "linear: …"] and said[4].endswith("chain-linear/compare_recipes.ipynb")
    assert "75.0 % 74.0 %, 76.0 %" in said[3] and said[5] == "e1: 75.0 %"
    assert said[7].split() == "e1 2e-5 75.0 % 70.0 % to 80.0 % –".split()


def test_a_cache_of_another_source_or_one_that_fails_ends_the_chain(ran, monkeypatch):
    ran.write_cache("race")
    with pytest.raises(RaceError, match="was made from source ehovy/race, not my/race"):
        ran("race", "--source", "my/race")
    monkeypatch.setattr(chain, "generate_race_cache", lambda _: 1)
    assert ran("demo") == 1 and not ran.notebooks


def test_without_a_test_split_validation_is_scored(ran, capsys):
    ran.splits = ["train", "validation"]
    assert ran("demo") == 0 and ran.values("SPLIT")[3:] == ["validation", "validation"]
    assert "which also chose the checkpoints" in capsys.readouterr().out


def test_parameters_from_the_command_line(ran):
    """Each reaches the notebooks that have it; with a stage in front, that stage alone; the cache may be another."""
    ran.write_cache("mine")
    general = ["LEARNING_RATE=1e-5", "LEVEL=high", "RUN_DIR=runs/slow", "CACHE_DIR=cache/mine"]
    assert ran("race", "--set", *general, "--set", "e3.LEARNING_RATE=1e-6", "e2.MAX_EPOCHS=4") == 0
    assert set(ran.values("LEVEL")) == {"high"} and set(ran.values("RUN_DIR")) == {"runs/slow"}
    assert ran.values("LEARNING_RATE") == ["1e-5", "1e-5", "1e-6", None, None]
    assert ran.values("MAX_EPOCHS") == [None, "4", None, None, None]
    assert set(ran.values("CACHE_DIR")) == {"cache/mine"} and ran.cache == [[f"--verify={ran.root / 'cache/mine'}"]]


def test_some_stages_or_none(ran):
    assert ran("race", "--stages", "--set", "SPLIT=validation") == 0 and ran.names() == [*chain.EVALUATIONS]
    assert set(ran.values("SPLIT")) == {"validation"}
    batch_file = ["e1.SEED=3", "e2.BASE_CHECKPOINT=x", "MAX_EPOCHS=4", "QUESTIONS=y"]  # what its stages got
    assert ran("race", "--stages", "--set", *batch_file) == 0 and ran.values("QUESTIONS") == ["y", None]
    assert ran("race", "--stages", "e3", "e2", "--set", "e2.BASE_CHECKPOINT=e1.ckpt") == 0
    assert ran.names()[:2] == ["ex02", "ex03"] and ran.values("BASE_CHECKPOINT") == ["e1.ckpt", *[None] * 3]


def test_one_other_recipe_is_evaluated_like_the_chain_and_a_trial_kept_apart(ran):
    assert ran("demo", "--recipe", "step", "--limit-questions", "9") == 0
    assert ran.names() == ["ex01", *chain.EVALUATIONS] and set(ran.values("LIMIT_QUESTIONS")) == {9}
    assert set(ran.values("CACHE_DIR")) == {"cache/demo"} and set(ran.values("RUN_DIR")) == {"runs/demo-trial-step"}
    assert set(ran.values("CHECKPOINT_DIR")) == {"checkpoints/demo-trial-step"}
    assert json.loads((ran.root / "runs" / "demo-trial-step" / "recipe.json").read_text())["name"] == "step"


def test_several_recipes_run_their_stages_and_are_then_compared(ran):
    """Each with each seed in folders of its own, without the evaluations of a single chain."""
    assert ran("race", "--recipe", "chain", "linear", "--seeds", "1", "2", "1", "--limit-questions", "9") == 0
    assert ran.names() == [*STAGES, "ex01", *STAGES, "ex01", "compare_recipes"] and len(ran.reported) == 1
    assert ran.values("RUN_DIR")[2:5] == [f"runs/race-trial{it}" for it in ("-seed1", "-linear-seed1", "-seed2")]
    assert ran.notebooks[3][1]["SCHEDULE"] == "linear" and ran.values("SEED")[2:5] == [1, 1, 2]
    compared = ran.notebooks[-1][1]
    assert compared["RUN_DIR"] == "runs/race-trial-recipes/chain-linear-2-seeds"
    assert (compared["RECIPES"], compared["SEEDS"]) == (["chain", "linear"], [1, 2])
    assert (compared["CHECKPOINT_DIR"], compared["RUNS"]) == ("checkpoints/race-trial", "runs/race-trial")
    assert json.loads((ran.root / compared["RUN_DIR"] / "planned.json").read_text())["difference"] == 1.0


def test_of_several_seeds_what_is_finished_with_these_parameters_is_passed_over(ran, capsys):
    assert ran("race", "--seeds", "1") == 0
    assert ran("race", "--seeds", "1", "2") == 0 and ran.values("SEED") == [2] * 5
    assert [parameters["SEED"] for parameters in ran.reported[0]] == [1, 2]
    assert "runs/race-seed1: ex01 skipped, finished 2026-01-01" in capsys.readouterr().out
    path = ran.root / "runs" / "race-seed1" / "ex02.ipynb"
    path.write_text(path.read_text().replace("cache/race", "cache/other"))
    assert ran("race", "--seeds", "1") == 0 and ran.names() == ["ex02", "ex03", *chain.EVALUATIONS]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda root: (root / "checkpoints" / "race-seed1" / "e2-epoch=00.ckpt").unlink(), 4),
        (lambda root: (root / "runs" / "race-seed1" / "results.csv").unlink(), 2),
        (lambda root: (root / "cache" / "race" / "manifest.json").write_text("{}"), 5),
        (lambda root: replace(root / "ex03.ipynb", "BATCH_SIZE = 32", "BATCH_SIZE = 8"), 3),
        (lambda root: replace(root / "ex03.ipynb", "# Stage e3", "# The last stage"), 0),  # prose
    ],
)
def test_what_has_changed_since_is_run_again(ran, monkeypatch, change, again):
    """A checkpoint or a result that is gone, another cache, a parameter in a notebook's own cell; other code."""
    ran("race", "--seeds", "1")
    change(ran.root)
    assert ran("race", "--seeds", "1") == 0 and ran.names() == [*STAGES, *chain.EVALUATIONS][5 - again :]
    monkeypatch.setattr(chain, "CODE", "other")
    assert ran("race", "--seeds", "1") == 0 and len(ran.notebooks) == 5


def replace(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_run_that_fails_stops_no_other_and_is_gone_on_with(ran, capsys):
    """Whatever it raises; it is named at the end, and what needs it is not done."""
    ran.failing = {("ex02", 1): RuntimeError("Kernel didn't respond")}
    assert ran("race", "--seeds", "1", "2") == 1
    assert ran.names() == ["ex01", "ex02", *STAGES, *chain.EVALUATIONS]
    assert [parameters["SEED"] for parameters in ran.reported[0]] == [2]
    assert [path.parent.name for path in ran.root.glob("runs/*/recipe.json")] == ["race-seed2"]
    assert 'runs/race-seed1: RuntimeError("Kernel' in capsys.readouterr().err.split("not finished:")[1]
    assert ran("race", "--recipe", "chain", "step", "--seeds", "1") == 1 and "compare_recipes" not in ran.names()
    ran.failing = {}
    assert ran("race", "--seeds", "1", "2") == 0 and ran.names() == ["ex02", "ex03", *chain.EVALUATIONS]


@pytest.mark.parametrize("last", ["ex02", "compare_recipes"])
def test_a_stopped_notebook_ends_the_chain(ran, monkeypatch, capsys, last):
    def run_notebook(name: str, parameters: dict) -> None:
        if name == last:
            os.kill(os.getpid(), signal.SIGUSR1)
            raise RaceError("its process died")

    monkeypatch.setattr(chain, "run_notebook", run_notebook)
    with pytest.raises(SystemExit, match="75"):
        ran("demo", "--recipe", "chain", "linear")
    said = capsys.readouterr()
    assert "run this again to resume" in said.out and "its process died" not in said.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--set LERNING_RATE=1", "--set LERNING_RATE=1: expected NAME=VALUE"),
        ("--set MAX_EPOCHS=3.5", "MAX_EPOCHS is '3.5'"),
        ("--recipe fast", "--recipe fast"),
        ("--recipe linear --stages e2", "--stages e2: recipe linear has e1 only"),
        ("--recipe chain linear --set RUN_DIR=x", "--set RUN_DIR"),
        ("--seeds 1 2 --set e1.SEED=3", "--set e1.SEED=3: no notebook takes it here, or --seeds"),
        ("--recipe chain --recipe linear --set e1.MAX_EPOCHS=1", "--set e1.MAX_EPOCHS=1: no notebook"),
        ("--set MAX_EPOCHS=1 e3.SPLIT=test", "--set e3.SPLIT=test: no notebook takes it"),
        ("--set DIFFERENCE=2", "--set DIFFERENCE=2: no notebook takes it"),
        ("--recipe linear --set BASE_CHECKPOINT=x", "--set BASE_CHECKPOINT=x: no notebook takes it"),
        ("--stages e1 --set e2.SEED=1", "--set e2.SEED=1: no notebook takes it"),
        ("--recipe chain linear --set QUESTIONS=x", "--set QUESTIONS=x: no notebook takes it"),
        ("--seeds 1 4294967296", "SEEDS is [1, 4294967296]"),
        ("--set LOGGERS=" + "[" * 5000, "LOGGERS is '[[["),
    ],
    ids=lambda text: text[:40],
)
def test_what_makes_no_sense_or_is_gone_is_met_before_anything_runs(ran, arguments, named):
    with pytest.raises(RaceError, match=re.escape(named)):
        ran("race", *arguments.split())
    assert not ran.cache


def test_the_users_folder_is_meant_whoever_reads_it(ran, monkeypatch):
    monkeypatch.setenv("HOME", str(ran.root / "ada"))
    assert ran("demo", "--source=~/exams", "--model=~/bert", "--set", "RUN_DIR=~/x", "CACHE_DIR=~/c") == 0
    assert set(ran.values("RUN_DIR")) == {f"{ran.root}/ada/x"} and set(ran.values("CACHE_DIR")) == {f"{ran.root}/ada/c"}
    made = {"source": "exams", "model": "bert", "out": "c"}
    assert ran.cache == [[f"--{part}={ran.root}/ada/{name}" for part, name in made.items()]]


def test_an_output_that_is_not_utf_8():
    settings = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", "import race; print('── runs/demo: ex01')"]
    assert subprocess.check_output(command, env=settings, text=True) == "?? runs/demo: ex01\n"


def test_a_signal_to_the_chain_saves_the_stage(cache, tmp_path):
    """SIGTERM reaches the notebook's own process, which saves and ends; exit status 75 says: run again."""
    places = {"CHECKPOINT_DIR": str(tmp_path / "checkpoints"), "RUN_DIR": str(tmp_path / "run")}
    parameters = {"CACHE_DIR": str(cache), "MAX_EPOCHS": 40, "LEARNING_RATE": 1e-4, "BATCH_SIZE": 8} | places
    path = Stage("e1", tmp_path / "checkpoints").state_path

    def run_all() -> None:
        try:
            os._exit(len(chain.run_all([("ex01", parameters)])))
        except SystemExit as stopped:
            os._exit(stopped.code)

    process, end = in_a_process(run_all), time.monotonic() + 120
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    state = read_state(path)
    assert process.exitcode == chain.STOPPED and not state["finished"]
    assert not chain.finished(("ex01", parameters))  # although papermill notes its end, and no exception
