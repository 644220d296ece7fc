"""The model card of an exported checkpoint: what it is, how well it does, how to use it, where it comes from."""

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_url

RACE_HOME = "https://www.cs.cmu.edu/~glai1/data/race/"


def model_card(facts: dict, scores, name: str):
    """The card of an export: facts as in export.json, scores as rows of results.csv or None, name of repo or folder."""
    race = facts["data"]["is_race"]
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
        model_name=name.split("/")[-1],
        eval_results=None if scores is None else _eval_results(facts, scores, name),
    )
    title = f"# {name.split('/')[-1]}\n\n{_summary(facts)}"
    parts = [title, _scores_text(facts, scores), _usage(facts, name), _lineage_text(facts), _data_text(facts), LIMITS]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _eval_results(facts: dict, scores, name: str) -> list:
    """One EvalResult for each split and level; the source is named where the repository is known."""
    race = facts["data"]["is_race"]
    source = {"source_name": "results.csv", "source_url": hf_hub_url(name, "results.csv")} if "/" in name else {}
    return [
        EvalResult(
            task_type="multiple-choice",
            task_name="Reading comprehension",
            dataset_type="ehovy/race" if race else facts["data"]["name"],
            dataset_name="RACE" if race else f"{facts['data']['name']} (not RACE)",
            dataset_config=row.level,
            dataset_split=row.split,
            metric_type="accuracy",
            metric_value=round(float(row.accuracy), 4),
            metric_name=f"accuracy on {_asked(row, facts)} questions, 95 % interval {_interval(row)}",
            **source,
        )
        for row in scores.itertuples()
    ]


def _interval(row) -> str:
    return f"{row.ci_low:.1%} to {row.ci_high:.1%}"


def _asked(row, facts: dict) -> str:
    """The number of questions, and of how many they are a sample."""
    whole = facts["questions"][row.split]
    return f"{row.questions:,} of {whole:,}" if row.level == "all" and row.questions < whole else f"{row.questions:,}"


def _summary(facts: dict) -> str:
    own, data = facts["lineage"][-1], facts["data"]
    trained = "RACE" if data["is_race"] else f"`{data['name']}`, which is not RACE"
    stage = f"stage {own['stage']}, " if own.get("stage") else ""
    return (
        f"{facts['model_type'].upper()} for multiple-choice reading comprehension ({facts['parameters']:,} weights), "
        f"fine-tuned on {trained}: an article, a question, four options, one of them right. "
        f"Exported from `{facts['checkpoint']}` ({stage}sha256 {facts['checkpoint_sha256'][:12]}…)."
    )


def _scores_text(facts: dict, scores) -> str:
    if scores is None:
        return "## Accuracy\n\nNot scored: the export was made without results."
    rows = [
        f"| {row.split} | {row.level} | {_asked(row, facts)} | {row.accuracy:.1%} | {_interval(row)} |"
        for row in scores.itertuples()
    ]
    precisions = sorted(set(scores["precision"])) if "precision" in scores else []
    scored = f"Scored in {', '.join(precisions)}; the weights here are float32. " if precisions else ""
    return "\n".join(
        [
            "## Accuracy",
            "",
            "| split | level | questions | accuracy | 95 % interval |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"Own evaluation; the rows are in `results.csv`. {scored}The intervals are Wilson's and cover the "
            "questions, not the training seed. Guessing gives 25 %. The validation split chose the checkpoint.",
        ]
    )


def _lineage_text(facts: dict) -> str:
    rows = []
    for link in facts["lineage"]:
        metrics = link.get("metrics", {})
        rate = link.get("recipe", {}).get("learning_rate", "")
        loss, accuracy = metrics.get("val_loss_epoch"), metrics.get("val_acc")
        shown = ["" if loss is None else f"{loss:.4f}", "" if accuracy is None else f"{accuracy:.1%}"]
        places = [link.get("stage", ""), f"`{link['base']}`", f"`{link['checkpoint']}`"]
        rows.append(f"| {' | '.join(map(str, [*places, rate, link.get('epoch', ''), *shown]))} |")
    before = facts["lineage"][0].get("chain") or []
    note = f"\n\nStages before these: {', '.join(map(str, before))}." if before else ""
    optimizer = facts["optimizer"]
    return "\n".join(
        [
            "## Lineage and recipe",
            "",
            "| stage | starts from | checkpoint | learning rate | epoch, from 0 | val. loss | val. accuracy |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"AdamW, ε {optimizer['epsilon']:g}, weight decay {optimizer['weight_decay']}, constant learning rate. "
            f"A stage takes only weights from the one before. Sequences hold at most {facts['max_len']} tokens.{note}",
        ]
    )


def _usage(facts: dict, name: str) -> str:
    return f"""## Use

For each option one sequence `[CLS] article [SEP] question+option [SEP]` of at most {facts["max_len"]} tokens. A blank
`_` in the question is replaced by the option; otherwise question and option are joined by a space. Question+option
keeps its last {facts["max_qa_len"]} tokens, the article its head. Segments (`token_type_ids`) matter: the tokenizer of
this folder returns them, ALBERT's own does so only with `return_token_type_ids=True`.

```python
import torch
from transformers import AutoModelForMultipleChoice, AutoTokenizer

MODEL = "{name}"  # this repository, or the path of this folder
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForMultipleChoice.from_pretrained(MODEL).eval()


def encode(article, question, options):
    article = tokenizer(article, add_special_tokens=False)["input_ids"]
    rows = []
    for option in options:
        text = question.replace("_", option) if "_" in question else f"{{question}} {{option}}"
        text = tokenizer(text, add_special_tokens=False)["input_ids"][-{facts["max_qa_len"]}:]
        first = [tokenizer.cls_token_id, *article[: {facts["max_len"]} - 3 - len(text)], tokenizer.sep_token_id]
        segments = [0] * len(first) + [1] * (len(text) + 1)
        rows.append({{"input_ids": [*first, *text, tokenizer.sep_token_id], "token_type_ids": segments}})
    return {{name: tensor[None] for name, tensor in tokenizer.pad(rows, return_tensors="pt").items()}}


article = "Ada repairs clocks. On Monday she found a letter inside an old one and took it to the town hall."
question, options = "Ada took the letter to the _ .", ["school", "town hall", "market", "station"]
with torch.no_grad():
    probabilities = model(**encode(article, question, options)).logits[0].softmax(0)
for option, probability in zip(options, probabilities.tolist()):
    print(f"{{probability:.1%}}  {{option}}")
```"""


def _data_text(facts: dict) -> str:
    data = facts["data"]
    held = ", ".join(f"{count:,} in {split}" for split, count in facts["questions"].items())
    licence = (
        f"RACE ({RACE_HOME}) is English exam text for pupils in China. It is for **non-commercial research only**, and "
        "so is this model, which was trained on it. None of its text is in this repository."
        if data["is_race"]
        else f"These are not the questions of RACE: see to the licence of `{data['name']}` before passing the model on."
    )
    fingerprint = f" (sha256 {data['sha256'][:12]}…)" if data["sha256"] else ""
    return f"## Data and licence\n\nSource `{data['name']}`{fingerprint}; questions in the cache: {held}.\n\n{licence}"


LIMITS = """## Limits

The model chooses among exactly four options and always chooses one: it cannot say that none fits. It reads English exam
passages, and only their first 512 tokens less the question. Its probabilities are not calibrated unless someone has
checked them. It was made to study training, not to grade people."""
