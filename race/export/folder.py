"""A checkpoint as a folder that transformers loads by itself: weights, tokenizer, configuration, model card."""

import contextlib
import dataclasses
import filecmp
import json
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoModelForMultipleChoice, AutoTokenizer

from race import HUB_ID, LETTERS, RACE_QUESTIONS, RaceError
from race.data import Cache, RaceDataset, collate, open_cache
from race.encoder import attention_dropout, longest_input, pads_left, takes_segments
from race.files import file_identity, known_hash, move_into_place, temporary_folder
from race.report.formats import interval, percent, rate, schedule
from race.report.sentences import seen
from race.score.statistics import quoted_interval
from race.train.checkpoints import Checkpoint
from race_module import RaceModule

TEMPLATE = Path(__file__).with_name("card.md")
RACE_HOME = "https://www.cs.cmu.edu/~glai1/data/race/"
OF_EXPORTS = ["results.csv", "special_tokens_map.json", "added_tokens.json", "spiece.model", "vocab.txt", "vocab.json"]
OF_EXPORTS += ["merges.txt"]  # of earlier exports, or of other versions of transformers
LOGIT_TOLERANCE = 1e-4  # float32 sums in another order differ by about 1e-6; wrong weights by far more


def export_checkpoint(
    checkpoint: str | Path,
    out_dir: str | Path,
    cache_dir: str | Path | Cache,
    results: str | Path | None = None,
    repo: str | None = None,
    force: bool = False,
) -> Path:
    """Write model (safetensors, float32), tokenizer, configuration and model card to `out_dir`; returns it.

    cache_dir: the checkpoint's, which keeps its tokenizer. results: a results.csv for the card. repo: the hub
    repository (USER/NAME) it is meant for. The folder is written atomically, after it was loaded again and compared;
    one of other content is replaced only with `force`. Raises RaceError.
    """
    out, cache, lineage = Path(out_dir), open_cache(cache_dir), ancestry(checkpoint)
    if out.exists() and not (out / "export.json").is_file():
        raise RaceError(f"{out} exists and is no export; choose another folder")
    lineage[-1].check_encoding(cache)
    scores = None if results is None else _scores(Path(results), lineage[-1])
    module = lineage[-1].load(cache).float().eval()
    facts = _facts(module, lineage, cache)
    dataset = RaceDataset(cache, cache.splits[-1], facts["max_len"])
    items = [dataset[i] for i in range(min(2, len(dataset)))]
    with temporary_folder(out) as temporary, torch.inference_mode():
        folder, logits = temporary / out.name, module(collate(items))
        _write_model(module, cache, folder)
        difference = (_logits(folder, items) - logits).abs().max().item()
        if not difference <= LOGIT_TOLERANCE:
            raise RaceError(f"{checkpoint}: the exported model's logits differ by {difference:g}; not exported")
        if scores is not None:
            scores.to_csv(folder / "results.csv", index=False)
        model_card(facts, scores, repo or out.name).save(folder / "README.md")
        facts |= {"largest_logit_difference": difference, "articles": lineage[-1].lineage.get("articles")}
        _, *others = filecmp.cmpfiles(folder, out, [it.name for it in folder.iterdir()], shallow=False)
        if not any(others):  # an earlier export of the same content
            return out
        if out.exists() and not force:
            differ = f"of other content ({', '.join(sorted(others[0] + others[1]))}): choose another folder"
            raise RaceError(f"{out} is an earlier export {differ} (python -m race.export --force replaces it)")
        (folder / "export.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
        move_into_place(folder, out, known=OF_EXPORTS)
    return out


def ancestry(path: str | Path) -> list[Checkpoint]:
    """A checkpoint and those that it was built on, oldest first, as far as they lie beside it."""
    links = [Checkpoint(path)]
    beside = sorted(links[0].path.parent.glob("*.ckpt"))
    hashes = {known_hash(file_identity(file)): file for file in beside} if links[0].base_sha256 else {}
    while base := hashes.get(links[0].base_sha256):
        links.insert(0, Checkpoint(base))
    return links


def _scores(results: Path, checkpoint: Checkpoint) -> pd.DataFrame:
    """The rows of results.csv that belong to a checkpoint, by its hash: a stage that is run again repeats names."""
    table = pd.read_csv(results)
    if not {"checkpoint_sha256", "not_known"} <= {*table}:
        raise RaceError(f"{results} is no results.csv of the evaluation notebooks, or of an earlier version")
    rows = table[table["checkpoint_sha256"] == checkpoint.sha256]
    if rows.empty:
        raise RaceError(f"{results} has no row of this {checkpoint.name}; score it with eval_test_dataset_race.ipynb")
    return rows


def _facts(module: RaceModule, lineage: list[Checkpoint], cache: Cache) -> dict:
    """What export.json and the card say of the model, in plain values."""
    checkpoint, source, model = lineage[-1], cache.manifest["source"], cache.manifest["model"]
    trained_on = checkpoint.lineage.get("cache") or {}
    data = {"name": trained_on.get("source", source["name"])}
    data |= {"sha256": trained_on.get("source_sha256", source["sha256"])}
    counts = {split: counts["questions"] for split, counts in cache.manifest["splits"].items()}
    base = lineage[0].base or "demo"
    on_hub = base != "demo" and public_name(base, model) == base and not lineage[0].chain
    links = []
    for link in lineage:  # the cache is said once, under data; the articles at the end
        known = {name: value for name, value in link.lineage.items() if name not in ("cache", "articles")}
        links.append({"checkpoint": link.name} | known | {"base": public_name(str(link.base or "unknown"), model)})
    template = dataclasses.asdict(cache.template)
    tokens = [cache.tokenizer.convert_ids_to_tokens(list(template[part])) for part in ("before", "between", "after")]
    return {
        "format": 1,
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": checkpoint.sha256,
        "model_type": module.model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "optimizer": {"weight_decay": module.weight_decay, "epsilon": module.adam_epsilon},
        "learning_rate": module.learning_rate,
        "max_len": min(checkpoint.max_len, longest_input(module.model) or checkpoint.max_len),
        "attention_dropout": attention_dropout(module.model.config),
        "max_qa_len": cache.manifest["max_qa_len"],
        "options": cache.options,
        "template": template | {"tokens": tokens, "has_segments": takes_segments(module.model)},
        "lineage": links,
        "base_model": base if on_hub else None,
        "data": data | {"name": public_name(data["name"], source), "is_race": is_race(data, source, counts)},
        "questions": counts,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
    }


def is_race(data: dict, source: dict, counts: dict[str, int]) -> bool:
    """Whether the training data is RACE: by its hub name; or it is the cache's source, with RACE's numbers."""
    if not data.items() <= source.items():
        return data["name"] == "ehovy/race"
    return public_name(data["name"], source) == "ehovy/race" or counts.items() <= RACE_QUESTIONS.items()


def public_name(name: str, noted: dict) -> str:
    """A source or model as others may know it: a hub id, or the last part of what is, or was noted as, a path."""
    was_path = noted["path"] if noted["name"] == name and "path" in noted else Path(name).exists()
    return name if HUB_ID.fullmatch(name) and not was_path else Path(name).name


def _write_model(module: RaceModule, cache: Cache, folder: Path) -> None:
    """Weights, configuration and tokenizer in the form that transformers reads."""
    if not module.padded:
        module.model.set_attn_implementation("sdpa")  # a choice of the process; "packed" is this repository's
    module.model.config.id2label = dict(enumerate(LETTERS[: cache.options]))
    module.model.config.label2id = {letter: label for label, letter in module.model.config.id2label.items()}
    module.model.save_pretrained(folder)
    cache.tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    segments = ["token_type_ids"] if takes_segments(module.model) else []
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["model_input_names"] = ["input_ids", *segments, "attention_mask"]  # ALBERT's default leaves segments out
    settings["padding_side"] = "left" if pads_left(module.model) else "right"
    settings = {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")}
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    for path in folder.iterdir():
        with contextlib.suppress(PermissionError):  # of a file system that has no permissions
            path.chmod(0o644)  # safetensors writes files that others cannot read


def _logits(folder: Path, items: list[dict]) -> torch.Tensor:
    """[B, k] of the exported folder as transformers loads it, for items of RaceDataset."""
    tokenizer, model = (it.from_pretrained(folder) for it in (AutoTokenizer, AutoModelForMultipleChoice))
    names = [name for name in tokenizer.model_input_names if name != "attention_mask"]
    count = len(items[0]["input_ids"])  # options of a question
    rows = [{name: item[name][option].tolist() for name in names} for item in items for option in range(count)]
    padded = tokenizer.pad(rows, return_tensors="pt")
    return model.eval()(**{name: tensor.view(len(items), count, -1) for name, tensor in padded.items()}).logits


# ------------------------------------------------------------------------------------------------- the model card


def model_card(facts: dict, scores: pd.DataFrame | None, name: str) -> ModelCard:
    """facts: as in export.json; scores: the checkpoint's rows of results.csv; name: of the repository or folder."""
    race, title = facts["data"]["is_race"], name.split("/")[-1]
    rows = [] if scores is None else [_score(row, facts) for _, row in scores.iterrows()]
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
        eval_results=[row["result"] for row in rows] or None,
    )
    context = {"facts": facts, "race": race, "race_home": RACE_HOME, "title": title, "name": name, "rows": rows}
    context |= {"percent": percent, "rate": rate, "schedule": schedule} | _sequence(facts["template"])
    if scores is not None:
        splits = [(split, seen([part], ["this model"])) for split, part in scores.groupby("split", sort=False)]
        context["seen"] = " ".join(f"Split {split}: {text}" for split, text in splits)
        context["precisions"] = ", ".join(sorted(set(scores["precision"])))
    return ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), **context)


