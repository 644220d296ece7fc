"""A checkpoint as a folder that transformers loads by itself: weights, tokenizer, configuration and model card."""

import dataclasses
import json
import re
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from transformers import AutoModelForMultipleChoice, AutoTokenizer

from race import LETTERS, OPTIONS, RACE_QUESTIONS, SPLITS, RaceError
from race.data import RaceDataModule, collate
from race.data.cache import check_files, read_manifest, template_of
from race.encoder import attention_dropout, longest_input, pads_left, takes_segments
from race.export.card import model_card
from race.files import file_identity, known_hash, move_into_place, set_mode, temporary_folder
from race.train.checkpoints import Checkpoint
from race_module import RaceModule

FORMAT = 1
LOGIT_TOLERANCE = 1e-4  # float32 sums in another order differ by about 1e-6; wrong weights by far more
RESULTS_NEEDED = ["checkpoint", "split", "level", "questions", "accuracy", "ci_low", "ci_high"]


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
    checkpoint go into the card. repo: the hub repository (USER/NAME) it is meant for. The folder is written atomically,
    after it has been loaded again and compared; an earlier export is replaced only with `force`. Raises RaceError with
    everything that is wrong.
    """
    out = Path(out_dir)
    module, lineage, manifest, scores = _read(Path(checkpoint), out, Path(cache_dir), results, repo, force)
    facts = _facts(module, lineage, manifest, Path(cache_dir) / "model")
    with temporary_folder(out) as temporary:
        folder = temporary / out.name
        try:
            _write_model(module, Path(cache_dir) / "model", folder)
            difference = _largest_difference(module, folder, cache_dir, facts)
        except SafetensorError as error:
            raise RaceError(f"{out}: the weights cannot be written ({error})") from error
        if not difference <= LOGIT_TOLERANCE:
            raise RaceError(f"{checkpoint}: the exported model's logits differ by {difference:g}; not exported")
        if scores is not None:
            scores.to_csv(folder / "results.csv", index=False)
        model_card(facts, scores, repo or out.name).save(folder / "README.md")
        facts |= {"largest_logit_difference": difference, "articles": lineage[-1].lineage.get("articles")}
        (folder / "export.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
        move_into_place(folder, out)
    return out


def _read(checkpoint: Path, out: Path, cache_dir: Path, results, repo: str | None, force: bool) -> tuple:
    """(module, lineage, oldest checkpoint first, manifest, scores or None); raises all problems at once."""
    problems = []

    def attempt(read, *arguments):
        try:
            return read(*arguments)
        except (ValueError, OSError) as error:
            problems.append(str(error))

    if out.exists() and not (out / "export.json").is_file():
        problems.append(f"{out} exists and is no export; choose another folder")
    elif out.exists() and not force:
        problems.append(f"{out} is an earlier export; --force replaces it")
    if repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        problems.append(f"--repo {repo}: expected USER/NAME")
    lineage = attempt(ancestry, checkpoint)
    module = lineage and attempt(lineage[-1].load, cache_dir)
    manifest = attempt(read_manifest, cache_dir)
    if manifest:
        attempt(check_files, cache_dir, "model/tokenizer")
    scores = attempt(_scores, Path(results), lineage[-1], manifest) if manifest and lineage and results else None
    if manifest and lineage:
        before = len(problems)
        attempt(lineage[-1].check_encoding, manifest, cache_dir)
        used = manifest["tokenizer"]["vocabulary"]
        if len(problems) == before and module and (known := module.model.config.vocab_size) < used:
            problems.append(f"{checkpoint} knows {known} tokens, {cache_dir} uses {used}; name its cache")
    if problems:
        raise RaceError("\n".join(problems))
    return module.eval(), lineage, manifest, scores


def ancestry(path: str | Path) -> list[Checkpoint]:
    """A checkpoint and those that it was built on, oldest first, as far as they lie beside it."""
    links = [Checkpoint(path)]
    beside = sorted(links[0].path.parent.glob("*.ckpt"))
    hashes = {known_hash(file_identity(file)): file for file in beside} if links[0].base_sha256 else {}
    while base := hashes.get(links[0].base_sha256):
        links.insert(0, Checkpoint(base))
    return links


def _scores(results: Path, checkpoint: Checkpoint, manifest: dict) -> pd.DataFrame:
    """The rows of results.csv that belong to a checkpoint: by its name, and by its hash if they have it."""
    table = pd.read_csv(results)
    if missing := [name for name in RESULTS_NEEDED if name not in table]:
        raise RaceError(f"{results} has no column {', '.join(missing)}; it should be results.csv of an evaluation")
    named = table["checkpoint"] == checkpoint.name
    own = table["checkpoint_sha256"] == checkpoint.sha256 if "checkpoint_sha256" in table else named
    if named.any() and not own.any():
        raise RaceError(f"{results} has scores of another file called {checkpoint.name}; score this one first")
    table = table[own].reset_index(drop=True)
    if table.empty:
        raise RaceError(f"{results} has no row of {checkpoint.name}; score it with eval_test_dataset_race.ipynb")
    for row in table.itertuples():
        cached = manifest["splits"].get(row.split, {"questions": 0})["questions"]
        if row.questions > cached:
            raise RaceError(
                f"{results} counts {row.questions} questions of {row.split}, the cache {cached}: "
                "these results are of another cache"
            )
    return table


def _facts(module: RaceModule, lineage: list[Checkpoint], manifest: dict, tokenizer: Path) -> dict:
    """What export.json and the card say of the model, in plain values."""
    checkpoint = lineage[-1]
    trained_on = checkpoint.lineage.get("cache") or {}
    data = {
        "name": trained_on.get("source", manifest["source"]["name"]),
        "sha256": trained_on.get("source_sha256", manifest["source"]["sha256"]),
    }
    links = []
    for link in lineage:  # the cache is said once, under data; the articles at the end
        known = {name: value for name, value in link.lineage.items() if name not in ("cache", "articles")}
        links.append({"checkpoint": link.name} | known | {"base": _public(str(link.base or "unknown"))})
    return {
        "format": FORMAT,
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": checkpoint.sha256,
        "model_type": module.model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "optimizer": {"weight_decay": module.weight_decay, "epsilon": module.adam_epsilon},
        "learning_rate": module.learning_rate,
        "max_len": min(checkpoint.max_len, longest_input(module.model) or checkpoint.max_len),
        "attention_dropout": attention_dropout(module.model.config),
        "max_qa_len": manifest["max_qa_len"],
        "template": _template(module, manifest, tokenizer),
        "lineage": links,
        "base_model": _hub_id(lineage[0]),
        "data": {"name": _public(data["name"]), "sha256": data["sha256"], "is_race": _is_race(manifest, data)},
        "questions": {split: counts["questions"] for split, counts in manifest["splits"].items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
    }


def _template(module: RaceModule, manifest: dict, tokenizer: Path) -> dict:
    """How a sequence is put together: ids and texts of its special tokens, and its segments if the model takes any."""
    template = dataclasses.asdict(template_of(manifest))
    tokens = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).convert_ids_to_tokens
    texts = [tokens(list(template[part])) for part in ("before", "between", "after")]
    return template | {"tokens": texts, "has_segments": takes_segments(module.model)}


def _is_race(manifest: dict, data: dict) -> bool:
    """Whether the training data is RACE: by its hub name, or by the number of questions in each split."""
    if data["name"] == "ehovy/race":
        return True
    counts = {split: counts["questions"] for split, counts in manifest["splits"].items()}
    return data == manifest["source"] and all(RACE_QUESTIONS[split] == count for split, count in counts.items())


def _hub_id(oldest: Checkpoint) -> str | None:
    """The pretrained model below the whole chain, if it is known and named as on the hub."""
    base = oldest.base
    return None if base in (None, "demo") or oldest.chain or _public(base) != base else base


def _public(name: str) -> str:
    """A source or model as others may know it: a hub id, or the last part of a path of this machine."""
    return name if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists() else Path(name).name


def _write_model(module: RaceModule, tokenizer: Path, folder: Path) -> None:
    """Weights, configuration and tokenizer in the form that transformers reads."""
    if not module.padded:
        module.model.set_attn_implementation("sdpa")  # a choice of the process; "packed" is this repository's
    module.model.config.id2label = dict(enumerate(LETTERS))
    module.model.config.label2id = {letter: label for label, letter in enumerate(LETTERS)}
    module.model.save_pretrained(folder)
    if not module.padded:
        module.model.set_attn_implementation("packed")
    AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    segments = ["token_type_ids"] if takes_segments(module.model) else []
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["model_input_names"] = ["input_ids", *segments, "attention_mask"]  # ALBERT's default leaves segments out
    settings["padding_side"] = "left" if pads_left(module.model) else "right"
    settings = {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")}
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    for path in folder.iterdir():
        set_mode(path, 0o644)  # safetensors writes files that others cannot read


def _largest_difference(module: RaceModule, folder: Path, cache_dir: str | Path, facts: dict) -> float:
    """The largest difference between the logits of the exported folder and of the checkpoint, on cached questions."""
    data = RaceDataModule(cache_dir, max_len=facts["max_len"])
    dataset = data.open_split([split for split in SPLITS if split in data.manifest["splits"]][-1])
    items = [dataset[i] for i in range(min(2, len(dataset)))]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [
        {"input_ids": ids.tolist(), "token_type_ids": segments.tolist()}
        for item in items
        for ids, segments in zip(item["input_ids"], item["token_type_ids"], strict=True)
    ]
    rows = [{name: ids for name, ids in row.items() if name in tokenizer.model_input_names} for row in rows]
    padded = tokenizer.pad(rows, return_tensors="pt")
    model = AutoModelForMultipleChoice.from_pretrained(folder).eval()
    with torch.inference_mode():
        theirs = model(**{name: tensor.view(len(items), OPTIONS, -1) for name, tensor in padded.items()}).logits
        return (theirs - module.float()(collate(items))).abs().max().item()
