"""A signal is obeyed within a step, at the next micro-batch; what goes on later is as if nothing had happened."""

import os
import signal

import pytest
import torch
from small_stage import position, stage, state

from race_module import RaceModule

SETTINGS = {"epochs": 1, "precision": "64-true", "data": {"limit_questions": 32}, "token_budget": 1}


def test_an_interrupt_ends_a_step_between_its_micro_batches(cache, tmp_path, monkeypatch, capsys):
    """Four steps of eight micro-batches; the signal comes in the third micro-batch of the third step."""
    stage(tmp_path / "whole", cache, **SETTINGS)
    calls, modules, loss = [], [], RaceModule.loss

    def interrupted(module, batch):
        calls.append(len(batch) if module.training else 0)
        modules[:] = [module]
        if sum(calls) == 2 * 8 + 3:
            os.kill(os.getpid(), signal.SIGINT)
        torch.rand(3 if sum(calls) > 2 * 8 else 0)  # what the step draws is drawn again
        return loss(module, batch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RaceModule, "loss", interrupted)
        stage(tmp_path / "stopped", cache, **SETTINGS)
    assert sum(calls) == 2 * 8 + 3  # no further micro-batch
    assert modules[0].stop is None  # it ends nothing else that is done with this module
    found = position(tmp_path / "stopped")
    assert (found["epoch"], found["batches"], found["steps"]) == (0, 2, 2)
    assert "stopped by SIGINT at epoch 0, batch 2" in capsys.readouterr().out
    stage(tmp_path / "stopped", cache, **SETTINGS)
    whole, stopped = state(tmp_path / "whole"), state(tmp_path / "stopped")
    assert all(torch.equal(stopped["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items())
    assert torch.equal(stopped["resume"]["random"][0]["torch"], whole["resume"]["random"][0]["torch"])


def test_a_smaller_budget_is_kept_when_a_stage_resumes(cache, tmp_path, monkeypatch):
    """Memory was full in step 2, and the run is interrupted later: the same micro-batches, and so the same bits."""
    settings = SETTINGS | {"token_budget": None, "data": {"limit_questions": 48}}
    loss, calls = RaceModule.loss, []

    def small(interrupt: bool):
        calls.clear()

        def full(module, batch):
            calls.append(module.training)
            if sum(calls) == 2 and module.training and len(batch) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if interrupt and sum(calls) == 9:
                os.kill(os.getpid(), signal.SIGINT)
            return loss(module, batch)

        return full

    with monkeypatch.context() as patched:
        patched.setattr(RaceModule, "loss", small(interrupt=False))
        stage(tmp_path / "whole", cache, **settings)
        patched.setattr(RaceModule, "loss", small(interrupt=True))
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path / "stopped", cache, **settings)
    stage(tmp_path / "stopped", cache, **settings)
    whole, stopped = (state(tmp_path / name)["state_dict"] for name in ("whole", "stopped"))
    assert all(torch.equal(stopped[name], tensor) for name, tensor in whole.items())
