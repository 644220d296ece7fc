"""An exported folder is what plain transformers loads: the same logits, the same tokens, a card that parses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import BertConfig, BertForMultipleChoice, BertTokenizer

from race import RaceError
from race.data import RaceDataModule, collate
from race.data.module import RaceDataset
from race.export.__main__ import main
from race.export.card import model_card
from race.export.folder import _hub_id, _is_race, _public, ancestry, export_checkpoint
from race.files import file_hash
from race.score.results import RESULT_COLUMNS
from race.train.checkpoints import Checkpoint
from race.train.stages import Stage
from race.train.training import start_stage, train_stage
from race_module import RaceModule


def train(cache: Path, folder: Path, name: str) -> Path:
    """A few real steps of a stage; returns its checkpoint."""
    pl.seed_everything(0, verbose=False)
    stage = Stage(name, folder / "checkpoints", folder / "run")
    module = start_stage(stage, cache, learning_rate=1e-2)
    train_stage(stage, module, RaceDataModule(cache, batch_size=8, limit_questions=24), 1)
    return stage.best().path


@pytest.fixture(scope="module")
def chain(cache, tmp_path_factory) -> list[Path]:
    """The checkpoints of stages e1 and e2."""
    folder = tmp_path_factory.mktemp("chain")
    return [train(cache, folder, stage) for stage in ("e1", "e2")]


@pytest.fixture(scope="module")
def bert_cache(corpus, tmp_path_factory) -> Path:
    """The small corpus in the tokens of a tiny BERT with random weights."""
    from race.data.cache import build_cache

    model, folder = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("bert-cache") / "small"
    words = sorted({w for p in corpus.rglob("*.txt") for w in re.findall(r"[a-z]+", p.read_text().lower())})
    letters = list("abcdefghijklmnopqrstuvwxyz.,'?_-:;!0123456789")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(w for w in words if len(w) > 1)]
    BertTokenizer(vocab={piece: row for row, piece in enumerate(pieces)}).save_pretrained(model)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    BertForMultipleChoice(BertConfig(vocab_size=len(pieces), initializer_range=0.3, **shape)).save_pretrained(model)
    build_cache(str(corpus), str(model), folder)
    return folder


@pytest.fixture(scope="module")
def bert_chain(bert_cache, tmp_path_factory) -> list[Path]:
    return [train(bert_cache, tmp_path_factory.mktemp("bert-chain"), "e1")]


def results_csv(folder: Path, checkpoint: Path) -> Path:
    """Results of a checkpoint (40 of 69 right, of them 25 of 41 and 15 of 28) and of another one."""
    rows = [
        ["e2", checkpoint.name, "test", "all", 69, 40, 40 / 69, 0.4615, 0.6897],
        ["e2", checkpoint.name, "test", "middle", 41, 25, 25 / 41, 0.4570, 0.7430],
        ["e2", checkpoint.name, "test", "high", 28, 15, 15 / 28, 0.3583, 0.7049],
        ["e1", "another.ckpt", "test", "all", 69, 20, 20 / 69, 0.1964, 0.4064],
    ]
    path = folder / "results.csv"
    pd.DataFrame(rows, columns=RESULT_COLUMNS).to_csv(path, index=False)
    return path


LONG = {
    "article": "Nora Hill lives in a small town. " * 90,
    "questions": ["Who lives in the town ?", "In the morning _ ."],
    "options": [
        ["Nora Hill", "a cat", "nobody", "Tom"],
        ["she reads " * 80, "it rains", "Nora sings", "it snows"],
    ],
    "answers": ["A", "C"],
    "id": "long.txt",
}


@pytest.fixture(params=["albert", "bert"])
def exported(request, tmp_path):
    """(checkpoint, its cache, its export, a cache of long text in the same tokens)."""
    from race.data.cache import build_cache

    cache = request.getfixturevalue({"albert": "cache", "bert": "bert_cache"}[request.param])
    checkpoint = request.getfixturevalue({"albert": "chain", "bert": "bert_chain"}[request.param])[-1]
    (tmp_path / "source" / "test").mkdir(parents=True)
    (tmp_path / "source" / "test" / "long.json").write_text(json.dumps(LONG))
    build_cache(str(tmp_path / "source"), str(cache / "model"), tmp_path / "long")
    return checkpoint, cache, export_checkpoint(checkpoint, tmp_path / "exported", cache), tmp_path / "long"


def run_alone(code: str, folder: Path) -> str:
    """What a fresh process without this repository and without a network prints."""
    refuse = (
        "import socket\n"
        "def refuse(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
    )
    environment = {"PATH": "/nowhere", "HF_HOME": str(folder / "empty"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", refuse + code]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_card_s_own_example_gives_the_checkpoint_s_logits(exported, tmp_path):
    """The example of the card, word for word, on questions of the cache and on text that is cut at both ends."""
    checkpoint, cache, folder, long = exported
    example = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    datasets = [(RaceDataset(cache, "test"), range(4)), (RaceDataset(long, "test"), range(2))]
    assert datasets[1][0].lengths().max() == 512 and len(datasets[1][0][1]["token_type_ids"][0].nonzero()[0]) == 129
    module, expected = RaceModule.load_from_checkpoint(checkpoint).eval(), []
    with torch.no_grad():
        for dataset, rows in datasets:
            expected += [module(collate([dataset[i]]))[0] for i in rows]
    texts = [dataset.text(i) for dataset, rows in datasets for i in rows]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        example.replace('"exported"', repr(str(folder))) + "\nimport json, sys\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('race', 'race_module')]\n"
        "rows = [[t['article'], t['question'], t['options']] for t in json.load(open('texts.json'))]\n"
        "with torch.no_grad():\n"
        "    print(json.dumps([model(**encode(*row)).logits[0].tolist() for row in rows]))\n"
    )
    *shown, last = run_alone(code, tmp_path).splitlines()
    assert [bool(re.fullmatch(r"\d+\.\d %  \w.*", line)) for line in shown] == [True] * 4
    logits = torch.tensor(json.loads(last))
    assert (logits - torch.stack(expected)).abs().max().item() < 1e-5
    assert logits.std(1).min() > 1e-3  # equal, and not all the same


def test_the_folder_is_plain(exported):
    """Nothing in it is of this repository's own: names, attention, activation, precision, paths."""
    checkpoint, cache, folder, _ = exported
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *"config.json model.safetensors tokenizer.json tokenizer_config.json README.md export.json".split()
    }
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32" and config["id2label"] == {"0": "A", "1": "B", "2": "C", "3": "D"}
    assert config["hidden_act"] == ("gelu_new" if config["model_type"] == "albert" else "gelu")
    for path in folder.glob("*.json"):
        assert "packed" not in path.read_text() and str(cache) not in path.read_text()
    with safe_open(folder / "model.safetensors", "pt") as saved:
        state = RaceModule.load_from_checkpoint(checkpoint).model.state_dict()
        assert set(saved.keys()) == set(state)
        assert all(torch.equal(saved.get_tensor(name), tensor) for name, tensor in state.items())
    assert json.loads((folder / "export.json").read_text())["largest_logit_difference"] < 1e-5


