"""Mean, spread and interval over seeds, on numbers worked out by hand."""

import math
from pathlib import Path

import pandas as pd
import pytest

from race import RaceError
from race.score.results import RESULT_COLUMNS
from race.score.seeds import WHAT_IS_COVERED, differences, main, over_seeds, report

E1, E2, E3 = (("e1", "test", "all"), ("e2", "test", "all"), ("e3", "test", "all"))
CHAIN = ({E2: 0.70, E3: 0.705}, {E2: 0.75, E3: 0.742}, {E2: 0.68, E3: 0.681})  # e3 − e2: +0.5, −0.8, +0.1 points


def write_results(root, seed: int, accuracies: dict, questions: int = 1000, **more) -> str:
    """results.csv of one seed: {(stage, split, level): accuracy}; more: values of further columns."""
    rows = [
        [stage, f"{stage}-seed{seed}.ckpt", split, level, questions, round(accuracy * questions), accuracy, 0, 1]
        for (stage, split, level), accuracy in accuracies.items()
    ]
    folder = root / f"race-seed{seed}"
    folder.mkdir(parents=True)
    pd.DataFrame(rows, columns=RESULT_COLUMNS).assign(**more).to_csv(folder / "results.csv", index=False)
    return str(folder)


def write_seeds(root, *accuracies: dict, **more) -> list[str]:
    """The run folders of seeds 1, 2, …"""
    return [write_results(root, seed, of_seed, **more) for seed, of_seed in enumerate(accuracies, 1)]


def said(runs: list) -> str:
    return report(over_seeds(runs), differences(runs))


def refused(runs: list) -> list[str]:
    """The lines of the one error."""
    with pytest.raises(RaceError) as error:
        over_seeds(runs)
    with pytest.raises(RaceError) as again:
        differences(runs)
    assert str(error.value) == str(again.value)
    return str(error.value).splitlines()


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
    run = write_results(tmp_path, 7, {("e1", "test", "all"): 0.66})
    table = over_seeds([run])
    assert table["mean"].tolist() == [0.66] and table[["std", "ci_low", "ci_high"]].isna().all(axis=None)
    assert "| 1 (7) | 66.0 % | – | none: one seed |" in said([run])
    assert "No differences between stages: no split and level has two." in said([run])


def test_seeds_that_agree_have_no_interval(tmp_path):
    runs = write_seeds(tmp_path, {E1: 0.1}, {E1: 0.1}, {E1: 0.1})
    table = over_seeds(runs)
    assert table["std"].tolist() == [0] and table[["ci_low", "ci_high"]].isna().all(axis=None)
    assert "| 3 (1 2 3) | 10.0 % | 0.00 points | none: all alike |" in said(runs)


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
    assert "Some seeds lack some rows" in said(runs)


def test_what_cannot_be_put_together_is_refused_all_at_once(tmp_path):
    few = write_results(tmp_path, 1, {("e1", "test", "all"): 0.6}, questions=500)
    many = write_results(tmp_path, 2, {("e1", "test", "all"): 0.6})
    found = "\n".join(refused([few, many, many, tmp_path / "race-seed9"]))
    assert "e1 test all: the seeds answered different numbers of questions: 500 (seed 1), 1000 (seed 2)" in found
    assert f"two run folders of seed 2: name each seed once ({many}, {many})" in found
    assert "race-seed9/results.csv: not found" in found


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
    text = said(runs)
    assert "| e1 | test | all | 48 |" in text and "| e1 | test | middle | 28–30 |" in text
    assert "The seeds answered different questions" in text and "beyond" not in text


def test_an_interval_beyond_0_to_100_percent_is_not_given(tmp_path):
    """20 and 90 %: 55 % ± 12.7062 · 35 points. 1 and 2 %: 1.5 % ± 6.4 points, beyond 0; 98 and 99 %: beyond 100."""
    low, high = ("e1", "test", "middle"), ("e1", "test", "high")
    runs = write_seeds(tmp_path, {E1: 0.2, low: 0.01, high: 0.98}, {E1: 0.9, low: 0.02, high: 0.99})
    assert over_seeds(runs)[["ci_low", "ci_high"]].isna().all(axis=None)
    assert said(runs).count("| none: beyond 0 to 100 % |") == 3
    assert "too few seeds for a useful one" in said(runs)


def test_two_checkpoints_of_a_stage_are_refused(tmp_path):
    run = write_results(tmp_path, 1, {("e1", "test", "all"): 0.6})
    table = pd.read_csv(f"{run}/results.csv")
    pd.concat([table, table.assign(checkpoint="other.ckpt")]).to_csv(f"{run}/results.csv", index=False)
    with pytest.raises(RaceError, match=r"several checkpoints of e1 on test.*e1-seed1.ckpt, other.ckpt"):
        over_seeds([run])


