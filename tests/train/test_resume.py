"""Whatever ends a run, the next one ends with the same bytes as if nothing had happened."""

import io
import math
import os
import random
import shutil
import signal
import time

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from kill import MINUTES, SCHEDULED, die, in_a_process, killed_chain, remains, run_chain
from small_stage import At, e1, position, stage, state

from race import RaceError
from race.data import RaceDataModule
from race.files import locked, read_archive, save_archive
from race.train.logs import read_log
from race.train.stages import Stage
from race.train.state import KeepState, random_state, set_random_state
from race.train.training import start_stage, train_stage


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """What the small chain leaves when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    process = in_a_process(run_chain, folder, cache)
    process.join(240)
    assert process.exitcode == 0
    return remains(folder)


@pytest.fixture(scope="module")
def scheduled(cache, tmp_path_factory):
    """The same with warm-up, cosine, clipping, and the highest accuracy as the rule of selection."""
    folder = tmp_path_factory.mktemp("scheduled")
    process = in_a_process(run_chain, folder, cache, 0, MINUTES, SCHEDULED)
    process.join(240)
    assert process.exitcode == 0
    return remains(folder)


def assert_equal(found: dict, expected: dict) -> None:
    for name, parts in expected.items():
        if isinstance(parts, list):
            assert found[name] == parts
            continue
        assert found[name].keys() == parts.keys()
        different = [part for part, value in parts.items() if found[name][part] != value]
        assert not different, (name, different)


def test_killed_chains_of_a_schedule_end_the_same(scheduled, cache, tmp_path):
    """The rate of each step follows from its number: a resume needs no scheduler, and gives the same bytes."""
    rng, hit, chains = random.Random(20), 0, 0
    while hit < 5:
        chains += 1
        hit += killed_chain(tmp_path / str(chains), cache, 5 - hit, rng, 0, SCHEDULED)
        assert_equal(remains(tmp_path / str(chains)), scheduled)
    log = pd.read_csv(io.StringIO(scheduled["e1"]["log"]))
    rates = log["learning_rate"].dropna()
    assert rates.iloc[0] < rates.max() and rates.iloc[-1] < 0.1 * rates.max() and log["gradient_norm"].max() > 0.5


@pytest.mark.parametrize(("workers", "kills"), [(0, 5), (2, 4)])
def test_killed_chains_end_the_same(whole, cache, tmp_path, workers, kills):
    """SIGKILL at random moments, in saving and in validation: same weights, optimizer, log rows, checkpoint files."""
    rng, hit, chains = random.Random(workers), 0, 0
    while hit < kills:
        chains += 1
        hit += killed_chain(tmp_path / str(chains), cache, kills - hit, rng, workers)
        assert_equal(remains(tmp_path / str(chains)), whole)


@pytest.mark.kill
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_hundred_kills(whole, cache, tmp_path, workers):
    rng, hit, chains = random.Random(10 + workers), 0, 0
    while hit < 60:
        chains += 1
        hit += killed_chain(tmp_path / str(chains), cache, 25, rng, workers)
        assert_equal(remains(tmp_path / str(chains)), whole)
    print(f"{hit} kills over {chains} chains with {workers} loader workers")


@pytest.mark.parametrize(
    ("number", "workers", "group"),
    [(signal.SIGTERM, 0, False), (signal.SIGUSR1, 0, False), (signal.SIGTERM, 2, True), (signal.SIGUSR1, 2, True)],
)
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


def test_an_interrupt_saves_and_running_again_goes_on(cache, tmp_path, capsys):
    """The stop button of a notebook: KeyboardInterrupt after the step, handlers as before, then on in one line."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    stage(tmp_path / "whole", cache)
    with pytest.raises(KeyboardInterrupt, match="run this cell again"):
        stage(tmp_path / "cut", cache, At(11, lambda *_: os.kill(os.getpid(), signal.SIGINT)))
    assert position(tmp_path / "cut")["batches"] in (3, 4)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    capsys.readouterr()
    stage(tmp_path / "cut", cache)
    assert capsys.readouterr().out.count("e1 resumes from epoch 1, batch") == 1
    one, other = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert all(torch.equal(tensor, other["state_dict"][name]) for name, tensor in one["state_dict"].items())
    logs = [read_log(tmp_path / name / "run", "e1").drop(columns="tokens_per_second") for name in ("whole", "cut")]
    assert logs[0].equals(logs[1]) and logs[0]["train_loss_step"].notna().sum() == 16


