"""Predictions, what is kept of them, accuracy tables and results files; typed questions."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import padded
from predictions import made

from race import RaceError
from race.data import collate
from race.data.cache import build_cache
from race.data.module import RaceDataset
from race.files import atomic_write, file_hash
from race.score import predict as scoring
from race.score.predict import answer_question, predict, prediction_settings, score, score_each, validation_predictions
from race.score.results import (
    PASSAGE_COLUMNS,
    RESULT_COLUMNS,
    accuracy_table,
    predictions_path,
    read_results,
    save_results,
    write_json,
)
from race.score.statistics import PROBABILITIES, SEEN_COLUMNS
from race.train.checkpoints import Checkpoint
from race_module import RaceModule


@pytest.fixture(scope="module")
def checkpoint(cache, tmp_path_factory):
    """A saved checkpoint of the demo's untrained model."""
    import pytorch_lightning as pl

    path = tmp_path_factory.mktemp("checkpoint") / "e1-albert-race-epoch=00-val_loss_epoch=1.39.ckpt"
    module = RaceModule(model=cache / "model")
    trainer = pl.Trainer(max_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    return Checkpoint(path)


def test_accuracy_and_wilson_interval_by_hand():
    """7 of 10: the closed form of Wilson's interval at z = 1.959964."""
    table = accuracy_table(
        made("ABCDABCDAB", "ABCDABDAAC"[:10], levels=["middle"] * 4 + ["high"] * 6), "e1", "b.ckpt", "test"
    )
    assert list(table.columns) == [*RESULT_COLUMNS, *PASSAGE_COLUMNS, *SEEN_COLUMNS, "not_known"]
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
    table = accuracy_table(made("AB", "AB", levels=["", ""]), "e1", "x", "test")
    assert table[["level", "accuracy", "ci_high"]].to_numpy().tolist() == [["all", 1.0, 1.0]]
    table = accuracy_table(made("AB", "BA", levels=["high", "high"]), "e1", "x", "test")
    assert table["accuracy"].tolist() == [0.0, 0.0] and table["ci_low"].tolist() == [0.0, 0.0]


def test_results_replace_the_same_and_keep_the_others(tmp_path):
    first = accuracy_table(made("AB", "AA", levels=["", ""]), "e1", "one.ckpt", "test")
    save_results(first, tmp_path, {})
    save_results(accuracy_table(made("AB", "AA", levels=["", ""]), "e1", "one.ckpt", "validation"), tmp_path, {})
    save_results(accuracy_table(made("AB", "AB", levels=["", ""]), "e1", "one.ckpt", "test"), tmp_path, {})
    saved = pd.read_csv(tmp_path / "results.csv")
    assert list(saved.columns) == [*RESULT_COLUMNS, *PASSAGE_COLUMNS, *SEEN_COLUMNS, "not_known"]
    assert saved[["split", "accuracy"]].to_numpy().tolist() == [["test", 1.0], ["validation", 0.5]]


def test_predictions_are_in_cache_order_and_equal_hugging_face(cache, checkpoint):
    """Probabilities of the packed, length-sorted run equal the padded model's, question by question."""
    predictions = predict(checkpoint, cache, "test", device="cpu")
    dataset = RaceDataset(cache, "test")
    assert len(predictions) == len(dataset)
    module = RaceModule.load_from_checkpoint(checkpoint.path).eval()
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
    saved = pd.read_parquet(predictions_path(tmp_path, checkpoint, "validation"))
    pd.testing.assert_frame_equal(saved, predictions)
    flat = pd.read_csv(tmp_path / "results.csv")
    assert list(flat.columns)[:9] == RESULT_COLUMNS and flat["correct"].tolist() == table["correct"].tolist()
    assert flat["level"].tolist() == ["all", "middle", "high"]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["correct"] for row in rows] == table["correct"].tolist()
    assert rows[0]["checkpoint_sha256"] == file_hash(checkpoint.path) == flat["checkpoint_sha256"][0]
    assert (rows[0]["device"], rows[0]["precision"], rows[0]["limit_questions"]) == ("CPU", "32-true", None)
    assert rows[0]["versions"]["torch"] == torch.__version__ and rows[0]["seconds"] > 0
    levels = flat.set_index("level")["accuracy"]
    assert flat["macro_accuracy"][0] == pytest.approx((levels["middle"] + levels["high"]) / 2)
    assert not list(tmp_path.rglob("*.tmp"))


