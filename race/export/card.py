"""The model card of an exported checkpoint: card.md beside this file, filled in."""

from pathlib import Path

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_url

from race.report.sentences import quoted, seen
from race.written import percent, rate, schedule

RACE_HOME = "https://www.cs.cmu.edu/~glai1/data/race/"


def model_card(facts: dict, scores: pd.DataFrame | None, name: str) -> ModelCard:
    """facts: as in export.json; scores: the checkpoint's rows of results.csv; name: of the repository or folder."""
    race, title = facts["data"]["is_race"], name.split("/")[-1]
    rows = None if scores is None else [_score(row, facts) for _, row in scores.iterrows()]
    licence = {"license": "other", "license_name": "race-non-commercial-research", "license_link": RACE_HOME}
    data = ModelCardData(
        language="en",
        **(licence if race else {}),
        library_name="transformers",
        pipeline_tag="multiple-choice",
        tags=["reading-comprehension", facts["model_type"], *(["race"] if race else [])],
        datasets=["ehovy/race"] if race else None,
        metrics=["accuracy"],
        base_model=facts["base_model"],
        model_name=title,
        eval_results=rows and [_eval_result(row, facts, name) for row in rows],
    )
    return ModelCard.from_template(
        data,
        template_str=Path(__file__).with_name("card.md").read_text(encoding="utf-8"),
        facts=facts,
        race=race,
        race_home=RACE_HOME,
        title=title,
        name=name,
        own=facts["lineage"][-1],
        rows=rows,
        seen="" if scores is None else _seen(scores),
        precisions=", ".join(sorted(set(scores["precision"]))) if rows and "precision" in scores else "",
        **_template(facts["template"]),
        lineage=[_link(link) for link in facts["lineage"]],
        cached=", ".join(f"{count:,} in {split}" for split, count in facts["questions"].items()),
    )


def _template(template: dict) -> dict:
    """How a sequence is put together, for the sentence and for the code of the card."""
    parts = [template[name] for name in ("before", "between", "after")]
    before, between, after = map(" ".join, template["tokens"])
    segments = template["segments"]
    return {
        "sequence": f"{before} article {between} question+option {after}".strip(),
        "special_ids": ", ".join(str(list(part)) for part in parts),
        "special_tokens": ", ".join(text or "none" for text in (before, between, after)),
        "specials": sum(map(len, parts)),
        "kinds": (segments[len(parts[0])], segments[-len(parts[2]) - 1], list(segments[-len(parts[2]) :])),
    }


def _score(row: pd.Series, facts: dict) -> dict:
    """One row of the table of accuracies; a sample is called one."""
    whole, asked = facts["questions"][row["split"]], f"{row['questions']:,}"
    if row["level"] == "all" and row["questions"] < whole:
        asked += f" of {whole:,}"
    shown = {"accuracy": percent(row["accuracy"]), "interval": quoted(row), "asked": asked}
    return {"split": row["split"], "level": row["level"], "value": float(row["accuracy"])} | shown


def _seen(scores: pd.DataFrame) -> str:
    """What each scored split is to the checkpoint, where the results say it."""
    if "trained_on" not in scores:
        return "The validation split chose the checkpoint."
    whole = scores.drop_duplicates("split")
    return " ".join(f"Split {row['split']}: {seen([row.to_frame().T], ['this model'])}" for _, row in whole.iterrows())


def _eval_result(row: dict, facts: dict, name: str) -> EvalResult:
    """The same for the hub; the source is named if the repository is known."""
    race = facts["data"]["is_race"]
    source = {"source_name": "results.csv", "source_url": hf_hub_url(name, "results.csv")} if "/" in name else {}
    return EvalResult(
        task_type="multiple-choice",
        task_name="Reading comprehension",
        dataset_type="ehovy/race" if race else facts["data"]["name"],
        dataset_name="RACE" if race else f"{facts['data']['name']} (not RACE)",
        dataset_config=row["level"],
        dataset_split=row["split"],
        metric_type="accuracy",
        metric_value=round(row["value"], 4),
        metric_name=f"accuracy on {row['asked']} questions, 95 % interval {row['interval']}",
        **source,
    )


def _link(link: dict) -> dict:
    """One row of the table of stages; what is not known stays empty."""
    metrics, recipe = link.get("metrics", {}), link.get("recipe", {})
    loss, accuracy = metrics.get("val_loss_epoch"), metrics.get("val_acc")
    return {"stage": link.get("stage", ""), "base": link["base"], "checkpoint": link["checkpoint"]} | {
        "rate": "" if recipe.get("learning_rate") is None else f"{rate(recipe['learning_rate'])}, {schedule(recipe)}",
        "epoch": link.get("epoch", ""),
        "loss": "" if loss is None else f"{loss:.4f}",
        "accuracy": "" if accuracy is None else percent(accuracy),
    }
