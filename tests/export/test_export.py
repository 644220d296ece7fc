"""An exported folder is what plain transformers loads: the same logits, the same tokens, a card that parses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers import ROOT
from huggingface_hub import ModelCard
from predictions import PROBABILITIES
from safetensors import safe_open
from transformers import AutoTokenizer

from race import RaceError
from race.data import collate
from race.data.cache import Cache, build_cache
from race.data.module import RaceDataset
from race.export.__main__ import main
from race.export.folder import ancestry, export_checkpoint, is_race, model_card, public_name
from race.files import file_hash
from race_module import RaceModule

FAMILIES = ("albert", "bert", "deberta-v2")
LONG = {
    "article": "Nora Hill lives in a small town. " * 90,
    "questions": ["Who lives in the town ?", "In the morning _ ."],
    "options": [["Nora Hill", "a cat", "nobody", "Tom"], ["she reads " * 80, "it rains", "Nora sings", "it snows"]],
    "answers": ["A", "C"],
    "id": "long.txt",
}


def trained(family: str) -> SimpleNamespace:
    """What an earlier version trained and scored: cache, checkpoint, results, saved predictions."""
    folder = ROOT / "tests" / "before_1_5" / family
    (checkpoint,), (scored,) = folder.glob("checkpoints/*.ckpt"), folder.glob("runs/predictions/*.parquet")
    files = {"cache": folder / "cache", "results": folder / "runs" / "results.csv"}
    return SimpleNamespace(checkpoint=checkpoint, predictions=pd.read_parquet(scored), **files)


@pytest.fixture(scope="module")
def albert() -> SimpleNamespace:
    return trained("albert")


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, SimpleNamespace]:
    """Each family exported with its results, and a cache of text that is truncated at both ends."""
    found = {family: trained(family) for family in FAMILIES}
    for family, made in found.items():
        folder = tmp_path_factory.mktemp(family)
        (folder / "source" / "test").mkdir(parents=True)
        (folder / "source" / "test" / "long.json").write_text(json.dumps(LONG))
        build_cache(str(folder / "source"), str(made.cache / "model"), folder / "long")
        made.long = folder / "long"
        made.folder = export_checkpoint(made.checkpoint, folder / "model", made.cache, made.results, repo="ada/race-e1")
    return found


@pytest.fixture(params=FAMILIES)
def exported(request, exports) -> SimpleNamespace:
    return exports[request.param]


@pytest.fixture
def two_stages(albert, tmp_path) -> list[Path]:
    """A checkpoint and one of stage e2 that remembers it as its base."""
    first = Path(shutil.copy(albert.checkpoint, tmp_path / "e1.ckpt"))
    content = torch.load(first, weights_only=True)
    content["race"] |= {"stage": "e2", "base": first.name, "base_sha256": file_hash(first), "chain": ["e1"]}
    torch.save(content, tmp_path / "e2.ckpt")
    return [first, tmp_path / "e2.ckpt"]


def test_the_cards_own_example_gives_the_scored_probabilities(exports, tmp_path):
    """The example of the card, word for word, in a process without this repository and without a network."""
    runs, expected = [], []
    for made in exports.values():
        example = re.search(r"```python\n(.*?)```", (made.folder / "README.md").read_text(), re.DOTALL)[1]
        scored, long = RaceDataset(made.cache, "test"), RaceDataset(made.long, "test", 160)
        assert long.lengths().max() == 160
        texts = [dataset.text(i) for dataset in (scored, long) for i in range(len(dataset))]
        asked = [[text["article"], text["question"], text["options"]] for text in texts]
        runs.append((example.replace('"ada/race-e1"', repr(str(made.folder))), asked))
        module = RaceModule.load_from_checkpoint(made.checkpoint).eval()
        with torch.no_grad():
            cut = [module(collate([long[i]]))[0].softmax(0) for i in range(len(long))]
        expected.append(torch.stack([*torch.tensor(made.predictions[PROBABILITIES].to_numpy("float32")), *cut]))
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    code = (
        "import json, socket, sys, torch\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = None\n"
        "for example, asked in json.load(open('runs.json')):\n"
        "    exec(example, names := {})\n"
        "    with torch.no_grad():\n"
        "        logits = [names['model'](**names['encode'](*it)).logits[0] for it in asked]\n"
        "    print(json.dumps([it.softmax(0).tolist() for it in logits]))\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('race', 'race_module')]\n"
    )
    environment = {"PATH": "/nowhere", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert [bool(re.fullmatch(r"\d+\.\d %  \w.*", line)) for line in lines] == [True, True, True, True, False] * 3
    for line, probabilities in zip(lines[4::5], expected, strict=True):
        found = torch.tensor(json.loads(line))
        assert (found - probabilities).abs().max().item() < 1e-5
        assert found.std(1).min() > 1e-4  # equal, and not all the same


def test_the_folder_is_plain(exported):
    """Nothing in it is of this repository's own: names, attention, activation, precision, paths."""
    names = "config.json model.safetensors tokenizer.json tokenizer_config.json README.md export.json results.csv"
    assert {path.name for path in exported.folder.iterdir()} == {*names.split()}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in exported.folder.iterdir() if path.suffix != ".csv")
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["dtype"] == "float32" and config["id2label"] == {"0": "A", "1": "B", "2": "C", "3": "D"}
    assert config["hidden_act"] == ("gelu_new" if config["model_type"] == "albert" else "gelu")
    for path in exported.folder.glob("*.json"):
        assert "packed" not in path.read_text() and str(exported.cache) not in path.read_text()
    state = RaceModule.load_from_checkpoint(exported.checkpoint).model.state_dict()
    with safe_open(exported.folder / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) == set(state)
        assert all(torch.equal(saved.get_tensor(name), tensor) for name, tensor in state.items())
    assert json.loads((exported.folder / "export.json").read_text())["largest_logit_difference"] < 1e-5
    segments = ["token_type_ids"] if config["type_vocab_size"] else []  # ALBERT's own tokenizer leaves them out
    encoded = AutoTokenizer.from_pretrained(exported.folder)("a", "b")
    assert list(encoded) == ["input_ids", *segments, "attention_mask"]


