"""Whatever ends a run, the next one ends with the same bytes as if nothing had happened."""

import io
import os
import random
import shutil
import signal
import time

import pandas as pd
import pytest
import pytorch_lightning as pl
from kill import in_a_process, killed_chain, remains, run_chain
from small_stage import At, e1, interrupt, position, same_weights, stage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from race import SIGNALS, RaceError
from race.data import RaceDataModule
from race.data.cache import build_cache
from race.device import CODE
from race.files import locked, read_archive, save_archive
from race.parameters import CHANGED
from race.train.checkpoints import read_checkpoints
from race.train.stages import Stage, read_log
from race.train.state import KeepState
from race.train.training import start_stage, train_stage


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory) -> dict:
    """What the small chain leaves when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    process = in_a_process(run_chain, folder, cache)
    process.join(240)
    assert process.exitcode == 0
    return remains(folder)


def assert_equal(found: dict, expected: dict) -> None:
    assert found.pop("others") == expected["others"] == []
    for name, parts in found.items():
        assert parts.keys() == expected[name].keys()
        different = [part for part, value in parts.items() if expected[name][part] != value]
        assert not different, (name, different)


def kill_and_compare(expected, cache, folder, kills: int, seed: int, workers: int) -> int:
    """Kill chains until so many kills have hit; what each leaves is compared. Returns the number of chains."""
    rng, hit, chains = random.Random(seed), 0, 0
    while hit < kills:
        chains += 1
        hit += killed_chain(folder / str(chains), cache, min(25, kills - hit), rng, workers)
        assert_equal(remains(folder / str(chains)), expected)
    return chains


@pytest.mark.parametrize(("workers", "kills"), [(0, 6), (2, 2)])
def test_killed_chains_end_the_same(whole, cache, tmp_path, workers, kills):
    """SIGKILL at random moments, in saving and in validation: same weights, optimizer, log rows, checkpoint files.

    The rate of each step follows from its number: a resume needs no scheduler.
    """
    kill_and_compare(whole, cache, tmp_path, kills, workers, workers)
    log = pd.read_csv(io.StringIO(whole["e1"]["log"]))
    rates = log["learning_rate"].dropna()
    assert rates.iloc[0] < rates.max() and rates.iloc[-1] < 0.1 * rates.max() and log["gradient_norm"].max() > 0.5


@pytest.mark.kill
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_hundred_kills(whole, cache, tmp_path, workers):
    print(f"60 kills over {kill_and_compare(whole, cache, tmp_path, 60, 10 + workers, workers)} chains")


@pytest.mark.parametrize(("number", "workers", "group"), [(signal.SIGTERM, 2, True), (signal.SIGUSR1, 0, False)])
def test_a_signal_saves_and_ends(whole, cache, tmp_path, number, workers, group):
    """In the midst of training, to the process or to its group with the loader workers: gone within 30 s by that very
    signal, nothing lost, and the next run goes on."""

    def in_a_group() -> None:
        os.setpgid(0, 0)
        run_chain(tmp_path, cache, workers, 60.0)

    process = in_a_process(in_a_group)
    end = time.monotonic() + 60
    while not list(tmp_path.rglob("e1*.ckpt")) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)  # some steps more
    (os.killpg if group else os.kill)(process.pid, number)
    process.join(30)
    assert process.exitcode == -number
    process = in_a_process(run_chain, tmp_path, cache, workers, 60.0)
    process.join(240)
    assert process.exitcode == 0
    assert_equal(remains(tmp_path), whole)


@pytest.fixture(scope="module")
def two_epochs(cache, tmp_path_factory):
    """A folder in which e1 was trained for two epochs, of eight steps each; read-only."""
    folder = tmp_path_factory.mktemp("two-epochs")
    stage(folder, cache)
    return folder


def test_an_interrupt_saves_and_running_again_goes_on(two_epochs, cache, tmp_path, capsys):
    """The stop button of a notebook: KeyboardInterrupt after the step, handlers as before, then on in one line."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(KeyboardInterrupt, match="run this cell again"):
        stage(tmp_path, cache, At(11, interrupt))
    assert position(tmp_path)["batches"] in (3, 4)
    assert handlers == [signal.getsignal(number) for number in SIGNALS]
    capsys.readouterr()
    stage(tmp_path, cache)
    assert capsys.readouterr().out.count("e1 resumes from epoch 1, batch") == 1
    assert same_weights(tmp_path, two_epochs)
    logs = [read_log(folder / "run", "e1").drop(columns="tokens_per_second") for folder in (tmp_path, two_epochs)]
    assert logs[0].equals(logs[1]) and logs[0]["train_loss_step"].notna().sum() == 16


