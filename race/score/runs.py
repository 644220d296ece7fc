"""Runs of recipes, one for each seed: what they had, their course, what they answer; stages over seeds likewise."""

import dataclasses
import functools
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd

from race import CHAIN, RaceError
from race.data import Cache, RaceDataModule
from race.files import write_json
from race.recipes import run_name
from race.score.comparison import at_chance, compare_runs
from race.score.predictions import Predictions, kept_predictions, save_results
from race.score.statistics import is_correct, wilson
from race.train.stages import Stage, read_log, stages_of
from race.train.state import read_state

Correct = dict[str, np.ndarray]  # [seeds, questions] right or wrong, by recipe or by stage


@dataclasses.dataclass(frozen=True)
class Run:
    """One recipe trained with one seed: its folders, and the stages that it has been through; files are read once."""

    recipe: str
    seed: int | None
    checkpoint_dir: str
    run_dir: str

    @functools.cached_property
    def stages(self) -> list[Stage]:
        """The stages in order; raises RaceError if there is none."""
        return stages_of(self.checkpoint_dir, self.run_dir)

    @functools.cached_property
    def record(self) -> dict:
        """The recipe as race.chain was last started with it; empty if that is not known."""
        path = Path(self.run_dir) / "recipe.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @functools.cached_property
    def chosen(self):
        """The best checkpoint of its last stage."""
        return self.stages[-1].best()

    @property
    def last_epoch(self):
        """The checkpoint of the last epoch of its last stage."""
        return _newest(self.stages[-1])

    def settings(self) -> dict:
        """What each stage was trained with, as its checkpoints remember it, but the seed: {"e1 batch_size": 32, …}."""
        own = {stage.name: _settings(_newest(stage)) for stage in self.stages}
        return {f"{stage} {name}": value for stage, settings in own.items() for name, value in settings.items()}

    def problem(self) -> str | None:
        """Why it cannot be compared."""
        again = f"run python -m race.chain race (or demo) [--name NAME] --recipe {self.recipe}"
        again += "" if self.seed is None else f" --seeds {self.seed}"
        try:
            begun = [stage.name for stage in self.stages]
            states = {stage.name: read_state(stage.state_path) for stage in self.stages}
            seed = self.chosen.lineage.get("recipe", {}).get("seed")
        except RaceError as error:
            return f"{error}; {again}"
        asked = list(self.record.get("stages", begun))
        unfinished = [name for name, state in states.items() if state and not state["finished"]]
        if begun != asked or unfinished:
            missing = f"{', '.join(begun)} of {', '.join(asked)}; not finished: {', '.join(unfinished) or 'none'}"
            return f"{self.checkpoint_dir} has stages {missing}: {again}"
        if None not in (seed, self.seed) and seed != self.seed:
            return f"{self.checkpoint_dir} was trained with seed {seed}, not {self.seed}"
        return None


def _newest(stage: Stage):
    return max(stage.saved, key=lambda it: it.epoch)


def _settings(checkpoint) -> dict:
    """The recipe of a checkpoint and its cache, without what does not change the training."""
    lineage, other = checkpoint.lineage, ("seed", "max_epochs", "early_stopping")  # seen in the checkpoints themselves
    other += ("token_budget", "accelerator", "deterministic", "compile")  # of rounding
    own = {"code": lineage.get("code"), "cache": (lineage.get("cache") or {}).get("source_sha256")}
    own |= {name: value for name, value in lineage.get("recipe", {}).items() if name not in other}
    for later in lineage.get("went_on_with", []):  # what was changed on the way
        own |= {name: f"{old}, then {new}" for name, (old, new) in later.get("recipe", {}).items() if name in own}
        own["code"] = later.get("code") or own["code"]
    return {name: value for name, value in own.items() if value is not None}