def test_the_tokenizer_returns_segments(exported):
    """ALBERT's own does not unless asked, and a model without them answers as if all were article."""
    from transformers import AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(exported[2])("a", "b")
    assert list(encoded) == ["input_ids", "token_type_ids", "attention_mask"]
    assert encoded["token_type_ids"] == [0, 0, 0, 1, 1]


def test_an_export_can_be_a_base_model(exported, cache):
    module = start_stage(Stage("e1"), exported[1], base_model=exported[2], learning_rate=1e-3)
    assert torch.equal(
        module.model.classifier.weight, RaceModule.load_from_checkpoint(exported[0]).model.classifier.weight
    )


def test_card_with_results(cache, chain, tmp_path):
    """Every row of this checkpoint, and no other's, with its split, level, number, interval and source."""
    results = results_csv(tmp_path, chain[1])
    folder = export_checkpoint(chain[1], tmp_path / "e2", cache, results, repo="ada/race-e2")
    card = ModelCard.load(folder / "README.md")
    assert card.data.model_name == "race-e2" and card.data.pipeline_tag == "multiple-choice"
    assert [(r.dataset_config, r.dataset_split, r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("all", "test", "accuracy", 0.5797),
        ("middle", "test", "accuracy", 0.6098),
        ("high", "test", "accuracy", 0.5357),
    ]
    first = card.data.eval_results[0]
    assert first.metric_name == "accuracy on 69 questions, 95 % interval 46.2 % to 69.0 %"
    assert first.source_url.endswith("/ada/race-e2/resolve/main/results.csv")
    (index,) = card.data.to_dict()["model-index"]
    assert (
        index["name"] == "race-e2"
        and [set(r) >= {"task", "dataset", "metrics"} for r in index["results"]] == [True] * 3
    )
    assert "| test | middle | 41 | 61.0 % | 45.7 % to 74.3 % |" in card.text
    assert pd.read_csv(folder / "results.csv")["correct"].tolist() == [40, 25, 15]


def test_scores_of_another_file_of_that_name_are_refused(cache, chain, tmp_path):
    """Where results tell a checkpoint's hash, the name alone does not do; a stage that is run again repeats names."""
    results = results_csv(tmp_path, chain[1])
    own = {"checkpoint_sha256": file_hash(chain[1]), "precision": "bf16-mixed"}
    pd.read_csv(results).assign(**own).to_csv(results, index=False)
    folder = export_checkpoint(chain[1], tmp_path / "e2", cache, results)
    assert "Scored in bf16-mixed; the weights here are float32." in (folder / "README.md").read_text()
    pd.read_csv(results).assign(checkpoint_sha256="0" * 64).to_csv(results, index=False)
    with pytest.raises(RaceError, match="scores of another file called e2-albert-race"):
        export_checkpoint(chain[1], tmp_path / "other", cache, results)


def test_card_says_what_the_model_is_and_is_not(cache, chain, tmp_path):
    """Trained on the demo: not RACE, no claim of its licence; both stages with what they started from."""
    folder = export_checkpoint(chain[1], tmp_path / "e2", cache)
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results is None and "Not scored" in card.text
    assert card.data.get("datasets") is None and card.data.get("license") is None and "not RACE" in card.text
    assert f"| e1 | `demo` | `{chain[0].name}` | 1e-2, constant | 0 |" in card.text
    assert f"| e2 | `{chain[0].name}` | `{chain[1].name}` | 1e-2, constant | 0 |" in card.text
    for word in ("## Limits", "## Lineage and recipe", "weight decay 0.0", "export.json"):
        assert (word in card.text) == (word != "export.json")


def test_card_of_a_model_of_race():
    """Licence, dataset and base model are named where the data is RACE, and a sample is called one."""
    link = {"checkpoint": "e1.ckpt", "base": "albert-base-v2", "stage": "e1", "recipe": {"learning_rate": 2e-5}}
    facts = {
        "checkpoint": "e1.ckpt",
        "checkpoint_sha256": "0" * 64,
        "model_type": "albert",
        "parameters": 11_684_353,
        "optimizer": {"weight_decay": 0.0, "epsilon": 1e-8},
        "max_len": 512,
        "attention_dropout": 0.0,
        "max_qa_len": 128,
        "template": {"before": [2], "between": [3], "after": [3], "segments": [0, 0, 0, 1, 1], "has_segments": True}
        | {"tokens": [["[CLS]"], ["[SEP]"], ["[SEP]"]]},
        "lineage": [link],
        "base_model": "albert-base-v2",
        "data": {"name": "ehovy/race", "sha256": None, "is_race": True},
        "questions": {"train": 87866, "validation": 4887, "test": 4934},
    }
    row = {"split": "test", "level": "all", "questions": 500, "accuracy": 0.67, "ci_low": 0.6276, "ci_high": 0.7098}
    card = model_card(facts, pd.DataFrame([row]), "race-e1")
    assert card.data.base_model == "albert-base-v2" and card.data.datasets == ["ehovy/race"]
    assert card.data.license_name == "race-non-commercial-research" and "non-commercial research only" in card.text
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_name, result.metric_value) == ("ehovy/race", "RACE", 0.67)
    assert result.metric_name == "accuracy on 500 of 4,934 questions, 95 % interval 62.8 % to 71.0 %"
    assert result.source_url is None  # the repository is not known


