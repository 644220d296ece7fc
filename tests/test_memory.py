"""Micro-batches: their size, and a GPU that runs out of memory, simulated: the step begins anew with smaller parts."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from helpers import ROOT
from small_stage import At, stage, state
from transformers import AlbertConfig, BertConfig, DebertaV2Config

from race import RaceError
from race.data import collate
from race.encoder import most_padding
from race.memory import CPU_TOKENS, fit_memory, in_parts, token_budget_for
from race_module import RaceModule

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def fill_memory(monkeypatch, call: int) -> None:
    """The call of RaceModule.loss in training with this number, counted from 1, finds the memory full."""
    calls, loss = [], RaceModule.loss

    def full(module, *given):
        calls.append(module)
        if len(calls) == call:
            torch.rand(7)  # what the step drew before it failed must not count
            raise FULL
        return loss(module, *given)

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
    call = [call for call, (_, questions) in enumerate(counted.parts, 1) if questions > 1][which]
    with monkeypatch.context() as patched:
        fill_memory(patched, call)
        stage(tmp_path / "full", cache, Dropout(), **settings)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "memory was full" in line]
    smaller = int(line.rpartition(" ")[2].replace(",", ""))
    assert 100 < smaller < 1500
    now = At(counted.parts[call - 1][0], lambda trainer, module: setattr(module, "token_budget", smaller))
    stage(tmp_path / "smaller", cache, Dropout(), now, **settings)
    full, expected = (state(tmp_path / name)["state_dict"] for name in ("full", "smaller"))
    assert all(torch.equal(full[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("processes", "training", "call"), [(1, True, 0), (2, True, 2), (2, False, 2), (2, True, 0)])
def test_what_does_not_fit_is_halved_or_refused(items, processes, training, call):
    """Refused: one question, and the last part of several processes that train, which exchange gradients in it."""
    module = SimpleNamespace(token_budget=700, padded=False, processes=processes)
    batch, calls, undone = collate(items(20)), [], []

    def run(part, is_last: bool) -> int:
        calls.append(is_last)
        if len(calls) - 1 == call:
            raise FULL
        return len(part)

    assert len(list(batch.micro_batches(700))) == 3
    if processes == 2 and training and call == 2:
        with pytest.raises(RaceError, match="exchange their gradients"):
            in_parts(module, batch, run, lambda: undone.append(True))
        module.token_budget, call = 1, len(calls)
        with pytest.raises(RaceError, match="one question of .* does not fit. Set a smaller MAX_LEN"):
            in_parts(module, batch, run)
        return
    counts = in_parts(module, batch, run, (lambda: undone.append(True)) if training else None)
    assert sum(counts) == 20 and len(counts) > 3 and module.token_budget <= 350
    assert undone == [True] * training and calls[call + 1 :] == [False] * (len(counts) - 1) + [True]


@pytest.mark.parametrize(("given", "found"), [({}, "roundup_power2"), ({"PYTORCH_ALLOC_CONF": "x:1"}, "x:1")])
def test_reserved_memory_is_kept_small_unless_the_user_says_otherwise(given, found):
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | given
    code = "import race, os; print(os.environ['PYTORCH_ALLOC_CONF'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(found)


def test_token_budget_grows_with_memory(albert_config):
    base = AlbertConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    full, half = (
        [token_budget_for(base, 12_000_000, gigabytes << 30, half) for gigabytes in (1, 8, 16, 24, 40, 80)]
        for half in (False, True)
    )
    for budgets in (full, half):
        assert budgets == sorted(budgets) and budgets[0] == 4 * 512 and budgets[-1] > 32 * 4 * 512
    assert half[3] > 1.6 * full[3]
    assert token_budget_for(base, 12_000_000, 24 << 30, True, padding=2) < 0.85 * half[3]  # of queries, keys, values
    bert = BertConfig()
    assert most_padding(bert, torch.device("cuda"), torch.bfloat16) == 2  # attention dropout: no kernel takes it
    assert most_padding(base, torch.device("cuda"), torch.float32) == 2
    assert most_padding(DebertaV2Config(), torch.device("cuda"), torch.bfloat16) == 1  # padded already
    fit_memory(module := RaceModule(config=albert_config), torch.device("cpu"))
    assert module.token_budget == CPU_TOKENS


def test_token_budget_counts_the_bytes_that_a_step_takes():
    """Peak resident memory of steps of 2,048 and of 6,144 tokens, against the formula, in fresh processes."""
    code = (
        "import os, re, numpy as np, torch\n"
        "from transformers import AlbertConfig\n"
        "from race.data import collate\n"
        "from race_module import RaceModule\n"
        "half = os.fork() == 0\n"  # one import for both
        "sizes = {'hidden_size': 128, 'intermediate_size': 512, 'num_hidden_layers': 8, 'num_attention_heads': 2}\n"
        "module = RaceModule(config=AlbertConfig(vocab_size=1000, **sizes))\n"
        "module.manual_backward = torch.Tensor.backward\n"
        "question = {'input_ids': [np.full(256, 7)] * 4, 'token_type_ids': [np.zeros(256, int)] * 4, 'label': 0}\n"
        "for questions in (2, 6):\n"
        "    with torch.autocast('cpu', torch.bfloat16, half):\n"
        "        module.model_step(collate([question] * questions), 'train')\n"
        "    status = open('/proc/self/status').read()\n"  # getrusage would count what the parent had at the fork
        "    print(half, 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]), flush=True)\n"
        "half or os.wait()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    config = AlbertConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=8)
    for half in (False, True):
        small, large = map(int, re.findall(rf"{half} (\d+)", run.stdout))
        first, second = (token_budget_for(config, 0, memory << 30, half) for memory in (16, 32))
        assert 0.9 <= 0.9 * (16 << 30) / (second - first) / ((large - small) / 4096) <= 1.35