def test_card_with_results(exported):
    """Every row with its split, level, number, interval and source; not RACE, and no claim of its licence."""
    card, rows = ModelCard.load(exported.folder / "README.md"), pd.read_csv(exported.results)
    assert card.data.model_name == "race-e1" and card.data.pipeline_tag == "multiple-choice"
    found = [(it.dataset_config, it.dataset_split, it.metric_value) for it in card.data.eval_results]
    assert found == [(row.level, row.split, round(row.accuracy, 4)) for row in rows.itertuples()]
    ends = f"{100 * rows['passage_low'][0]:.1f} % to {100 * rows['passage_high'][0]:.1f} %"
    assert card.data.eval_results[0].metric_name == f"accuracy on 14 questions, 95 % interval {ends}"
    assert f"| test | all | 14 | {100 * rows['accuracy'][0]:.1f} % | {ends} |" in card.text
    assert card.data.get("datasets") is None and card.data.get("license") is None and "not RACE" in card.text
    assert pd.read_csv(exported.folder / "results.csv")["correct"].tolist() == rows["correct"].tolist()


def test_card_without_results_tells_the_lineage(albert, two_stages, tmp_path):
    folder = export_checkpoint(two_stages[1], tmp_path / "e2", albert.cache)
    text = ModelCard.load(folder / "README.md").text
    assert "Not scored" in text and "42 in train, 14 in validation" in text
    assert re.search(r"\| e1 \| `albert` \| `e1.ckpt` \| 1e-3, constant \| 0 \| 1\.3\d+ \| 0.0 % \|", text)
    assert "| e2 | `e1.ckpt` | `e2.ckpt` | 1e-3, constant | 0 |" in text


def test_card_of_a_model_of_race(exports):
    """Licence, dataset and base model are named where the data is RACE, and a sample is called one."""
    facts = json.loads((exports["albert"].folder / "export.json").read_text())
    facts |= {"base_model": "albert-base-v2", "data": {"name": "ehovy/race", "sha256": None, "is_race": True}}
    facts |= {"questions": {"train": 87866, "validation": 4887, "test": 4934}}
    row = {"split": "test", "level": "all", "questions": 500, "accuracy": 0.67, "ci_low": 0.6276, "ci_high": 0.7098}
    row |= {"trained_on": 0, "selected_on": 0, "not_known": 0, "precision": "bf16-mixed"}
    card = model_card(facts, pd.DataFrame([row]), "race-e1")
    assert card.data.base_model == "albert-base-v2" and card.data.datasets == ["ehovy/race"]
    assert card.data.license_name == "race-non-commercial-research" and "non-commercial research only" in card.text
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_name, result.metric_value) == ("ehovy/race", "RACE", 0.67)
    assert result.metric_name == "accuracy on 500 of 4,934 questions, 95 % interval 62.8 % to 71.0 %"


def test_race_is_told_by_its_name_or_by_its_numbers():
    source, race = {"name": "/data/RACE.tar.gz", "sha256": "1"}, {"train": 87866, "test": 4934}
    assert is_race({"name": "ehovy/race", "sha256": "2"}, source, {"test": 10}) and is_race(source, source, race)
    assert not is_race(source, source, race | {"test": 4933}) and not is_race({"name": "x"}, source, race)