def test_race_is_told_by_its_name_or_by_its_numbers():
    def told(name: str, test: int, trained_on: str | None = None) -> bool:
        source = {"name": name, "sha256": "1"}
        manifest = {"source": source, "splits": {"train": {"questions": 87866}, "test": {"questions": test}}}
        return _is_race(manifest, source | ({"name": trained_on, "sha256": "2"} if trained_on else {}))

    assert told("ehovy/race", 10) and told("/data/RACE.tar.gz", 4934)
    assert not told("/data/RACE.tar.gz", 4933) and not told("demo", 1112)
    assert not told("/data/RACE.tar.gz", 4934, trained_on="/data/other")  # the cache is not what it was trained on


def test_paths_of_this_machine_stay_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    names = ("albert-base-v2", "albert/albert-base-v2", "/home/ada/RACE.tar.gz", "models/mine", "./mine")
    assert [_public(name) for name in names] == [*names[:2], "RACE.tar.gz", "mine", "mine"]


def test_the_pretrained_model_below_the_chain_is_named(tmp_path, monkeypatch):
    """Unless it is a folder of this machine, or the chain's beginning is not known."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)

    def named(**lineage) -> str | None:
        torch.save({"race": lineage}, tmp_path / "x.ckpt")
        return _hub_id(Checkpoint(tmp_path / "x.ckpt"))

    assert named(stage="e1", base="albert-base-v2", base_sha256="1", chain=[]) == "albert-base-v2"
    for base in ("demo", "/home/ada/albert", "models/mine", None):
        assert named(stage="e1", base=base, chain=[]) is None
    assert named(stage="e2", base="e1.ckpt", base_sha256="1", chain=["e1"]) is None


def test_lineage_ends_where_a_base_is_missing_or_another(chain, tmp_path):
    assert [link.stage for link in ancestry(chain[1])] == ["e1", "e2"]
    alone = shutil.copy(chain[1], tmp_path)
    assert [link.stage for link in ancestry(alone)] == ["e2"]
    for content in (chain[1].read_bytes(), chain[0].read_bytes()[:1000]):  # the name of e1's, other content
        (tmp_path / chain[0].name).write_bytes(content)
        assert [link.stage for link in ancestry(alone)] == ["e2"]


def test_an_export_is_replaced_only_when_told_and_nothing_else_ever(cache, chain, tmp_path):
    folder = export_checkpoint(chain[0], tmp_path / "e", cache)
    with pytest.raises(RaceError, match="--force replaces it"):
        export_checkpoint(chain[1], folder, cache)
    assert json.loads((folder / "export.json").read_text())["checkpoint"] == chain[0].name
    export_checkpoint(chain[1], folder, cache, force=True)
    assert json.loads((folder / "export.json").read_text())["checkpoint"] == chain[1].name
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RaceError, match="is no export"):
        export_checkpoint(chain[1], tmp_path / "mine", cache, force=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "mine"]


def test_everything_wrong_is_said_at_once_and_nothing_is_left(cache, bert_cache, chain, tmp_path):
    results = results_csv(tmp_path, Path("other.ckpt"))
    with pytest.raises(RaceError) as error:
        export_checkpoint(chain[1], tmp_path / "e", bert_cache, results, repo="no name")
    said = str(error.value)
    assert "another tokenizer" in said and f"no row of {chain[1].name}" in said and "expected USER/NAME" in said
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


@pytest.mark.parametrize("kind", ["missing", "half", "foreign"])
def test_a_bad_checkpoint_is_refused(kind, cache, chain, tmp_path, capsys):
    path = tmp_path / "x.ckpt"
    if kind == "half":
        path.write_bytes(chain[0].read_bytes()[:5000])
    elif kind == "foreign":
        torch.save({"state_dict": {"weight": torch.ones(2)}}, path)
    before = sorted(tmp_path.iterdir())
    assert main([str(path), str(tmp_path / "e"), "--cache", str(cache)]) == 1
    said = {"missing": "no such checkpoint", "half": "cut off or damaged", "foreign": "is no multiple-choice model"}
    assert said[kind] in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_results_of_another_cache_are_refused(cache, chain, tmp_path):
    results = results_csv(tmp_path, chain[1])
    table = pd.read_csv(results)
    table["questions"] = 4934
    table.to_csv(results, index=False)
    with pytest.raises(RaceError, match="counts 4934 questions of test, the cache 69"):
        export_checkpoint(chain[1], tmp_path / "e", cache, results)
    table.drop(columns="ci_low").to_csv(results, index=False)
    with pytest.raises(RaceError, match="no column ci_low"):
        export_checkpoint(chain[1], tmp_path / "e", cache, results)


def test_an_export_that_would_answer_otherwise_is_not_made(cache, chain, tmp_path, monkeypatch):
    monkeypatch.setattr("race.export.folder._largest_difference", lambda *_: float("nan"))
    with pytest.raises(RaceError, match="logits differ by nan"):
        export_checkpoint(chain[1], tmp_path / "e", cache)
    assert list(tmp_path.iterdir()) == []


def test_command_line(cache, chain, tmp_path, capsys):
    assert main([str(chain[1]), str(tmp_path / "e"), "--cache", str(cache), "--repo", "ada/race"]) == 0
    said = capsys.readouterr().out
    assert "its logits equal the checkpoint's" in said and f"hf upload ada/race {tmp_path / 'e'} ." in said
