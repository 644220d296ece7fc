"""Fixtures: a small demo cache, tiny models, hand-made questions, and real RACE text where it is at hand."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it

import numpy as np
import pytest
from helpers import ALBERT, NOTEBOOKS, TEST_DATA
from transformers import AlbertConfig, BertConfig

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "initializer_range": 0.2} | NO_DROPOUT


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first process of this test run to come here fills; read-only for all tests (copy it)."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder = shared / name
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / f"{name}.done").exists():
            folder.mkdir()
            make(folder)
            (shared / f"{name}.done").touch()
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A small demo corpus in the layout of RACE.tar.gz."""
    from race.demo.corpus import write_corpus

    return made_once(tmp_path_factory, "corpus", lambda folder: write_corpus(folder, train=60, dev=16, test=20))


@pytest.fixture(scope="session")
def cache(corpus, tmp_path_factory) -> Path:
    """The token cache of the small corpus, with the demo's model in it."""
    from race.data.cache import build_cache

    return made_once(tmp_path_factory, "cache", lambda out: build_cache(str(corpus), "demo", out / "small")) / "small"


@pytest.fixture(scope="session")
def chain(cache, tmp_path_factory) -> Path:
    """The whole chain, run through its notebooks as a user runs them: checkpoints/ and run/ in a folder to be copied.

    Learning rates at which something happens in a few steps, on 48 questions of each split of `cache`.
    """
    return made_once(tmp_path_factory, "chain", lambda folder: _run_notebooks(cache, folder))


def _run_notebooks(cache: Path, folder: Path) -> None:
    from race.chain import run_notebook

    places = {"CHECKPOINT_DIR": str(folder / "checkpoints"), "RUN_DIR": str(folder / "run")}
    asked = "article,question,A,B,C,D\nTom has a dog.,Tom has a ____ .,cat,dog,hen,cow\n"
    (folder / "asked.csv").write_text(asked)
    for notebook, rate in zip(NOTEBOOKS, (1e-2, 1e-2, 1e-3, None, None), strict=True):
        training = {"LEARNING_RATE": str(rate), "MAX_EPOCHS": 1} if rate else {}  # text, as YAML gives 1e-2
        more = {"QUESTIONS": str(folder / "asked.csv"), "EXPORT_DIR": str(folder / "export"), "GROUP_BY": ["kind"]}
        more = more if notebook == "eval_test_dataset_race" else {}
        run_notebook(notebook, {"CACHE_DIR": str(cache), "LIMIT_QUESTIONS": 48} | places | training | more)


@pytest.fixture(scope="session")
def real_cache(tmp_path_factory) -> Path:
    """Real RACE text in the real ALBERT vocabulary; skips where the test data is missing."""
    from race.data.cache import build_cache

    source = TEST_DATA / "race.tar.xz"
    if not source.exists():
        pytest.skip(f"real RACE text is not at hand ({source}); set RACE_TEST_DATA")
    return made_once(tmp_path_factory, "real", lambda out: build_cache(str(source), str(ALBERT), out / "race")) / "race"


@pytest.fixture
def albert_config() -> AlbertConfig:
    """Two groups of two inner layers, applied four times: every way in which ALBERT shares weights."""
    layers = {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2}
    return AlbertConfig(vocab_size=100, embedding_size=16, classifier_dropout_prob=0.0, **layers, **TINY)


@pytest.fixture
def bert_config() -> BertConfig:
    return BertConfig(vocab_size=100, num_hidden_layers=3, **TINY)


@pytest.fixture
def items():
    """make(n, seed): n questions of random tokens and unequal lengths, as RaceDataset gives them."""

    def make(count: int, seed: int = 0, vocabulary: int = 100, longest: int = 40, options: int = 4) -> list[dict]:
        rng = np.random.default_rng(seed)
        made = []
        for _ in range(count):
            lengths = rng.integers(5, longest, options)
            made.append(
                {
                    "input_ids": [rng.integers(5, vocabulary, length) for length in lengths],
                    "token_type_ids": [np.repeat([0, 1], [length - 3, 3]) for length in lengths],
                    "label": int(rng.integers(options)),
                    "example_id": "made.txt",
                }
            )
        return made

    return make