def _sequence(template: dict) -> dict:
    """How a sequence is put together, for the sentence and for the code of the card."""
    parts = [template[name] for name in ("before", "between", "after")]
    before, between, after = map(" ".join, template["tokens"])
    segments = template["segments"]
    return {
        "sequence": f"{before} {f'article {between} ' if between else ''}question+option {after}".strip(),
        "special_ids": ", ".join(str(list(part)) for part in parts),
        "special_tokens": ", ".join(text or "none" for text in (before, between, after)),
        "specials": sum(map(len, parts)),
        "kinds": (segments[len(parts[0])], segments[-len(parts[2]) - 1], list(segments[-len(parts[2]) :])),
    }


def _score(row: pd.Series, facts: dict) -> dict:
    """One row of the table of accuracies, and the same for the hub (result); a sample is called one."""
    data, ends, asked = facts["data"], interval(*quoted_interval(row)[:2]), f"{row['questions']:,}"
    whole = facts["questions"].get(row["split"], 0)  # in the cache
    if row["level"] == "all" and row["questions"] < whole:
        asked += f" of {whole:,}"
    result = EvalResult(
        task_type="multiple-choice",
        dataset_type="ehovy/race" if data["is_race"] else data["name"],
        dataset_name="RACE" if data["is_race"] else f"{data['name']} (not RACE)",
        dataset_config=row["level"],
        dataset_split=row["split"],
        metric_type="accuracy",
        metric_value=round(float(row["accuracy"]), 4),
        metric_name=f"accuracy on {asked} questions, 95 % interval {ends}",
    )
    return {"result": result, "accuracy": percent(row["accuracy"]), "asked": asked, "interval": ends}
