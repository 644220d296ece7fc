"""Accuracy, intervals, confusion and results files, on predictions with known answers."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import padded

from race_data import RaceDataset, collate
from race_evaluation import (
    PROBABILITIES,
    RESULT_COLUMNS,
    accuracy_table,
    chosen_checkpoints,
    comparison,
    confusion,
    predict,
    reported_accuracy,
    save_results,
    score,
)
from race_module import RaceModule
from race_training import StageError


def made(answers: str, predictions: str, levels: list[str]) -> pd.DataFrame:
    columns = {"example_id": "x", "question_index": range(len(answers)), "level": levels}
    table = pd.DataFrame(columns | {"answer": list(answers), "prediction": list(predictions)})
    table[PROBABILITIES] = 0.25
    return table


@pytest.fixture(scope="module")
def checkpoint(cache, tmp_path_factory):
    """A saved checkpoint of the demo's untrained model."""
    import pytorch_lightning as pl

    path = tmp_path_factory.mktemp("checkpoint") / "e1-albert-race-epoch=00-val_loss_epoch=1.39.ckpt"
    module = RaceModule(model=cache / "model")
    trainer = pl.Trainer(max_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    return path


def test_accuracy_and_wilson_interval_by_hand():
    """7 of 10: the closed form of Wilson's interval at z = 1.959964."""
    table = accuracy_table(
        made("ABCDABCDAB", "ABCDABDAAC"[:10], ["middle"] * 4 + ["high"] * 6), "e1", "a/b.ckpt", "test"
    )
    assert list(table.columns) == RESULT_COLUMNS
    everything = table.set_index("level").loc["all"]
    right = sum(a == b for a, b in zip("ABCDABCDAB", "ABCDABDAAC", strict=True))
    assert (everything["questions"], everything["correct"], everything["accuracy"]) == (10, right, right / 10)
    z, n, p = 1.959963984540054, 10, right / 10
    centre, half = (p + z * z / (2 * n)), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert everything["ci_low"] == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-12)
    assert everything["ci_high"] == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-12)
    assert table.set_index("level")["questions"].to_dict() == {"all": 10, "middle": 4, "high": 6}
    assert table["checkpoint"].unique().tolist() == ["b.ckpt"]


def test_all_right_all_wrong_and_absent_levels():
    table = accuracy_table(made("AB", "AB", ["", ""]), "e1", "x", "test")
    assert table[["level", "accuracy", "ci_high"]].to_numpy().tolist() == [["all", 1.0, 1.0]]
    table = accuracy_table(made("AB", "BA", ["high", "high"]), "e1", "x", "test")
    assert table["accuracy"].tolist() == [0.0, 0.0] and table["ci_low"].tolist() == [0.0, 0.0]


def test_confusion_counts():
    table = confusion(made("AABD", "ABBC", ["high"] * 4))
    assert table.loc["A"].tolist() == [1, 1, 0, 0] and table.loc["D"].tolist() == [0, 0, 1, 0]
    assert table.shape == (4, 4) and table.to_numpy().sum() == 4


def test_results_replace_the_same_and_keep_the_others(tmp_path):
    first = accuracy_table(made("AB", "AA", ["", ""]), "e1", "one.ckpt", "test")
    save_results(first, tmp_path)
    save_results(accuracy_table(made("AB", "AA", ["", ""]), "e1", "one.ckpt", "validation"), tmp_path)
    save_results(accuracy_table(made("AB", "AB", ["", ""]), "e1", "one.ckpt", "test"), tmp_path)
    saved = pd.read_csv(tmp_path / "results.csv")
    assert list(saved.columns) == RESULT_COLUMNS
    assert saved[["split", "accuracy"]].to_numpy().tolist() == [["test", 1.0], ["validation", 0.5]]


def test_predictions_are_in_cache_order_and_equal_hugging_face(cache, checkpoint):
    """Probabilities of the packed, length-sorted run equal the padded model's, question by question."""
    predictions = predict(checkpoint, cache, "test", device="cpu")
    dataset = RaceDataset(cache, "test")
    assert len(predictions) == len(dataset)
    module = RaceModule.load_from_checkpoint(checkpoint).eval()
    for i in (0, 1, len(dataset) // 2, len(dataset) - 1):
        text = dataset.text(i)
        row = predictions.iloc[i]
        assert (row["example_id"], row["question_index"], row["level"]) == (
            text["example_id"],
            text["question_index"],
            text["level"],
        )
        assert row["answer"] == "ABCD"[text["label"]]
        with torch.no_grad():
            expected = module.model(**padded(collate([dataset[i]]))).logits.softmax(1)[0].numpy()
        np.testing.assert_allclose(row[PROBABILITIES].to_numpy(float), expected, atol=1e-5)
        assert row["prediction"] == "ABCD"[expected.argmax()]
    assert np.allclose(predictions[PROBABILITIES].sum(axis=1), 1)


def test_score_leaves_predictions_and_results(cache, checkpoint, tmp_path):
    predictions, table = score(checkpoint, cache, "validation", tmp_path, device="cpu")
    saved = pd.read_parquet(tmp_path / "predictions" / f"{checkpoint.stem}-validation.parquet")
    pd.testing.assert_frame_equal(saved, predictions)
    assert pd.read_csv(tmp_path / "results.csv")["correct"].tolist() == table["correct"].tolist()
    assert not list(tmp_path.rglob("*.tmp"))
    again, _ = score(checkpoint, cache, "validation", tmp_path, device="cpu")
    pd.testing.assert_frame_equal(again, predictions, check_exact=True)


def test_comparison_has_a_row_for_each_checkpoint(cache, checkpoint):
    tables = [accuracy_table(made("AB", "AB", ["middle", "high"]), "e1", checkpoint, "test")]
    row = comparison(tables, [checkpoint]).iloc[0]
    assert (row["stage"], row["accuracy"], row["middle"], row["high"]) == ("e1", 1.0, 1.0, 1.0)


def test_other_peoples_numbers_appear_on_their_split_only():
    def table(questions: int, split: str):
        return pd.DataFrame({"split": [split], "questions": [questions]})

    assert reported_accuracy([table(4934, "test")] * 2) == {"e1": 0.671, "e2": 0.680, "e3": 0.720}
    assert reported_accuracy([table(4934, "test"), table(500, "test")]) == {}
    assert reported_accuracy([table(4934, "train")]) == {}


def test_checkpoints_of_one_name_are_refused(tmp_path):
    with pytest.raises(StageError, match=r"two checkpoints are called x.ckpt"):
        chosen_checkpoints(["a/x.ckpt", "b/x.ckpt"], tmp_path)
    with pytest.raises(StageError, match="holds no checkpoints"):
        chosen_checkpoints(None, tmp_path)


def test_another_tokenizer_is_refused(cache, tmp_path):
    torch.save({"race": {"tokenizer": "other"}}, tmp_path / "x.ckpt")
    with pytest.raises(StageError, match="another tokenizer"):
        predict(tmp_path / "x.ckpt", cache)
