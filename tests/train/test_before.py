"""Files of version 0, made by the code of commit 1cf8842, still work: a cache, a checkpoint, and a state in mid-epoch.

tests/before: a tiny ALBERT with dropout on the demo's stories, e1 stopped in its second epoch. expected.json: the log
and the checkpoints of the same stage uninterrupted, and the first checkpoint's probabilities, by that same code.
"""

import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
from helpers import ROOT

from race.data import RaceDataModule
from race.data.cache import verify_cache
from race.score.predict import predict
from race.score.statistics import PROBABILITIES
from race.train.logs import read_log
from race.train.stages import Stage
from race.train.training import start_stage, train_stage


@pytest.fixture
def before(tmp_path):
    """A copy of the old files, and what the old code made of them."""
    shutil.copytree(ROOT / "tests" / "before", tmp_path / "before")
    return tmp_path / "before", json.loads((tmp_path / "before" / "expected.json").read_text())


def test_an_old_state_resumes_in_an_old_cache(before, capsys):
    folder, expected = before
    assert verify_cache(folder / "cache") == []
    pl.seed_everything(0, verbose=False)
    stage = Stage("e1", folder / "checkpoints", folder / "runs")
    module = start_stage(stage, folder / "cache", learning_rate=1e-3)
    data = RaceDataModule(folder / "cache", batch_size=8, max_len=160)
    train_stage(stage, module, data, 2, log_every=2)
    assert "e1 resumes from epoch 1, batch 3 of 6" in capsys.readouterr().out
    theirs = pd.read_csv(io.StringIO(expected["log"]))
    ours = read_log(folder / "runs", "e1")[theirs.columns]
    np.testing.assert_allclose(ours.to_numpy(float), theirs.to_numpy(float), atol=1e-5)
    assert [path.name for path in stage.files()] == expected["checkpoints"]


def test_an_old_checkpoint_is_scored_as_before(before):
    folder, expected = before
    checkpoint = Stage("e1", folder / "checkpoints").best()
    assert (checkpoint.stage, checkpoint.epoch, checkpoint.learning_rate) == ("e1", 0, 1e-3)
    predictions = predict(checkpoint, folder / "cache", max_len=160, device="cpu")
    np.testing.assert_allclose(predictions[PROBABILITIES], expected["probabilities"], atol=2e-6)