def test_a_signal_in_validation_does_not_wait_for_its_end(cache, tmp_path):
    class InValidation(pl.Callback):
        def on_validation_epoch_start(self, trainer, module):
            if not trainer.sanity_checking:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, cache, InValidation())
    found = position(tmp_path)
    assert (found["epoch"], found["batches"]) == (0, 7), "before the epoch's last step"
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))


def test_a_finished_stage_trains_nothing(cache, tmp_path, capsys):
    stage(tmp_path, cache)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")}
    trainer = stage(tmp_path, cache)
    assert "e1 is finished after 2 epochs: nothing to train" in capsys.readouterr().out
    assert trainer.global_step == 0 and before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")}


def test_more_epochs_go_on_from_the_end(cache, tmp_path):
    """Two epochs and then a third are three epochs."""
    stage(tmp_path / "three", cache, epochs=3)
    for epochs in (2, 3):
        stage(tmp_path / "more", cache, epochs=epochs)
    one, other = state(tmp_path / "three"), state(tmp_path / "more")
    assert all(torch.equal(tensor, other["state_dict"][name]) for name, tensor in one["state_dict"].items())
    logs = [read_log(tmp_path / name / "run", "e1").drop(columns="tokens_per_second") for name in ("three", "more")]
    assert logs[0].equals(logs[1])


def test_early_stopping_goes_on_and_ends_as_without_a_kill(cache, tmp_path, capsys):
    for folder in ("whole", "cut"):
        cut = [At(10, lambda *_: os.kill(os.getpid(), signal.SIGINT))] if folder == "cut" else []
        settings = {"learning_rate": 0.0, "epochs": 5, "early_stopping": 1}
        if cut:
            with pytest.raises(KeyboardInterrupt):
                stage(tmp_path / folder, cache, *cut, **settings)
        stage(tmp_path / folder, cache, **settings)
        assert position(tmp_path / folder)["epoch"] == 2
    stage(tmp_path / "cut", cache, **settings)
    assert "finished after 2 epochs" in capsys.readouterr().out


CHANGES = {
    "LEARNING_RATE was 0.001, is 0.01": {"learning_rate": 1e-2},
    "BATCH_SIZE was 8, is 16": {"data": {"batch_size": 16}},
    "SEED was 0, is 1": {"data": {"seed": 1}},
    "MAX_LEN was 512, is 64": {"data": {"max_len": 64}},
    "LIMIT_QUESTIONS was 64, is 32": {"data": {"limit_questions": 32}},
}


