"""Predictions, what is kept of them, accuracy tables and results files; typed questions; lineage and logs."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import padded

import race_evaluation
from race_cache import CacheError, build_cache
from race_data import RaceDataModule, RaceDataset, collate
from race_evaluation import (
    RESULT_COLUMNS,
    accuracy_table,
    answer_question,
    chosen_checkpoints,
    encoded_question,
    headline,
    percent,
    predict,
    prediction_settings,
    published_table,
    reported_accuracy,
    score,
    temperature_predictions,
)
from race_files import file_hash, write_whole
from race_lineage import comparison, comparison_style, learning_story, lineage_table, short_names, stages_behind
from race_module import RaceModule
from race_results import predictions_path, read_results, save_results, write_json
from race_statistics import PROBABILITIES
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
    flat = pd.read_csv(tmp_path / "results.csv")
    assert list(flat.columns)[:9] == RESULT_COLUMNS and flat["correct"].tolist() == table["correct"].tolist()
    assert flat["level"].tolist() == ["all", "middle", "high"]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["correct"] for row in rows] == table["correct"].tolist()
    assert rows[0]["checkpoint_sha256"] == file_hash(checkpoint) == flat["checkpoint_sha256"][0]
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
    monkeypatch.setattr(race_evaluation, "predict", lambda *args, **named: calls.append(1) or predict(*args, **named))
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
    assert "asked afresh" in capsys.readouterr().out and path.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "differs"),
    [({"limit_questions": 13}, "limit_questions"), ({"seed": 1}, "seed"), ({"max_len": 40}, "max_len")],
)
def test_other_settings_make_them_again(checkpoint, cache, run_dir, monkeypatch, capsys, settings, differs):
    assert again(checkpoint, cache, run_dir, monkeypatch, **settings)
    assert f"differ in {differs}" in capsys.readouterr().out


def test_a_checkpoint_of_the_same_name_makes_them_again(checkpoint, cache, run_dir, monkeypatch, capsys, tmp_path):
    other = tmp_path / "elsewhere" / checkpoint.name
    other.parent.mkdir()
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["model.classifier.bias"] += 1
    torch.save(content, other)
    assert again(other, cache, run_dir, monkeypatch)
    assert "differ in checkpoint_sha256" in capsys.readouterr().out


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
    with pytest.raises(ValueError, match="expected 32-true, bf16-mixed or 16-mixed"):
        prediction_settings(cache, precision="bf16", device="cuda")
    with pytest.raises(CacheError, match="has no dev split"):
        prediction_settings(cache, "dev")


def test_output_that_is_not_finite_is_no_prediction(cache, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["model.classifier.bias"] *= float("nan")
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(StageError, match="not finite on 5 of 5 questions"):
        score(tmp_path / "x.ckpt", cache, "test", tmp_path, device="cpu", limit_questions=5)
    assert not (tmp_path / "predictions").exists() and not (tmp_path / "results.csv").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    write_whole(path, lambda file: file.write_text("old"))

    def fail(file):
        file.write_text("new, but h")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
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
    old = accuracy_table(made("AB", "AA", ["", ""]), "e1", "old.ckpt", "test")
    old.to_csv(tmp_path / "results.csv", index=False)
    new = accuracy_table(made("AB", "AB", ["", ""]), "e2", "new.ckpt", "test").assign(device="CPU")
    save_results(new, tmp_path, {"versions": {"torch": "2"}})
    flat = pd.read_csv(tmp_path / "results.csv")
    assert flat["checkpoint"].tolist() == ["old.ckpt", "new.ckpt"] and list(flat.columns) == [*RESULT_COLUMNS, "device"]
    assert [row.get("versions") for row in read_results(tmp_path)] == [None, {"torch": "2"}]
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(ValueError, match="results.json: not a list of results"):
        save_results(new, tmp_path)


def test_temperature_needs_a_validation_split_of_its_own(cache, checkpoint, tmp_path, capsys):
    assert temperature_predictions(checkpoint, cache, "validation", tmp_path) is None
    assert "would be fitted to itself" in capsys.readouterr().out
    found = temperature_predictions(checkpoint, cache, "test", tmp_path, limit_questions=8, device="cpu")
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
    assert facts["longest_option"].to_dict() == {("high", 0): "A", ("middle", 0): "B", ("middle", 1): "A"}
    assert facts["article_in_train"].to_dict() == {("high", 0): True, ("middle", 0): False, ("middle", 1): False}
    assert facts["truncated"].to_dict() == {("high", 0): True, ("middle", 0): False, ("middle", 1): False}
    assert facts["article_tokens"].tolist() == [36, 6, 6]
    assert predict(checkpoint, small_cache, "train", device="cpu")["article_in_train"].isna().all()


def test_facts_follow_the_sample(cache, checkpoint):
    everything = predict(checkpoint, cache, "test", device="cpu")
    sample = predict(checkpoint, cache, "test", device="cpu", limit_questions=9, seed=3)
    columns = ["example_id", "question_index", "level", "answer", "kind", "article_tokens", "longest_option"]
    found = sample[columns].merge(everything[columns], how="inner")
    assert len(sample) == 9 and found.equals(sample[columns])


@pytest.mark.parametrize("max_len", [512, 40])
def test_a_typed_question_is_encoded_as_in_the_cache(cache, max_len):
    dataset = RaceDataset(cache, "test", max_len)
    for i in (0, 3, len(dataset) - 1):
        text = dataset.text(i)
        typed = encoded_question(cache, text["article"], text["question"], text["options"], max_len)
        for name in ("input_ids", "token_type_ids"):
            assert all(np.array_equal(a, b) for a, b in zip(typed[name], dataset[i][name], strict=True))


def test_real_questions_are_encoded_as_in_the_cache(real_cache):
    """Among them the ones with the longest article and the longest question and option, which are cut."""
    dataset = RaceDataset(real_cache, "validation")
    article = np.diff(dataset._article_offsets)[dataset._passage]
    longest_qa = np.diff(dataset._qa_offsets).reshape(-1, 4).max(1)
    for i in (0, 1000, int(article.argmax()), int(longest_qa.argmax())):
        text = dataset.text(i)
        typed = encoded_question(real_cache, text["article"], text["question"], text["options"])
        for name in ("input_ids", "token_type_ids"):
            assert all(np.array_equal(a, b) for a, b in zip(typed[name], dataset[i][name], strict=True))


def test_a_typed_question_gets_the_probabilities_of_the_cached_one(cache, checkpoint):
    text = RaceDataset(cache, "test").text(2)
    predictions = predict(checkpoint, cache, "test", device="cpu")
    typed = answer_question(checkpoint, cache, text["article"], text["question"], text["options"], device="cpu")
    np.testing.assert_allclose(typed["probability"], predictions.loc[2, PROBABILITIES].to_numpy(float), atol=1e-6)
    assert typed["letter"].tolist() == list("ABCD") and typed["option"].tolist() == text["options"]


def test_a_typed_question_must_be_whole(cache):
    with pytest.raises(ValueError, match=r"article: empty; .*3 options, not 4"):
        encoded_question(cache, " ", "Who?", ["a", "b", "c"])


# -------------------------------------------------------------------------------------------------- tables and words


def test_headline_by_hand():
    table = accuracy_table(made("ABCD" * 25, "AAAA" * 25, ["middle"] * 60 + ["high"] * 40), "e1", "x.ckpt", "test")
    assert headline(table) == (
        "e1 is right on 25 of 100 questions of test: 25.0 % (95 % interval 17.5 % to 34.3 %), "
        "no more than guessing gives (25 %; exact binomial p = 0.54)."
    )
    table = accuracy_table(made("ABCD" * 25, "ABCD" * 25, [""] * 100), "e1", "x.ckpt", "test")
    assert "100.0 % (95 % interval 96.3 % to 100.0 %), more than guessing gives" in headline(table)


def test_table_for_reading_has_the_interval_in_one_column():
    html = percent(accuracy_table(made("AB", "AA", ["", ""]), "e1", "x.ckpt", "test").assign(seconds=1)).to_html()
    assert "9.5% – 90.5%" in html and "50.0%" in html and "ci_low" not in html and "seconds" not in html


def test_other_peoples_numbers_appear_on_their_split_only():
    def table(questions: int, split: str):
        return pd.DataFrame({"stage": ["e1"], "split": [split], "questions": [questions], "accuracy": [0.7]})

    assert reported_accuracy([table(4934, "test")] * 2) == {"e1": 0.671, "e2": 0.680, "e3": 0.720}
    assert reported_accuracy([table(4934, "test"), table(500, "test")]) == {}
    assert reported_accuracy([table(4934, "train")]) == {}
    assert published_table(table(500, "test")).empty
    published = published_table(table(4934, "test"))
    assert published["accuracy"].is_monotonic_increasing and published["source"].ne("").all()
    assert published.query("source == 'measured here'")["accuracy"].tolist() == [0.7]
    assert published["accuracy"].iloc[0] == 0.25


# -------------------------------------------------------------------------------------------------- lineage and logs


@pytest.fixture
def three(tmp_path):
    """Checkpoints that remember a chain: e1, e2 built on it, and one from elsewhere that remembers nothing."""
    paths = [tmp_path / name for name in ("e1-a.ckpt", "e2-b.ckpt", "other.ckpt")]
    e1 = {"stage": "e1", "base": "albert-base-v2", "base_sha256": None, "chain": [], "epoch": 1}
    torch.save({"race": e1 | {"recipe": {"learning_rate": 2e-5}, "metrics": {"val_loss_epoch": 0.9}}}, paths[0])
    e2 = {"stage": "e2", "base": "e1-a.ckpt", "base_sha256": file_hash(paths[0]), "chain": ["e1"], "epoch": 0}
    torch.save({"race": e2}, paths[1])
    torch.save({"state_dict": {}}, paths[2])
    return paths


def test_lineage_follows_hashes(three):
    table = lineage_table(three).set_index("name")
    assert table["parent"].fillna("").to_dict() == {"e1": "", "e2": "e1", "other": ""}
    assert table["base"].fillna("").tolist() == ["albert-base-v2", "e1-a.ckpt", ""]
    assert (table.loc["e1", "epochs"], table.loc["e1", "val_loss"]) == (2, 0.9) and np.isnan(
        table.loc["other", "epochs"]
    )
    changed = torch.load(three[0], weights_only=True)
    torch.save(changed | {"more": 1}, three[0])  # the same name, another file
    assert lineage_table(three).set_index("name")["parent"].isna().all()
    assert stages_behind(three[1:]) == ["e1", "e2"]


def test_short_names_tell_all_apart(three, tmp_path):
    assert short_names(three) == ["e1", "e2", "other"]
    torch.save({"race": {"stage": "e1", "epoch": 4}}, tmp_path / "e1-c.ckpt")
    assert short_names([three[0], tmp_path / "e1-c.ckpt"]) == ["e1, epoch 1", "e1, epoch 4"]
    torch.save({"race": {"stage": "e1", "epoch": 1}}, tmp_path / "e1-d.ckpt")
    assert short_names([three[0], tmp_path / "e1-d.ckpt"]) == ["e1-a", "e1-d"]


def test_comparison_has_a_row_for_each_checkpoint(three):
    tables = [
        accuracy_table(made("AB", "AB", ["middle", "high"]), "e1", three[0], "test"),
        accuracy_table(made("AB", "AA", ["", ""]), "other", three[2], "test"),
    ]
    table = comparison(tables, [three[0], three[2]])
    first, second = table.iloc[0], table.iloc[1]
    assert (first["name"], first["accuracy"], first["middle"], first["high"]) == ("e1", 1.0, 1.0, 1.0)
    assert (first["epochs"], first["learning_rate"], first["base"]) == (2, 2e-5, "albert-base-v2")
    assert second["accuracy"] == 0.5 and pd.isna(second["middle"]) and pd.isna(second["val_loss"])
    html = comparison_style(table).to_html()
    assert "34.2% – 100.0%" in html and ">2e-05<" in html and ">–<" in html


def test_learning_story_on_one_axis(cache, tmp_path):
    """e1 with two epochs, of which the second was logged twice after a resume; e2 with one; no log of e3."""
    rows = {"e1": [(0, 1.2, 0.4), (1, 1.1, 0.45), (1, 1.0, 0.5)], "e2": [(0, 0.9, 0.6)]}
    for stage, values in rows.items():
        folder = tmp_path / "logs" / stage / "version_0"
        folder.mkdir(parents=True)
        log = pd.DataFrame(values, columns=["epoch", "val_loss_epoch", "val_acc"])
        steps = pd.DataFrame({"epoch": [0], "learning_rate": [2e-5 if stage == "e1" else 2e-6]})
        pd.concat([steps, log]).to_csv(folder / "metrics.csv", index=False)
    story, notes = learning_story(tmp_path, cache, ["e1", "e2", "e3"], limit_questions=30)
    assert story["questions"].tolist() == [30, 60, 90] and story["val_loss"].tolist() == [1.2, 1.0, 0.9]
    assert story["learning_rate"].tolist() == [2e-5, 2e-5, 2e-6] and story["val_acc"].tolist() == [0.4, 0.5, 0.6]
    assert len(notes) == 1 and notes[0].startswith("no log of e3")
    train = len(RaceDataModule(cache).dataset("train"))
    assert learning_story(tmp_path, cache, ["e1"])[0]["questions"].tolist() == [train, 2 * train]
    assert learning_story(tmp_path / "none", cache, ["e1"])[0].empty


def test_checkpoints_of_one_name_are_refused(tmp_path):
    with pytest.raises(StageError, match=r"two checkpoints are called x.ckpt"):
        chosen_checkpoints(["a/x.ckpt", "b/x.ckpt"], tmp_path)
    with pytest.raises(StageError, match="holds no checkpoints"):
        chosen_checkpoints(None, tmp_path)


def test_another_tokenizer_is_refused(cache, tmp_path):
    torch.save({"race": {"tokenizer": "other"}}, tmp_path / "x.ckpt")
    with pytest.raises(StageError, match="another tokenizer"):
        predict(tmp_path / "x.ckpt", cache)