def find_runs(checkpoint_dir: str, run_dir: str, recipes: list[str], seeds: list[int] | None) -> dict[str, list[Run]]:
    """The runs of each recipe, as race.chain names their folders; raises RaceError with all that cannot be compared.

    seeds: None: the one run of each recipe without a seed in its name.
    """
    problems, found = [], {}
    if len(recipes) < 2 or len(set(recipes)) < len(recipes):
        problems.append(f"RECIPES is {recipes}: name two or more, each once; the others are compared with the first")
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
        problems.append(f"SEEDS is {seeds}: name one or more, each once")
    for recipe in dict.fromkeys(recipes):
        names = [(seed, run_name("", recipe, seed)) for seed in seeds or [None]]
        found[recipe] = [Run(recipe, seed, f"{checkpoint_dir}{name}", f"{run_dir}{name}") for seed, name in names]
        own = [problem for run in found[recipe] if (problem := run.problem())]
        problems += own or unlike(found[recipe])
    runs = [run for of_recipe in found.values() for run in of_recipe]
    if len(recipes) > 1 and not any(Path(run.checkpoint_dir).exists() for run in runs):
        given = " ".join(["--recipe", *recipes, *(["--seeds", *map(str, seeds)] if seeds else [])])
        made = f"python -m race.chain race (or demo) [--name NAME] {given}"
        problems = [f"no runs such as {runs[0].checkpoint_dir}: make them with {made}"]
    if not problems:
        hashes = [run.chosen.sha256 for run in runs]
        if same := [run.checkpoint_dir for run in runs if hashes.count(run.chosen.sha256) > 1]:
            problems.append(f"{', '.join(same)}: the same checkpoint, which says nothing of two recipes")
    if problems:
        raise RaceError("\n".join(dict.fromkeys(problems)))
    return found


def unlike(runs: list[Run]) -> list[str]:
    """A problem for the runs of one recipe that differ in more than the seed, or not even in that."""
    problems, first = [], runs[0].settings()
    for run in runs[1:]:
        own = run.settings()
        names = {name for name in own.keys() | first.keys() if own.get(name) != first.get(name)}
        if differ := sorted(names - {f"{it} code" for it in CHAIN if not {f"{it} code"} <= own.keys() & first.keys()}):
            told = f"{run.checkpoint_dir} differs from {runs[0].checkpoint_dir} in {', '.join(differ)}"
            problems.append(f"{told}: runs of one recipe differ in their seed only")
    hashes = [run.chosen.sha256 for run in runs]
    if len(set(hashes)) < len(hashes):
        folders = ", ".join(run.checkpoint_dir for run in runs)
        problems.append(f"{folders}: two have the same checkpoint: that is one seed, not several")
    return problems


def training_totals(found: dict[str, list[Run]], cache: Cache) -> pd.DataFrame:
    """What the runs of each recipe had, a row each; of numbers that differ between its seeds, the largest.

    Columns: recipe, stages (how many), learning_rate (the highest of each stage), epochs, questions (trained on),
    checkpoints (to choose from), choices (by stage), seeds, monitor (of all, or of each stage), learning_rates_tried,
    fewest_epochs (of its seeds), also (dict: settings that should be the same for all recipes).
    """
    rows = []
    for run in itertools.chain(*found.values()):
        last, saved = run.last_epoch, [len(stage.saved) for stage in run.stages]
        row = {"recipe": run.recipe, "stages": len(run.stages), "epochs": 0, "questions": 0, "checkpoints": sum(saved)}
        row["choices"] = " + ".join(map(str, saved))
        for stage in run.stages:
            epochs = 1 + max(checkpoint.epoch for checkpoint in stage.saved)
            row["epochs"] += epochs
            row["questions"] += epochs * _questions(stage, cache)
        row["learning_rate"] = [stage.saved[0].learning_rate for stage in run.stages]
        rules = [stage.saved[0].monitor for stage in run.stages]
        row["monitor"] = rules if len({*rules}) > 1 else rules[:1]
        row |= {"learning_rates_tried": run.record.get("learning_rates_tried"), "fewest_epochs": row["epochs"]}
        settings = _settings(last)
        also = {name: settings.get(name) for name in ("batch_size", "max_len", "precision", "cache", "code")}
        rows.append(row | {"seeds": 1, "also": also})
    whole = dict.fromkeys(["stages", "epochs", "questions", "checkpoints"], "max")
    whole |= dict.fromkeys(["learning_rate", "monitor", "learning_rates_tried", "also", "choices"], "first")
    table = pd.DataFrame(rows).groupby("recipe", sort=False).agg(whole | {"seeds": "sum", "fewest_epochs": "min"})
    return table.reset_index().astype({"learning_rates_tried": "Int64"})


