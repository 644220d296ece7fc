"""Turn a checkpoint into a folder that plain transformers loads, with a model card.

python race_export.py checkpoints/race/e3-….ckpt export/race-e3 --cache cache/race --results runs/race/results.csv
"""

import argparse
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

FORMAT = 1
LOGIT_TOLERANCE = 1e-4  # float32 sums in another order differ by about 1e-6; wrong weights by far more
CHECKED_QUESTIONS = 2
MODEL_INPUTS = ["input_ids", "token_type_ids", "attention_mask"]  # ALBERT's default leaves the segments out
RACE_QUESTIONS = {"train": 87866, "validation": 4887, "test": 4934}  # by which the original files are recognised
RESULTS_NEEDED = ["checkpoint", "split", "level", "questions", "accuracy", "ci_low", "ci_high"]


class ExportError(ValueError):
    """A checkpoint that cannot be exported; the message lists everything that is wrong, and nothing was written."""


def main(arguments: list[str] | None = None) -> int:
    """Export one checkpoint; returns the exit status."""
    parser = argparse.ArgumentParser(description="Turn a checkpoint into a folder that plain transformers loads.")
    parser.add_argument("checkpoint", help="a .ckpt file of any stage")
    parser.add_argument("out", help="the folder to make, such as export/race-e3")
    parser.add_argument("--cache", default="cache/race", help="the cache it was trained with (default cache/race)")
    parser.add_argument("--results", help="results.csv of the evaluation notebooks; without it the card has no scores")
    parser.add_argument("--repo", metavar="USER/NAME", help="the hub repository it is meant for, named in the card")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    options = parser.parse_args(arguments)
    from safetensors import SafetensorError  # after --help and usage errors, which need no libraries

    try:
        out = export_checkpoint(
            options.checkpoint, options.out, options.cache, options.results, options.repo, options.force
        )
    except (ExportError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    difference = json.loads((out / "export.json").read_text())["largest_logit_difference"]
    print(f"{out}: written; loaded by transformers alone, its logits are the checkpoint's to {difference:.1e}")
    print(f"to upload it: hf upload {options.repo or 'USER/NAME'} {out} .")
    return 0


def export_checkpoint(
    checkpoint: str | Path,
    out_dir: str | Path,
    cache_dir: str | Path,
    results: str | Path | None = None,
    repo: str | None = None,
    force: bool = False,
) -> Path:
    """Write model (safetensors, float32), tokenizer, configuration and model card to `out_dir`; returns it.

    cache_dir: the cache of the checkpoint, which keeps its tokenizer. results: the results.csv whose rows of this
    checkpoint go into the card. repo: the hub repository (USER/NAME) it is meant for. The folder is written beside
    `out_dir` and renamed when it has been loaded again and compared; an earlier export is replaced only with `force`.
    Raises ExportError.
    """
    from race_card import model_card
    from race_files import flush, folder_aside, move_in

    checkpoint, out = Path(checkpoint), Path(out_dir)
    module, tokenizer, facts, scores = _read(checkpoint, out, Path(cache_dir), results, repo, force)
    with folder_aside(out) as temporary:
        folder = temporary / out.name
        _write_model(module, tokenizer, folder)
        facts["largest_logit_difference"] = difference = _largest_difference(module, folder, cache_dir)
        if not difference <= LOGIT_TOLERANCE:
            raise ExportError(f"{checkpoint}: the exported model's logits differ by {difference:g}; not exported")
        if scores is not None:
            scores.to_csv(folder / "results.csv", index=False)
        model_card(facts, scores, repo or out.name).save(folder / "README.md")
        (folder / "export.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
        for path in (*folder.rglob("*"), folder):
            flush(path)
        move_in(folder, out)
    return out


# -------------------------------------------------------------------------------------------------- reading


def _read(checkpoint: Path, out: Path, cache_dir: Path, results, repo: str | None, force: bool) -> tuple:
    """Everything that an export is made from: (RaceModule, tokenizer, facts, scores); raises all problems at once."""
    from race_cache import load_tokenizer, read_manifest, tokenizer_hash
    from race_training import check_encoding_of

    problems = []

    def attempt(read, *arguments):
        try:
            return read(*arguments)
        except (ValueError, RuntimeError, OSError) as error:
            problems.append(str(error))

    if out.exists() and not (out / "export.json").is_file():
        problems.append(f"{out} exists and is no export; choose another folder")
    elif out.exists() and not force:
        problems.append(f"{out} is an earlier export; --force replaces it")
    if repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        problems.append(f"--repo {repo}: expected USER/NAME")
    module, lineage = attempt(_load, checkpoint) or (None, [{}])
    manifest = attempt(read_manifest, cache_dir)
    scores = attempt(_scores, Path(results), checkpoint, manifest) if manifest and results else None
    tokenizer = manifest and attempt(load_tokenizer, cache_dir / "model")
    if tokenizer:
        expected = manifest["tokenizer"]["sha256"]
        if tokenizer_hash(tokenizer) != expected:
            problems.append(f"{cache_dir}/model holds another tokenizer than its manifest says; --verify the cache")
        before = len(problems)
        attempt(check_encoding_of, checkpoint, lineage[-1], cache_dir)
        if len(problems) == before and module and module.model.config.vocab_size < len(tokenizer):
            known = module.model.config.vocab_size
            problems.append(f"{checkpoint} knows {known} tokens, {cache_dir} uses {len(tokenizer)}; name its cache")
    if problems:
        raise ExportError("\n".join(problems))
    return module, tokenizer, _facts(checkpoint, module, lineage, manifest), scores


def _load(checkpoint: Path) -> tuple:
    """The module, and the lineage of its checkpoint, oldest first."""
    import pickle

    from race_module import RaceModule

    lineage = ancestry(checkpoint)
    try:
        return RaceModule.load_from_checkpoint(checkpoint).eval(), lineage
    except (KeyError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise ExportError(f"{checkpoint} holds no RaceModule that can be loaded: {error}") from error


def ancestry(checkpoint: str | Path) -> list[dict]:
    """What a checkpoint and those that it was built on remember, oldest first, as far as they lie beside it."""
    from race_files import file_hash
    from race_training import read_lineage

    path, links = Path(checkpoint), []
    while True:
        links.insert(0, {"checkpoint": path.name} | read_lineage(path))
        base = path.parent / str(links[0].get("base"))
        sha256 = links[0].get("base_sha256")
        if sha256 is None or not base.is_file() or file_hash(base) != sha256:
            return links
        path = base


def _scores(results: Path, checkpoint: Path, manifest: dict):
    """The rows of results.csv that belong to a checkpoint: by its name, and by its hash where they tell it."""
    import pandas as pd

    from race_files import file_hash

    table = pd.read_csv(results)
    if missing := [name for name in RESULTS_NEEDED if name not in table]:
        raise ExportError(f"{results} has no column {', '.join(missing)}; it should be results.csv of an evaluation")
    table = table[table["checkpoint"] == checkpoint.name].reset_index(drop=True)
    if table.empty:
        raise ExportError(f"{results} has no row of {checkpoint.name}; score it with eval_test_dataset_race.ipynb")
    if "checkpoint_sha256" in table and set(table["checkpoint_sha256"]) != {file_hash(checkpoint)}:
        raise ExportError(f"{results} has scores of another file called {checkpoint.name}; score this one first")
    for row in table.itertuples():
        held = manifest["splits"].get(row.split, {"questions": 0})["questions"]
        if row.questions > held:
            raise ExportError(
                f"{results} counts {row.questions} questions of {row.split}, the cache {held}: "
                "these results are of another cache"
            )
    return table


def _facts(checkpoint: Path, module, lineage: list[dict], manifest: dict) -> dict:
    """What export.json and the card say of the model, in plain values."""
    from race_files import file_hash

    trained_on = lineage[-1].get("cache") or {}
    data = {"name": trained_on.get("source", manifest["source"]["name"])}
    data["sha256"] = trained_on.get("source_sha256", manifest["source"]["sha256"])
    base_model = _hub_id(lineage[0])
    lineage = [link | {"base": _public(str(link.get("base", "unknown")))} for link in lineage]
    for link in lineage:
        link.pop("cache", None)  # said once, under data
    return {
        "format": FORMAT,
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": file_hash(checkpoint),
        "model_type": module.model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "optimizer": {"weight_decay": module.weight_decay, "epsilon": module.adam_epsilon},
        "learning_rate": module.learning_rate,
        "max_len": min(512, module.model.config.max_position_embeddings),
        "max_qa_len": manifest["max_qa_len"],
        "lineage": lineage,
        "base_model": base_model,
        "data": {"name": _public(data["name"]), "sha256": data.get("sha256"), "is_race": _is_race(manifest, data)},
        "questions": {split: counts["questions"] for split, counts in manifest["splits"].items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
    }


def _is_race(manifest: dict, data: dict) -> bool:
    """Whether the training data is RACE: by its hub name, or by the number of questions in each split."""
    if data["name"] == "ehovy/race":
        return True
    counts = {split: counts["questions"] for split, counts in manifest["splits"].items()}
    return data == manifest["source"] and all(RACE_QUESTIONS[split] == count for split, count in counts.items())


def _hub_id(oldest: dict) -> str | None:
    """The pretrained model below the whole chain, where it is known and named as on the hub."""
    base = oldest.get("base")
    if base in (None, "demo") or oldest.get("base_sha256") or _public(base) != base:
        return None
    return base


def _public(name: str) -> str:
    """A source or model as others may know it: a hub id, or the last part of a path of this machine."""
    return name if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists() else Path(name).name


# -------------------------------------------------------------------------------------------------- writing


def _write_model(module, tokenizer, folder: Path) -> None:
    """Weights, configuration and tokenizer in the form that transformers reads."""
    module.model.set_attn_implementation("sdpa")  # a choice of the process, not saved; "packed" is this repository's
    module.model.config.id2label = dict(enumerate("ABCD"))
    module.model.config.label2id = {letter: label for label, letter in enumerate("ABCD")}
    module.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"model_input_names": MODEL_INPUTS}
    for local in ("is_local", "local_files_only"):  # of the loading, not of the tokenizer
        settings.pop(local, None)
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    module.model.set_attn_implementation("packed")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that others cannot read


def _largest_difference(module, folder: Path, cache_dir: str | Path) -> float:
    """The largest difference between the logits of the exported folder and of the checkpoint, on cached questions."""
    import torch
    from transformers import AutoModelForMultipleChoice, AutoTokenizer

    from race_cache import read_manifest, splits_of
    from race_data import RaceDataset, collate

    dataset = RaceDataset(
        cache_dir, splits_of(read_manifest(cache_dir))[-1], min(512, module.model.config.max_position_embeddings)
    )
    items = [dataset[i] for i in range(min(CHECKED_QUESTIONS, len(dataset)))]
    rows = [
        {"input_ids": ids.tolist(), "token_type_ids": segments.tolist()}
        for item in items
        for ids, segments in zip(item["input_ids"], item["token_type_ids"], strict=True)
    ]
    padded = AutoTokenizer.from_pretrained(folder).pad(rows, return_tensors="pt")
    model = AutoModelForMultipleChoice.from_pretrained(folder).eval()
    with torch.inference_mode():
        theirs = model(**{name: tensor.view(len(items), 4, -1) for name, tensor in padded.items()}).logits
        return (theirs - module.float()(collate(items))).abs().max().item()


if __name__ == "__main__":
    sys.exit(main())
