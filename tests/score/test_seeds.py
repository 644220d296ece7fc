"""Mean, spread and interval over seeds, on numbers worked out by hand."""

import pandas as pd
import pytest

from race import RaceError
from race.score.results import RESULT_COLUMNS
from race.score.seeds import main, over_seeds, report


def write_results(root, seed: int, accuracies: dict, questions: int = 1000) -> str:
    """results.csv of one seed: {(stage, split, level): accuracy}."""
    rows = [
        [stage, f"{stage}-seed{seed}.ckpt", split, level, questions, round(accuracy * questions), accuracy, 0, 1]
        for (stage, split, level), accuracy in accuracies.items()
    ]
    folder = root / f"race-seed{seed}"
    folder.mkdir(parents=True)
    pd.DataFrame(rows, columns=RESULT_COLUMNS).to_csv(folder / "results.csv", index=False)
    return str(folder)


def test_three_seeds_by_hand(tmp_path):
    """66, 68 and 70 %: mean 68, sample standard deviation 2, t(0.975, 2) = 4.302653, half width 4.302653 · 2 / √3."""
    runs = [write_results(tmp_path, s, {("e1", "test", "all"): a}) for s, a in ((1, 0.66), (2, 0.68), (3, 0.70))]
    (row,) = over_seeds(runs).to_dict("records")
    assert (row["stage"], row["split"], row["level"], row["questions"], row["n"]) == ("e1", "test", "all", 1000, 3)
    assert row["seeds"] == "1 2 3" and (row["lowest"], row["highest"]) == (0.66, 0.70)
    assert row["mean"] == pytest.approx(0.68) and row["std"] == pytest.approx(0.02)
    assert row["ci_low"] == pytest.approx(0.68 - 0.0496828, abs=1e-6)
    assert row["ci_high"] == pytest.approx(0.68 + 0.0496828, abs=1e-6)


def test_two_seeds_by_hand(tmp_path):
    """60 and 61 %: standard deviation 1/√2 points, t(0.975, 1) = 12.7062, half width 12.7062 · 0.5 points."""
    runs = [write_results(tmp_path, s, {("e1", "test", "all"): a}) for s, a in ((1, 0.60), (2, 0.61))]
    (row,) = over_seeds(runs).to_dict("records")
    assert row["std"] == pytest.approx(0.01 / 2**0.5)
    assert row["ci_high"] - row["mean"] == pytest.approx(0.0635310, abs=1e-6)


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    table = over_seeds([write_results(tmp_path, 7, {("e1", "test", "all"): 0.66})])
    assert table["mean"].tolist() == [0.66] and table[["std", "ci_low", "ci_high"]].isna().all(axis=None)
    assert "| 1 (7) | 66.0 % | – | none: one seed |" in report(table)


def test_seeds_that_agree_have_an_interval_without_width(tmp_path):
    table = over_seeds([write_results(tmp_path, s, {("e1", "test", "all"): 0.5}) for s in (1, 2)])
    assert table[["std", "ci_low", "ci_high"]].to_numpy().tolist() == [[0, 0.5, 0.5]]


def test_every_stage_split_and_level_has_its_own_row(tmp_path):
    keys = [("e2", "test", "all"), ("e2", "test", "high"), ("e1", "validation", "all"), ("e1", "test", "all")]
    runs = [write_results(tmp_path, s, {key: 0.1 * s + 0.01 * i for i, key in enumerate(keys)}) for s in (1, 2)]
    table = over_seeds(runs)
    found = {(row.stage, row.split, row.level): row.mean for row in table.itertuples()}
    assert found == {key: pytest.approx(0.15 + 0.01 * i) for i, key in enumerate(keys)}
    assert table["stage"].tolist() == ["e1", "e1", "e2", "e2"]


def test_a_seed_that_lacks_a_stage_is_seen(tmp_path):
    runs = [write_results(tmp_path, 1, {("e1", "test", "all"): 0.6, ("e2", "test", "all"): 0.7})]
    runs += [write_results(tmp_path, 2, {("e1", "test", "all"): 0.6})]
    table = over_seeds(runs)
    assert table[["stage", "n", "seeds"]].to_numpy().tolist() == [["e1", 2, "1 2"], ["e2", 1, "1"]]
    assert "Some seeds lack some rows" in report(table)


def test_what_cannot_be_put_together_is_refused_all_at_once(tmp_path):
    few = write_results(tmp_path, 1, {("e1", "test", "all"): 0.6}, questions=500)
    many = write_results(tmp_path, 2, {("e1", "test", "all"): 0.6})
    with pytest.raises(RaceError) as error:
        over_seeds([few, many, many, tmp_path / "race-seed9"])
    said = str(error.value)
    assert "e1 test all: the seeds answered different numbers of questions: 500 (seed 1), 1000 (seed 2)" in said
    assert "two run folders of seed 2" in said and "race-seed9/results.csv: not found" in said


def test_samples_of_other_levels_are_told(tmp_path):
    """In a trial run each seed draws its own sample, with more or fewer questions of a level."""
    runs = []
    for seed, middle in ((1, 28), (2, 30)):
        rows = [
            ["e1", "x.ckpt", "test", "all", 48, 24, 0.5, 0, 1],
            ["e1", "x.ckpt", "test", "middle", middle, 14, 14 / middle, 0, 1],
        ]
        (tmp_path / f"race-seed{seed}").mkdir()
        runs.append(tmp_path / f"race-seed{seed}")
        pd.DataFrame(rows, columns=RESULT_COLUMNS).to_csv(runs[-1] / "results.csv", index=False)
    said = report(over_seeds(runs))
    assert "| e1 | test | all | 48 |" in said and "| e1 | test | middle | 28–30 |" in said
    assert "The seeds answered different questions" in said and "beyond 0 or 100" not in said


def test_an_interval_that_says_nothing_is_called_so(tmp_path):
    """20 and 90 %: half width 12.7062 · 35 points."""
    runs = [write_results(tmp_path, s, {("e1", "test", "all"): a}) for s, a in ((1, 0.2), (2, 0.9))]
    assert "An interval reaches beyond 0 or 100 %" in report(over_seeds(runs))


def test_two_checkpoints_of_a_stage_are_refused(tmp_path):
    run = write_results(tmp_path, 1, {("e1", "test", "all"): 0.6})
    table = pd.read_csv(f"{run}/results.csv")
    pd.concat([table, table.assign(checkpoint="other.ckpt")]).to_csv(f"{run}/results.csv", index=False)
    with pytest.raises(RaceError, match=r"several checkpoints of e1 on test.*e1-seed1.ckpt, other.ckpt"):
        over_seeds([run])


def test_command_line(tmp_path, capsys):
    runs = [write_results(tmp_path, s, {("e1", "test", "all"): a}) for s, a in ((1, 0.66), (2, 0.68), (3, 0.70))]
    assert main([*runs, "--out", str(tmp_path / "over" / "results.csv")]) == 0
    said = capsys.readouterr().out
    assert "| e1 | test | all | 1,000 | 3 (1 2 3) | 68.0 % | 2.00 points | 63.0 % to 73.0 % |" in said
    assert "t interval covers the training seed" in said and "Wilson interval" in said
    saved = pd.read_csv(tmp_path / "over" / "results.csv")
    assert saved["mean"].tolist() == [pytest.approx(0.68)] and len(list((tmp_path / "over").iterdir())) == 1
    assert main([str(tmp_path)]) == 1 and "not found" in capsys.readouterr().err