def test_the_same_row_twice_is_refused(tmp_path):
    """A checkpoint written again under the same name: its hash tells, and without hashes the row that stands twice."""
    run = write_results(tmp_path, 1, {E1: 0.6})
    table = pd.read_csv(f"{run}/results.csv")
    both = pd.concat([table, table])
    both.to_csv(f"{run}/results.csv", index=False)
    assert refused([run]) == [f"{run}/results.csv has several rows of e1 on test all; keep one of each"]
    both.assign(checkpoint_sha256=["a" * 64, "b" * 64]).to_csv(f"{run}/results.csv", index=False)
    (line,) = refused([run])
    assert "several checkpoints of e1 on test" in line
    assert line.endswith("e1-seed1.ckpt (aaaaaaaa), e1-seed1.ckpt (bbbbbbbb)")


def test_one_checkpoint_under_two_seeds_is_refused(tmp_path):
    first = write_results(tmp_path, 1, {E1: 0.6, E2: 0.7}, checkpoint_sha256=["a" * 64, "b" * 64])
    copied = write_results(tmp_path, 2, {E1: 0.6, E2: 0.7}, checkpoint_sha256=["a" * 64, "b" * 64])
    other = write_results(tmp_path, 3, {E1: 0.6, E2: 0.7}, checkpoint_sha256=["c" * 64, "d" * 64])
    (line,) = refused([first, copied, other])
    assert line.startswith(f"{first} and {copied} have the same checkpoint of e1 on test (aaaaaaaa), e2 on test (bbbb")
    assert "that is one seed, not several" in line
    assert over_seeds([first, other])["n"].tolist() == [2, 2]


@pytest.mark.parametrize("column", ["cache_sha256", "max_len", "precision"])
def test_results_of_other_settings_are_refused(tmp_path, column):
    """Between seeds, and between the stages of one seed, of which differences are taken."""
    middle = ("e1", "test", "middle")
    first = write_results(tmp_path, 1, {E1: 0.6, middle: 0.6}, **{column: "256"})
    second = write_results(tmp_path, 2, {E1: 0.6, middle: 0.6}, **{column: "512"})
    (line,) = refused([first, second])
    assert line.startswith(f"test all, test middle: {column} differs: 256 ({first}: e1), 512 ({second}: e1); score all")
    stages = write_results(tmp_path, 3, {E1: 0.6, E2: 0.7}, **{column: ["256", "512"]})
    (line,) = refused([stages])
    assert line.startswith(f"test all: {column} differs: 256 ({stages}: e1), 512 ({stages}: e2)")


def test_settings_that_may_differ_and_files_without_them_pass(tmp_path):
    same = {"cache_sha256": "c" * 64, "precision": "32-true"}
    runs = [write_results(tmp_path, 1, {E1: 0.6}, **same, max_len=512, batch_size=8, device="CPU", limit_questions=1)]
    runs += [write_results(tmp_path, 2, {E1: 0.6}, **same, max_len=512, batch_size=32, device="GPU", limit_questions=2)]
    runs += [write_results(tmp_path, 3, {E1: 0.6})]  # of an earlier version
    mixed = {"max_len": [512, None], "cache_sha256": [same["cache_sha256"], None]}  # pandas writes 512.0
    runs += [write_results(tmp_path, 4, {E1: 0.6, ("e1", "validation", "all"): 0.6}, **mixed)]
    assert over_seeds(runs)["n"].tolist() == [4, 1]


def test_stages_of_one_seed_that_answered_other_questions_are_refused(tmp_path):
    run = write_results(tmp_path, 1, {E1: 0.6, E2: 0.7}, questions=500)
    table = pd.read_csv(f"{run}/results.csv")
    table.assign(questions=[500, 1000]).to_csv(f"{run}/results.csv", index=False)
    (line,) = refused([run])
    assert line.startswith(f"{run}, test all: the stages answered different numbers of questions: 500 (e1), 1000 (e2)")


def test_cells_that_cannot_be_are_refused_by_row_and_column(tmp_path):
    run = write_results(tmp_path, 1, {E1: 0.6, E2: 0.7, E3: 0.8})
    wrong = ["stage,checkpoint,split,level,questions,correct,accuracy,ci_low,ci_high"]
    wrong += ["e1,e1.ckpt,test,all,100,60,0.6,0,1", "", "e2,,test,,none,60,,0,1", " ,e3.ckpt,,all,2.5,60,60,0,1", ""]
    Path(f"{run}/results.csv").write_text("\n".join(wrong))
    other = write_results(tmp_path, 2, {E1: 1.01})
    lines = [line.removeprefix(f"{run}/results.csv, ") for line in refused([run, other])]
    assert [line.removesuffix("; score this checkpoint again") for line in lines] == [
        "row 4, column checkpoint: is empty",
        "row 4, column level: is empty",
        "row 4, column questions: 'none' is not a whole number from 1",
        "row 4, column accuracy: is empty",
        "row 5, column stage: is empty",
        "row 5, column split: is empty",
        "row 5, column questions: '2.5' is not a whole number from 1",
        "row 5, column accuracy: '60' is not a number from 0 to 1",
        f"{other}/results.csv, row 2, column accuracy: '1.01' is not a number from 0 to 1",
    ]


