"""The runs of several recipes, one for each seed: what they had, their checkpoints, their course, their answers."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pandas as pd

from race import RaceError
from race.data import RaceDataModule
from race.recipes import run_name
from race.score import predict
from race.score.recipes import CHOICES, against_baseline
from race.score.statistics import is_correct, mostly_trained_on
from race.train.checkpoints import Checkpoint
from race.train.logs import read_log
from race.train.stages import Stage, begun_stages, by_the_other_rule
from race.train.state import read_state


@dataclasses.dataclass(frozen=True)
class Run:
    """One recipe trained with one seed: its folders, and the stages that it has been through; files are read once."""

    recipe: str
    seed: int | None
    checkpoint_dir: str
    run_dir: str

    @functools.cached_property
    def stages(self) -> dict[Stage, list[Checkpoint]]:
        """The stages in order, each with its checkpoints, best first; raises RaceError if there is none."""
        begun = begun_stages(self.checkpoint_dir)
        return {dataclasses.replace(stage, run_dir=self.run_dir): stage.saved() for stage in begun}

    @property
    def record(self) -> dict:
        """The recipe as race.chain was last started with it; empty if that is not known."""
        try:
            return json.loads((Path(self.run_dir) / "recipe.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    @property
    def settings(self) -> dict:
        """What each stage was trained with, as its checkpoints remember it, but the seed."""
        return {stage.name: _settings(saved[0]) for stage, saved in self.stages.items()}

    @functools.cached_property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Those of its last stage that are scored, by CHOICES: the other rule's may be the same."""
        last, saved = list(self.stages.items())[-1]
        best = last.best()
        found = [best, by_the_other_rule(best), max(saved, key=lambda it: it.epoch)]
        return dict(zip(CHOICES, found, strict=True))

    def problems(self) -> list[str]:
        """Why it cannot be compared."""
        named = f"--recipe {self.recipe}" + ("" if self.seed is None else f" --seeds {self.seed}")
        again = f"run python -m race.chain with {named}"
        if not list(Path(self.checkpoint_dir).glob("*.ckpt")):
            return [f"{self.checkpoint_dir} has no checkpoints: {again}"]
        try:
            stages, problems = self.stages, []
            begun, asked = [stage.name for stage in stages], list(self.record.get("stages", {}))
            if asked and begun != asked:
                have = f"has stages {', '.join(begun)}, its recipe {', '.join(asked)}"
                problems.append(f"{have}: {again}, with --fresh if they are too many")
            for stage in stages:
                problems += stage.damaged()
                state = read_state(stage.state_path) if stage.state_path.exists() else {"finished": True}
                if not state["finished"]:
                    where = f"epoch {state['epoch']}, batch {state['batches']}"
                    problems.append(f"{stage.name} ended at {where} before it was finished: {again}")
            seed = self.checkpoints[CHOICES[0]].lineage.get("recipe", {}).get("seed")
            if None not in (seed, self.seed) and seed != self.seed:
                problems.append(f"was trained with seed {seed}, not {self.seed}")
        except RaceError as error:
            problems = [str(error)]
        return [f"{self.checkpoint_dir}: {problem}" for problem in problems]


def _settings(checkpoint: Checkpoint) -> dict:
    """The recipe of a checkpoint and its cache, without what does not change the training."""
    recipe = checkpoint.lineage.get("recipe", {})
    own = {name: value for name, value in recipe.items() if name not in ("seed", "token_budget")}
    return own | {"cache": (checkpoint.lineage.get("cache") or {}).get("source_sha256")}


def find_runs(checkpoint_dir: str, run_dir: str, recipes: list[str], seeds: list[int] | None) -> dict[str, list[Run]]:
    """The runs of each recipe, as race.chain names their folders; raises RaceError with all that cannot be compared.

    seeds: None: the one run of each recipe without a seed in its name.
    """
    problems = []
    if len(recipes) < 2 or len(set(recipes)) < len(recipes):
        problems.append(f"RECIPES is {recipes}: name two or more, each once; the others are compared with the first")
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
        problems.append(f"SEEDS is {seeds}: name one or more, each once")
    found = {
        recipe: [
            Run(recipe, seed, run_name(checkpoint_dir, recipe, seed), run_name(run_dir, recipe, seed))
            for seed in seeds or [None]
        ]
        for recipe in recipes
    }
    for recipe, runs in found.items():
        own = [problem for run in runs for problem in run.problems()]
        problems += own or _unlike(recipe, runs)
    if problems:
        raise RaceError("\n".join(dict.fromkeys(problems)))
    return found


