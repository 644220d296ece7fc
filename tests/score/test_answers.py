"""Questions without answers: every one gets a choice, and nobody gets an accuracy."""

import json

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
from helpers import RECORD

import generate_race_cache
from race.score.answers import answers, main
from race.score.predict import answer_question
from race.score.statistics import PROBABILITIES
from race.train.checkpoints import Checkpoint
from race_module import RaceModule

ARTICLES = ["Tom has a dog. The dog is old.", "Ada found a kite in the park, and NA is a name."]
ROWS = [
    (ARTICLES[0], "What has Tom?", "a cat", "a dog", "a cow", "NA"),
    (ARTICLES[1], "Ada found a ____ .", "kite", "dog, old", "None", 'hat "new"'),
    (ARTICLES[0], "How old is it?", "old", "new", "one", "two"),
]
COLUMNS = ["article", "question", "A", "B", "C", "D"]


@pytest.fixture(scope="module")
def checkpoint(cache, tmp_path_factory) -> Checkpoint:
    path = tmp_path_factory.mktemp("checkpoint") / "mine.ckpt"
    trainer = pl.Trainer(max_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(RaceModule(model=cache / "model"))
    trainer.save_checkpoint(path, weights_only=True)
    return Checkpoint(path)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.csv"
    pd.DataFrame(ROWS, columns=COLUMNS).to_csv(path, index=False)
    return path


def test_a_table_of_choices(questions, checkpoint, cache, tmp_path, capsys):
    """The probabilities are those of the same questions typed one by one."""
    assert main([str(checkpoint), str(questions), str(tmp_path / "out"), "--cache", str(cache)]) == 0
    name = f"questions-mine-{checkpoint.sha256[:8]}"
    assert f"3 questions answered: {tmp_path / 'out' / name}.csv and {name}.parquet" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / f"{name}.csv", keep_default_na=False)
    assert list(table) == ["split", "id", "question_index", "question", "choice", "option", *PROBABILITIES]
    assert sorted(table["question"]) == sorted(row[1] for row in ROWS)
    for row in table.itertuples():
        article, question, *options = next(given for given in ROWS if given[1] == row.question)
        typed = answer_question(checkpoint, cache, article, question, options)["probability"].to_numpy()
        found = np.array([getattr(row, name) for name in PROBABILITIES])
        np.testing.assert_allclose(found, typed, atol=2e-6)
        assert row.choice == "ABCD"[found.argmax()] and row.option == options[found.argmax()]
    assert len(pd.read_parquet(tmp_path / "out" / f"{name}.parquet")) == 3
    assert table["id"].is_unique or table.groupby("id")["question_index"].nunique().sum() == 3


@pytest.mark.parametrize("missing", [{"answers": None}, {"answers": ["", None]}, {}])
def test_races_own_layout_without_answers(missing, checkpoint, cache, tmp_path):
    record = {name: value for name, value in (RECORD | missing).items() if value is not None and name in RECORD}
    record = record if missing else {name: value for name, value in RECORD.items() if name != "answers"}
    (tmp_path / "one.json").write_text(json.dumps(record))
    table = answers(checkpoint, str(tmp_path / "one.json"), cache)
    assert table["question"].tolist() == RECORD["questions"] and set(table["choice"]) <= set("ABCD")


def test_training_and_scoring_refuse_them_by_place(questions, tmp_path, capsys):
    questions.rename(tmp_path / "train.csv")
    arguments = ["--source", str(tmp_path / "train.csv"), "--model", "demo", "--out", str(tmp_path / "cache")]
    assert generate_race_cache.main(arguments) == 1
    assert "train.csv" in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_bad_questions_are_named_and_nothing_is_written(checkpoint, cache, tmp_path, capsys):
    path = tmp_path / "questions.csv"
    pd.DataFrame([(*ROWS[0][:5], "")], columns=COLUMNS).to_csv(path, index=False)
    assert main([str(checkpoint), str(path), str(tmp_path / "out"), "--cache", str(cache)]) == 1
    assert "row 2: question, option D: empty" in capsys.readouterr().err and not (tmp_path / "out").exists()