def _questions(stage: Stage, cache: Cache, split: str = "train") -> int:
    """How many questions of a split its training used in an epoch."""
    recipe = stage.saved[0].lineage.get("recipe", {})
    sample = {name: recipe.get(name) for name in ("limit_questions", "level")}
    return len(RaceDataModule(cache, seed=recipe.get("seed") or 0, **sample).open_split(split))


def training_curves(found: dict[str, list[Run]], cache: Cache) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """(validation after each epoch, the learning rate at each logged step, notes on logs that are missing).

    Columns: recipe, seed, questions (trained on by then), and val_loss_epoch and val_acc, or learning_rate and stage.
    """
    validated, rates, notes = [], [], []
    for run in itertools.chain(*found.values()):
        before, names = 0, {"recipe": run.recipe, "seed": run.seed}
        for stage in run.stages:
            an_epoch = _questions(stage, cache)
            try:
                log, epochs = _course(run.run_dir, stage.name, before, an_epoch)
            except (RaceError, KeyError) as error:
                notes.append(f"{run.run_dir}, {stage.name}: no log to draw ({error})")
                break
            validated.append(epochs[["questions", "val_loss_epoch", "val_acc"]].assign(**names))
            steps = (epochs["step"].max() + 1) / len(epochs)  # of an epoch
            logged = log[["step", "learning_rate"]].dropna()
            at_step = before + (logged["step"] + 1) / steps * an_epoch
            rates.append(logged.assign(questions=at_step, stage=stage.name, **names))
            before = epochs["questions"].max()
    return _joined(validated), _joined(rates), notes


def learning_story(run_dir: str | Path, stages: list[Stage], cache: Cache) -> tuple[pd.DataFrame, list[str]]:
    """Validation after each epoch of all stages over the questions seen, and notes on logs that are missing.

    Columns: stage, monitor, epoch (from 0), questions (trained on by then, in all), val_loss, val_acc, val_low and
    val_high (Wilson's 95 % interval), learning_rate (the highest).
    """
    parts, before = [], 0
    notes = [] if stages else ["no curves: these are not stages of one run"]
    for stage in stages:
        try:
            log, epochs = _course(run_dir, stage.name, before, _questions(stage, cache))
            asked, losses = _questions(stage, cache, "validation"), dict(epochs[["epoch", "val_loss_epoch"]].to_numpy())
            best = stage.saved[0]
            trained_on = (best.lineage.get("cache") or {}).get("source_sha256", cache.identity["source_sha256"])
            same = math.isclose(losses.get(best.epoch, math.nan), best.val_loss or math.nan, rel_tol=1e-6)
            if not same or trained_on != cache.identity["source_sha256"]:
                raise RaceError("of another run")
        except (RaceError, KeyError):
            notes.append(f"{stage.name} is missing: no log in {run_dir}/logs fits its checkpoints and {cache}")
            continue
        low, high = wilson(epochs["val_acc"] * asked, asked)
        own = epochs[["epoch", "questions", "val_acc"]].assign(val_loss=epochs["val_loss_epoch"], val_low=low)
        own = own.assign(val_high=high, stage=stage.name, monitor=best.monitor)
        parts.append(own.assign(learning_rate=log["learning_rate"].max()))
        before = epochs["questions"].max()
    return _joined(parts), notes


