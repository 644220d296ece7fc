"""Files of earlier versions still work: a cache, a checkpoint, a state in mid-epoch, and predictions.

tests/before: made by the code of commit 1cf8842 (version 0), a tiny ALBERT. tests/before_1_5: by that of fd20cb7
(version 1.5.0), a tiny ALBERT (the demo's tokenizer), BERT (cosine schedule, warm-up, clipping) and DeBERTa-v2, their
tokenizers as of tests/tiny_models.py. All have dropout, and `write_corpus(train=12, dev=4, test=4)` as source. e1 was
trained on one thread with the settings below, and interrupted before step 9, in its second epoch. expected.json: the
log and the checkpoints of the same stage uninterrupted, and the first checkpoint's probabilities on test, by that same
code.
"""

import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
from helpers import ROOT
from predictions import PROBABILITIES

from race.data import RaceDataModule
from race.data.cache import verify_cache
from race.score.predictions import score
from race.train.stages import Stage, read_log
from race.train.training import start_stage, train_stage

SETS = ["before", "before_1_5/albert", "before_1_5/bert", "before_1_5/deberta-v2"]
RECIPES = {"before_1_5/bert": {"schedule": "cosine", "warmup": 0.25, "max_grad_norm": 0.5}}


@pytest.fixture(params=SETS)
def before(request, tmp_path):
    """A copy of the old files, what the old code made of them, and settings of RaceModule."""
    shutil.copytree(ROOT / "tests" / request.param, tmp_path / "before")
    expected = json.loads((tmp_path / "before" / "expected.json").read_text())
    return tmp_path / "before", expected, {"learning_rate": 1e-3} | RECIPES.get(request.param, {})


def test_an_old_state_resumes_in_an_old_cache(before, capsys):
    folder, expected, recipe = before
    assert verify_cache(folder / "cache") == []
    pl.seed_everything(0, verbose=False)
    stage = Stage("e1", folder / "checkpoints", folder / "runs")
    module = start_stage(stage, folder / "cache", **recipe)
    data = RaceDataModule(folder / "cache", batch_size=8, max_len=160)
    train_stage(stage, module, data, 2, log_every=2)
    assert "e1 resumes from epoch 1, batch 3 of 6" in capsys.readouterr().out
    theirs = pd.read_csv(io.StringIO(expected["log"]))
    ours = read_log(folder / "runs", "e1")[theirs.columns]
    np.testing.assert_allclose(ours.to_numpy(float), theirs.to_numpy(float), atol=1e-5)
    assert sorted(checkpoint.name for checkpoint in stage.saved) == expected["checkpoints"]


def test_an_old_checkpoint_is_scored_as_before(before):
    """Saved predictions of the old code are read again, or made again to the same numbers; its results are kept."""
    folder, expected, recipe = before
    checkpoint = Stage("e1", folder / "checkpoints").best()
    assert (checkpoint.stage, checkpoint.epoch, checkpoint.learning_rate) == ("e1", 0, recipe["learning_rate"])
    data = RaceDataModule(folder / "cache", batch_size=8, max_len=160)
    old = [pd.read_csv(path) for path in (folder / "runs").glob("results.csv")]  # version 0 has none
    for run_dir in (folder / "runs", folder / "new"):
        found = score(checkpoint, data, "test", run_dir, accelerator="cpu")
        np.testing.assert_allclose(found.table[PROBABILITIES], expected["probabilities"], atol=2e-6)
        assert found.saved == (run_dir.name == "runs" and len(old) == 1)
        for results in old:
            new = pd.read_csv(run_dir / "results.csv")
            pd.testing.assert_frame_equal(new[results.columns[:9]], results[results.columns[:9]])
