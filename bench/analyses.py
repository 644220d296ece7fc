"""All analyses of both evaluation notebooks on 5,000 questions of saved predictions: statistics, figures, browser.

The predictions are drawn at random and saved once, three models' worth; questions and articles are those of the real
cache where it is at hand. On the clock: reading the predictions, and everything that follows from them.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from bench.common import in_turn, real_cache, report, spread, timed
from race import LETTERS
from race.data import RaceDataModule
from race.data.module import RaceDataset
from race.report import figures, score_figures, sentences
from race.report.error_browser import error_browser, mistake_cards
from race.score import calibration, comparison, statistics
from race.score.predict import question_facts
from race.score.results import accuracy_table, read_predictions, save_predictions
from race.score.statistics import SEEN_COLUMNS

MODELS = ("e1", "e2", "e3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=5000)
    options = parser.parse_args()
    dataset = RaceDataModule(real_cache(), limit_questions=options.questions).dataset("train")
    with tempfile.TemporaryDirectory() as folder:
        write_predictions(Path(folder), dataset)
        sides = {
            "one checkpoint": lambda: timed(lambda: one_checkpoint(Path(folder), dataset)),
            "side by side": lambda: timed(lambda: side_by_side(Path(folder))),
        }
        seconds = in_turn(sides, options.rounds)
    report(
        "analyses", {"questions": len(dataset), "seconds": {side: spread(values) for side, values in seconds.items()}}
    )


def write_predictions(folder: Path, dataset: RaceDataset) -> None:
    """Save predictions of three models that are right on a third, a half and two thirds of the questions or so."""
    columns, facts = dataset.columns(), question_facts(dataset)
    rng = np.random.default_rng(0)
    for model, skill in zip(MODELS, (0.5, 1.2, 2.0), strict=True):
        logits = rng.normal(0, 1, (len(dataset), 4))
        logits[np.arange(len(dataset)), columns["label"]] += skill
        table = facts.assign(**{name: columns[name] for name in ("example_id", "question_index", "level")})
        table["answer"] = np.take(LETTERS, columns["label"])
        table["prediction"] = np.take(LETTERS, logits.argmax(1))
        table = table.assign(**dict.fromkeys(SEEN_COLUMNS.values(), pd.array([False] * len(table), "boolean")))
        table[statistics.PROBABILITIES] = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        save_predictions(folder / f"{model}.parquet", table, {"settings": {}})


def read(folder: Path, model: str):
    """The saved predictions of a model."""
    return read_predictions(folder / f"{model}.parquet", {})[0]


def one_checkpoint(folder: Path, dataset: RaceDataset) -> None:
    """What eval_test_dataset_race.ipynb does with predictions."""
    predictions, validation = read(folder, "e3"), read(folder, "e2")
    table = accuracy_table(predictions, "e3", "e3.ckpt", "test")
    groups = statistics.group_accuracies(predictions)
    temperature, _ = calibration.fit_temperature(validation)
    after = calibration.at_temperature(predictions, temperature)
    versions, change = {"as is": predictions, "changed": after}, calibration.log_loss_change(predictions, after)
    calibrated, curve = calibration.calibration_table(versions), calibration.coverage_curve(predictions)
    calibration.coverage_groups(curve)
    sentences.headline(table.assign(macro_accuracy=0.5, macro_low=0.4, macro_high=0.6))
    sentences.calibration(calibrated, temperature, change)
    sentences.groups(groups)
    for sentence in (sentences.overlap, sentences.letters, sentences.longest_option):
        sentence(predictions)
    diagrams = {name: calibration.reliability(version) for name, version in versions.items()}
    drawn = [
        score_figures.accuracy_figure(table),
        score_figures.groups_figure(groups, sentences.groups_title(groups)),
        score_figures.confusion_figure(statistics.confusion(predictions)),
        score_figures.confidence_figure(diagrams, calibrated, curve),
    ]
    for number, figure in enumerate(drawn):
        figures.save_figure(figure, folder, f"one-{number}")
    mistake_cards(predictions, dataset)
    error_browser(predictions, dataset)


def side_by_side(folder: Path) -> None:
    """What eval_test_dataset_race_2.ipynb does with predictions."""
    predictions = {model: read(folder, model) for model in MODELS}
    pairs = comparison.compare_pairs(predictions)
    title = sentences.short_verdict(predictions, pairs)
    sentences.verdict(predictions, pairs)
    together = comparison.ensemble(list(predictions.values()))
    comparison.compare_pairs({"e3": predictions["e3"], "the ensemble": together})
    figures.save_figure(figures.differences_figure(pairs, title), folder, "pairs")


if __name__ == "__main__":
    main()