def _course(run_dir: str | Path, stage: str, before: int, an_epoch: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(log of a stage, its rows of validations with the questions trained on by then, `before` of them before it)."""
    log = read_log(run_dir, stage)
    epochs = log.dropna(subset="val_loss_epoch").drop_duplicates("epoch", keep="last").astype({"epoch": int})
    return log, epochs.assign(questions=before + (epochs["epoch"] + 1) * an_epoch)


def _joined(parts: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def correct_answers(
    found: dict[str, list[Run]], data, split: str, run_dir, **how
) -> tuple[Correct, Correct, pd.DataFrame]:
    """(answers of the chosen checkpoints, of those of the last epoch, predictions of the first run for their facts).

    Raises RaceError if a checkpoint was trained on most of the questions.
    """
    scored = {}
    for run in itertools.chain(*found.values()):
        for checkpoint in (run.chosen, run.last_epoch):
            if checkpoint.sha256 not in scored:
                scored[checkpoint.sha256] = _on_new_questions(checkpoint, data, split, run_dir, **how)
    save_results(run_dir, list(scored.values()))
    right = {sha256: is_correct(predictions.table) for sha256, predictions in scored.items()}
    chosen = {name: np.stack([right[run.chosen.sha256] for run in runs]) for name, runs in found.items()}
    last = {name: np.stack([right[run.last_epoch.sha256] for run in runs]) for name, runs in found.items()}
    return chosen, last, next(iter(scored.values())).table


def _on_new_questions(checkpoint, data: RaceDataModule, split: str, run_dir, **how) -> Predictions:
    predictions = kept_predictions(checkpoint, data, split, run_dir, **how)
    if predictions.table["article_in_train"].fillna(False).mean() > 0.5:
        raise RaceError(f"{checkpoint} was trained on most of these questions: choose another SPLIT")
    return predictions


def accuracies(chosen: Correct, facts: pd.DataFrame, last: Correct | None = None) -> pd.DataFrame:
    """Mean accuracy over seeds of each recipe, a row each; each and sd: of every seed; at_chance: how many.

    facts: predictions of a run.
    """
    each = {recipe: pd.Series(runs.mean(1)) for recipe, runs in chosen.items()}
    rows = [{"recipe": name, "accuracy": it.mean(), "each": it.tolist(), "sd": it.std()} for name, it in each.items()]
    failed = at_chance(chosen, facts)
    table = pd.DataFrame(rows).assign(at_chance=[len(failed.get(name, [])) for name in each])
    return table if last is None else table.assign(last_epoch=[last[recipe].mean() for recipe in each])


def record_margin(run_dir: str | Path, margin: float) -> float:
    """The points that would matter, as they were when the runs of a comparison were started; noted if it is new."""
    path = Path(run_dir) / "planned.json"
    if not path.exists():
        write_json(path, {"difference": margin, "when": time.strftime("%Y-%m-%d %H:%M:%S")})
    return json.loads(path.read_text(encoding="utf-8"))["difference"]


def stages_over_seeds(runs: list[Run], data: RaceDataModule, split: str, **how) -> tuple[pd.DataFrame, dict]:
    """The best checkpoints of each stage over the seeds: (accuracies, compare_runs: each against the first stage).

    runs: of one recipe, one for each seed; how: precision and accelerator. Raises RaceError.
    """
    if problems := unlike(runs):
        raise RaceError("\n".join(problems))
    answers: dict[str, list[np.ndarray]] = {}
    for run in runs:
        for stage in run.stages:
            facts = _on_new_questions(stage.best(), data, split, run.run_dir, **how).table
            answers.setdefault(stage.name, []).append(is_correct(facts))
    correct = {stage: np.stack(each) for stage, each in answers.items()}
    return accuracies(correct, facts), compare_runs(correct, facts)
