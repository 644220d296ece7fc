"""Tables for reading, what checkpoints remember, and other people's numbers."""

import pandas as pd
import pytest
import torch
from predictions import made, two

from race.files import file_hash
from race.report.tables import (
    comparison_style,
    comparison_table,
    lineage_table,
    pairs_style,
    published_table,
    reported_accuracy,
    score_style,
    stages_behind,
)
from race.score.comparison import compare_pairs
from race.score.predictions import accuracy_table
from race.train.checkpoints import Checkpoint, short_names


@pytest.fixture
def three(tmp_path):
    """Checkpoints that remember a chain: e1, e2 built on it, and one from elsewhere that remembers nothing."""
    paths = [tmp_path / name for name in ("e1-a.ckpt", "e2-b.ckpt", "other.ckpt")]
    e1 = {"stage": "e1", "base": "albert-base-v2", "base_sha256": None, "chain": [], "epoch": 1}
    torch.save({"race": e1 | {"recipe": {"learning_rate": 2e-5}, "metrics": {"val_loss_epoch": 0.9}}}, paths[0])
    e2 = {"stage": "e2", "base": "e1-a.ckpt", "base_sha256": file_hash(paths[0]), "chain": ["e1"], "epoch": 0}
    torch.save({"race": e2}, paths[1])
    torch.save({"state_dict": {}}, paths[2])
    return [Checkpoint(path) for path in paths]


def test_lineage_follows_hashes(three):
    table = lineage_table(three, short_names(three)).set_index("name")
    assert table["parent"].fillna("").to_dict() == {"e1": "", "e2": "e1", "other": ""}
    assert table["base"].fillna("").tolist() == ["albert-base-v2", "e1-a.ckpt", ""]
    assert table.loc["e1", ["chosen_epoch", "val_loss"]].tolist() == [1, 0.9]
    assert table["epochs"].isna().tolist() == [True, False, True]  # of e1, the file of epoch 0 is missing
    changed = torch.load(three[0].path, weights_only=True)
    torch.save(changed | {"more": 1}, three[0].path)  # the same name, another file
    again = [Checkpoint(checkpoint.path) for checkpoint in three]
    assert lineage_table(again, short_names(again)).set_index("name")["parent"].isna().all()
    assert stages_behind(three[1:]) == dict.fromkeys(["e1", "e2"], "val_loss_epoch")


def test_short_names_tell_all_apart(three, tmp_path):
    def named(name: str, **race) -> Checkpoint:
        torch.save({"race": race}, tmp_path / name)
        return Checkpoint(tmp_path / name)

    assert short_names(three) == ["e1", "e2", "other"]
    assert short_names([three[0], named("e1-c.ckpt", stage="e1", epoch=4)]) == ["e1, epoch 1", "e1, epoch 4"]
    assert short_names([three[0], named("e1-d.ckpt", stage="e1", epoch=1)]) == ["e1-a", "e1-d"]


def test_epochs_trained_are_those_of_the_run_whatever_epoch_is_chosen(tmp_path):
    for epoch in range(3):
        race = {"stage": "e1", "epoch": epoch, "metrics": {"val_loss_epoch": abs(epoch - 1)}, "weights_start": "x"}
        torch.save({"race": race}, tmp_path / f"e1-{epoch}.ckpt")
    torch.save({"race": race | {"epoch": 5, "weights_start": "another run"}}, tmp_path / "e1-5.ckpt")
    chosen = Checkpoint(tmp_path / "e1-1.ckpt")
    row = lineage_table([chosen], ["e1"]).iloc[0]
    assert (row["epochs"], row["chosen_epoch"]) == (3, 1)


def test_comparison_has_a_row_for_each_checkpoint(three):
    tables = [
        accuracy_table(made("AB", "AB", levels=["middle", "high"]), "e1", three[0].name, "test"),
        accuracy_table(made("AB", "AA"), "other", three[2].name, "test"),
    ]
    table = comparison_table(tables, [three[0], three[2]], ["e1", "e3"])
    first, second = table.iloc[0], table.iloc[1]
    assert first[["name", "accuracy", "middle", "high", "questions"]].tolist() == ["e1", 1.0, 1.0, 1.0, 2]
    assert first[["chosen_epoch", "learning_rate", "base"]].tolist() == [1, 2e-5, "albert-base-v2"]
    assert first["middle_low"] < 1 == first["middle_high"]
    assert second["accuracy"] == 0.5 and pd.isna(second["middle"]) and pd.isna(second["val_loss"])
    html = comparison_style(table).to_html()
    assert "34.2 % to 100.0 %" in html and ">2e-5<" in html and ">–<" in html


def test_scores_have_the_interval_in_one_column():
    html = score_style(accuracy_table(made("AB", "AA"), "e1", "x.ckpt", "test").assign(seconds=1)).to_html()
    assert "9.5 % to 90.5 %" in html and "50.0 %" in html and "ci_low" not in html and "seconds" not in html


def test_differences_are_counted_in_points():
    html = pairs_style(compare_pairs(dict(zip(("e1", "e2"), two(3000, 312, 288, 1334), strict=True)))).to_html()
    assert ">+0.5<" in html and ">0.35<" in html and ">1,334<" in html
    assert ">McNemar p<" in html and ">Holm p<" in html and ">95 % bootstrap<" in html


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
    source = published.set_index("model")["source"]
    assert "dev set" in source["ALBERT v2 base"] and "test split" in source["RoBERTa large"]
    assert "share with one clear answer" in source["valid questions"]
    assert published.set_index("model").loc["people on Mechanical Turk", "accuracy"] == 0.733
