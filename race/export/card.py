"""The model card of an exported checkpoint: card.md beside this file, filled in."""

from pathlib import Path

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_url

from race.report.formats import interval, percent, rate, schedule
from race.report.sentences import seen
from race.score.statistics import quoted_interval

TEMPLATE = Path(__file__).with_name("card.md")
RACE_HOME = "https://www.cs.cmu.edu/~glai1/data/race/"


def model_card(facts: dict, scores: pd.DataFrame | None, name: str) -> ModelCard:
    """facts: as in export.json; scores: the checkpoint's rows of results.csv; name: of the repository or folder."""
    race, title = facts["data"]["is_race"], name.split("/")[-1]
    rows = [] if scores is None else [_score(row, facts["questions"]) for _, row in scores.iterrows()]
    licence = {"license": "other", "license_name": "race-non-commercial-research", "license_link": RACE_HOME}
    data = ModelCardData(
        language="en",
        **(licence | {"datasets": ["ehovy/race"]} if race else {}),
        library_name="transformers",
        pipeline_tag="multiple-choice",
        tags=["reading-comprehension", facts["model_type"], *(["race"] if race else [])],
        metrics=["accuracy"],
        base_model=facts["base_model"],
        model_name=title,
        eval_results=[_eval_result(row, facts["data"], name) for row in rows] or None,
    )
    context = {"facts": facts, "race": race, "race_home": RACE_HOME, "title": title, "name": name, "rows": rows}
    context |= {"percent": percent, "rate": rate, "schedule": schedule} | _sequence(facts["template"])
    context["seen"] = "" if scores is None else _seen(scores)
    context["precisions"] = ", ".join(sorted(set(scores["precision"]))) if rows and "precision" in scores else ""
    return ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), **context)


def _sequence(template: dict) -> dict:
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


def _score(row: pd.Series, cached: dict[str, int]) -> dict:
    """One row of the table of accuracies; a sample is called one. cached: the questions of each split."""
    whole, asked = cached.get(row["split"], 0), f"{row['questions']:,}"
    asked += f" of {whole:,}" if row["level"] == "all" and row["questions"] < whole else ""
    low, high, _ = quoted_interval(row)
    shown = {"asked": asked, "accuracy": float(row["accuracy"]), "interval": interval(low, high)}
    return {"split": row["split"], "level": row["level"]} | shown


def _seen(scores: pd.DataFrame) -> str:
    """What each scored split is to the checkpoint, where the results say it."""
    if "trained_on" not in scores:
        return "The validation split chose the checkpoint."
    whole = scores.drop_duplicates("split")
    return " ".join(f"Split {row['split']}: {seen([row.to_frame().T], ['this model'])}" for _, row in whole.iterrows())


def _eval_result(row: dict, data: dict, name: str) -> EvalResult:
    """The same for the hub; the source is named if the repository is known."""
    source = {"source_name": "results.csv", "source_url": hf_hub_url(name, "results.csv")} if "/" in name else {}
    return EvalResult(
        task_type="multiple-choice",
        task_name="Reading comprehension",
        dataset_type="ehovy/race" if data["is_race"] else data["name"],
        dataset_name="RACE" if data["is_race"] else f"{data['name']} (not RACE)",
        dataset_config=row["level"],
        dataset_split=row["split"],
        metric_type="accuracy",
        metric_value=round(row["accuracy"], 4),
        metric_name=f"accuracy on {row['asked']} questions, 95 % interval {row['interval']}",
        **source,
    )