@pytest.fixture(scope="module")
def begun(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(KeyboardInterrupt):
        stage(folder, cache, At(3, lambda *_: os.kill(os.getpid(), signal.SIGINT)))
    return folder


@pytest.mark.parametrize("message", CHANGES)
def test_a_changed_parameter_is_named(begun, cache, message):
    with pytest.raises(RaceError, match=message):
        stage(begun, cache, **CHANGES[message])
    assert position(begun)["batches"] > 0


def test_another_cache_is_named(begun, corpus, tmp_path):
    from race.data.cache import build_cache

    build_cache(str(corpus), "demo", tmp_path / "other", max_qa_len=9)
    with pytest.raises(RaceError, match=r"the cache was .*'max_qa_len': 128.* is .*'max_qa_len': 9"):
        stage(begun, tmp_path / "other")


def test_another_base_is_named(cache, tmp_path):
    """e2 was begun from one checkpoint of e1; it does not go on from another."""
    stage(tmp_path, cache)

    def begin(*callbacks):
        e2 = Stage("e2", tmp_path / "checkpoints", tmp_path / "run")
        module = start_stage(e2, cache, learning_rate=1e-3)
        train_stage(e2, module, RaceDataModule(cache, batch_size=8, limit_questions=64), 1, callbacks=callbacks)

    with pytest.raises(KeyboardInterrupt):
        begin(At(3, lambda *_: os.kill(os.getpid(), signal.SIGINT)))
    e1(tmp_path).best().path.unlink()
    with pytest.raises(RaceError, match="e2 was begun with other settings: the base was 'e1-"):
        begin()


def test_fresh_starts_again(begun, cache, tmp_path, capsys):
    shutil.copytree(begun, tmp_path / "copy")
    stage(tmp_path / "copy", cache, epochs=1, fresh=True)
    assert "of an earlier run, from e1 on, are now in" in capsys.readouterr().out
    assert position(tmp_path / "copy")["epoch"] == 1
    assert list((tmp_path / "copy" / "checkpoints" / "earlier").glob("e1-*/e1-state.ckpt"))


def test_a_level_is_part_of_the_run(cache, tmp_path):
    """Trained on the middle questions only; another level is another run, and the checkpoint says which it was."""
    trainer = stage(tmp_path, cache, epochs=1, data={"level": "middle"})
    assert set(trainer.datamodule.train_dataset.columns()["level"]) == {"middle"}
    assert e1(tmp_path).best().lineage["recipe"]["level"] == "middle"
    with pytest.raises(RaceError, match="LEVEL was 'middle', is None"):
        stage(tmp_path, cache, epochs=1)


def test_fresh_counts_once(cache, tmp_path, capsys):
    """Left standing after an interrupt, it does not begin anew; with other settings, or another number, it does."""

    def stop(trainer, module):
        raise KeyboardInterrupt

    def interrupted(**settings):
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            stage(tmp_path, cache, At(5, stop), epochs=1, minutes=0, **settings)

    stage(tmp_path, cache, epochs=1)
    interrupted(fresh=True)
    capsys.readouterr()
    trainer = stage(tmp_path, cache, epochs=1, fresh=True)
    out = capsys.readouterr().out
    assert "FRESH counts once: e1 was begun with it and goes on" in out and "e1 resumes from epoch 0, batch" in out
    assert trainer.global_step == 8 and len(list((tmp_path / "checkpoints" / "earlier").iterdir())) == 1
    stage(tmp_path, cache, epochs=1, fresh=True)
    assert "nothing to train (FRESH = 2 trains it again)" in capsys.readouterr().out
    stage(tmp_path, cache, epochs=1, fresh=2)
    assert "of an earlier run, from e1 on" in capsys.readouterr().out
    stage(tmp_path, cache, epochs=1, fresh=2, learning_rate=1e-4)
    assert "of an earlier run, from e1 on" in capsys.readouterr().out and position(tmp_path)["fresh"] == 2


def test_a_fresh_run_after_going_on_sees_every_question(cache, tmp_path):
    """In one kernel, with the same data module: the place where the begun stage went on is forgotten."""
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, cache, At(3, lambda *_: os.kill(os.getpid(), signal.SIGINT)))
    data = RaceDataModule(cache, batch_size=8, limit_questions=64)
    for fresh in (False, True):
        pl.seed_everything(0, verbose=False)
        module = start_stage(e1(tmp_path), cache, learning_rate=1e-3)
        trainer = train_stage(e1(tmp_path), module, data, 1, fresh=fresh)
        assert trainer.global_step == 8
    assert len(list((tmp_path / "checkpoints" / "earlier").glob("*/e1-state.ckpt"))) == 1