def test_a_signal_in_validation_does_not_wait_for_its_end(cache, tmp_path):
    class InValidation(pl.Callback):
        on_validation_epoch_start = interrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, cache, InValidation())
    found = position(tmp_path)
    assert (found["epoch"], found["batches"]) == (0, 7), "before the epoch's last step"
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))


def test_a_finished_stage_trains_nothing_and_goes_on_for_more_epochs(two_epochs, cache, tmp_path, capsys):
    """One epoch and then a second are two epochs."""
    stage(tmp_path, cache, epochs=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")}
    assert stage(tmp_path, cache, epochs=1).global_step == 0
    told = capsys.readouterr().out
    assert "finished after 1 epoch: nothing to train" in told and "CHECKPOINT_DIR" in told
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")}
    stage(tmp_path, cache, epochs=2)
    assert same_weights(tmp_path, two_epochs)


def test_early_stopping_goes_on_and_ends_as_without_a_kill(cache, tmp_path, capsys):
    settings = {"learning_rate": 0.0, "epochs": 5, "early_stopping": 1}
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, cache, At(10, interrupt), **settings)
    for _ in range(2):
        stage(tmp_path, cache, **settings)
        assert position(tmp_path)["epoch"] == 2
    assert "finished after 2 epochs" in capsys.readouterr().out


def test_a_larger_patience_is_obeyed_after_a_stop(cache, tmp_path):
    """Without a better epoch after the first: patience 1 ends after two, 3 after four, 2 then trains no more."""
    for patience, epochs in ((1, 2), (3, 4), (2, 4)):
        stage(tmp_path, cache, learning_rate=0.0, epochs=9, early_stopping=patience)
        assert position(tmp_path)["epoch"] == epochs
    assert [it.lineage["recipe"]["early_stopping"] for it in read_checkpoints(tmp_path / "checkpoints")] == [1, 1, 3, 3]


def test_a_checkpoint_says_what_held_for_which_epochs(cache, tmp_path):
    """Precision and the number of epochs were changed after the first."""
    stage(tmp_path, cache, epochs=1, precision="bf16-mixed")
    stage(tmp_path, cache, epochs=2, precision="32-true")
    first, second = (it.lineage for it in read_checkpoints(tmp_path / "checkpoints"))
    assert first["recipe"]["precision"] == "bf16-mixed" and "went_on_with" not in first
    assert second["recipe"]["precision"] == "32-true" and second["recipe"]["max_epochs"] == 2
    (later,) = second["went_on_with"]
    assert (later["epoch"], later["batches"]) == (1, 0)
    assert later["recipe"] == {"precision": ["bf16-mixed", "32-true"], "max_epochs": [1, 2]}


def test_other_code_is_refused_until_it_is_accepted(begun, cache, tmp_path, monkeypatch, capsys):
    """As after label smoothing in race_module.py; a finished stage says so; what went on says both."""
    shutil.copytree(begun, tmp_path / "begun")
    before, folder = CODE, tmp_path / "begun"
    for module in ("state", "training"):
        monkeypatch.setattr(f"race.train.{module}.CODE", "changed")
    for accepted in (None, before):
        with pytest.raises(RaceError, match='e1 was begun with other code .*commit .*; or set ACCEPT_CODE = "changed"'):
            stage(folder, cache, accept_code=accepted)
    stage(folder, cache, accept_code="changed")
    lineage = e1(folder).best().lineage
    assert (lineage["code"], lineage["went_on_with"][0]["code"]) == (before, "changed")
    stage(folder, cache)
    assert "with other code" not in capsys.readouterr().out
    monkeypatch.undo()
    stage(folder, cache)
    assert "is finished after 2 epochs, with other code than this (commit" in capsys.readouterr().out
    for path in (folder / "checkpoints").glob("*.ckpt"):
        path.unlink()
    with pytest.raises(RaceError, match="e1 is finished, but its checkpoints are gone"):
        stage(folder, cache)