# -------------------------------------------------------------------------------------------------- kept predictions


@pytest.fixture
def run_dir(cache, checkpoint, tmp_path):
    score(checkpoint, cache, "validation", tmp_path, device="cpu", limit_questions=12)
    return tmp_path


def again(checkpoint, cache, run_dir, monkeypatch, fresh=False, **settings) -> bool:
    """Whether predictions were made once more."""
    calls = []
    monkeypatch.setattr(scoring, "predict", lambda *args, **named: calls.append(1) or predict(*args, **named))
    settings = {"device": "cpu", "limit_questions": 12} | settings
    score(checkpoint, cache, "validation", run_dir, fresh, **settings)
    return bool(calls)


def test_kept_predictions_are_used(checkpoint, cache, run_dir, monkeypatch, capsys):
    path = predictions_path(run_dir, checkpoint, "validation")
    before, results = path.read_bytes(), (run_dir / "results.json").read_bytes()
    assert not again(checkpoint, cache, run_dir, monkeypatch)
    assert "saved predictions are used" in capsys.readouterr().out
    assert (path.read_bytes(), (run_dir / "results.json").read_bytes()) == (before, results)


def test_made_afresh_they_are_the_same_bytes(checkpoint, cache, run_dir, monkeypatch, capsys):
    path = predictions_path(run_dir, checkpoint, "validation")
    before = path.read_bytes()
    assert again(checkpoint, cache, run_dir, monkeypatch, fresh=True)
    assert "FRESH is set" in capsys.readouterr().out and path.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "differs"),
    [({"limit_questions": 13}, "limit_questions"), ({"seed": 1}, "seed"), ({"max_len": 40}, "max_len")],
)
def test_other_settings_make_them_again(checkpoint, cache, run_dir, monkeypatch, capsys, settings, differs):
    assert again(checkpoint, cache, run_dir, monkeypatch, **settings)
    assert f"differ in {differs}" in capsys.readouterr().out


def test_a_checkpoint_of_the_same_name_has_predictions_of_its_own(checkpoint, cache, run_dir, monkeypatch, tmp_path):
    other = changed(checkpoint, tmp_path / "elsewhere" / checkpoint.name)
    assert again(other, cache, run_dir, monkeypatch)
    assert not again(checkpoint, cache, run_dir, monkeypatch) and not again(other, cache, run_dir, monkeypatch)
    rows = pd.read_csv(run_dir / "results.csv").query("level == 'all'")
    assert sorted(rows["checkpoint_sha256"]) == sorted([checkpoint.sha256, other.sha256])


def changed(checkpoint, path) -> Checkpoint:
    """The same checkpoint with other weights, elsewhere."""
    path.parent.mkdir(exist_ok=True)
    content = torch.load(checkpoint.path, weights_only=True)
    content["state_dict"]["model.classifier.bias"] += 1
    torch.save(content, path)
    return Checkpoint(path)


def test_a_file_that_is_written_again_takes_the_place_of_its_results(checkpoint, cache, tmp_path):
    """The scores of a checkpoint that is no longer there must not stand beside those of its successor."""
    path = tmp_path / "checkpoints" / checkpoint.name
    path.parent.mkdir()
    path.write_bytes(checkpoint.path.read_bytes())
    for it in (Checkpoint(path), changed(checkpoint, path)):
        score(it, cache, "validation", tmp_path, device="cpu", limit_questions=4)
        rows = pd.read_csv(tmp_path / "results.csv").query("level == 'all'")
        assert rows["checkpoint_sha256"].tolist() == [it.sha256]


