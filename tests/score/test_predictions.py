"""Predictions, what is kept of them, and the results that follow; typed questions, and questions without answers."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from helpers import RECORD, padded
from predictions import PROBABILITIES, made

from race import RaceError
from race.data import RaceDataModule, build_cache, collate
from race.files import file_hash
from race.score import predictions as scoring
from race.score.predictions import (
    RESULT_COLUMNS,
    Predictions,
    accuracy_table,
    answer_question,
    predict,
    prediction_settings,
    save_answers,
    save_results,
    score,
    score_each,
    validation_predictions,
    write_json,
)
from race.score.statistics import SEEN_COLUMNS
from race.train.checkpoints import Checkpoint
from race_module import RaceModule


@pytest.fixture(scope="module")
def checkpoint(cache, tmp_path_factory) -> Checkpoint:
    """A saved checkpoint of the demo's untrained model."""
    path, module = tmp_path_factory.mktemp("checkpoint") / "mine.ckpt", RaceModule(model=cache / "model")
    trainer = pl.Trainer(max_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module.trainer = trainer
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    return Checkpoint(path)


@pytest.fixture
def data(cache) -> RaceDataModule:
    return RaceDataModule(cache)


@pytest.fixture(scope="module")
def predicted(cache, checkpoint) -> pd.DataFrame:
    """Its predictions on the whole test split."""
    return predict(checkpoint, RaceDataModule(cache), accelerator="cpu")


def changed(checkpoint: Checkpoint, path: Path, factor: float = 2.0) -> Checkpoint:
    """The same checkpoint with other weights, elsewhere."""
    path.parent.mkdir(exist_ok=True)
    content = torch.load(checkpoint.path, weights_only=True)
    content["state_dict"]["model.classifier.bias"] += 1
    content["state_dict"]["model.classifier.weight"] *= factor
    torch.save(content, path)
    return Checkpoint(path)


def test_accuracy_by_level():
    table = accuracy_table(made("ABCDAB", "ABCAAC", levels=["middle"] * 4 + ["high"] * 2), "e1", "b.ckpt", "test")
    of_passages = ["passages", "design_effect", "passage_low", "passage_high"]
    assert list(table.columns) == [*RESULT_COLUMNS, "options", *of_passages, *SEEN_COLUMNS, "not_known"]
    assert table["level"].tolist() == ["all", "middle", "high"]
    assert table[["questions", "correct"]].to_numpy().tolist() == [[6, 4], [4, 3], [2, 1]]
    assert table[["stage", "checkpoint", "split"]].drop_duplicates().to_numpy().tolist() == [["e1", "b.ckpt", "test"]]
    wrong = accuracy_table(made("AB", "BA", levels=["", ""]), "e1", "x", "test")
    assert wrong[["level", "accuracy", "ci_low"]].to_numpy().tolist() == [["all", 0.0, 0.0]]


def kept(name: str, chosen: str, sha256: str, split: str = "test", folder: str = "c", level=None) -> Predictions:
    """Predictions on two questions, one of each level."""
    sizes = {"batch_size": 32, "max_len": 512, "limit_questions": None, "seed": None}
    settings = {"checkpoint_sha256": sha256, "split": split, "level": level} | sizes
    versions = {"torch": "2", "transformers": "5"}
    how = {"checkpoint": name, "folder": folder, "stage": "e1", "seconds": 1.5, "made": "now", "versions": versions}
    return Predictions(made("AB", chosen, levels=["middle", "high"]), how | {"settings": settings})


def rows(folder: Path) -> list[list]:
    table = pd.read_csv(folder / "results.csv")
    return table[["checkpoint", "split", "level", "correct"]].to_numpy().tolist()


def test_results_replace_the_same_and_keep_the_others(tmp_path):
    """The same: by hash, or a file that has been written again; rows without predictions stay to the letter."""
    old = "stage,checkpoint,split,level,questions,correct,accuracy,ci_low,ci_high,mine\n"
    old += "e0,old.ckpt,test,all,3,1,0.333333333333333333333,0.1,0.90,x y\n"
    (tmp_path / "results.csv").write_text(old)
    save_results(tmp_path, [kept("a.ckpt", "AA", "1"), kept("b.ckpt", "AB", "2")])
    save_results(tmp_path, [kept("a.ckpt", "AA", "1", "validation"), kept("a.ckpt", "AA", "3", folder="other")])
    save_results(tmp_path, [kept("renamed.ckpt", "BB", "2")])
    save_results(tmp_path, [kept("a.ckpt", "BA", "4")])
    saved = (tmp_path / "results.csv").read_text()
    assert "e0,old.ckpt,test,all,3,1,0.333333333333333333333,0.1,0.90," in saved and saved.splitlines()[1][-3:] == "x y"
    found = [(name, split, correct) for name, split, level, correct in rows(tmp_path) if level == "all"]
    of_a = [("a.ckpt", "test", 0), ("a.ckpt", "test", 1), ("a.ckpt", "validation", 1)]
    assert found == [("old.ckpt", "test", 1), *of_a, ("renamed.ckpt", "test", 1)]
    save_results(tmp_path, [kept("a.ckpt", "AB", "4", level="middle")])
    of_4 = pd.read_csv(tmp_path / "results.csv").query("checkpoint_sha256 == 4").set_index("level")["correct"]
    assert of_4.to_dict() == {"middle": 1, "all": 0, "high": 0}


def save_five(folder: Path, name: str) -> None:
    for number in range(5):
        save_results(folder, [kept(f"{name}{number}", "AB", f"{name}{number}")])


def test_results_of_processes_at_the_same_time_are_all_there(tmp_path):
    processes = [multiprocessing.get_context("fork").Process(target=save_five, args=(tmp_path, name)) for name in "ab"]
    for step in ("start", "join"):
        for process in processes:
            getattr(process, step)()
    assert sum(row[2] == "all" for row in rows(tmp_path)) == 10


def test_json_holds_tables_and_no_nan(tmp_path):
    table = pd.DataFrame({"n": [1, pd.NA], "share": [0.5, float("nan")]}).astype({"n": "Int64"})
    write_json(tmp_path / "x.json", {"table": table, "count": np.int64(3), "nested": [np.float64(0.5), np.nan]})
    table = [{"n": 1, "share": 0.5}, {"n": None, "share": None}]
    expected = {"table": table, "count": 3, "nested": [0.5, None]}
    assert json.loads((tmp_path / "x.json").read_text()) == expected


def test_predictions_are_in_cache_order_and_equal_hugging_face(data, checkpoint, predicted):
    """Probabilities of the packed, length-sorted run equal the padded model's, question by question."""
    dataset, module = data.dataset("test"), RaceModule.load_from_checkpoint(checkpoint.path).eval()
    assert len(predicted) == len(dataset)
    for i in (0, 1, len(dataset) // 2, len(dataset) - 1):
        text, row = dataset.text(i), predicted.iloc[i]
        names = ["example_id", "question_index", "level"]
        assert [*row[names], row["answer"]] == [*(text[name] for name in names), "ABCD"[text["label"]]]
        with torch.no_grad():
            expected = module.model(**padded(collate([dataset[i]]))).logits.softmax(1)[0].numpy()
        np.testing.assert_allclose(row[PROBABILITIES].to_numpy(float), expected, atol=1e-5)
        assert row["prediction"] == "ABCD"[expected.argmax()]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_differs_by_little(cache, checkpoint, precision):
    data = RaceDataModule(cache, limit_questions=8)
    full, half = (predict(checkpoint, data, precision=it, accelerator="cpu") for it in (None, precision))
    difference = np.abs(full[PROBABILITIES].to_numpy() - half[PROBABILITIES].to_numpy())
    assert 0 < difference.max() < 0.02


def test_what_cannot_be_scored_is_refused(data, cache, checkpoint, monkeypatch, tmp_path):
    with pytest.raises(RaceError, match="PRECISION is '64-true'"):
        prediction_settings(data, "test", precision="64-true")
    with pytest.raises(RaceError, match="has no dev split"):
        prediction_settings(data, "dev")
    torch.save({"race": {"tokenizer": "other"}}, tmp_path / "other.ckpt")
    with pytest.raises(RaceError, match="another tokenizer"):
        predict(Checkpoint(tmp_path / "other.ckpt"), data, accelerator="cpu")
    bad = changed(checkpoint, tmp_path / "bad.ckpt", float("nan"))
    with pytest.raises(RaceError, match="not finite on 5 of 5 questions"):
        score(bad, RaceDataModule(cache, limit_questions=5), "test", tmp_path, accelerator="cpu")
    assert not (tmp_path / "predictions").exists() and not (tmp_path / "results.csv").exists()
    monkeypatch.setattr("race.device.gpu_problem", lambda: "the driver is too old")
    with pytest.raises(RaceError, match="the driver is too old"):
        predict(checkpoint, data)


@pytest.fixture
def calls(monkeypatch) -> list:
    """A list that grows with every split that is predicted."""
    found = []
    monkeypatch.setattr(scoring, "predict", lambda *args, **how: found.append(args[2]) or predict(*args, **how))
    return found


def test_predictions_are_made_once_and_kept(cache, checkpoint, calls, tmp_path, capsys):
    data = RaceDataModule(cache, limit_questions=12)
    first = score(checkpoint, data, "validation", tmp_path, accelerator="cpu")
    (path,), results = (tmp_path / "predictions").glob("*.parquet"), (tmp_path / "results.csv").read_bytes()
    whole, name = path.read_bytes(), f"mine-{checkpoint.sha256[:8]}-validation.parquet"
    assert path.name == name and first.name == "mine-validation" and not list(tmp_path.rglob("*.tmp"))
    pd.testing.assert_frame_equal(pd.read_parquet(path), first.table)
    again = score(checkpoint, data, "validation", tmp_path, accelerator="cpu")
    assert calls == ["validation"] and again.table.equals(first.table) and "are used" in capsys.readouterr().out
    assert (path.read_bytes(), (tmp_path / "results.csv").read_bytes()) == (whole, results)
    flat = pd.read_csv(tmp_path / "results.csv")
    assert list(flat)[:9] == RESULT_COLUMNS and flat["level"].tolist() == ["all", "middle", "high"]
    assert flat["macro_accuracy"][0] == pytest.approx(flat["accuracy"][1:].mean())
    assert (flat["device"][0], flat["precision"][0], flat["limit_questions"][0]) == ("CPU", "32-true", 12)
    path.write_bytes(whole[: len(whole) // 2])  # as a full disk leaves it
    score(checkpoint, data, "validation", tmp_path, accelerator="cpu")
    assert len(calls) == 2 and path.read_bytes() == whole
    for count, text in enumerate(["{", "[]", "{}"], 3):
        path.with_suffix(".json").write_text(text)
        score(checkpoint, data, "validation", tmp_path, accelerator="cpu")
        assert len(calls) == count and f"{name}: not used" in capsys.readouterr().out


def test_other_code_makes_them_again(cache, checkpoint, calls, tmp_path, capsys, monkeypatch):
    """Those of earlier versions, which noted none, are used."""
    data = RaceDataModule(cache, limit_questions=12)
    made = score(checkpoint, data, "validation", tmp_path, accelerator="cpu").made
    monkeypatch.setattr("race.score.predictions.CODE", "changed")
    score(checkpoint, data, "validation", tmp_path, accelerator="cpu")
    assert len(calls) == 2 and "differ in code" in capsys.readouterr().out
    path = next((tmp_path / "predictions").glob("*.json"))
    del made["settings"]["code"]
    write_json(path, made | {"sha256": file_hash(path.with_suffix(".parquet"))})
    score(checkpoint, data, "validation", tmp_path, accelerator="cpu")
    assert len(calls) == 2


@pytest.mark.parametrize("other", [{"limit_questions": 13}, {"seed": 1}, {"max_len": 40}, {"batch_size": 8}])
def test_other_settings_make_them_again(cache, checkpoint, calls, tmp_path, capsys, other):
    for given in ({}, other):
        data = RaceDataModule(cache, **({"limit_questions": 12} | given))
        score(checkpoint, data, "validation", tmp_path, accelerator="cpu")
    assert len(calls) == 2 and f"differ in {next(iter(other))}" in capsys.readouterr().out


def test_a_limit_beyond_the_split_is_no_limit(cache, data):
    limited = RaceDataModule(cache, limit_questions=10**6, seed=5)
    assert prediction_settings(limited, "test") == prediction_settings(data, "test")


def test_checkpoints_are_told_apart_by_their_content(cache, checkpoint, calls, tmp_path):
    """Two of one name have predictions of their own; one that is named twice is refused."""
    two = [changed(checkpoint, tmp_path / "lower" / "mine.ckpt"), checkpoint]
    data = RaceDataModule(cache, limit_questions=4)
    found = score_each(two, data, "test", tmp_path, accelerator="cpu")
    assert list(found) == ["lower/mine", f"{checkpoint.path.parent.name}/mine"] and len(calls) == 2
    assert [it.made["settings"]["checkpoint_sha256"] for it in found.values()] == [it.sha256 for it in two]
    assert sum(row[2] == "all" for row in rows(tmp_path)) == 2
    with pytest.raises(RaceError, match="the same checkpoint; name it once: .*mine.ckpt"):
        score_each([checkpoint, checkpoint], data, "test", tmp_path)


def test_one_level_alone(cache, checkpoint, predicted, tmp_path):
    """The middle questions: the same predictions as among all, one row of results, and the other rows stay."""
    save_results(tmp_path, [kept("other.ckpt", "AB", "1")])
    middle = score(checkpoint, RaceDataModule(cache, level="middle"), "test", tmp_path, accelerator="cpu")
    expected = predicted[predicted["level"] == "middle"]
    assert middle.name == "mine-test-middle" and middle.table["example_id"].tolist() == expected["example_id"].tolist()
    np.testing.assert_allclose(middle.table[PROBABILITIES], expected[PROBABILITIES], atol=1e-6)
    assert middle.results[["level", "questions"]].to_numpy().tolist() == [["middle", len(expected)]]
    assert [row[2] for row in rows(tmp_path)].count("middle") == 2 and len(rows(tmp_path)) == 4


def test_temperature_needs_a_validation_split_of_its_own(cache, checkpoint, tmp_path, capsys):
    data = RaceDataModule(cache, limit_questions=8)
    assert validation_predictions(checkpoint, data, "validation", tmp_path) is None
    assert "validation itself" in capsys.readouterr().out
    found = validation_predictions(checkpoint, data, "test", tmp_path, accelerator="cpu")
    assert len(found.table) == 8 and not (tmp_path / "results.csv").exists()


def test_a_level_that_a_split_lacks(checkpoint, tmp_path, capsys):
    """No temperature is fitted on it, and the others are scored."""
    for split, level in {"train": "high", "validation": "middle", "test": "high"}.items():
        (tmp_path / "source" / split / level).mkdir(parents=True)
        (tmp_path / "source" / split / level / "1.txt").write_text(json.dumps(RECORD | {"article": split}))
    build_cache(str(tmp_path / "source"), "demo", tmp_path / "cache")
    data = RaceDataModule(tmp_path / "cache", level="high")
    assert score(checkpoint, data, "test", tmp_path, accelerator="cpu").results["questions"].tolist() == [2]
    assert validation_predictions(checkpoint, data, "test", tmp_path, accelerator="cpu") is None
    assert "no temperature is fitted on the validation split: " in capsys.readouterr().out
    with pytest.raises(RaceError, match="no such questions in validation"):
        data.dataset("validation")


def test_a_typed_question_gets_the_probabilities_of_the_cached_one(data, checkpoint, predicted):
    text = data.dataset("test").text(2)
    typed = answer_question(checkpoint, data, text["article"], text["question"], text["options"], "cpu")
    np.testing.assert_allclose(typed["probability"], predicted.loc[2, PROBABILITIES].to_numpy(float), atol=1e-6)
    assert typed["letter"].tolist() == list("ABCD") and typed["option"].tolist() == text["options"]


def test_questions_without_answers_get_a_choice_each(checkpoint, data, tmp_path):
    """The probabilities are those of the same questions typed one by one."""
    (tmp_path / "asked.json").write_text(json.dumps(RECORD | {"answers": ["", None]}))
    table = save_answers(checkpoint, str(tmp_path / "asked.json"), data, tmp_path / "out", accelerator="cpu")
    columns = ["split", "id", "question_index", "place", "question", "choice", "option", *PROBABILITIES]
    assert list(table) == columns
    for row, question, options in zip(table.itertuples(), RECORD["questions"], RECORD["options"], strict=True):
        typed = answer_question(checkpoint, data, RECORD["article"], question, options, "cpu")["probability"]
        found = np.array([getattr(row, name) for name in PROBABILITIES])
        np.testing.assert_allclose(found, typed, atol=2e-6)
        assert (row.question, row.choice, row.option) == (question, "ABCD"[found.argmax()], options[found.argmax()])
    (path,) = (tmp_path / "out").glob(f"asked-mine-{checkpoint.sha256[:8]}-*.csv")
    assert pd.read_csv(path)["choice"].tolist() == pd.read_parquet(path.with_suffix(".parquet"))["choice"].tolist()


def test_every_row_comes_back_in_its_order_with_its_place(checkpoint, data, tmp_path):
    """Repeated rows, rows interleaved by article, files of one name, and of any split."""
    rows = ["Tom has a dog.,Who?", "Ann has hens.,What?", "Tom has a dog.,What?", "Ann has hens.,What?"]
    text = "article,question,A,B,C,D\n" + "".join(f"{row},cat,dog,hen,cow\n" for row in rows)
    for name in ("b/1.json", "a/1.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(RECORD | {"article": f"{name}: Tom has a dog.", "id": "1"}))
    for name in ("train.csv", "a/test.csv", "b/test.csv"):
        (tmp_path / name).write_text(text)
    table = save_answers(checkpoint, str(tmp_path), data, tmp_path / "out", accelerator="cpu")
    of_record, of_rows = ["1.json, question 0", "1.json, question 1"], [f"test.csv, row {row}" for row in range(2, 6)]
    expected = [f"{folder}/{place}" for folder in "ab" for place in (*of_record, *of_rows)]
    assert list(table["place"]) == expected + [f"train.csv, row {row}" for row in range(2, 6)]
    assert list(table["question"][-4:]) == ["Who?", "What?", "What?", "What?"]
    assert not table.duplicated(["id", "question_index", "place"]).any() and list(table["id"][:2]) == ["1", "1"]
    pd.testing.assert_frame_equal(table[PROBABILITIES][2:6], table[PROBABILITIES][8:12].set_index(table.index[2:6]))
    assert list(table.loc[3, PROBABILITIES]) == list(table.loc[5, PROBABILITIES]) != list(table.loc[4, PROBABILITIES])
    for folder in "ab":
        save_answers(checkpoint, str(tmp_path / folder / "test.csv"), data, tmp_path / "one", accelerator="cpu")
    assert len([*(tmp_path / "one").glob("test-*.csv")]) == 2