def test_a_table_without_rows_names_its_cause(tmp_path):
    bare, nothing = write_results(tmp_path, 1, {}), write_results(tmp_path, 2, {})
    Path(f"{nothing}/results.csv").write_text("")
    lines = refused([bare, nothing])
    assert lines[0] == f"{bare}/results.csv has no rows; run the evaluation notebooks of this seed again"
    assert lines[1].startswith(f"{nothing}/results.csv: cannot be read")
    assert refused([]) == ["no run folder is named: name that of each seed"]


# -------------------------------------------------------------------------------------------------- differences


def test_differences_of_three_seeds_by_hand(tmp_path):
    """+0.5, −0.8 and +0.1 points: mean −0.2 / 3, deviations .566667, −.733333, .166667, their squares' sum .886667. The
    standard deviation is √.443333 = .665833, the standard error .384419, t = −.173422, the half width
    4.302653 · .384419 = 1.654021. With 2 degrees of freedom p = 1 − |t| / √(2 + t²) = 1 − .173422 / 1.424807.
    """
    runs = write_seeds(tmp_path, *CHAIN)
    (row,) = differences(runs).to_dict("records")
    assert (row["first"], row["second"], row["split"], row["level"]) == ("e2", "e3", "test", "all")
    assert (row["n"], row["seeds"], row["each_in_points"]) == (3, "1 2 3", "+0.5, −0.8, +0.1")
    found = [100 * row[name] for name in ("mean", "std", "ci_low", "ci_high", "lowest", "highest")]
    assert found == pytest.approx([-0.066667, 0.665833, -1.720688, 1.587354, -0.8, 0.5], abs=1e-5)
    assert row["p"] == row["p_holm"] == pytest.approx(0.878284, abs=1e-5)
    cells = "| e3 − e2 | test | all | 3 (1 2 3) | −0.1 points | 0.67 points | −1.7 to +1.6 | 0.88 |"
    assert f"{cells} 0.88: not significant | +0.5, −0.8, +0.1 |" in said(runs)


def test_holm_over_the_pairs_of_one_split_and_level(tmp_path):
    """e2 − e1: 9, 10, 11 points, t = 10 √3; e3 − e1: 9.5, 9.2, 11.1; e3 − e2 as above. The smallest p counts three
    times (0.0099); the next twice (0.0070), but never less than the one before. The level middle has one pair, whose p
    is not adjusted by these.
    """
    e1 = [{E1: 0.61}, {E1: 0.65}, {E1: 0.57}]
    middle = [
        {("e1", "test", "middle"): a, ("e2", "test", "middle"): b} for a, b in ((0.5, 0.6), (0.5, 0.7), (0.5, 0.8))
    ]
    runs = write_seeds(tmp_path, *(a | b | c for a, b, c in zip(e1, CHAIN, middle, strict=True)))
    table = differences(runs)
    assert [f"{row.level} {row.second} − {row.first}" for row in table.itertuples()] == [
        "all e2 − e1",
        "all e3 − e1",
        "all e3 − e2",
        "middle e2 − e1",
    ]
    p = [1 - t / (2 + t * t) ** 0.5 for t in (10 * 3**0.5, 9.933333 / 1.021437 * 3**0.5, 0.173422, 2 * 3**0.5)]
    assert table["p"].tolist() == pytest.approx(p, abs=1e-5)
    assert table["p_holm"].tolist() == pytest.approx([3 * p[0], 3 * p[0], p[2], p[3]], abs=1e-5)
    text = said(runs)
    assert "| 0.0033 | 0.01: significant | +9.0, +10.0, +11.0 |" in text
    assert "| 0.074 | 0.074: not significant | +10.0, +20.0, +30.0 |" in text


def test_significant_follows_holm(tmp_path):
    """Three pairs: e2 − e1 has p = 0.035 (t = 5.196), and three times that after Holm."""
    seeds = [{E1: 0.5, E2: 0.5 + d, E3: 0.5 + e} for d, e in ((0.02, 0.01), (0.03, 0.0), (0.04, -0.01))]
    text = said(write_seeds(tmp_path, *seeds))
    assert "| +1.3 to" not in text and "| 0.035 | 0.11: not significant | +2.0, +3.0, +4.0 |" in text
    assert " significant |" not in text.replace("not significant", "")