def test_tensorboard_shows_each_step_once(cache, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def late(trainer, module):  # some steps after the last save
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        stage(tmp_path, cache, At(14, late), minutes=60.0)
    stage(tmp_path, cache)
    events = EventAccumulator(str(next((tmp_path / "run" / "logs" / "e1").iterdir()))).Reload()
    steps = [event.step for event in events.Scalars("train_loss_step")]
    assert steps == sorted(set(steps)) and len(steps) == 16


def test_one_file_an_epoch_stays(cache, tmp_path):
    """An epoch that is ended again with another loss, as a GPU may give it, leaves one checkpoint to choose from."""
    stage(tmp_path, cache, epochs=1)
    stray = tmp_path / "checkpoints" / "e1-albert-race-epoch=01-val_loss_epoch=0.01.ckpt"
    content = read_archive(next((tmp_path / "checkpoints").glob("e1-*epoch=00*")))
    save_archive(content | {"race": content["race"] | {"epoch": 1}}, stray)
    stage(tmp_path, cache, epochs=2)
    assert len(list((tmp_path / "checkpoints").glob("e1-*.ckpt"))) == 2 and not stray.exists()
    assert len(list((tmp_path / "checkpoints" / "earlier").rglob(stray.name))) == 1


def test_two_runs_of_one_stage_do_not_mix(begun, cache, tmp_path):
    def hold() -> None:
        with locked(begun / "checkpoints" / "resume" / "e1.lock"):
            (tmp_path / "held").touch()
            time.sleep(60)

    process = in_a_process(hold)
    end = time.monotonic() + 30
    while not (tmp_path / "held").exists() and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(RaceError, match="another process trains e1"):
        stage(begun, cache)
    process.kill()


def test_a_killed_save_leaves_the_state_before(cache, tmp_path, monkeypatch):
    """The state is replaced in one step; what the killed process left is cleared away by the next one."""
    import race.files

    def killed() -> None:
        saves, flush = [0], race.files.flush

        def count(path):
            saves[0] += str(path).endswith(".tmp")
            if saves[0] == 3:  # the third file is whole and not yet renamed
                die()
            flush(path)

        race.files.flush = count
        stage(tmp_path, cache, minutes=0.0)

    process = in_a_process(killed)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert position(tmp_path)["batches"] == 1
    assert len(list((tmp_path / "checkpoints" / "resume").glob(".*.tmp"))) == 1
    stage(tmp_path, cache)
    assert not list(tmp_path.rglob(".*.tmp"))


def test_random_states_come_back():
    before = random_state()
    drawn = [random.random(), np.random.rand(), torch.rand(3).tolist()]
    buffer = io.BytesIO()
    torch.save(before, buffer)
    buffer.seek(0)
    set_random_state(torch.load(buffer, weights_only=True))
    assert drawn == [random.random(), np.random.rand(), torch.rand(3).tolist()]


def test_saving_interval(cache, tmp_path, monkeypatch):
    """With 0 minutes every step is saved, with many only each epoch's start, last step and end."""
    counts = []
    for minutes in (0.0, 60.0):
        saves = []
        monkeypatch.setattr(KeepState, "save", lambda keeper, *_, saves=saves: saves.append(keeper.position))
        stage(tmp_path / str(minutes), cache, minutes=minutes)
        counts.append(saves)
    assert len(counts[0]) == 17 and counts[1] == [(0, 0), (0, 7), (1, 0), (1, 7), (2, 0)]


# -------------------------------------------------------------------------------------------------- losses that tell


def test_nan_stops_with_the_last_good_state_kept(cache, tmp_path):
    def poison(trainer, module):
        with torch.no_grad():
            next(module.parameters()).fill_(math.nan)

    with pytest.raises(RaceError, match="NaN or infinite by step 6.*LEARNING_RATE"):
        stage(tmp_path, cache, At(5, poison), minutes=0.0)
    kept = state(tmp_path)
    assert kept["resume"]["batches"] == 5
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())
    stage(tmp_path, cache)


def test_weights_that_are_no_numbers_are_never_saved(cache, tmp_path):
    """The loss of a step may be fine and its gradient not: the state looks at the weights themselves."""

    def poison(trainer, module):
        with torch.no_grad():
            next(module.parameters()).fill_(math.inf)
        next(c for c in trainer.callbacks if isinstance(c, KeepState)).save(trainer, module)

    with pytest.raises(RaceError, match="NaN or infinite"):
        stage(tmp_path, cache, At(4, poison))
    assert all(tensor.isfinite().all() for tensor in state(tmp_path)["state_dict"].values())


def test_nan_in_validation_leaves_no_checkpoint_behind(cache, tmp_path):
    class Poison(pl.Callback):
        def on_validation_epoch_start(self, trainer, module):
            if not trainer.sanity_checking:
                with torch.no_grad():
                    next(module.parameters()).fill_(math.nan)

    with pytest.raises(RaceError, match="NaN or infinite"):
        stage(tmp_path, cache, Poison())
    assert not list((tmp_path / "checkpoints").glob("e1-*.ckpt"))


def test_a_loss_that_stays_at_chance_is_told_once(cache, tmp_path, capsys, monkeypatch):
    def still(trainer, module):
        for parameter in module.model.classifier.parameters():
            torch.nn.init.zeros_(parameter)

    class Still(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            still(trainer, module)

    monkeypatch.setattr("race.train.callbacks.STUCK", 40)
    trainer = stage(tmp_path, cache, Still(), learning_rate=0.0)
    assert capsys.readouterr().out.count("chance is ln 4 = 1.386") == 1
    assert trainer.global_step == 16


def test_a_loss_that_is_not_chance_is_not_told(cache, tmp_path, capsys, monkeypatch):
    def sure(trainer, module):
        with torch.no_grad():
            module.model.classifier.weight.mul_(50)

    monkeypatch.setattr("race.train.callbacks.STUCK", 40)
    stage(tmp_path, cache, At(0, sure), learning_rate=0.0)
    assert "the model has learned nothing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "max_epochs is 0"),
        ({"minutes": -1.0}, "save_minutes is -1"),
        ({"early_stopping": 0}, "early_stopping is 0"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"data": {"seed": -1}}, "seed is -1"),
    ],
)
def test_absurd_parameters(cache, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        stage(tmp_path, cache, **settings)
    assert not list(tmp_path.rglob("*.ckpt"))