def test_paths_of_this_machine_stay_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    names = ("albert-base-v2", "albert/albert-base-v2", "/home/ada/RACE.tar.gz", "models/mine")
    assert [public_name(name, {"name": "x", "path": True}) for name in names] == [*names[:2], "RACE.tar.gz", "mine"]


def test_a_name_was_a_path_if_the_cache_says_so(albert, tmp_path, monkeypatch):
    """Folders that are called like something on the hub, and are no longer there when a card is written."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(albert.cache / "model", "google/albert")
    (tmp_path / "ehovy" / "race" / "test").mkdir(parents=True)
    (tmp_path / "ehovy" / "race" / "test" / "1.json").write_text(json.dumps(LONG))
    build_cache("ehovy/race", "google/albert", "cache")
    content, cache = torch.load(albert.checkpoint, weights_only=True), Cache("cache")
    content["race"] |= {"base": "google/albert", "cache": cache.identity, "tokenizer": cache.identity["tokenizer"]}
    torch.save(content, "e1.ckpt")
    for folder in ("google", "ehovy"):
        shutil.rmtree(folder)
    facts = json.loads((export_checkpoint("e1.ckpt", "out", "cache") / "export.json").read_text())
    assert facts["base_model"] is None and facts["lineage"][0]["base"] == "albert"
    assert facts["data"]["name"] == "race" and not facts["data"]["is_race"]


def test_lineage_ends_where_a_base_is_missing_or_another(two_stages, tmp_path):
    assert [link.stage for link in ancestry(two_stages[1])] == ["e1", "e2"]
    for content in (two_stages[1].read_bytes(), b"", None):  # the name of e1's, other content; no file
        two_stages[0].write_bytes(content) if content is not None else two_stages[0].unlink()
        assert [link.stage for link in ancestry(two_stages[1])] == ["e2"]


def test_an_export_is_replaced_only_when_told_and_nothing_else_ever(albert, two_stages, tmp_path):
    folder, mine = export_checkpoint(two_stages[0], tmp_path / "e", albert.cache), tmp_path / "mine"
    written = (folder / "export.json").stat().st_ino
    assert export_checkpoint(two_stages[0], folder, albert.cache) == folder  # of the same content: kept
    assert (folder / "export.json").stat().st_ino == written
    with pytest.raises(RaceError, match=r"other content \(README.md\): choose another folder"):
        export_checkpoint(two_stages[1], folder, albert.cache)
    assert json.loads((folder / "export.json").read_text())["checkpoint"] == "e1.ckpt"
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("mine")
    with pytest.raises(RaceError, match=r"not made with it: .git/HEAD; move them away"):
        export_checkpoint(two_stages[1], folder, albert.cache, force=True)
    shutil.rmtree(folder / ".git")
    (folder / "results.csv").touch()  # of the export before, with scores
    export_checkpoint(two_stages[1], folder, albert.cache, force=True)
    assert json.loads((folder / "export.json").read_text())["checkpoint"] == "e2.ckpt"
    mine.mkdir()
    with pytest.raises(RaceError, match="is no export"):
        export_checkpoint(two_stages[1], mine, albert.cache, force=True)
    assert list(mine.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"checkpoint": "missing.ckpt"}, "missing.ckpt: no such checkpoint"),
        ({"cache_dir": trained("bert").cache}, "another tokenizer"),
        ({"results": trained("bert").results}, "has no row of this e1-albert-race"),
        ({"results": ROOT / "race" / "report" / "published.csv"}, "no results.csv"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(given, said, albert, tmp_path):
    fitting = {"checkpoint": albert.checkpoint, "cache_dir": albert.cache, "out_dir": tmp_path / "e"}
    with pytest.raises(RaceError, match=said):
        export_checkpoint(**fitting | given)
    assert not list(tmp_path.iterdir())


def test_an_export_that_would_answer_otherwise_is_not_made(albert, tmp_path, monkeypatch):
    monkeypatch.setattr("race.export.folder._logits", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(RaceError, match="logits differ by nan"):
        export_checkpoint(albert.checkpoint, tmp_path / "e", albert.cache)
    assert list(tmp_path.iterdir()) == []


def test_command_line(albert, tmp_path, capsys, monkeypatch):
    """Also on a file system that has no permissions."""
    monkeypatch.setattr(Path, "chmod", lambda *_: exec("raise PermissionError"))
    arguments = [str(albert.checkpoint), str(tmp_path / "e"), "--cache", str(albert.cache), "--repo", "ada/race"]
    assert main(arguments) == 0 and f"hf upload ada/race {tmp_path / 'e'} ." in capsys.readouterr().out
    assert main(arguments) == 0
    assert main([*arguments[:-1], "ada/other"]) == 1 and "--force" in capsys.readouterr().err