def test_half_written_or_foreign_files_are_not_used(checkpoint, cache, run_dir, monkeypatch, capsys):
    path = predictions_path(run_dir, checkpoint, "validation")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert again(checkpoint, cache, run_dir, monkeypatch) and path.read_bytes() == whole
    assert "is not the file that" in capsys.readouterr().out
    for text in ("{", "[]", "{}", '{"settings": 1}'):
        path.with_suffix(".json").write_text(text)
        assert again(checkpoint, cache, run_dir, monkeypatch)
        assert "cannot be read" in capsys.readouterr().out
    path.with_suffix(".json").unlink()
    assert again(checkpoint, cache, run_dir, monkeypatch)
    assert not again(checkpoint, cache, run_dir, monkeypatch)


def test_a_limit_beyond_the_split_is_no_limit(cache):
    assert prediction_settings(cache, limit_questions=10**6, seed=5) == prediction_settings(cache)
    assert prediction_settings(cache, limit_questions=5, seed=5)["seed"] == 5


def test_settings_that_cannot_be_are_refused(cache):
    with pytest.raises(RaceError, match="expected one of 32-true, bf16-mixed, 16-mixed"):
        prediction_settings(cache, precision="bf16", device="cuda")
    with pytest.raises(RaceError, match="PRECISION is 'bf16-true', which rounds the weights"):
        prediction_settings(cache, precision="bf16-true", device="cpu")
    with pytest.raises(RaceError, match="has no dev split"):
        prediction_settings(cache, "dev")


def test_output_that_is_not_finite_is_no_prediction(cache, checkpoint, tmp_path):
    content = torch.load(checkpoint.path, weights_only=True)
    content["state_dict"]["model.classifier.bias"] *= float("nan")
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(RaceError, match="not finite on 5 of 5 questions"):
        score(Checkpoint(tmp_path / "x.ckpt"), cache, "test", tmp_path, device="cpu", limit_questions=5)
    assert not (tmp_path / "predictions").exists() and not (tmp_path / "results.csv").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    atomic_write(path, lambda file: file.write_text("old"))

    def fail(file):
        file.write_text("new, but h")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x.txt", "old")]


def test_json_holds_tables_and_no_nan(tmp_path):
    table = pd.DataFrame({"n": [1, 2], "share": [0.5, float("nan")]})
    write_json(tmp_path / "x.json", {"table": table, "count": np.int64(3), "none": pd.NA, "nested": [np.float64(0.5)]})
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "table": [{"n": 1, "share": 0.5}, {"n": 2, "share": None}],
        "count": 3,
        "none": None,
        "nested": [0.5],
    }


def test_results_of_before_are_kept_and_damaged_ones_named(tmp_path):
    """A results.csv that an earlier version left alone is taken over; a results.json that is no such file stops."""
    old = accuracy_table(made("AB", "AA", levels=["", ""]), "e1", "old.ckpt", "test")[RESULT_COLUMNS]
    old.to_csv(tmp_path / "results.csv", index=False)
    new = accuracy_table(made("AB", "AB", levels=["", ""]), "e2", "new.ckpt", "test").assign(device="CPU")
    save_results(new, tmp_path, {"versions": {"torch": "2"}})
    flat = pd.read_csv(tmp_path / "results.csv")
    assert flat["checkpoint"].tolist() == ["old.ckpt", "new.ckpt"] and list(flat.columns) == list(new.columns)
    assert [row.get("versions") for row in read_results(tmp_path)] == [None, {"torch": "2"}]
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(RaceError, match="results.json: not a list of results"):
        save_results(new, tmp_path, {})


def test_temperature_needs_a_validation_split_of_its_own(cache, checkpoint, tmp_path, capsys):
    assert validation_predictions(checkpoint, cache, "validation", tmp_path) is None
    assert "the scored split is validation itself" in capsys.readouterr().out
    found = validation_predictions(checkpoint, cache, "test", tmp_path, limit_questions=8, device="cpu")
    assert len(found) == 8 and not (tmp_path / "results.csv").exists()


