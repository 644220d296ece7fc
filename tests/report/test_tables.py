"""Tables for reading, what checkpoints remember, and other people's numbers."""

import pandas as pd
import pytest
import torch
from predictions import made

from race.files import file_hash
from race.report import sentences, tables
from race.score.predictions import accuracy_table
from race.train.checkpoints import Checkpoint, short_names
from race.train.stages import lineage_table, stages_behind


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
    assert [stage.name for stage in stages_behind(three[1:])] == ["e1", "e2"]


def test_two_runs_of_a_stage_are_told_apart_and_are_no_chain(tmp_path):
    for name, code in (("plain", "a"), ("smooth", "b")):
        (tmp_path / name).mkdir()
        torch.save({"race": {"stage": "e1", "epoch": 1, "code": code}}, tmp_path / name / f"e1-{code}.ckpt")
    two = [Checkpoint(path) for path in sorted(tmp_path.glob("*/*.ckpt"))]
    assert short_names(two) == ["plain/e1", "smooth/e1"] and stages_behind(two) == []
    assert "trained with different code" in sentences.scope(lineage_table(two, short_names(two)))
    assert "trained with different code" not in sentences.scope(lineage_table(two[:1] * 2, ["a", "b"]))


def test_comparison_has_a_row_for_each_checkpoint(three):
    scored = [
        accuracy_table(made("AB", "AB", levels=["middle", "high"]), "e1", three[0].name, "test"),
        accuracy_table(made("AB", "AA"), "other", three[2].name, "test"),
    ]
    table = tables.comparison_table(scored, lineage_table([three[0], three[2]], ["e1", "e3"]))
    first, second = table.iloc[0], table.iloc[1]
    assert first[["name", "accuracy", "middle", "high", "base"]].tolist() == ["e1", 1.0, 1.0, 1.0, "albert-base-v2"]
    assert first["middle_low"] < 1 == first["middle_high"] and first["accuracy_low"] == pytest.approx(0.342, abs=1e-3)
    assert second["accuracy"] == 0.5 and pd.isna(second["middle"]) and pd.isna(second["val_loss"])
    html = tables.styled(table, tables.CHECKPOINTS).to_html()
    assert all(it in html for it in ("34.2\xa0%\xa0to\xa0100.0\xa0%", ">2e-5<", ">0.900<", ">–<"))


def test_cells_are_written_one_way():
    html = (
        tables.styled(
            accuracy_table(made("AB" * 9, "AA" * 9, example_id=range(18)), "e1", "x.ckpt", "test"), tables.SCORES
        )
        .to_html()
        .replace("\xa0", " ")
    )
    assert "27.2 % to 72.8 %" in html and "50.0 %" in html and "ci_low" not in html and "icc" not in html


def test_tables_of_recipes():
    had = pd.DataFrame({"recipe": ["chain"], "learning_rate": [[1e-2, 1e-3]], "monitor": "val_acc", "questions": 87866})
    html = tables.styled(had.assign(learning_rates_tried=pd.array([None], "Int64")), tables.TOTALS).to_html()
    assert all(f">{it}<" in html for it in ("1e-2, 1e-3", "highest validation accuracy", "87,866", "–"))
    accuracies = pd.DataFrame({"recipe": ["chain"], "accuracy": 0.72, "sd": 0.004, "each": [[0.71, 0.73]]})
    html = tables.styled(accuracies, tables.ACCURACIES).to_html().replace("\xa0", " ")
    assert all(f">{it}<" in html for it in ("chain", "72.0 %", "0.40 points", "71.0 %, 73.0 %"))


def test_other_peoples_numbers_appear_on_their_split_only():
    def table(questions: int, split: str):
        return pd.DataFrame({"stage": ["e1"], "split": [split], "questions": [questions], "accuracy": [0.7]})

    assert tables.reported_accuracy([table(4934, "test")] * 2) == {"e1": 0.671, "e2": 0.680, "e3": 0.720}
    assert tables.reported_accuracy([table(4934, "test"), table(500, "test")]) == {}
    assert tables.published_table(table(4934, "train")).empty
    published = tables.published_table(table(4934, "test")).set_index("model")
    assert published["accuracy"].is_monotonic_increasing
    assert published.loc["this checkpoint (e1)"].tolist() == [0.7, "measured here"]