def _unlike(recipe: str, runs: list[Run]) -> list[str]:
    """A problem for the runs of one recipe that differ in more than the seed, or not even in that."""
    problems, first = [], runs[0].settings
    for run in runs[1:]:
        own = run.settings
        differ = [] if own.keys() == first.keys() else ["stages"]
        for stage in first.keys() & own.keys():
            names = sorted(first[stage].keys() | own[stage].keys())
            differ += [f"{stage} {name}" for name in names if first[stage].get(name) != own[stage].get(name)]
        if differ:
            told = f"differs from {runs[0].checkpoint_dir} in {', '.join(differ)}"
            problems.append(f"{run.checkpoint_dir}: {told}: runs of one recipe differ in their seed only")
    hashes = [run.checkpoints[CHOICES[0]].sha256 for run in runs]
    if len(set(hashes)) < len(hashes):
        problems.append(f"{recipe}: two of its runs have the same checkpoint: that is one seed, not several")
    return problems


def budgets(found: dict[str, list[Run]], cache_dir: str) -> pd.DataFrame:
    """What each recipe had, a row each; of numbers that differ between its seeds, the largest.

    Columns: recipe, stages (how many), learning_rate (the highest of each stage), epochs, questions (trained on),
    checkpoints (to choose from), seeds, monitor (the rule of selection), learning_rates_tried (as the recipe says),
    fewest_epochs (of its seeds), also (dict: settings that should be the same for all recipes).
    """
    rows = []
    for recipe, runs in found.items():
        each = [_budget(run, cache_dir) for run in runs]
        row = {name: max(it[name] for it in each) for name in ("stages", "epochs", "questions", "checkpoints")}
        row |= {name: each[0][name] for name in ("learning_rate", "monitor", "also")} | {"seeds": len(runs)}
        row |= {"learning_rates_tried": runs[0].record.get("learning_rates_tried")}
        rows.append({"recipe": recipe, "fewest_epochs": min(it["epochs"] for it in each)} | row)
    columns = ["recipe", "stages", "learning_rate", "epochs", "questions", "checkpoints", "seeds", "monitor"]
    table = pd.DataFrame(rows, columns=[*columns, "learning_rates_tried", "fewest_epochs", "also"])
    return table.astype({"learning_rates_tried": "Int64"})


def _budget(run: Run, cache_dir: str) -> dict:
    epochs, questions, checkpoints, rates = 0, 0, 0, []
    for saved in run.stages.values():
        done = 1 + max(checkpoint.epoch for checkpoint in saved)
        epochs, checkpoints = epochs + done, checkpoints + len(saved)
        questions += done * _training_questions(saved[0], cache_dir)
        rates.append(saved[0].learning_rate)
    row = {"stages": len(rates), "epochs": epochs, "questions": questions, "checkpoints": checkpoints}
    also = {name: _settings(saved[0]).get(name) for name in ("batch_size", "max_len", "precision", "cache")}
    return row | {"learning_rate": rates, "monitor": saved[0].monitor, "also": also}


def _training_questions(checkpoint: Checkpoint, cache_dir: str) -> int:
    """How many questions an epoch of its training had."""
    recipe = checkpoint.lineage.get("recipe", {})
    sample = {name: recipe.get(name) for name in ("limit_questions", "level")}
    return len(RaceDataModule(cache_dir, seed=recipe.get("seed") or 0, **sample).dataset("train"))