@pytest.fixture(scope="module")
def begun(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(KeyboardInterrupt):
        stage(folder, cache, At(3, interrupt))
    return folder


@pytest.mark.parametrize(
    ("changed", "settings"),
    [
        ("LEARNING_RATE was 0.001, is 0.01", {"learning_rate": 1e-2}),
        (
            "MAX_GRAD_NORM was None, is 1.0; SCHEDULE was 'constant', is 'linear'; WARMUP",
            {"schedule": "linear", "warmup": 1, "max_grad_norm": 1.0},
        ),
        ("MONITOR was 'val_loss_epoch', is 'val_acc'", {"monitor": "val_acc"}),
        ("BATCH_SIZE was 8, is 16", {"data": {"batch_size": 16}}),
        ("SEED was 0, is 1", {"data": {"seed": 1}}),
        ("MAX_LEN was 512, is 64", {"data": {"max_len": 64}}),
        ("LIMIT_QUESTIONS was 64, is 32", {"data": {"limit_questions": 32}}),
        ("LEVEL was None, is 'middle'", {"data": {"level": "middle"}}),
    ],
)
def test_a_changed_parameter_is_named(begun, cache, changed, settings):
    with pytest.raises(RaceError, match=f"{changed}.*move its files and those of later stages to another folder"):
        stage(begun, cache, **settings)
    assert position(begun)["batches"] > 0


def test_the_table_of_parameters_says_what_is_refused(begun):
    refused = {name for name, word in CHANGED.items() if word == "refused"}
    assert position(begun)["identity"].keys() & CHANGED.keys() == refused


def test_the_steps_of_a_schedule_are_part_of_a_run(cache, tmp_path):
    """The rate of a step depends on all of it; a longer constant stage goes on as ever."""
    stage(tmp_path, cache, epochs=1, schedule="linear", warmup=2)
    with pytest.raises(RaceError, match="MAX_EPOCHS.* was 8, is 16"):
        stage(tmp_path, cache, epochs=2, schedule="linear", warmup=2)


def test_another_cache_or_base_is_named(begun, two_epochs, corpus, cache, tmp_path):
    """e2 was begun from one checkpoint of e1; it does not go on from another."""
    build_cache(str(corpus), "demo", tmp_path / "other", max_qa_len=9)
    with pytest.raises(RaceError, match=r"the cache was .*'max_qa_len': 128.* is .*'max_qa_len': 9"):
        stage(begun, tmp_path / "other")

    def begin(base, *callbacks):
        e2 = Stage("e2", tmp_path / "checkpoints", tmp_path / "run")
        module = start_stage(e2, cache, base_checkpoint=base.path, learning_rate=1e-3)
        train_stage(e2, module, RaceDataModule(cache, batch_size=8, limit_questions=64), 1, callbacks=callbacks)

    best, other = e1(two_epochs).saved
    with pytest.raises(KeyboardInterrupt):
        begin(best, At(3, interrupt))
    with pytest.raises(RaceError, match="e2 was begun with other settings: the base was 'e1-"):
        begin(other)


def test_tensorboard_shows_each_step_once(cache, tmp_path):
    def late(trainer, module):  # some steps after the last save
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        stage(tmp_path, cache, At(14, late), minutes=60.0)
    stage(tmp_path, cache)
    events = EventAccumulator(str(next((tmp_path / "run" / "logs" / "e1").iterdir()))).Reload()
    steps = [event.step for event in events.Scalars("train_loss_step")]
    assert steps == sorted(set(steps)) and len(steps) == 16


def test_one_file_of_an_epoch_stays(cache, tmp_path):
    """Ended again with another loss, as on a GPU, it replaces its own file; a file of another run is left alone."""
    stage(tmp_path, cache, epochs=1)
    content = read_archive(e1(tmp_path).best().path)
    names = [f"e1-albert-race-epoch=01-val_loss_epoch=0.0{i}.ckpt" for i in (1, 2)]
    for name, start in zip(names, (content["race"]["weights_start"], "of another run"), strict=True):
        save_archive(
            content | {"race": content["race"] | {"epoch": 1, "weights_start": start}}, tmp_path / "checkpoints" / name
        )
    stage(tmp_path, cache, epochs=2)
    left = sorted(path.name for path in (tmp_path / "checkpoints").glob("*epoch=01*"))
    assert names[0] not in left and names[1] in left and len(left) == 2


def test_two_runs_of_one_stage_do_not_mix(begun, cache, tmp_path):
    def hold() -> None:
        with locked(begun / "checkpoints" / "resume" / "e1.lock"):
            (tmp_path / "held").touch()
            time.sleep(60)

    process = in_a_process(hold)
    end = time.monotonic() + 30
    while not (tmp_path / "held").exists() and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(RaceError, match="another process trains e1.*e1.lock"):
        stage(begun, cache)
    process.kill()


@pytest.mark.parametrize("minutes", [0.0, 60.0])
def test_saving_interval(cache, tmp_path, monkeypatch, minutes):
    """With 0 minutes every step is saved, with many only each epoch's start, last step and end."""
    saves = []
    monkeypatch.setattr(KeepState, "save", lambda keeper, *_: saves.append(keeper.position))
    stage(tmp_path, cache, minutes=minutes)
    assert len(saves) == 17 if minutes == 0 else saves == [(0, 0), (0, 7), (1, 0), (1, 7), (2, 0)]
