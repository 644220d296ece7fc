"""A GPU that runs out of memory, simulated: the step begins anew with smaller parts, and nothing else changes."""

import os
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch
from helpers import ROOT
from small_stage import At, stage, state

from race import RaceError
from race_module import RaceModule

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Full:
    """In place of RaceModule.loss: the call with this number, counted from 1, finds the memory full."""

    def __init__(self, monkeypatch, call: int):
        self.calls, loss = 0, RaceModule.loss

        def full(module, batch):
            self.calls += module.training
            if self.calls == call and module.training:
                torch.rand(7)  # what the step drew before it failed must not count
                raise FULL
            return loss(module, batch)

        monkeypatch.setattr(RaceModule, "loss", full)


class Dropout(pl.Callback):
    """Random numbers in every micro-batch; and the parts of each step with a budget of 1,500 tokens."""

    def __init__(self):
        self.parts = []

    def on_fit_start(self, trainer, module):
        module.model.dropout.p = 0.3

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.parts += [(trainer.global_step, len(part)) for part in batch.micro_batches(1500)]


@pytest.mark.parametrize("which", [0, 3, -1])
def test_the_step_is_taken_again_exactly(which, cache, tmp_path, monkeypatch, capsys):
    """As if the smaller budget had been set before that step: the same weights, byte for byte, in float64."""
    settings = {"epochs": 1, "precision": "64-true", "data": {"limit_questions": 48}, "token_budget": 1500}
    stage(tmp_path / "whole", cache, counted := Dropout(), **settings)
    several = [call for call, (_, questions) in enumerate(counted.parts, 1) if questions > 1]
    call = several[which]
    with monkeypatch.context() as patched:
        Full(patched, call)
        stage(tmp_path / "full", cache, Dropout(), **settings)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "memory was full" in line]
    smaller = int(line.rpartition(" ")[2].replace(",", ""))
    assert 100 < smaller < 1500 and "the step is taken again with TOKEN_BUDGET" in line
    now = At(counted.parts[call - 1][0], lambda trainer, module: setattr(module, "token_budget", smaller))
    stage(tmp_path / "smaller", cache, Dropout(), now, **settings)
    full, expected = (state(tmp_path / name)["state_dict"] for name in ("full", "smaller"))
    assert all(torch.equal(full[name], expected[name]) for name in expected)


def test_other_parts_change_the_rounding_only(cache, tmp_path, monkeypatch):
    settings = {"epochs": 1, "precision": "64-true", "data": {"limit_questions": 32}, "token_budget": 3000}
    stage(tmp_path / "whole", cache, **settings)
    Full(monkeypatch, 2)
    stage(tmp_path / "full", cache, **settings)
    whole, full = (state(tmp_path / name)["state_dict"] for name in ("whole", "full"))
    assert all(torch.allclose(full[name], whole[name], rtol=0, atol=1e-9) for name in whole)


def test_a_question_that_does_not_fit_is_an_error_that_says_what_to_set(cache, tmp_path, monkeypatch):
    def full(module, batch):
        raise FULL

    monkeypatch.setattr(RaceModule, "loss", full)
    with pytest.raises(
        RaceError, match=r"one question of \d+ tokens does not fit. Set a smaller MAX_LEN, or BATCH_SIZE"
    ):
        stage(tmp_path, cache, epochs=1)


@pytest.mark.parametrize(
    ("given", "found"), [({}, "roundup_power2_divisions:4"), ({"PYTORCH_ALLOC_CONF": "x:1"}, "x:1")]
)
def test_reserved_memory_is_kept_small_unless_the_user_says_otherwise(given, found):
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | given
    code = "import race, os; print(os.environ['PYTORCH_ALLOC_CONF'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == found
