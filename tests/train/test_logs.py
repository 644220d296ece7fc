"""The course of the training, read back from logs."""

import pandas as pd

from race.train.logs import learning_story


def test_learning_story_on_one_axis(tmp_path):
    """e1 with two epochs, of which the second was logged twice after a resume; e2 with one; no log of e3."""
    rows = {"e1": [(0, 1.2, 0.4), (1, 1.1, 0.45), (1, 1.0, 0.5)], "e2": [(0, 0.9, 0.6)]}
    for stage, values in rows.items():
        folder = tmp_path / "logs" / stage / "version_0"
        folder.mkdir(parents=True)
        log = pd.DataFrame(values, columns=["epoch", "val_loss_epoch", "val_acc"])
        steps = pd.DataFrame({"epoch": [0], "learning_rate": [2e-5 if stage == "e1" else 2e-6]})
        pd.concat([steps, log]).to_csv(folder / "metrics.csv", index=False)
    story, notes = learning_story(tmp_path, ["e1", "e2", "e3"], questions_per_epoch=30)
    assert story["questions"].tolist() == [30, 60, 90] and story["val_loss"].tolist() == [1.2, 1.0, 0.9]
    assert story["learning_rate"].tolist() == [2e-5, 2e-5, 2e-6] and story["val_acc"].tolist() == [0.4, 0.5, 0.6]
    assert len(notes) == 1 and notes[0].startswith("no log of e3")
    assert learning_story(tmp_path / "none", ["e1"], 30)[0].empty