# -------------------------------------------------------------------------------------------------- questions


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory):
    """Two hand-made passages in the test split, one of which is in train too."""
    folder = tmp_path_factory.mktemp("small")
    shared = {
        "article": "Ada went to the park. " * 6,
        "questions": ["Why?"],
        "options": [list("abcd")],
        "answers": ["A"],
    }
    own = {
        "article": "Ben came home by bus.",
        "questions": ["Ben came home _ .", "Which is NOT true?"],
        "options": [["by bus", "by a big boat", "on foot", "by taxi"], ["aaa", "bb", "ccc", "d"]],
        "answers": ["A", "D"],
    }
    for split, level, name, record in (
        ("train", "high", "1", shared),
        ("test", "middle", "1", own),
        ("test", "high", "2", shared),
    ):
        path = folder / "source" / split / level / f"{name}.txt"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record | {"id": path.name}))
    build_cache(str(folder / "source"), "demo", folder / "cache")
    return folder / "cache"


def test_question_facts_by_hand(small_cache, checkpoint):
    predictions = predict(checkpoint, small_cache, "test", max_len=40, device="cpu")
    facts = predictions.set_index(["level", "question_index"]).sort_index()
    assert facts["kind"].to_dict() == {("high", 0): "why", ("middle", 0): "cloze", ("middle", 1): "negated"}
    assert facts["longest_option"].fillna("").to_dict() == {("high", 0): "", ("middle", 0): "B", ("middle", 1): ""}
    assert facts[["article_in_train", "article_in_validation"]].isna().all(axis=None)  # another source trained it
    assert facts["truncated"].to_dict() == {("high", 0): True, ("middle", 0): False, ("middle", 1): False}
    assert facts["article_tokens"].tolist() == [36, 6, 6]


def test_facts_follow_the_sample(cache, checkpoint):
    everything = predict(checkpoint, cache, "test", device="cpu")
    sample = predict(checkpoint, cache, "test", device="cpu", limit_questions=9, seed=3)
    columns = ["example_id", "question_index", "level", "answer", "kind", "article_tokens", "longest_option"]
    found = sample[columns].merge(everything[columns], how="inner")
    assert len(sample) == 9 and found.equals(sample[columns])


def test_a_typed_question_gets_the_probabilities_of_the_cached_one(cache, checkpoint):
    text = RaceDataset(cache, "test").text(2)
    predictions = predict(checkpoint, cache, "test", device="cpu")
    typed = answer_question(checkpoint, cache, text["article"], text["question"], text["options"])
    np.testing.assert_allclose(typed["probability"], predictions.loc[2, PROBABILITIES].to_numpy(float), atol=1e-6)
    assert typed["letter"].tolist() == list("ABCD") and typed["option"].tolist() == text["options"]


def test_several_checkpoints_are_scored_by_name(cache, checkpoint, tmp_path):
    predictions, (table,) = score_each([checkpoint], cache, "test", tmp_path, False, limit_questions=4, device="cpu")
    (name,) = predictions
    assert name == checkpoint.path.stem and len(predictions[name]) == table["questions"][0] == 4
    with pytest.raises(RaceError, match=f"named more than once: .*{checkpoint.name}"):
        score_each([checkpoint, checkpoint], cache, "test", tmp_path, False)