def courses(found: dict[str, list[Run]], cache_dir: str) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """(validation after each epoch, the learning rate at each logged step, notes on logs that are missing).

    Columns: recipe, seed, questions (trained on by then), and val_loss_epoch and val_acc, or learning_rate and stage.
    """
    columns = ["recipe", "seed", "questions"]
    validated = [pd.DataFrame(columns=[*columns, "val_loss_epoch", "val_acc"])]
    rates, notes = [pd.DataFrame(columns=[*columns, "learning_rate", "stage"])], []
    for recipe, run in ((recipe, run) for recipe, runs in found.items() for run in runs):
        before = 0
        for stage, saved in run.stages.items():
            try:
                log = read_log(run.run_dir, stage.name)
                logged = log.dropna(subset="learning_rate")
                epochs = log.dropna(subset="val_loss_epoch").drop_duplicates("epoch", keep="last")
            except (RaceError, KeyError) as error:
                notes.append(f"{run.run_dir}, {stage.name}: no log to draw ({error})")
                break
            an_epoch = _training_questions(saved[0], cache_dir)
            steps = (epochs["step"].max() + 1) / len(epochs)  # of an epoch
            names = {"recipe": recipe, "seed": run.seed}
            at_end = before + (epochs["epoch"] + 1) * an_epoch
            validated.append(epochs[["val_loss_epoch", "val_acc"]].assign(questions=at_end, **names))
            at_step = before + (logged["step"] + 1) / steps * an_epoch
            rates.append(logged[["learning_rate"]].assign(questions=at_step, stage=stage.name, **names))
            before = at_end.max()
    tables = [pd.concat(parts[1:] or parts, ignore_index=True) for parts in (validated, rates)]
    return *tables, notes


def answers(found: dict[str, list[Run]], **scoring) -> tuple[dict[str, dict[str, np.ndarray]], pd.DataFrame]:
    """({choice: {recipe: [seeds, questions] right or wrong}}, the predictions of the first run, for their facts).

    scoring: as race.score.predict.score takes it. Raises RaceError if most of the questions trained one of the
    checkpoints.
    """
    correct = {choice: {recipe: [] for recipe in found} for choice in CHOICES}
    scored: dict[str, pd.DataFrame] = {}
    for recipe, runs in found.items():
        for run in runs:
            for choice, checkpoint in run.checkpoints.items():
                if checkpoint.sha256 not in scored:
                    scored[checkpoint.sha256] = predict.score(checkpoint, **scoring)[0]
                    if mostly_trained_on(scored[checkpoint.sha256]):
                        raise RaceError(f"most of these questions trained {checkpoint}: choose another SPLIT")
                correct[choice][recipe].append(is_correct(scored[checkpoint.sha256]))
    first = next(iter(scored.values()))
    return {choice: {name: np.stack(it) for name, it in each.items()} for choice, each in correct.items()}, first


def same_base(found: dict[str, list[Run]]) -> set[str]:
    """The recipes whose last stage starts from the very weights of the first recipe's, seed by seed."""

    def bases(runs: list[Run]) -> list[str | None]:
        best = [run.checkpoints[CHOICES[0]] for run in runs]
        return [checkpoint.lineage.get("weights_start") if checkpoint.chain else None for checkpoint in best]

    (_, baseline), *others = found.items()
    wanted = bases(baseline)
    return {recipe for recipe, runs in others if None not in wanted and bases(runs) == wanted}


def compare(
    found: dict[str, list[Run]], correct: dict[str, dict[str, np.ndarray]], facts: pd.DataFrame
) -> pd.DataFrame:
    """recipes.against_baseline for each of CHOICES, in the column `choice`; p_holm for the chosen ones alone."""
    shared = same_base(found)
    tables = [against_baseline(correct[choice], facts, shared).assign(choice=choice) for choice in CHOICES]
    table = pd.concat(tables, ignore_index=True)
    table.loc[table["choice"] != CHOICES[0], "p_holm"] = np.nan
    return table


def accuracies(correct: dict[str, dict[str, np.ndarray]]) -> pd.DataFrame:
    """Mean accuracy over seeds of each recipe, a row each, by CHOICES; sd: of the chosen ones; each: of every seed."""
    rows = []
    for recipe, runs in correct[CHOICES[0]].items():
        each = runs.mean(1)
        row = {choice: float(correct[choice][recipe].mean()) for choice in CHOICES}
        row |= {"sd": float(each.std(ddof=1)) if len(each) > 1 else np.nan, "each": each.tolist()}
        rows.append({"recipe": recipe} | row)
    return pd.DataFrame(rows)
