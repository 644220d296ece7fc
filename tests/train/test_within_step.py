"""A signal is obeyed within a step, at the next micro-batch; what goes on later is as if nothing had happened."""

import pytest
import torch
from small_stage import interrupt, position, same_weights, stage, state

from race_module import RaceModule

SETTINGS = {"epochs": 1, "precision": "64-true", "data": {"limit_questions": 32}, "token_budget": 1}


def at_call(monkeypatch, calls: list, **happens) -> None:
    """Do things at calls of RaceModule.loss in training: name=(number from 1, function); the calls are counted."""
    loss = RaceModule.loss

    def counted(module, *given):
        calls.append(module)
        for number, what in happens.values():
            if len(calls) == number:
                what(*given)
        torch.rand(3 if len(calls) > 2 * 8 else 0)  # what the step draws is drawn again
        return loss(module, *given)

    monkeypatch.setattr(RaceModule, "loss", counted)


def test_an_interrupt_ends_a_step_between_its_micro_batches(cache, tmp_path, monkeypatch, capsys):
    """Four steps of eight micro-batches; the signal comes in the third micro-batch of the third step."""
    stage(tmp_path / "whole", cache, **SETTINGS)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        at_call(patched, calls := [], signal=(2 * 8 + 3, interrupt))
        stage(tmp_path / "stopped", cache, **SETTINGS)
    assert len(calls) == 2 * 8 + 3  # no further micro-batch
    assert calls[0].stop is None  # it ends nothing else that is done with this module
    found = position(tmp_path / "stopped")
    assert (found["epoch"], found["batches"], found["steps"]) == (0, 2, 2)
    assert "stopped by SIGINT at epoch 0, batch 2" in capsys.readouterr().out
    stage(tmp_path / "stopped", cache, **SETTINGS)
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    whole, stopped = (state(tmp_path / name)["resume"]["random"][0]["torch"] for name in ("whole", "stopped"))
    assert torch.equal(whole, stopped)


def test_a_smaller_budget_is_kept_when_a_stage_resumes(cache, tmp_path, monkeypatch):
    """Memory was full in step 2, and the run is interrupted later: the same micro-batches, and so the same bits."""
    settings = SETTINGS | {"token_budget": None, "data": {"limit_questions": 48}}

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        at_call(patched, [], memory=(2, full))
        stage(tmp_path / "whole", cache, **settings)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        at_call(patched, [], memory=(2, full), signal=(9, interrupt))
        stage(tmp_path / "stopped", cache, **settings)
    stage(tmp_path / "stopped", cache, **settings)
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