def test_two_checkpoints_of_one_name_are_told_apart_by_their_folders(cache, checkpoint, tmp_path):
    two = [changed(checkpoint, tmp_path / "lower" / checkpoint.name), checkpoint]
    predictions, tables = score_each(two, cache, "test", tmp_path, False, limit_questions=4, device="cpu")
    stem = checkpoint.path.stem
    assert list(predictions) == [f"lower/{stem}", f"{checkpoint.path.parent.name}/{stem}"]
    assert len(pd.read_csv(tmp_path / "results.csv").query("level == 'all'")) == len(tables) == 2
    assert len(list((tmp_path / "predictions").glob("*.parquet"))) == 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_precision_is_taken_on_cpu_too(cache, checkpoint, precision):
    """bf16 keeps 8 bits: other probabilities than in fp32, by little."""
    settings = {"device": "cpu", "limit_questions": 8}
    assert prediction_settings(cache, precision=precision, device="cpu")["precision"] == precision
    full, half = (predict(checkpoint, cache, "test", **settings, precision=it) for it in (None, precision))
    difference = np.abs(full[PROBABILITIES].to_numpy() - half[PROBABILITIES].to_numpy())
    assert 0 < difference.max() < 0.02


def test_the_accelerator_is_what_is_asked_for(cache, checkpoint, monkeypatch):
    """On a node whose GPU torch cannot use: "cpu" and a device given by name go on, all else says why not."""
    settings, text = {"limit_questions": 4}, RaceDataset(cache, "test").text(0)
    expected = predict(checkpoint, cache, "test", **settings, device="cpu")
    monkeypatch.setattr("race.device.gpu_problem", lambda: "the driver is too old")
    for goes_on in ({"accelerator": "cpu"}, {"accelerator": "gpu", "device": "cpu"}):
        pd.testing.assert_frame_equal(predict(checkpoint, cache, "test", **settings, **goes_on), expected)
    typed = (checkpoint, cache, text["article"], text["question"], text["options"])
    assert len(answer_question(*typed, accelerator="cpu")) == 4
    for refused in (lambda: predict(checkpoint, cache, "test"), lambda: answer_question(*typed)):
        with pytest.raises(RaceError, match="the driver is too old"):
            refused()
    assert prediction_settings(cache, accelerator="cpu") == prediction_settings(cache, device="cpu")


def test_one_level_alone(cache, checkpoint, tmp_path):
    """The middle questions: the same predictions as among all, one row of results, and the other rows stay."""
    everything, _ = score(checkpoint, cache, "test", tmp_path, device="cpu")
    middle, table = score(checkpoint, cache, "test", tmp_path, device="cpu", level="middle")
    expected = everything[everything["level"] == "middle"]
    assert middle["example_id"].tolist() == expected["example_id"].tolist() and len(middle) == len(expected) > 0
    np.testing.assert_allclose(middle[PROBABILITIES], expected[PROBABILITIES], atol=1e-6)
    assert table["level"].tolist() == ["middle"] and table["questions"].tolist() == [len(expected)]
    rows = pd.read_csv(tmp_path / "results.csv").set_index("level")
    assert sorted(rows.index) == ["all", "high", "middle"] and rows.loc["all", "questions"] == len(everything)
    sample = predict(checkpoint, cache, "test", device="cpu", level="high", limit_questions=5, seed=1)
    assert len(sample) == 5 and set(sample["level"]) == {"high"}
    with pytest.raises(RaceError, match="level is 'low', expected middle, high or None"):
        predict(checkpoint, cache, "test", level="low")


def test_another_tokenizer_is_refused(cache, tmp_path):
    torch.save({"race": {"tokenizer": "other"}}, tmp_path / "x.ckpt")
    with pytest.raises(RaceError, match="another tokenizer"):
        predict(Checkpoint(tmp_path / "x.ckpt"), cache)


def test_a_full_memory_halves_the_micro_batches(cache, checkpoint, monkeypatch, capsys):
    """Simulated: whatever has more than 700 tokens does not fit; the answers are the same."""
    whole, forward = predict(checkpoint, cache, "test", device="cpu", limit_questions=12), RaceModule.forward

    def full(module, batch):
        if sum(batch.lengths) > 700:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(module, batch)

    monkeypatch.setattr(RaceModule, "forward", full)
    found = predict(checkpoint, cache, "test", device="cpu", limit_questions=12)
    np.testing.assert_allclose(found[PROBABILITIES], whole[PROBABILITIES], atol=1e-6)
    assert "taken again with TOKEN_BUDGET" in capsys.readouterr().out
