"""What watches a stage: losses that tell something, the first line, the estimate."""

import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from small_stage import At, stage, state

from race import RaceError
from race.data import RaceDataModule
from race.train.callbacks import StageReport
from race.train.stages import Stage
from race.train.state import KeepState
from race.train.training import start_stage


def poison(trainer, module) -> None:
    with torch.no_grad():
        next(module.parameters()).fill_(math.nan)


def test_nan_stops_with_the_last_good_state_kept(cache, tmp_path):
    with pytest.raises(RaceError, match="NaN or infinite by step 6.*LEARNING_RATE"):
        stage(tmp_path, cache, At(5, poison), minutes=0.0)
    kept = state(tmp_path)
    assert kept["resume"]["batches"] == 5
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())
    stage(tmp_path, cache, epochs=1)


def test_weights_that_are_no_numbers_are_never_saved(cache, tmp_path):
    """The loss of a step may be fine and its gradient not: the state looks at the weights themselves."""

    def save(trainer, module):
        poison(trainer, module)
        next(callback for callback in trainer.callbacks if isinstance(callback, KeepState)).save(trainer, module)

    with pytest.raises(RaceError, match="NaN or infinite"):
        stage(tmp_path, cache, At(4, save))
    assert all(tensor.isfinite().all() for tensor in state(tmp_path)["state_dict"].values())

    class InValidation(pl.Callback):
        def on_validation_epoch_start(self, trainer, module):
            poison(trainer, module)

    with pytest.raises(RaceError, match="NaN or infinite"):
        stage(tmp_path / "later", cache, InValidation())
    assert not list((tmp_path / "later" / "checkpoints").glob("e1-*.ckpt"))


@pytest.mark.parametrize(("factor", "warnings"), [(0.0, 1), (50.0, 0)])
def test_a_loss_that_stays_at_chance_is_said_once(cache, tmp_path, capsys, monkeypatch, factor, warnings):
    def scale(trainer, module):
        with torch.no_grad():
            module.model.classifier.weight.mul_(factor)

    monkeypatch.setattr("race.train.callbacks.STUCK", 40)
    stage(tmp_path, cache, At(0, scale), learning_rate=0.0)
    assert capsys.readouterr().out.count("chance is ln 4 = 1.386") == warnings


def test_the_estimate_is_given_once(cache, capsys):
    report = StageReport("CPU", after_seconds=0.0)
    off = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    module = start_stage(Stage("e1"), cache)
    pl.Trainer(max_epochs=2, callbacks=report, **off).fit(module, RaceDataModule(cache, 16, limit_questions=48))
    out = capsys.readouterr().out
    assert out.count("for 2 epochs of 3 steps") == 1 and out.count(": validation loss") == 2


def test_the_speed_is_that_between_logged_rows(cache, tmp_path, monkeypatch):
    """A GPU's host runs ahead and waits at a logged step: that step alone would read far too slow."""
    clock, log = [0.0], {}
    monkeypatch.setattr("race.train.callbacks.time.perf_counter", lambda: clock[0])
    report, trainer = StageReport("CPU"), SimpleNamespace(log_every_n_steps=4, global_step=0, max_epochs=1)
    report._batches, report._seconds, report._steps = 9, 0.0, 0
    module = SimpleNamespace(tokens=torch.tensor(100.0), log=lambda name, value, **_: log.update({name: float(value)}))
    report.on_train_epoch_start(trainer, module)
    for step in range(1, 9):
        trainer.global_step = step
        clock[0] += 5.0 if step % 4 == 0 else 1.0
        report.on_train_batch_end(trainer, module, None, None, step)
    assert log["tokens_per_second"] == 400 / 8 and (report._steps, report._seconds) == (7, 15.0)


def test_no_step_waits_for_its_loss(cache, tmp_path):
    """A metric with `prog_bar=True` is read from the GPU after each step: the bar reads the loss when it is drawn."""
    seen = []

    def look(trainer, module):
        seen.extend([dict(trainer.progress_bar_metrics), trainer.progress_bar_callback.get_metrics(trainer, module)])

    stage(tmp_path, cache, At(5, look), epochs=1)
    assert seen[0] == {} and float(seen[1].pop("loss")) > 0 and seen[1] == {}


def test_the_first_line_says_what_is_in_force(cache, tmp_path, capsys):
    stage(tmp_path, cache, epochs=1, data={"limit_questions": 16}, token_budget=2000, precision="bf16-mixed")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training on ")]
    for part in (f"CPU, {torch.get_num_threads()} threads, bf16-mixed, masked attention", "TOKEN_BUDGET 2,000"):
        assert part in line