def test_one_seed_has_a_difference_without_interval_and_p(tmp_path):
    runs = write_seeds(tmp_path, CHAIN[0])
    (row,) = differences(runs).to_dict("records")
    assert row["mean"] == pytest.approx(0.005) and row["n"] == 1
    assert pd.isna([row[name] for name in ("std", "ci_low", "ci_high", "p", "p_holm")]).all()
    cells = "| e3 − e2 | test | all | 1 (1) | +0.5 points | – | none: one seed | none: one seed | – | +0.5 |"
    assert cells in said(runs) and "about these checkpoints and not about the recipe" in said(runs)


def test_differences_that_are_all_alike_have_no_interval_and_no_p(tmp_path):
    """0.3 − 0.2, 0.4 − 0.3 and 0.9 − 0.8 differ in the 17th digit."""
    runs = write_seeds(tmp_path, {E1: 0.2, E2: 0.3}, {E1: 0.3, E2: 0.4}, {E1: 0.8, E2: 0.9})
    (row,) = differences(runs).to_dict("records")
    assert row["std"] == 0 and pd.isna([row[name] for name in ("ci_low", "ci_high", "p", "p_holm")]).all()
    text = "| +10.0 points | 0.00 points | none: all alike | none: all alike | – | +10.0, +10.0, +10.0 |"
    assert text in said(runs)


def test_an_interval_beyond_100_points_is_not_given(tmp_path):
    """+40 and +10 points: 25 ± 12.7062 · 15. With 1 degree of freedom p = 2 / π · atan(1 / t), t = 25 / 15."""
    runs = write_seeds(tmp_path, {E1: 0.3, E2: 0.7}, {E1: 0.6, E2: 0.7})
    (row,) = differences(runs).to_dict("records")
    assert pd.isna([row["ci_low"], row["ci_high"]]).all()
    assert row["p"] == pytest.approx(2 / math.pi * math.atan(15 / 25))
    assert "| none: beyond −100 to +100 points | 0.34 | 0.34: not significant |" in said(runs)
    assert "too few seeds for a useful one" in said(runs)


def test_only_seeds_that_have_both_stages_count(tmp_path):
    """The means of e2 (over 1, 2, 3) and e3 (over 1, 2) differ by 1.35 points; the pairs by −0.15."""
    runs = write_seeds(tmp_path, CHAIN[0], CHAIN[1], {E2: 0.68})
    (row,) = differences(runs).to_dict("records")
    assert (row["seeds"], row["each_in_points"]) == ("1 2", "+0.5, −0.8")
    assert row["mean"] == pytest.approx(-0.0015)
    assert "- e3 − e2 on test all is over seeds 1 2, but the mean of e2 is over 1 2 3." in said(runs)
    assert "and so not the difference of the two means above" in said(runs)
    assert "is over seeds" not in said(runs[:2])


def test_stages_that_no_seed_has_both(tmp_path):
    runs = write_seeds(tmp_path, {E1: 0.6}, {E2: 0.7})
    assert differences(runs)["n"].tolist() == [0]
    assert "| e2 − e1 | test | all | 0 | – | – | none: no seed has both | none: no seed has both | – | – |" in said(
        runs
    )


def test_command_line(tmp_path, capsys):
    runs = [write_results(tmp_path, s, {("e1", "test", "all"): a}) for s, a in ((1, 0.66), (2, 0.68), (3, 0.70))]
    assert main([*runs, "--out", str(tmp_path / "over" / "results.csv")]) == 0
    text = capsys.readouterr().out
    assert "| e1 | test | all | 1,000 | 3 (1 2 3) | 68.0 % | 2.00 points | 63.0 % to 73.0 % |" in text
    assert WHAT_IS_COVERED in text and text.endswith("results-differences.csv\n")
    saved = pd.read_csv(tmp_path / "over" / "results.csv")
    assert saved["mean"].tolist() == [pytest.approx(0.68)] and len(list((tmp_path / "over").iterdir())) == 2
    assert main([str(tmp_path)]) == 1 and "not found" in capsys.readouterr().err


def test_differences_are_saved_beside_the_means(tmp_path, capsys):
    assert main([*write_seeds(tmp_path, *CHAIN), "--out", str(tmp_path / "means.csv")]) == 0
    saved = pd.read_csv(tmp_path / "means-differences.csv")
    assert saved["each_in_points"].tolist() == ["+0.5, −0.8, +0.1"] and saved["p"].tolist() == [pytest.approx(0.878284)]
